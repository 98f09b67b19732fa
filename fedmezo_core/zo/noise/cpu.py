"""The numba backend: whole tiles of `materialize`, equal to `spec` bit for bit.

A kernel takes a range of a tensor and the pairs, and loops over tiles of 4,096 elements (one Philox
slot cycle of Rademacher bits, 16 KB: an L1 cache's worth); commits and pairs are the inner loops, so a
weight is read and written once however many pairs there are. How it becomes SIMD:

- Philox and Box-Muller are written out as LLVM vectors, because what limits them is latency: several
  vectors must go through the same dependent steps side by side, which no loop vectoriser does.
- Loops over elements are left to LLVM's loop vectoriser. Indices are unsigned, or numba adds Python's
  negative-index test to every access.

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
from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
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
_RADEMACHER, _GAUSSIAN, _ROUNDING = U64(1), U64(2), U64(3)
_ROW, _HALF_ROW, _LANES, _ROWS, _TILE = U64(128), U64(64), U64(32), U64(32), U64(4096)
_TOP_BIT = U64(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_ZERO, _ONE, _TWO, _THREE = U64(0), U64(1), U64(2), U64(3)

# Lanes of the vectors that are written out below; any number gives the same bits. Philox keeps 16 words
# of state a lane in 4 vectors: more than eight lanes each fit only into the registers of AVX-512.
_PHILOX_LANES: Final = 16 if get_host_cpu_features().get("avx512f") else 8
_GAUSSIAN_LANES: Final = 16
_PIECE = U64(_GAUSSIAN_LANES)
_SIGN_LANES: Final = 16

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


def _emit_splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of `lanes` times the scalar `value`."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _constant(0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def _emit_xor(builder: Any, a: Any, b: Any) -> Any:
    """a ^ b, where each is a 32-bit integer or a vector of them."""
    if isinstance(a.type, ir.VectorType) and not isinstance(b.type, ir.VectorType):
        b = _emit_splat(builder, b, a.type.count)
    elif isinstance(b.type, ir.VectorType) and not isinstance(a.type, ir.VectorType):
        a = _emit_splat(builder, a, b.type.count)
    return builder.xor(a, b)


def _emit_product(builder: Any, word: Any, multiplier: int) -> tuple[Any, Any]:
    """The (high, low) halves of multiplier * word, for a 32-bit integer or a vector of them.

    A vector's even and odd lanes are multiplied apart: SIMD units multiply 32-bit integers in 64-bit
    lanes, of which they read the lower halves.
    """
    i64 = ir.IntType(64)
    if not isinstance(word.type, ir.VectorType):
        product = builder.mul(builder.zext(word, i64), ir.Constant(i64, multiplier))
        high = builder.trunc(builder.lshr(product, ir.Constant(i64, 32)), _I32)
        return high, builder.trunc(product, _I32)
    lanes = word.type.count
    wide = ir.VectorType(i64, lanes // 2)
    shift = ir.Constant(wide, [32] * (lanes // 2))
    factor = ir.Constant(wide, [multiplier] * (lanes // 2))
    pairs = builder.bitcast(word, wide)
    even_lanes = builder.and_(pairs, ir.Constant(wide, [0xFFFFFFFF] * (lanes // 2)))
    even = builder.bitcast(builder.mul(even_lanes, factor), word.type)
    odd = builder.bitcast(builder.mul(builder.lshr(pairs, shift), factor), word.type)
    halves = []
    for half in (1, 0):
        order = [half + 2 * (i // 2) + i % 2 * lanes for i in range(lanes)]
        mask = ir.Constant(ir.VectorType(_I32, lanes), order)
        halves.append(builder.shuffle_vector(even, odd, mask))
    return halves[0], halves[1]


@_emitted
def _store_blocks(
    typing_context: Any, words: Any, at: Any, block: Any, seed: Any, tensor: Any, domain: Any
) -> Any:
    """Philox4x32-10 of 32 blocks, all at once: word w of block `block + i` to words[at + 32 w + i].

    The vectors go through each round side by side: a round's five dependent steps take longer than its
    work, so that one vector after the other would leave the arithmetic units half idle. Where the
    counter is the same for all blocks, the first two rounds are scalar.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def low(value: Any) -> Any:
            return builder.trunc(value, _I32)

        def high(value: Any) -> Any:
            return low(builder.lshr(value, ir.Constant(value.type, 32)))

        def word_address(index: Any) -> Any:
            address = builder.gep(array.data, [builder.add(values[1], ir.Constant(at.type, index))])
            return builder.bitcast(address, ir.PointerType(vector))

        at, block, seed, tensor, domain = values[1:]
        array = context.make_array(signature.args[0])(context, builder, values[0])
        vector = ir.VectorType(_I32, _PHILOX_LANES)
        firsts = range(0, spec.LANES, _PHILOX_LANES)
        states = [
            (
                builder.add(
                    ir.Constant(vector, list(range(first, first + _PHILOX_LANES))),
                    _emit_splat(builder, low(block), _PHILOX_LANES),
                ),
                high(block),
                low(tensor),
                low(domain),
            )
            for first in firsts
        ]
        for index in range(10):
            key_0 = builder.add(low(seed), _constant(index * 0x9E3779B9 & 0xFFFFFFFF))
            key_1 = builder.add(high(seed), _constant(index * 0xBB67AE85 & 0xFFFFFFFF))
            for place, (c0, c1, c2, c3) in enumerate(states):
                high_0, low_0 = _emit_product(builder, c0, 0xD2511F53)
                high_1, low_1 = _emit_product(builder, c2, 0xCD9E8D57)
                states[place] = (
                    _emit_xor(builder, high_1, _emit_xor(builder, c1, key_0)),
                    low_1,
                    _emit_xor(builder, high_0, _emit_xor(builder, c3, key_1)),
                    low_0,
                )
        for first, state in zip(firsts, states, strict=True):
            for word, value in enumerate(state):
                builder.store(value, word_address(word * spec.LANES + first), align=4)
        return context.get_dummy_value()

    return types.void(words, *[types.uint64] * 5), emit


