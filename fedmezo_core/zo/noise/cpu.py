"""The numba backend: whole tiles of `materialize`, equal to `spec` bit for bit.

A kernel takes a range of a tensor and the pairs, and loops over tiles of 4,096 elements (one Philox
slot cycle of Rademacher bits, 16 KB: an L1 cache's worth); commits and pairs are the inner loops, so a
weight is read and written once however many pairs there are. Everything is written so that LLVM's
loop vectoriser turns the innermost loops into SIMD:

- Philox runs in 64-bit lanes whose upper halves hold garbage: a 32x32 multiply reads lower halves only.
- Blocks 2i and 2i+1 are computed side by side and stored as one 64-bit word, which on a little-endian
  machine is the order of 32-bit words that the standard's rows want.
- Indices are unsigned, or numba adds Python's negative-index test to every access.

No operation is reassociated or fused: numba asks LLVM for strict IEEE arithmetic unless told
otherwise, and the tests compare every path with the specification. All compiled code is in this file
because numba's disk cache notices changes of a function's own file only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # publishes no types
from numba import njit
from numba import types as numba_types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from fedmezo_core.zo.noise import spec

Function = TypeVar("Function", bound=Callable[..., Any])
Operands = ParamSpec("Operands")


def _kernel(function: Function) -> Function:
    """Compile on first use, keep on disk, run without the GIL."""
    return cast("Function", njit(nogil=True, cache=True, error_model="numpy")(function))


def _compiled(function: Function) -> Function:
    """A piece of a kernel."""
    return cast("Function", njit(error_model="numpy")(function))


def _inlined(function: Function) -> Function:
    """A piece of a kernel's innermost loop: vectorised only if inlined."""
    return cast("Function", njit(forceinline=True, error_model="numpy")(function))


def _emitted(function: Callable[Concatenate[Any, Operands], Any]) -> Callable[Operands, Any]:
    """A few LLVM instructions on 32-bit values, which numba would widen to 64 bits."""
    return cast("Callable[Operands, Any]", intrinsic(function))


types: Any = numba_types  # partly annotated
cgutils: Any = numba_cgutils

TILE_ROWS: Final = 32
TILE_ELEMENTS: Final = TILE_ROWS * spec.ROW_ELEMENTS
"""Elements of a tile: 32 blocks of Rademacher bits."""
FUSED_PAIRS: Final = 4
"""Rademacher pairs added in one visit of a row: their +c and -c fill half the vector registers."""
SCRATCH_WORDS: Final = FUSED_PAIRS * spec.ROW_ELEMENTS
"""uint32 words of scratch that a thread needs for block words."""
ROUNDING_WORDS: Final = TILE_ELEMENTS // 2
"""uint32 words of scratch that a thread needs for a tile's rounding bits, 16 an element."""
FINITE: Final = -1
"""What a kernel returns when every result is finite; else the offset of the first that is not."""