@_compiled
def _generate(words: Any, at: Any, block: Any, seed: Any, tensor: Any, domain: Any) -> None:
    """Words of blocks `block` .. `block + 31` (a multiple of 32) into `words[at : at + 128]`.

    First word 0 of the 32 blocks, then their words 1, 2 and 3: a row of the standard.
    """
    _store_blocks(words, at, block, seed, tensor, domain)


# --- one tile, many pairs ----------------------------------------------------------------------------
#
# target[at + e] += the pairs begin .. end of seeds and coefficients, e over the tile's rows
# row_begin .. row_end. In place, because LLVM then sees one array: with two it must test at run time
# whether they overlap, and takes a scalar loop where they do.


@_compiled
def _add_rademacher(
    target: Any, at: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words: Any,
) -> None:  # fmt: skip
    block = tile * _LANES
    k = begin
    while k + U64(4) <= end:
        for pair in range(U64(4)):
            _generate(words, pair * _ROW, block, seeds[k + pair], tensor, _RADEMACHER)
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
        _generate(words, _ZERO, block, seeds[k], tensor, _RADEMACHER)
        plus = coefficients[k]
        minus = -plus
        for row in range(row_begin, row_end):
            mask = np.uint32(_TOP_BIT >> row)
            t = at + row * _ROW
            for i in range(_ROW):
                target[t + i] += _choose(words[i], mask, plus, minus)
        k += _ONE