U64 = np.uint64
_LOW, _SHIFT = U64(0xFFFFFFFF), U64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = U64(0xD2511F53), U64(0xCD9E8D57)
_KEY_STEP_0, _KEY_STEP_1 = U64(0x9E3779B9), U64(0xBB67AE85)
_RADEMACHER, _GAUSSIAN, _ROUNDING = U64(1), U64(2), U64(3)
_ROW, _HALF_ROW, _LANES, _ROWS, _TILE = U64(128), U64(64), U64(32), U64(32), U64(4096)
_TOP_BIT = U64(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_PAIR_WORDS = U64(64)  # 64-bit scratch words of one row of one pair
_ZERO, _ONE, _TWO, _THREE = U64(0), U64(1), U64(2), U64(3)

_F1, _TWO_LN2, _TWO_TO_MINUS_31 = np.float32(1), spec.TWO_LN2, spec.TWO_TO_MINUS_31
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = spec.LOG
_S0, _S1, _S2, _S3 = spec.SIN
_C0, _C1, _C2, _C3 = spec.COS

_I32 = ir.IntType(32)
_F32 = ir.FloatType()


def _constant(value: int) -> Any:
    return ir.Constant(_I32, value)


# --- 32-bit operations ------------------------------------------------------------------------------


@_emitted
def _choose(typing_context: Any, word: Any, mask: Any, clear: Any, set_: Any) -> Any:
    """`set_ if word & mask else clear`: a compare and a blend."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        masked = builder.and_(values[0], values[1])
        is_clear = builder.icmp_unsigned("==", masked, _constant(0))
        return builder.select(is_clear, values[2], values[3])

    return types.float32(types.uint32, types.uint32, types.float32, types.float32), emit


@_emitted
def _radius_parts(typing_context: Any, word: Any) -> Any:
    """(exponent as float32, mantissa) of the uniform that `word` stands for; see `spec.box_muller`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        odd = builder.or_(builder.lshr(values[0], _constant(1)), _constant(1))
        uniform = builder.bitcast(builder.sitofp(odd, _F32), _I32)
        shifted = builder.add(uniform, _constant(spec.ONE - spec.SQRT_HALF))
        exponent = builder.sub(_constant(158), builder.lshr(shifted, _constant(23)))
        fraction = builder.and_(shifted, _constant(0x007FFFFF))
        mantissa = builder.bitcast(builder.add(fraction, _constant(spec.SQRT_HALF)), _F32)
        parts = [builder.sitofp(exponent, _F32), mantissa]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.float32, 2)(types.uint32), emit


@_emitted
def _angle(typing_context: Any, word: Any) -> Any:
    """The angle's low 30 bits as an odd multiple of 2, signed, in float32."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.sitofp(builder.or_(builder.shl(values[0], _constant(2)), _constant(2)), _F32)

    return types.float32(types.uint32), emit


@_emitted
def _flip_by_bit_30(typing_context: Any, word: Any, value: Any) -> Any:
    """`value` with its sign bit flipped by bit 30 of `word`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        flip = builder.and_(builder.shl(values[0], _constant(1)), _constant(0x80000000))
        return builder.bitcast(builder.xor(flip, builder.bitcast(values[1], _I32)), _F32)

    return types.float32(types.uint32, types.float32), emit


@_emitted
def _top_bit(typing_context: Any, word: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.icmp_signed("<", values[0], _constant(0))

    return types.boolean(types.uint32), emit


@_emitted
def _larger_magnitude(typing_context: Any, magnitude: Any, value: Any) -> Any:
    """The larger of `magnitude` and the bits of |value|: integers order as floats do, NaN on top."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.and_(builder.bitcast(values[1], _I32), _constant(0x7FFFFFFF))
        return builder.select(builder.icmp_unsigned(">", bits, values[0]), bits, values[0])

    return types.uint32(types.uint32, types.float32), emit


@_emitted
def _widen(typing_context: Any, half: Any) -> Any:
    """bfloat16 bits to float32, exactly."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(values[0], _I32), _constant(16)), _F32)

    return types.float32(types.uint16), emit


@_emitted
def _narrow(typing_context: Any, value: Any) -> Any:
    """The bfloat16 bits of a float32 whose low 16 bits are zero."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.lshr(builder.bitcast(values[0], _I32), _constant(16))
        return builder.trunc(bits, ir.IntType(16))

    return types.uint16(types.float32), emit


def _emit_rounded(builder: Any, bits: Any, addend: Any) -> Any:
    """(bits + addend) without its low 16 bits; nothing is added to NaN and infinities.

    Choosing the addend, not the result: LLVM makes "keep the old value" a masked store, which some
    CPUs run many times slower than a store.
    """
    magnitude = builder.and_(bits, _constant(0x7FFFFFFF))
    finite = builder.icmp_unsigned("<", magnitude, _constant(0x7F800000))
    added = builder.add(bits, builder.select(finite, addend, _constant(0)))
    return builder.bitcast(builder.and_(added, _constant(0xFFFF0000)), _F32)


@_emitted
def _round_high(typing_context: Any, value: Any, word: Any) -> Any:
    """Stochastic rounding to bfloat16 by the high half of `word`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        addend = builder.lshr(values[1], _constant(16))
        return _emit_rounded(builder, builder.bitcast(values[0], _I32), addend)

    return types.float32(types.float32, types.uint32), emit


@_emitted
def _round_low(typing_context: Any, value: Any, word: Any) -> Any:
    """Stochastic rounding to bfloat16 by the low half of `word`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        addend = builder.and_(values[1], _constant(0xFFFF))
        return _emit_rounded(builder, builder.bitcast(values[0], _I32), addend)

    return types.float32(types.float32, types.uint32), emit


@_emitted
def _round_nearest(typing_context: Any, value: Any) -> Any:
    """Rounding to the nearest bfloat16, ties to even."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.bitcast(values[0], _I32)
        odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
        return _emit_rounded(builder, bits, builder.add(odd, _constant(0x7FFF)))

    return types.float32(types.float32), emit


@_emitted
def _float32_at(typing_context: Any, address: Any) -> Any:
    """The memory at `address` as a pointer to float32, for `carray`."""
    pointer = types.CPointer(types.float32)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return pointer(types.uint64), emit


@_emitted
def _uint16_at(typing_context: Any, address: Any) -> Any:
    """The memory at `address` as a pointer to uint16, for `carray`."""
    pointer = types.CPointer(types.uint16)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return pointer(types.uint64), emit


# --- the floating-point environment ------------------------------------------------------------------

_MACHINE: Final = platform.machine().lower()
STRICT_CONTROL: Final = U64(0x1F80 if _MACHINE in {"x86_64", "amd64"} else 0)
"""MXCSR, or FPCR on AArch64: round to nearest, subnormals kept, no traps."""


@_emitted
def _exchange(typing_context: Any, control: Any) -> Any:
    """Set this thread's floating-point control register and return what it was."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64, void = ir.IntType(64), ir.VoidType()

        def declared(name: str, returned: Any, *arguments: Any) -> Any:
            kind = ir.FunctionType(returned, arguments)
            return cgutils.get_or_insert_function(builder.module, kind, name)

        if _MACHINE in {"x86_64", "amd64"}:
            slot = cgutils.alloca_once(builder, _I32)
            pointer = ir.PointerType(ir.IntType(8))
            address = builder.bitcast(slot, pointer)
            builder.call(declared("llvm.x86.sse.stmxcsr", void, pointer), [address])
            before = builder.zext(builder.load(slot), i64)
            builder.store(builder.trunc(values[0], _I32), slot)
            builder.call(declared("llvm.x86.sse.ldmxcsr", void, pointer), [address])
            return before
        if _MACHINE in {"aarch64", "arm64"}:
            before = builder.call(declared("llvm.aarch64.get.fpcr", i64), [])
            builder.call(declared("llvm.aarch64.set.fpcr", void, i64), [values[0]])
            return before
        return values[0]  # no machine that we know of flushes without being asked

    return types.uint64(types.uint64), emit


@_kernel
def exchange_float_control(control: Any) -> Any:
    """Set this thread's floating-point control to `control` (uint64); return the one before.

    A call of its own around a kernel, so that no compiler can move arithmetic across it. Needed
    because `torch.set_flush_denormal(True)` and libraries built with fast-math flush subnormals in
    the calling thread and in every thread that it starts later.
    """
    return _exchange(control)


# --- Philox ------------------------------------------------------------------------------------------


@_inlined
def _philox_round(c0: Any, c1: Any, c2: Any, c3: Any, key_0: Any, key_1: Any) -> Any:
    """One round on 64-bit lanes: only the lower halves of arguments and results have a meaning."""
    product_0 = _MULTIPLIER_0 * (c0 & _LOW)
    product_1 = _MULTIPLIER_1 * (c2 & _LOW)
    return (
        (product_1 >> _SHIFT) ^ c1 ^ key_0,
        product_1,
        (product_0 >> _SHIFT) ^ c3 ^ key_1,
        product_0,
    )


@_inlined
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds, written out: the vectoriser takes innermost loops only."""
    a, b = _KEY_STEP_0, _KEY_STEP_1
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + a, k1 + b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(2) * a, k1 + U64(2) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(3) * a, k1 + U64(3) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(4) * a, k1 + U64(4) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(5) * a, k1 + U64(5) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(6) * a, k1 + U64(6) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(7) * a, k1 + U64(7) * b)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + U64(8) * a, k1 + U64(8) * b)
    return _philox_round(c0, c1, c2, c3, k0 + U64(9) * a, k1 + U64(9) * b)