def _rademacher_row(both: bool) -> Any:
    """An emitted function (out, opposite, at, base, base_at, words, row, coefficient, largest): a row of
    out[at + i] = base[base_at + i] + coefficient * z, and with `both` also opposite[at + i] = base - it.
    It returns the larger of `largest` and the bits of the row's |base|.

    Written out because LLVM would test at every row whether the arrays overlap.
    """

    def row(
        typing_context: Any, out: Any, opposite: Any, at: Any, base: Any, base_at: Any,
        words: Any, row: Any, coefficient: Any, largest: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            integers, floats = (ir.VectorType(kind, _SIGN_LANES) for kind in (_I32, _F32))
            i64 = ir.IntType(64)

            def address(argument: int, begin: Any, offset: int, vector: Any) -> Any:
                array = context.make_array(signature.args[argument])(
                    context, builder, values[argument]
                )
                index = builder.add(begin, ir.Constant(i64, offset))
                return builder.bitcast(builder.gep(array.data, [index]), ir.PointerType(vector))

            maximum = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_I32, [integers]),
                f"llvm.vector.reduce.umax.v{_SIGN_LANES}i32",
            )
            at, base_at = values[2], values[4]
            factor = builder.bitcast(_emit_splat(builder, values[7], _SIGN_LANES), integers)
            shift = _emit_splat(builder, builder.trunc(values[6], _I32), _SIGN_LANES)
            sign = ir.Constant(integers, [0x80000000] * _SIGN_LANES)
            magnitude = ir.Constant(integers, [0x7FFFFFFF] * _SIGN_LANES)
            largest = _emit_splat(builder, values[8], _SIGN_LANES)
            for offset in range(0, spec.ROW_ELEMENTS, _SIGN_LANES):
                word = builder.load(address(5, ir.Constant(i64, 0), offset, integers), align=4)
                flip = builder.and_(builder.shl(word, shift), sign)
                product = builder.bitcast(builder.xor(flip, factor), floats)
                value = builder.load(address(3, base_at, offset, floats), align=4)
                place = address(0, at, offset, floats)
                builder.store(builder.fadd(value, product), place, align=4)
                if both:
                    place = address(1, at, offset, floats)
                    builder.store(builder.fsub(value, product), place, align=4)
                bits = builder.and_(builder.bitcast(value, integers), magnitude)
                larger = builder.icmp_unsigned(">", bits, largest)
                largest = builder.select(larger, bits, largest)
            return builder.call(maximum, [largest])

        index = types.uint64
        return types.uint32(
            out, opposite, index, base, index, words, index, types.float32, types.uint32
        ), emit

    return _emitted(row)


_set_rademacher_row = _rademacher_row(both=False)
_set_both_rademacher_row = _rademacher_row(both=True)


@_compiled
def _set_rademacher(
    out: Any, at: Any, base: Any, base_at: Any, tile: Any, tensor: Any, seed: Any, coefficient: Any,
    words: Any,
) -> Any:  # fmt: skip
    """out[at + e] = base[base_at + e] + one pair, over a whole tile; the bits of the largest |base|."""
    _generate(words, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
    largest = np.uint32(0)
    for row in range(_ROWS):
        largest = _set_rademacher_row(
            out, out, at + row * _ROW, base, base_at + row * _ROW, words, row, coefficient, largest
        )
    return largest


@_compiled
def _set_both_rademacher(
    out: Any, opposite: Any, at: Any, base: Any, base_at: Any, tile: Any, tensor: Any,
    seed: Any, coefficient: Any, words: Any,
) -> Any:  # fmt: skip
    """`_set_rademacher` for a pair and its opposite, from one reading of the base."""
    _generate(words, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
    largest = np.uint32(0)
    for row in range(_ROWS):
        t, b = at + row * _ROW, base_at + row * _ROW
        largest = _set_both_rademacher_row(
            out, opposite, t, base, b, words, row, coefficient, largest
        )
    return largest


def _emit_box_muller(builder: Any, radius_word: Any, angle_word: Any) -> tuple[Any, Any]:
    """`spec.box_muller` of two vectors of words, operation by operation."""
    lanes = radius_word.type.count
    integers, floats = ir.VectorType(_I32, lanes), ir.VectorType(_F32, lanes)

    def word(value: int) -> Any:
        return ir.Constant(integers, [value] * lanes)

    def number(value: Any) -> Any:
        return ir.Constant(floats, [float(value)] * lanes)

    def add(a: Any, b: Any) -> Any:
        return builder.fadd(a, b)

    def times(a: Any, b: Any) -> Any:
        return builder.fmul(a, b)

    def line(x: Any, constant: Any, slope: Any) -> Any:
        return add(times(x, number(slope)), number(constant))

    odd = builder.or_(builder.lshr(radius_word, word(1)), word(1))
    uniform = builder.bitcast(builder.sitofp(odd, floats), integers)
    shifted = builder.add(uniform, word(spec.ONE - spec.SQRT_HALF))
    exponent = builder.sitofp(builder.sub(word(158), builder.lshr(shifted, word(23))), floats)
    fraction = builder.and_(shifted, word(0x007FFFFF))
    mantissa = builder.bitcast(builder.add(fraction, word(spec.SQRT_HALF)), floats)
    l0, l1, l2, l3, l4, l5, l6, l7, l8 = spec.LOG
    x = builder.fsub(mantissa, number(1))
    x2 = times(x, x)
    x4 = times(x2, x2)
    low = add(line(x, l0, l1), times(x2, line(x, l2, l3)))
    high = add(line(x, l4, l5), times(x2, add(line(x, l6, l7), times(x2, number(l8)))))
    square = add(times(exponent, number(spec.TWO_LN2)), times(x, add(low, times(x4, high))))
    square_root = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(floats, [floats]), f"llvm.sqrt.v{lanes}f32"
    )
    radius = builder.call(square_root, [square])

    angle = builder.or_(builder.shl(angle_word, word(2)), word(2))
    y = times(builder.sitofp(angle, floats), number(spec.TWO_TO_MINUS_31))
    y2 = times(y, y)

    def series(coefficients: Any) -> Any:
        total = number(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            total = add(number(coefficient), times(y2, total))
        return total

    flip = builder.and_(builder.shl(angle_word, word(1)), word(0x80000000))
    cosine = builder.bitcast(builder.xor(flip, builder.bitcast(series(spec.COS), integers)), floats)
    p, q = times(radius, cosine), times(radius, times(y, series(spec.SIN)))
    swap = builder.icmp_signed("<", angle_word, word(0))
    return builder.select(swap, q, p), builder.select(swap, p, q)


def _gaussian_piece(add: bool) -> Any:
    """An emitted function (target, at, words, from, coefficient): a piece of a row, for `_GAUSSIAN_LANES`
    radius words from `words[from]` and their angle words 32 further. `add`: target[at ...] is
    increased by the products with the coefficient, rather than set to them."""

    def piece(
        typing_context: Any, target: Any, at: Any, words: Any, word: Any, coefficient: Any
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            integers, floats = (ir.VectorType(kind, _GAUSSIAN_LANES) for kind in (_I32, _F32))

            def address(argument: int, offset: int, vector: Any) -> Any:
                array = context.make_array(signature.args[argument])(
                    context, builder, values[argument]
                )
                index = builder.add(values[argument + 1], ir.Constant(ir.IntType(64), offset))
                return builder.bitcast(builder.gep(array.data, [index]), ir.PointerType(vector))

            factor = _emit_splat(builder, values[4], _GAUSSIAN_LANES)
            radius_word = builder.load(address(2, 0, integers), align=4)
            angle_word = builder.load(address(2, spec.LANES, integers), align=4)
            both = _emit_box_muller(builder, radius_word, angle_word)
            for half, value in enumerate(both):
                place = address(0, half * spec.LANES, floats)
                product = builder.fmul(factor, value)
                if add:
                    product = builder.fadd(builder.load(place, align=4), product)
                builder.store(product, place, align=4)
            return context.get_dummy_value()

        place = types.uint64
        return types.void(target, place, words, place, types.float32), emit

    return _emitted(piece)


_add_gaussian_piece = _gaussian_piece(add=True)
_set_gaussian_piece = _gaussian_piece(add=False)


@_compiled
def _add_gaussian(
    target: Any, at: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words: Any,
) -> None:  # fmt: skip
    for k in range(begin, end):
        coefficient = coefficients[k]
        for row in range(row_begin, row_end):
            block = (tile * _ROWS + row) * _LANES
            _generate(words, _ZERO, block, seeds[k], tensor, _GAUSSIAN)
            for half in range(_TWO):
                w = half * _HALF_ROW
                t = at + row * _ROW + w
                for piece in range(_LANES // _PIECE):
                    p = piece * _PIECE
                    _add_gaussian_piece(target, t + p, words, w + p, coefficient)


@_compiled
def _round_rows(
    tile_values: Any, row_begin: Any, row_end: Any, tile: Any, tensor: Any, stochastic: Any,
    rounding_seed: Any, words: Any,
) -> None:  # fmt: skip
    """Round a commit's result to bfloat16, kept as float32. Whole pairs of rows; the rest is scratch."""
    for group in range(row_begin >> _ONE, (row_end + _ONE) >> _ONE):
        at = group * U64(256)
        if stochastic:
            block = (tile * U64(16) + group) * _LANES
            _generate(words, _ZERO, block, rounding_seed, tensor, _ROUNDING)
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
    gaussian: Any, seeds: Any, coefficients: Any, words: Any, tile_values: Any,
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
                _set_rademacher(out, at, base, at, tile, tensor, seeds[0], coefficients[0], words)
                done = _ONE
            elif out_of_place:
                for i in range(_TILE):
                    out[at + i] = base[at + i]
            if gaussian:
                _add_gaussian(out, at, _ZERO, _ROWS, tile, tensor,
                              seeds, coefficients, done, pairs, words)  # fmt: skip
            else:
                _add_rademacher(out, at, _ZERO, _ROWS, tile, tensor,
                                seeds, coefficients, done, pairs, words)  # fmt: skip
            for i in range(_TILE):
                largest = _larger_magnitude(largest, out[at + i])
        else:
            for i in range(last - first):
                tile_values[first + i] = base[at + i]
            if gaussian:
                _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                              seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                                seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
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
    words: Any, tile_values: Any,
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
                              seeds, coefficients, pair_begin, pair_end, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, tensor,
                                seeds, coefficients, pair_begin, pair_end, words)  # fmt: skip
            _round_rows(tile_values, row_begin, row_end, tile, tensor, stochastic,
                        rounding_seeds[commit], words)  # fmt: skip
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
    seed: Any, coefficient: Any, words: Any,
) -> None:  # fmt: skip
    """products[e] = fl(coefficient * z), e over the tile's rows row_begin .. row_end."""
    if gaussian:
        for row in range(row_begin, row_end):
            block = (tile * _ROWS + row) * _LANES
            _generate(words, _ZERO, block, seed, tensor, _GAUSSIAN)
            for half in range(_TWO):
                w = half * _HALF_ROW
                t = row * _ROW + w
                for piece in range(_LANES // _PIECE):
                    p = piece * _PIECE
                    _set_gaussian_piece(products, t + p, words, w + p, coefficient)
    else:
        _generate(words, _ZERO, tile * _LANES, seed, tensor, _RADEMACHER)
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
    words: Any, tile_values: Any, products: Any,
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
                              seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
            else:
                _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                                seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
            source, source_at = tile_values, first
        streamed = count == _TILE and not gaussian
        if not streamed or steps[0] == SHARED_STEP:
            for i in range(count):
                largest = _larger_magnitude(largest, source[source_at + i])
        for g in range(steps.shape[0]):
            step, seed, coefficient = steps[g], last_seeds[g], last_coefficients[g]
            out = carray(_float32_at(outs[g]), end)
            if step == SHARED_STEP:
                for i in range(count):
                    out[at + i] = source[source_at + i]
            elif step == OWN_STEP:
                if streamed:
                    in_tile = _set_rademacher(out, at, source, source_at, tile, U64(tensor),
                                              seed, coefficient, words)  # fmt: skip
                    largest = max(largest, in_tile)
                else:
                    _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                                  seed, coefficient, words)  # fmt: skip
                    for i in range(count):
                        out[at + i] = source[source_at + i] + products[first + i]
            elif step == BOTH_STEP:
                other = carray(_float32_at(outs[g + 1]), end)
                if streamed:
                    in_tile = _set_both_rademacher(out, other, at, source, source_at, tile,
                                                   U64(tensor), seed, coefficient, words)  # fmt: skip
                    largest = max(largest, in_tile)
                else:
                    _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                                  seed, coefficient, words)  # fmt: skip
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
    rounding_seeds: Any, ceiling: Any, words: Any, tile_values: Any, products: Any,
    rounding_words: Any,
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
                          seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
        else:
            _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, U64(tensor),
                            seeds, coefficients, _ZERO, pairs, words)  # fmt: skip
        for i in range(count):
            largest = _larger_magnitude(largest, tile_values[first + i])
        for g in range(steps.shape[0]):
            step, rounding_seed = steps[g], rounding_seeds[g]
            if stochastic and (g == 0 or rounding_seed != rounding_seeds[g - 1]):
                for group in range(row_begin >> _ONE, (row_end + _ONE) >> _ONE):
                    block = (tile * U64(16) + group) * _LANES
                    _generate(rounding_words, group * _ROW, block, rounding_seed,
                              U64(tensor), _ROUNDING)  # fmt: skip
            if step in (OWN_STEP, BOTH_STEP):
                _set_products(products, row_begin, row_end, tile, U64(tensor), gaussian,
                              last_seeds[g], last_coefficients[g], words)  # fmt: skip
            elif step == SHARED_STEP:
                products[first:last] = np.float32(-0.0)  # the one float whose sum changes nothing
            sign = np.float32(-1 if step == DONE_STEP else 1)
            out = carray(_uint16_at(outs[g]), end)
            _round_sum(out, at, tile_values, products, sign, first, last,
                       stochastic, rounding_words)  # fmt: skip
        at += count
    return largest <= ceiling