@_compiled
def _generate(words: Any, at: Any, block: Any, seed: Any, tensor: Any, domain: Any) -> None:
    """Words of blocks `block` .. `block + 31` (a multiple of 32) into `words[at : at + 64]`.

    `words` is uint64: read as uint32, it is word 0 of the 32 blocks, then word 1, 2 and 3.
    """
    key_0, key_1 = seed & _LOW, seed >> _SHIFT
    low, high = block & _LOW, block >> _SHIFT
    for i in range(U64(16)):
        even = low + _TWO * i
        a0, a1, a2, a3 = _philox(even, high, tensor, domain, key_0, key_1)
        b0, b1, b2, b3 = _philox(even + _ONE, high, tensor, domain, key_0, key_1)
        words[at + i] = (a0 & _LOW) | (b0 << _SHIFT)
        words[at + U64(16) + i] = (a1 & _LOW) | (b1 << _SHIFT)
        words[at + U64(32) + i] = (a2 & _LOW) | (b2 << _SHIFT)
        words[at + U64(48) + i] = (a3 & _LOW) | (b3 << _SHIFT)


# --- one tile, many pairs ----------------------------------------------------------------------------
#
# target[at + e] += the pairs begin .. end of seeds and coefficients, e over the tile's rows
# row_begin .. row_end. In place, because LLVM then sees one array: with two it must test at run time
# whether they overlap, and takes a scalar loop where they do.


@_compiled
def _add_rademacher(
    target: Any, at: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words_64: Any, words: Any,
) -> None:  # fmt: skip
    block = tile * _LANES
    k = begin
    while k + U64(4) <= end:
        for pair in range(U64(4)):
            _generate(words_64, pair * _PAIR_WORDS, block, seeds[k + pair], tensor, _RADEMACHER)
        plus_0, plus_1 = coefficients[k], coefficients[k + _ONE]
        plus_2, plus_3 = coefficients[k + _TWO], coefficients[k + _THREE]
        minus_0, minus_1, minus_2, minus_3 = -plus_0, -plus_1, -plus_2, -plus_3
        for row in range(row_begin, row_end):
            mask = np.uint32(_TOP_BIT >> row)
            t = at + row * _ROW
            for i in range(_ROW):
                value = target[t + i]
                value += _choose(words[i], mask, plus_0, minus_0)
                value += _choose(words[U64(128) + i], mask, plus_1, minus_1)
                value += _choose(words[U64(256) + i], mask, plus_2, minus_2)
                value += _choose(words[U64(384) + i], mask, plus_3, minus_3)
                target[t + i] = value
        k += U64(4)
    while k < end:
        _generate(words_64, _ZERO, block, seeds[k], tensor, _RADEMACHER)
        plus = coefficients[k]
        minus = -plus
        for row in range(row_begin, row_end):
            mask = np.uint32(_TOP_BIT >> row)
            t = at + row * _ROW
            for i in range(_ROW):
                target[t + i] += _choose(words[i], mask, plus, minus)
        k += _ONE


@_compiled
def _set_rademacher(
    out: Any, at: Any, base: Any, base_at: Any, tile: Any, tensor: Any, seed: Any, plus: Any,
    words_64: Any, words: Any,
) -> None:  # fmt: skip
    """out[at + e] = base[base_at + e] + one pair, over a whole tile: a perturbation, in one visit."""
    _generate(words_64, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
    minus = -plus
    for row in range(_ROWS):
        mask = np.uint32(_TOP_BIT >> row)
        t, b = at + row * _ROW, base_at + row * _ROW
        for i in range(_ROW):
            out[t + i] = base[b + i] + _choose(words[i], mask, plus, minus)


@_compiled
def _set_both_rademacher(
    plus_out: Any, minus_out: Any, at: Any, base: Any, base_at: Any, tile: Any, tensor: Any,
    seed: Any, plus: Any, words_64: Any, words: Any,
) -> None:  # fmt: skip
    """`_set_rademacher` for a pair and its opposite, from one reading of the base."""
    _generate(words_64, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
    minus = -plus
    for row in range(_ROWS):
        mask = np.uint32(_TOP_BIT >> row)
        t, b = at + row * _ROW, base_at + row * _ROW
        for i in range(_ROW):
            value = base[b + i]
            product = _choose(words[i], mask, plus, minus)
            plus_out[t + i] = value + product
            minus_out[t + i] = value - product


@_inlined
def _box_muller(radius_word: Any, angle_word: Any) -> Any:
    """`spec.box_muller`, operation by operation."""
    exponent, mantissa = _radius_parts(radius_word)
    x = mantissa - _F1
    x2 = x * x
    x4 = x2 * x2
    low = (x * _L1 + _L0) + x2 * (x * _L3 + _L2)
    high = (x * _L5 + _L4) + x2 * ((x * _L7 + _L6) + x2 * _L8)
    radius = np.sqrt(exponent * _TWO_LN2 + x * (low + x4 * high))
    y = _angle(angle_word) * _TWO_TO_MINUS_31
    y2 = y * y
    sine = y * (_S0 + y2 * (_S1 + y2 * (_S2 + y2 * _S3)))
    cosine = _flip_by_bit_30(angle_word, _C0 + y2 * (_C1 + y2 * (_C2 + y2 * _C3)))
    first, second = radius * cosine, radius * sine
    if _top_bit(angle_word):
        return second, first
    return first, second


@_compiled
def _add_gaussian(
    target: Any, at: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words_64: Any, words: Any,
) -> None:  # fmt: skip
    for k in range(begin, end):
        coefficient = coefficients[k]
        for row in range(row_begin, row_end):
            block = (tile * _ROWS + row) * _LANES
            _generate(words_64, _ZERO, block, seeds[k], tensor, _GAUSSIAN)
            for half in range(_TWO):
                w = half * _HALF_ROW
                t = at + row * _ROW + w
                for i in range(_LANES):
                    first, second = _box_muller(words[w + i], words[w + _LANES + i])
                    target[t + i] += coefficient * first
                    target[t + _LANES + i] += coefficient * second


@_compiled
def _round_rows(
    tile_values: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any, stochastic: Any,
    rounding_seed: Any, words_64: Any, words: Any,
) -> None:  # fmt: skip
    """Round a commit's result to bfloat16, kept as float32. Whole pairs of rows; the rest is scratch."""
    for group in range(row_begin >> _ONE, (row_end + _ONE) >> _ONE):
        at = group * U64(256)
        if stochastic:
            block = (tile * U64(16) + group) * _LANES
            _generate(words_64, _ZERO, block, rounding_seed, tensor, _ROUNDING)
            for i in range(_ROW):
                tile_values[at + i] = _round_high(tile_values[at + i], words[i])
            for i in range(_ROW):
                tile_values[at + _ROW + i] = _round_low(tile_values[at + _ROW + i], words[i])
        else:
            for i in range(U64(256)):
                tile_values[at + i] = _round_nearest(tile_values[at + i])


# --- a range of a tensor -----------------------------------------------------------------------------
#
# Both take: out and base, 1-D; the range begin .. end of them; `start`, the element index of out[0];
# the journal's pairs; and a thread's scratch (64-bit words, the same memory as 32-bit words, and one
# tile of float32). They return FINITE, or the offset in out of the first result that is NaN or infinite.


@_kernel
def materialize_float32(
    out: Any, base: Any, out_of_place: Any, begin: Any, end: Any, start: Any, tensor: Any,
    gaussian: Any, seeds: Any, coefficients: Any, words_64: Any, words: Any, tile_values: Any,
) -> Any:  # fmt: skip
    """float32 in, float32 out: commits' boundaries change nothing, so their pairs come joined."""
    pairs = U64(seeds.shape[0])
    at = begin
    while at < end:
        element = start + at
        tile, first = element // _TILE, element % _TILE
        last = min(_TILE, first + (end - at))
        row_begin, row_end = first // _ROW, (last + _ROW - _ONE) // _ROW
        largest = np.uint32(0)
        if last - first == _TILE:
            done = _ZERO
            if out_of_place and not gaussian and pairs > _ZERO:
                _set_rademacher(
                    out, at, base, at, tile, tensor, seeds[0], coefficients[0], words_64, words
                )
                done = _ONE
            elif out_of_place:
                for i in range(_TILE):
                    out[at + i] = base[at + i]
            if gaussian:
                _add_gaussian(out, at, _ZERO, _ROWS, tile, tensor,
                              seeds, coefficients, done, pairs, words_64, words)  # fmt: skip
            else:
                _add_rademacher(out, at, _ZERO, _ROWS, tile, tensor,
                                seeds, coefficients, done, pairs, words_64, words)  # fmt: skip
            for i in range(_TILE):
                largest = _larger_magnitude(largest, out[at + i])
        else:
            for i in range(last - first):
                tile_values[first + i] = base[at + i]
            if gaussian:
                _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                              seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                                seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
            for i in range(last - first):
                value = tile_values[first + i]
                out[at + i] = value
                largest = _larger_magnitude(largest, value)
        if largest >= _INFINITY:
            for i in range(last - first):
                if not np.isfinite(out[at + i]):
                    return np.int64(at + i)
        at += last - first
    return np.int64(FINITE)


@_kernel
def materialize_bfloat16(
    out: Any, base: Any, begin: Any, end: Any, start: Any, tensor: Any, gaussian: Any, stochastic: Any,
    seeds: Any, coefficients: Any, commit_ends: Any, rounding_seeds: Any,
    words_64: Any, words: Any, tile_values: Any,
) -> Any:  # fmt: skip
    """bfloat16 bits (uint16) in and out, rounded after each commit; `commit_ends` in pairs, uint64."""
    at = begin
    while at < end:
        element = start + at
        tile, first = element // _TILE, element % _TILE
        last = min(_TILE, first + (end - at))
        row_begin, row_end = first // _ROW, (last + _ROW - _ONE) // _ROW
        for i in range(last - first):
            tile_values[first + i] = _widen(base[at + i])
        pair_begin = _ZERO
        for commit in range(U64(commit_ends.shape[0])):
            pair_end = commit_ends[commit]
            if gaussian:
                _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                              seeds, coefficients, pair_begin, pair_end, words_64, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                                seeds, coefficients, pair_begin, pair_end, words_64, words)  # fmt: skip
            _round_rows(tile_values, row_begin, row_end, tile, tensor, stochastic,
                        rounding_seeds[commit], words_64, words)  # fmt: skip
            pair_begin = pair_end
        largest = np.uint32(0)
        for i in range(last - first):
            value = tile_values[first + i]
            out[at + i] = _narrow(value)
            largest = _larger_magnitude(largest, value)
        if largest >= _INFINITY:
            for i in range(last - first):
                if not np.isfinite(tile_values[first + i]):
                    return np.int64(at + i)
        at += last - first
    return np.int64(FINITE)


# --- several outputs from one base -------------------------------------------------------------------
#
# outs[g] = base + the pairs of `seeds` and `coefficients` + at most one more pair of its own, which
# `last_seeds`, `last_coefficients` and `steps` (a step for each output, below) give. Operands are
# addresses: making an array of a tensor costs more than a small block's arithmetic. They return whether
# every magnitude before the last pair stayed within `ceiling` (float32 bits), chosen by the caller so
# that no last pair can then make a result infinite.

SHARED_STEP: Final = 0
"""The output has no pair of its own."""
OWN_STEP: Final = 1
"""The output has a pair of its own."""
BOTH_STEP: Final = 2
"""The same, and the next output has its opposite: the same seed, the coefficient negated."""
DONE_STEP: Final = 3
"""The output is the second of two such."""


@_compiled
def _set_products(
    products: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any, gaussian: Any,
    seed: Any, coefficient: Any, words_64: Any, words: Any,
) -> None:  # fmt: skip
    """products[e] = fl(coefficient * z), e over the tile's rows row_begin .. row_end."""
    if gaussian:
        for row in range(row_begin, row_end):
            block = (tile * _ROWS + row) * _LANES
            _generate(words_64, _ZERO, block, seed, tensor, _GAUSSIAN)
            for half in range(_TWO):
                w = half * _HALF_ROW
                t = row * _ROW + w
                for i in range(_LANES):
                    first, second = _box_muller(words[w + i], words[w + _LANES + i])
                    products[t + i] = coefficient * first
                    products[t + _LANES + i] = coefficient * second
    else:
        _generate(words_64, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
        minus = -coefficient
        for row in range(row_begin, row_end):
            mask = np.uint32(_TOP_BIT >> row)
            t = row * _ROW
            for i in range(_ROW):
                products[t + i] = _choose(words[i], mask, coefficient, minus)


@_kernel
def fan_float32(
    outs: Any, base_address: Any, begin: Any, end: Any, start: Any, tensor: Any, gaussian: Any,
    seeds: Any, coefficients: Any, steps: Any, last_seeds: Any, last_coefficients: Any, ceiling: Any,
    words_64: Any, words: Any, tile_values: Any, products: Any,
) -> Any:  # fmt: skip
    """float32 in, float32 out."""
    base = carray(_float32_at(U64(base_address)), end)
    pairs = U64(seeds.shape[0])
    largest = np.uint32(0)
    at, stop = U64(begin), U64(end)
    while at < stop:
        element = U64(start) + at
        tile, first = element // _TILE, element % _TILE
        last = min(_TILE, first + (stop - at))
        count = last - first
        row_begin, row_end = first // _ROW, (last + _ROW - _ONE) // _ROW
        source, source_at = base, at
        if pairs > _ZERO:
            for i in range(count):
                tile_values[first + i] = base[at + i]
            if gaussian:
                _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                              seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                                seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
            source, source_at = tile_values, first
        for i in range(count):
            largest = _larger_magnitude(largest, source[source_at + i])
        for g in range(steps.shape[0]):
            step, seed, coefficient = steps[g], last_seeds[g], last_coefficients[g]
            out = carray(_float32_at(outs[g]), end)
            if step == SHARED_STEP:
                for i in range(count):
                    out[at + i] = source[source_at + i]
            elif step == OWN_STEP:
                if count == _TILE and not gaussian:
                    _set_rademacher(out, at, source, source_at, tile, U64(tensor),
                                    seed, coefficient, words_64, words)  # fmt: skip
                else:
                    _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                                  seed, coefficient, words_64, words)  # fmt: skip
                    for i in range(count):
                        out[at + i] = source[source_at + i] + products[first + i]
            elif step == BOTH_STEP:
                other = carray(_float32_at(outs[g + 1]), end)
                if count == _TILE and not gaussian:
                    _set_both_rademacher(out, other, at, source, source_at, tile, U64(tensor),
                                         seed, coefficient, words_64, words)  # fmt: skip
                else:
                    _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                                  seed, coefficient, words_64, words)  # fmt: skip
                    for i in range(count):
                        value, product = source[source_at + i], products[first + i]
                        out[at + i] = value + product
                        other[at + i] = value - product
        at += count
    return largest <= ceiling


@_compiled
def _round_sum(
    out: Any, at: Any, tile_values: Any, products: Any, sign: Any, first: Any, last: Any,
    stochastic: Any, rounding_words: Any,
) -> None:  # fmt: skip
    """out[at + e - first] = tile_values[e] + sign * products[e] in bfloat16, e over first .. last."""
    e = first
    while e < last:
        row = e // _ROW
        count = min(last, (row + _ONE) * _ROW) - e
        t, w = at + e - first, (row >> _ONE) * _ROW + e % _ROW
        if not stochastic:
            for i in range(count):
                out[t + i] = _narrow(_round_nearest(tile_values[e + i] + sign * products[e + i]))
        elif row & _ONE == _ZERO:
            for i in range(count):
                value = tile_values[e + i] + sign * products[e + i]
                out[t + i] = _narrow(_round_high(value, rounding_words[w + i]))
        else:
            for i in range(count):
                value = tile_values[e + i] + sign * products[e + i]
                out[t + i] = _narrow(_round_low(value, rounding_words[w + i]))
        e += count


@_kernel
def fan_bfloat16(
    outs: Any, base_address: Any, begin: Any, end: Any, start: Any, tensor: Any,
    gaussian: Any, stochastic: Any,
    seeds: Any, coefficients: Any, steps: Any, last_seeds: Any, last_coefficients: Any,
    rounding_seeds: Any, ceiling: Any, words_64: Any, words: Any, tile_values: Any, products: Any,
    rounding_words_64: Any, rounding_words: Any,
) -> Any:  # fmt: skip
    """bfloat16 bits in and out; the pairs before each output's own are of the same commit as that."""
    base = carray(_uint16_at(U64(base_address)), end)
    pairs = U64(seeds.shape[0])
    largest = np.uint32(0)
    at, stop = U64(begin), U64(end)
    while at < stop:
        element = U64(start) + at
        tile, first = element // _TILE, element % _TILE
        last = min(_TILE, first + (stop - at))
        count = last - first
        row_begin, row_end = first // _ROW, (last + _ROW - _ONE) // _ROW
        for i in range(count):
            tile_values[first + i] = _widen(base[at + i])
        if gaussian:
            _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                          seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
        else:
            _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                            seeds, coefficients, _ZERO, pairs, words_64, words)  # fmt: skip
        for i in range(count):
            largest = _larger_magnitude(largest, tile_values[first + i])
        for g in range(steps.shape[0]):
            step, rounding_seed = steps[g], rounding_seeds[g]
            if stochastic and (g == 0 or rounding_seed != rounding_seeds[g - 1]):
                for group in range(row_begin >> _ONE, (row_end + _ONE) >> _ONE):
                    block = (tile * U64(16) + group) * _LANES
                    _generate(rounding_words_64, group * _PAIR_WORDS, block, rounding_seed,
                              U64(tensor), _ROUNDING)  # fmt: skip
            if step in (OWN_STEP, BOTH_STEP):
                _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                              last_seeds[g], last_coefficients[g], words_64, words)  # fmt: skip
            elif step == SHARED_STEP:
                products[first:last] = np.float32(-0.0)  # the one float whose sum changes nothing
            sign = np.float32(-1 if step == DONE_STEP else 1)
            out = carray(_uint16_at(outs[g]), end)
            _round_sum(out, at, tile_values, products, sign, first, last,
                       stochastic, rounding_words)  # fmt: skip
        at += count
    return largest <= ceiling
