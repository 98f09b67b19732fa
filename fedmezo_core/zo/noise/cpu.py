"""The numba backend: `materialize` on the CPU, equal to `spec` bit for bit.

A kernel takes a range of a tensor and the pairs, and loops over tiles of 4,096 elements (one Philox
slot cycle of Rademacher bits, 16 KB: an L1 cache's worth); commits and pairs are the inner loops,
so a weight is read and written once however many pairs there are. Low-rank pairs have larger tiles,
of a matrix, because its rows share work. How it becomes SIMD:

- Philox and Box-Muller are written out as LLVM vectors, because what limits them is latency:
  several vectors must go through the same dependent steps side by side, which no loop vectoriser
  does.
- Loops over elements are left to LLVM's loop vectoriser. Indices are unsigned, or numba adds
  Python's negative-index test to every access.

No operation is reassociated or fused: numba asks LLVM for strict IEEE arithmetic unless told
otherwise, and the tests compare every path with the specification. All compiled code is in this
file because numba's disk cache notices changes of a function's own file only.

Contents, each a section below:

- 32-bit operations: choosing, signs, rounding to bfloat16 and float16, pointers
- the floating-point environment: round to nearest, subnormals kept
- Philox: 32 blocks of random words at a time
- one tile, many pairs: Rademacher and Gaussian directions
- low-rank pairs: patterns of a strip of columns
- any tile: loading, adding pairs, rounding, storing
- a range of a tensor: the kernels `apply_float32` and `apply_tiles`
- several outputs from one base: the kernels `fan_float32` and `fan_tiles`
- factors of low-rank directions: the kernel `factor_signs`
"""

from __future__ import annotations

import functools
import logging
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
from numba.np.numpy_support import carray as numba_carray

from fedmezo_core.zo.noise import spec

log = logging.getLogger("fedmezo.noise")

Function = TypeVar("Function", bound=Callable[..., Any])
Parameters = ParamSpec("Parameters")


def _kernel(function: Function) -> Function:
    """Compile on first use, keep on disk if a folder can be written to, run without the GIL."""
    compiling: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast("Function", njit(cache=True, **compiling)(function))
    except RuntimeError:
        # Neither this package's folder, nor NUMBA_CACHE_DIR, nor the home can be written to.
        _say_that_nothing_is_kept()
        return cast("Function", njit(**compiling)(function))


@functools.cache
def _say_that_nothing_is_kept() -> None:
    log.warning(
        "compiled kernels cannot be kept, so every start compiles them again; set NUMBA_CACHE_DIR "
        "to a folder of this user's own that can be written to"
    )


def _compiled(function: Function) -> Function:
    """A piece of a kernel."""
    return cast("Function", njit(error_model="numpy")(function))


def _emitted(function: Callable[Concatenate[Any, Parameters], Any]) -> Callable[Parameters, Any]:
    """A few LLVM instructions on 32-bit values, which numba would widen to 64 bits."""
    return cast("Callable[Parameters, Any]", intrinsic(function))


types: Any = numba_types  # partly annotated
cgutils: Any = numba_cgutils
carray: Any = numba_carray  # to which mypy gives no such pointers

TILE_ROWS: Final = 32
TILE_ELEMENTS: Final = TILE_ROWS * spec.ROW_ELEMENTS
"""Elements of a tile: 32 blocks of Rademacher bits."""
VECTOR_LANES: Final = 16
"""Elements of a vector of the low-rank kernels, whose arrays have room for one vector more."""
FUSED_PATTERNS: Final = 8
"""Low-rank pairs added in one visit of a row."""
SCRATCH_WORDS: Final = FUSED_PATTERNS * spec.ROW_ELEMENTS + VECTOR_LANES
"""uint32 words of scratch that a thread needs for block words."""
MATRIX_ELEMENTS: Final = 1 << 16
"""Elements of a tile of a matrix, for low-rank pairs: a quarter of a megabyte, for an L2 cache."""
MATRIX_ROWS_MAX: Final = 1024
"""Most rows of such a tile; their signs are in one or two runs of 32 Philox blocks."""
FAN_ELEMENTS: Final = 1 << 14
"""Elements of such a tile in a fan, which keeps products and rounding bits as well."""
STRIP_COLUMNS: Final = (0, 128, 128, 0, 64)
"""Columns of a strip, by rank: all its patterns fit an L1 cache."""
NEUTRAL_PATTERN: Final = FUSED_PATTERNS * max(2**rank * STRIP_COLUMNS[rank] for rank in (1, 2, 4))
"""Where, after all others, the pattern begins that changes nothing."""
PATTERN_VALUES: Final = NEUTRAL_PATTERN + max(STRIP_COLUMNS)
"""float32 of scratch for patterns."""
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""How weights are stored."""
FINITE: Final = -1
"""What a kernel returns when every result is finite; else the offset of the first that is not."""

U64 = np.uint64
_RADEMACHER, _GAUSSIAN = U64(spec.DOMAIN_RADEMACHER), U64(spec.DOMAIN_GAUSSIAN)
_ROUNDING, _ROUNDING_FLOAT16 = U64(spec.DOMAIN_ROUNDING), U64(spec.DOMAIN_ROUNDING_FLOAT16)
_ROW_SIGNS, _COLUMN_SIGNS = U64(spec.DOMAIN_ROW_SIGNS), U64(spec.DOMAIN_COLUMN_SIGNS)
_ROW, _HALF_ROW, _LANES, _ROWS, _TILE = U64(128), U64(64), U64(32), U64(32), U64(4096)
_TOP_BIT = U64(0x80000000)
_INFINITY, _NOTHING = np.uint32(0x7F800000), np.uint32(0)
_ZERO, _ONE, _TWO, _THREE, _FOUR = U64(0), U64(1), U64(2), U64(3), U64(4)
_VECTOR, _FUSED, _PLACES = U64(VECTOR_LANES), U64(FUSED_PATTERNS), U64(MATRIX_ROWS_MAX)
_SLOTS, _SIGNS = U64(8), U64(1024)  # of row and column signs: in a word, in 32 blocks
_LINE_BYTES = U64(64)

# Lanes of the vectors that are written out below; any number gives the same bits. Philox keeps 16
# words of state a lane in 4 vectors: more than eight lanes each fit only into the registers of
# AVX-512.
_PHILOX_LANES: Final = 16 if get_host_cpu_features().get("avx512f") else 8
_GAUSSIAN_LANES: Final = 16
_PIECE = U64(_GAUSSIAN_LANES)

# By rank.
_SCALES: Final = np.array([spec.LOW_RANK_SCALE.get(rank, 0) for rank in range(5)], dtype=np.float32)
_STRIPS: Final = np.array(STRIP_COLUMNS, dtype=np.uint64)

_I32 = ir.IntType(32)
_F32 = ir.FloatType()


def _constant(value: int) -> Any:
    return ir.Constant(_I32, value)


# --- 32-bit operations --------------------------------------------------------------------------


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
    """The larger of `magnitude` and |value|, as bits: integers order as floats do, NaN on top."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.and_(builder.bitcast(values[1], _I32), _constant(0x7FFFFFFF))
        return builder.select(builder.icmp_unsigned(">", bits, values[0]), bits, values[0])

    return types.uint32(types.uint32, types.float32), emit


@_emitted
def _widen_bfloat16(typing_context: Any, half: Any) -> Any:
    """bfloat16 bits to float32, exactly."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(values[0], _I32), _constant(16)), _F32)

    return types.float32(types.uint16), emit


@_emitted
def _narrow_bfloat16(typing_context: Any, value: Any) -> Any:
    """The bfloat16 bits of a float32 whose low 16 bits are zero."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.lshr(builder.bitcast(values[0], _I32), _constant(16))
        return builder.trunc(bits, ir.IntType(16))

    return types.uint16(types.float32), emit


def _emit_bfloat16(builder: Any, bits: Any, addend: Any) -> Any:
    """(bits + addend) without its low 16 bits; nothing is added to NaN and infinities.

    Choosing the addend, not the result: LLVM makes "keep the old value" a masked store, which some
    CPUs run many times slower than a store.
    """
    magnitude = builder.and_(bits, _constant(0x7FFFFFFF))
    finite = builder.icmp_unsigned("<", magnitude, _constant(0x7F800000))
    added = builder.add(bits, builder.select(finite, addend, _constant(0)))
    return builder.bitcast(builder.and_(added, _constant(0xFFFF0000)), _F32)


@_emitted
def _stochastic_bfloat16(typing_context: Any, value: Any, random: Any) -> Any:
    """Stochastic rounding to bfloat16 by 16 random bits."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _emit_bfloat16(builder, builder.bitcast(values[0], _I32), values[1])

    return types.float32(types.float32, types.uint32), emit


@_emitted
def _nearest_bfloat16(typing_context: Any, value: Any) -> Any:
    """Rounding to the nearest bfloat16, ties to even."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.bitcast(values[0], _I32)
        odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
        return _emit_bfloat16(builder, bits, builder.add(odd, _constant(0x7FFF)))

    return types.float32(types.float32), emit


# float16 by integer arithmetic: not every machine converts it, and a library's is no vector code.

_HALF_BIAS: Final = 112 << 23
"""Between the exponents' biases of float32 and float16."""
_HALF_NORMAL: Final = 0x38800000
"""Bits of 2^-14, float16's smallest normal number; below, it is fixed-point, in units of 2^-24."""
_HALF_OVERFLOW: Final = 0x47800000
"""Bits of 2^16."""


def _float(value: float) -> Any:
    return ir.Constant(_F32, value)


def _emit_signed(builder: Any, magnitude: Any, bits: Any) -> Any:
    """The float32 of these magnitude bits, with the sign of `bits`."""
    sign = builder.and_(bits, _constant(0x80000000))
    return builder.bitcast(builder.or_(magnitude, sign), _F32)


def _emit_float16(builder: Any, value: Any, addend: Any, round_units: Any) -> Any:
    """`value` rounded to float16, kept as float32.

    `addend` is added to the bits of normal numbers before the low 13 are dropped. `round_units`
    rounds a float32 below 1024 to an integer.
    """
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _constant(0x7FFFFFFF))
    normal = builder.and_(builder.add(magnitude, addend), _constant(0xFFFFE000))
    overflow = builder.icmp_unsigned(">=", normal, _constant(_HALF_OVERFLOW))
    normal = builder.select(overflow, _constant(0x7F800000), normal)
    nan = builder.icmp_unsigned(">", magnitude, _constant(0x7F800000))
    normal = builder.select(nan, _constant(0x7FC00000), normal)
    is_small = builder.icmp_unsigned("<", magnitude, _constant(_HALF_NORMAL))
    small = builder.bitcast(builder.select(is_small, magnitude, _constant(0)), _F32)
    units = round_units(builder.fmul(small, _float(2.0**24)))
    small = builder.bitcast(builder.fmul(units, _float(2.0**-24)), _I32)
    return _emit_signed(builder, builder.select(is_small, small, normal), bits)


@_emitted
def _stochastic_float16(typing_context: Any, value: Any, random: Any) -> Any:
    """Stochastic rounding to float16 by 32 random bits."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def round_units(units: Any) -> Any:
            whole = builder.sitofp(builder.fptosi(units, _I32), _F32)
            uniform = builder.sitofp(builder.lshr(values[1], _constant(8)), _F32)
            uniform = builder.fmul(uniform, _float(2.0**-24))
            up = builder.fcmp_ordered("<", uniform, builder.fsub(units, whole))
            return builder.fadd(whole, builder.select(up, _float(1.0), _float(0.0)))

        return _emit_float16(
            builder, values[0], builder.lshr(values[1], _constant(19)), round_units
        )

    return types.float32(types.float32, types.uint32), emit


@_emitted
def _nearest_float16(typing_context: Any, value: Any) -> Any:
    """Rounding to the nearest float16, ties to even."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def round_units(units: Any) -> Any:
            large = _float(2.0**23)  # where float32's neighbours are 1 apart
            return builder.fsub(builder.fadd(units, large), large)

        bits = builder.bitcast(values[0], _I32)
        odd = builder.and_(builder.lshr(bits, _constant(13)), _constant(1))
        return _emit_float16(builder, values[0], builder.add(odd, _constant(0xFFF)), round_units)

    return types.float32(types.float32), emit


@_emitted
def _widen_float16(typing_context: Any, half: Any) -> Any:
    """float16 bits to float32, exactly."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        half = builder.zext(values[0], _I32)
        magnitude = builder.and_(half, _constant(0x7FFF))
        special = builder.icmp_unsigned(">=", magnitude, _constant(0x7C00))
        bias = builder.select(special, _constant(2 * _HALF_BIAS), _constant(_HALF_BIAS))
        normal = builder.add(builder.shl(magnitude, _constant(13)), bias)
        units = builder.fmul(builder.sitofp(magnitude, _F32), _float(2.0**-24))
        is_small = builder.icmp_unsigned("<", magnitude, _constant(0x400))
        wide = builder.select(is_small, builder.bitcast(units, _I32), normal)
        return _emit_signed(builder, wide, builder.shl(half, _constant(16)))

    return types.float32(types.uint16), emit


@_emitted
def _narrow_float16(typing_context: Any, value: Any) -> Any:
    """The float16 bits of a float32 that float16 represents."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.bitcast(values[0], _I32)
        magnitude = builder.and_(bits, _constant(0x7FFFFFFF))
        special = builder.icmp_unsigned(">=", magnitude, _constant(0x7F800000))
        bias = builder.select(special, _constant(2 * _HALF_BIAS), _constant(_HALF_BIAS))
        normal = builder.lshr(builder.sub(magnitude, bias), _constant(13))
        is_small = builder.icmp_unsigned("<", magnitude, _constant(_HALF_NORMAL))
        small = builder.bitcast(builder.select(is_small, magnitude, _constant(0)), _F32)
        units = builder.fptosi(builder.fmul(small, _float(2.0**24)), _I32)
        half = builder.select(is_small, units, normal)
        sign = builder.and_(builder.lshr(bits, _constant(16)), _constant(0x8000))
        return builder.trunc(builder.or_(half, sign), ir.IntType(16))

    return types.uint16(types.float32), emit


@_emitted
def _random_bits(typing_context: Any, word: Any, shift: Any) -> Any:
    """The 16 bits of `word` above the lowest `shift`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.and_(builder.lshr(values[0], values[1]), _constant(0xFFFF))

    return types.uint32(types.uint32, types.uint32), emit


def _emit_sign(builder: Any, word: Any, shift: Any) -> Any:
    """Bit 31 of `word << shift`, the others zero."""
    return builder.and_(builder.shl(word, shift), _constant(0x80000000))


@_emitted
def _signed_32(typing_context: Any, word: Any, shift: Any, one: Any) -> Any:
    """`one`, the bits of a float32, with the sign that is bit 31 of `word << shift`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.or_(_emit_sign(builder, values[0], values[1]), values[2])

    return types.uint32(types.uint32, types.uint32, types.uint32), emit


@_emitted
def _signed_16(typing_context: Any, word: Any, shift: Any, one: Any) -> Any:
    """`one`, the bits of a 16-bit float, with the sign that is bit 31 of `word << shift`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        sign = builder.lshr(_emit_sign(builder, values[0], values[1]), _constant(16))
        return builder.trunc(builder.or_(sign, values[2]), ir.IntType(16))

    return types.uint16(types.uint32, types.uint32, types.uint32), emit


def _pointer_to(element: Any) -> Any:
    """An emitted function that makes an address (uint64) a pointer to `element`, for `carray`."""

    def at(typing_context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.uint64), emit

    return _emitted(at)


_float32_at = _pointer_to(types.float32)
_uint32_at = _pointer_to(types.uint32)
_uint16_at = _pointer_to(types.uint16)


@_emitted
def _outlined(typing_context: Any) -> Any:
    """Keep the calling function a function.

    Where LLVM copies long ones into each other, compiling can take minutes, and gigabytes.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), emit


# --- the floating-point environment -------------------------------------------------------------

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


# --- Philox -------------------------------------------------------------------------------------


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

    A vector's even and odd lanes are multiplied apart: SIMD units multiply 32-bit integers in
    64-bit lanes, of which they read the lower halves.
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

    The vectors go through each round side by side: a round's five dependent steps take longer than
    its work, so that one vector after the other would leave the arithmetic units half idle. Where
    the counter is the same for all blocks, the first two rounds are scalar.
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
    _outlined()
    _store_blocks(words, at, block, seed, tensor, domain)


# --- one tile, many pairs -----------------------------------------------------------------------
#
# target[at + e] += the pairs begin .. end of seeds and coefficients, e over the tile's rows
# row_begin .. row_end. In place, because LLVM then sees one array: with two it must test at run
# time whether they overlap, and takes a scalar loop where they do.


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
    """An emitted function that sets a row: out[at + i] = base[base_at + i] + coefficient * z.

    Its arguments are out, opposite, at, base, base_at, words, row, coefficient and largest. With
    `both`, also opposite[at + i] = base[base_at + i] - coefficient * z. It returns the larger of
    `largest` and the bits of the row's largest |base|.

    Written out because LLVM would test at every row whether the arrays overlap.
    """

    def row(
        typing_context: Any, out: Any, opposite: Any, at: Any, base: Any, base_at: Any,
        words: Any, row: Any, coefficient: Any, largest: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            integers, floats = (ir.VectorType(kind, VECTOR_LANES) for kind in (_I32, _F32))
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
                f"llvm.vector.reduce.umax.v{VECTOR_LANES}i32",
            )
            at, base_at = values[2], values[4]
            factor = builder.bitcast(_emit_splat(builder, values[7], VECTOR_LANES), integers)
            shift = _emit_splat(builder, builder.trunc(values[6], _I32), VECTOR_LANES)
            sign = ir.Constant(integers, [0x80000000] * VECTOR_LANES)
            magnitude = ir.Constant(integers, [0x7FFFFFFF] * VECTOR_LANES)
            largest = _emit_splat(builder, values[8], VECTOR_LANES)
            for offset in range(0, spec.ROW_ELEMENTS, VECTOR_LANES):
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
    """out[at + e] = base[base_at + e] + one pair, over a whole tile.

    Returns the bits of the largest |base|.
    """
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
    """An emitted function (target, at, words, word, coefficient) that makes a piece of a row.

    It takes `_GAUSSIAN_LANES` radius words from `words[word]` on and their angle words 32 further.
    With `add`, target[at ...] is increased by the products with the coefficient, else set to them.
    """

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


# --- low-rank pairs -----------------------------------------------------------------------------
#
# A tile is `rows` rows of `width` columns of a matrix, contiguous, from `row` and `column` on. Row
# i of c * z is one of 2^rank: the signs of row i decide which. So these *patterns* are made first,
# of those that occur, for a strip of columns and a few pairs (an L1 cache's worth); then each row
# of the strip is increased by one pattern a pair: a load and an addition an element. All is done in
# whole vectors: a pattern is -0 beyond its strip's last column, which changes no number that it is
# added to. Missing pairs of a few have such a pattern too.


@_emitted
def _set_patterns(
    typing_context: Any, patterns: Any, at: Any, opposite: Any, words: Any, word: Any, shift: Any,
    row_signs: Any, rank: Any, scale: Any, coefficient: Any, count: Any,
) -> Any:  # fmt: skip
    """patterns[at + i] = fl(coefficient * z), -0 for i >= count; i over a vector.

    patterns[opposite + i] is the same for a row of opposite signs. Column i's four signs are the
    bits of words[word + i] from `shift` on, a row's are `row_signs`.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integers, floats = (ir.VectorType(kind, VECTOR_LANES) for kind in (_I32, _F32))

        def address(argument: int, index: Any, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, values[argument])
            return builder.bitcast(builder.gep(array.data, [index]), ir.PointerType(vector))

        def splat(value: Any) -> Any:
            if value.type == ir.IntType(64):
                value = builder.trunc(value, _I32)
            return _emit_splat(builder, value, VECTOR_LANES)

        shift, row_signs, rank, scale, coefficient, count = map(splat, values[5:])
        ones = ir.Constant(integers, [1] * VECTOR_LANES)
        popcount = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(integers, [integers]),
            f"llvm.ctpop.v{VECTOR_LANES}i32",
        )
        nibble = builder.lshr(builder.load(address(3, values[4], integers), align=4), shift)
        unused = builder.sub(ir.Constant(integers, [4] * VECTOR_LANES), rank)
        signs = builder.lshr(builder.and_(nibble, splat(_constant(15))), unused)
        minuses = builder.call(popcount, [builder.xor(signs, row_signs)])
        total = builder.sub(rank, builder.shl(minuses, ones))
        z = builder.fmul(builder.sitofp(total, floats), scale)
        lanes = ir.Constant(integers, list(range(VECTOR_LANES)))
        inside = builder.icmp_unsigned("<", lanes, count)
        nothing = ir.Constant(floats, [-0.0] * VECTOR_LANES)
        zero = ir.Constant(floats, [0.0] * VECTOR_LANES)
        # Not the product's opposite: of z = +0, the standard's zero, that has the wrong sign.
        for index, number in ((values[1], z), (values[2], builder.fsub(zero, z))):
            product = builder.select(inside, builder.fmul(coefficient, number), nothing)
            builder.store(product, address(0, index, floats), align=4)
        return context.get_dummy_value()

    index, number = types.uint64, types.float32
    return types.void(
        patterns, index, index, words, index, index, index, index, number, number, index
    ), emit


def _pattern_sum(pairs: int) -> Any:
    """An emitted function (target, at, patterns, p_0, ...) that adds patterns to a vector.

    target[at + i] += patterns[p_0 + i], then patterns[p_1 + i] and so on. Written out because LLVM
    would test at every row whether the arrays overlap.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        floats = ir.VectorType(_F32, VECTOR_LANES)

        def address(argument: int, index: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, values[argument])
            return builder.bitcast(builder.gep(array.data, [index]), ir.PointerType(floats))

        place = address(0, values[1])
        total = builder.load(place, align=4)
        for pattern in values[3:]:
            total = builder.fadd(total, builder.load(address(2, pattern), align=4))
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    index = types.uint64
    if pairs == 1:

        def one(typing_context: Any, target: Any, at: Any, patterns: Any, p_0: Any) -> Any:
            return types.void(target, index, patterns, index), emit

        return _emitted(one)

    def eight(
        typing_context: Any, target: Any, at: Any, patterns: Any,
        p_0: Any, p_1: Any, p_2: Any, p_3: Any, p_4: Any, p_5: Any, p_6: Any, p_7: Any,
    ) -> Any:  # fmt: skip
        return types.void(target, index, patterns, *[index] * 8), emit

    return _emitted(eight)


_add_pattern = _pattern_sum(1)
_add_eight_patterns = _pattern_sum(8)


@_emitted
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Fetch the cache line at `address`, which need not be the program's, into the L2 cache."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.inttoptr(values[0], pointer)
        builder.call(fetch, [place, _constant(0), _constant(2), _constant(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), emit


@_compiled
def _place_rows(
    row_patterns: Any, pair: Any, rows: Any, row: Any, tensor: Any, rank: Any, strip: Any,
    seed: Any, words: Any,
) -> Any:  # fmt: skip
    """row_patterns[at + r] = where the pattern of row `row + r` begins; a bit for each used."""
    _outlined()
    at = pair * _PLACES
    used = _ZERO
    r = _ZERO
    while r < rows:
        i = row + r
        if r == _ZERO or i % _SIGNS == _ZERO:
            _generate(words, _ZERO, i // _SIGNS * _LANES, seed, tensor, _ROW_SIGNS)
        count = min(_ROW - i % _ROW, rows - r)
        shift = U64(32) - rank - _FOUR * (i // _ROW % _SLOTS)
        mask = (_ONE << rank) - _ONE
        for _ in range(count):
            signs = (U64(words[(row + r) % _ROW]) >> shift) & mask
            used |= _ONE << signs
            row_patterns[at + r] = np.uint32((pair * (mask + _ONE) + signs) * strip)
            r += _ONE
    return used


@_compiled
def _add_low_rank(
    target: Any, at: Any, rows: Any, width: Any, row: Any, column: Any, tensor: Any, rank: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words: Any, row_patterns: Any, patterns: Any, used: Any,
    next_tile: Any, next_stride: Any, item_bytes: Any,
) -> None:  # fmt: skip
    """target[at + e] += the pairs begin .. end, e over the tile. Writes a vector beyond its end.

    Meanwhile fetches the weights that come next, from address `next_tile` on (0: none), a row every
    `next_stride` bytes: memory would else wait for arithmetic, and arithmetic for memory.
    """
    _outlined()
    strip, scale = _STRIPS[rank], _SCALES[rank]
    neutral = U64(NEUTRAL_PATTERN)
    patterns[neutral : neutral + strip] = np.float32(-0.0)
    k = begin
    while k < end:
        fused = k + _THREE <= end
        pairs = min(_FUSED, end - k) if fused else _ONE
        for pair in range(pairs):
            used[pair] = _place_rows(
                row_patterns, pair, rows, row, tensor, rank, strip, seeds[k + pair], words
            )
        if fused:
            for pair in range(pairs, _FUSED):
                p = pair * _PLACES
                row_patterns[p : p + rows] = np.uint32(neutral)
        j = _ZERO
        while j < width:
            i = column + j
            if j == _ZERO or i % _SIGNS == _ZERO:
                for pair in range(pairs):
                    block = i // _SIGNS * _LANES
                    _generate(words, pair * _ROW, block, seeds[k + pair], tensor, _COLUMN_SIGNS)
            count = min(strip - i % strip, width - j)
            shift = U64(28) - _FOUR * (i // _ROW % _SLOTS)
            for pair in range(pairs):
                for signs in range(_ONE << (rank - _ONE)):
                    opposite = (_ONE << rank) - _ONE - signs
                    if used[pair] & (_ONE << signs | _ONE << opposite):
                        p, q = ((pair << rank) + signs) * strip, ((pair << rank) + opposite) * strip
                        w = pair * _ROW + i % _ROW
                        for e in range(_ZERO, count, _VECTOR):
                            _set_patterns(
                                patterns, p + e, q + e, words, w + e, shift, signs,
                                rank, scale, coefficients[k + pair], count - e,
                            )  # fmt: skip
            t = at + j
            if fused:
                for r in range(rows):
                    if k == begin and next_tile > _ZERO:
                        line = next_tile + r * next_stride + j * item_bytes
                        for e in range(_ZERO, count * item_bytes, _LINE_BYTES):
                            _prefetch(line + e)
                    p_0, p_1 = row_patterns[r], row_patterns[_PLACES + r]
                    p_2, p_3 = row_patterns[_TWO * _PLACES + r], row_patterns[_THREE * _PLACES + r]
                    p_4, p_5 = row_patterns[_FOUR * _PLACES + r], row_patterns[U64(5) * _PLACES + r]
                    p_6, p_7 = (
                        row_patterns[U64(6) * _PLACES + r],
                        row_patterns[U64(7) * _PLACES + r],
                    )
                    for e in range(_ZERO, count, _VECTOR):
                        _add_eight_patterns(
                            target, t + e, patterns, p_0 + e, p_1 + e, p_2 + e, p_3 + e,
                            p_4 + e, p_5 + e, p_6 + e, p_7 + e,
                        )  # fmt: skip
                    t += width
            else:
                for r in range(rows):
                    p_0 = row_patterns[r]
                    for e in range(_ZERO, count, _VECTOR):
                        _add_pattern(target, t + e, patterns, p_0 + e)
                    t += width
            j += count
        k += pairs


# --- any tile: storage, pairs, rounding ---------------------------------------------------------
#
# A tile is `rows` runs of `width` consecutive elements, one every `stride` elements of the tensor:
# a part of a matrix for low-rank pairs, one run within 4,096 aligned elements for the others. Its
# values are kept as float32 in tile_values, contiguous from `first` on.


@_compiled
def _band(element: Any, left: Any, rank: Any, columns: Any, room: Any, rows_least: Any) -> Any:
    """(rows, width, tile width) of the band that takes the next of the `left` elements.

    `rows_least` is how many rows a wide matrix's tiles have, to share patterns.
    """
    if rank == _ZERO:
        width = min(_TILE - element % _TILE, left)
        return _ONE, width, width
    whole_rows = columns * rows_least <= _TWO * room
    strip = columns if whole_rows else room // rows_least
    column = element % columns
    if column > _ZERO or left < columns:
        return _ONE, min(columns - column, left), strip
    rows = min(min(room // strip, U64(MATRIX_ROWS_MAX)), left // columns)
    return rows, columns, strip


@_compiled
def _load_run(
    tile_values: Any, at: Any, storage: Any, base_address: Any, begin: Any, count: Any
) -> None:
    """tile_values[at + i] = base[begin + i] for i below count."""
    if storage == FLOAT32:
        wide = carray(_float32_at(base_address), begin + count)
        for i in range(count):
            tile_values[at + i] = wide[begin + i]
    elif storage == BFLOAT16:
        half = carray(_uint16_at(base_address), begin + count)
        for i in range(count):
            tile_values[at + i] = _widen_bfloat16(half[begin + i])
    else:
        half = carray(_uint16_at(base_address), begin + count)
        for i in range(count):
            tile_values[at + i] = _widen_float16(half[begin + i])


@_compiled
def _store_run(
    storage: Any, out_address: Any, begin: Any, tile_values: Any, at: Any, count: Any, largest: Any
) -> Any:
    """out[begin + i] = tile_values[at + i], which is rounded already, for i below count.

    Returns the larger of `largest` and the bits of the largest magnitude.
    """
    if storage == FLOAT32:
        wide = carray(_float32_at(out_address), begin + count)
        for i in range(count):
            value = tile_values[at + i]
            wide[begin + i] = value
            largest = _larger_magnitude(largest, value)
    elif storage == BFLOAT16:
        half = carray(_uint16_at(out_address), begin + count)
        for i in range(count):
            value = tile_values[at + i]
            half[begin + i] = _narrow_bfloat16(value)
            largest = _larger_magnitude(largest, value)
    else:
        half = carray(_uint16_at(out_address), begin + count)
        for i in range(count):
            value = tile_values[at + i]
            half[begin + i] = _narrow_float16(value)
            largest = _larger_magnitude(largest, value)
    return largest


@_compiled
def _add_pairs(
    tile_values: Any, first: Any, rows: Any, width: Any, element: Any, tensor: Any,
    gaussian: Any, rank: Any, columns: Any,
    seeds: Any, coefficients: Any, begin: Any, end: Any,
    words: Any, row_patterns: Any, patterns: Any, used: Any,
    next_tile: Any, next_stride: Any, item_bytes: Any,
) -> None:  # fmt: skip
    """The tile's values += the pairs begin .. end; `element`: the tile's first."""
    if rank > _ZERO:
        _add_low_rank(tile_values, first, rows, width, element // columns, element % columns,
                      tensor, rank, seeds, coefficients, begin, end, words, row_patterns,
                      patterns, used, next_tile, next_stride, item_bytes)  # fmt: skip
        return
    row_begin, row_end = first // _ROW, (first + width + _ROW - _ONE) // _ROW
    if gaussian:
        _add_gaussian(tile_values, _ZERO, row_begin, row_end, element // _TILE, tensor,
                      seeds, coefficients, begin, end, words)  # fmt: skip
    else:
        _add_rademacher(tile_values, _ZERO, row_begin, row_end, element // _TILE, tensor,
                        seeds, coefficients, begin, end, words)  # fmt: skip


@_compiled
def _set_random_bits(
    random_bits: Any, at: Any, element: Any, count: Any, tensor: Any, storage: Any, seed: Any,
    words: Any,
) -> None:  # fmt: skip
    """random_bits[at + i] = what rounds `element + i`: 16 bits for bfloat16, 32 for float16."""
    _outlined()
    e, stop = element, element + count
    while e < stop:
        row, w = e // _ROW, e % _ROW
        in_row = min(stop - e, _ROW - w)
        if storage == BFLOAT16:
            if e == element or row % _TWO == _ZERO:
                _generate(words, _ZERO, row // _TWO * _LANES, seed, tensor, _ROUNDING)
            shift = np.uint32(0 if row % _TWO else 16)
            for i in range(in_row):
                random_bits[at + i] = _random_bits(words[w + i], shift)
        else:
            _generate(words, _ZERO, row * _LANES, seed, tensor, _ROUNDING_FLOAT16)
            for i in range(in_row):
                random_bits[at + i] = words[w + i]
        at += in_row
        e += in_row


@_compiled
def _round_run(
    tile_values: Any, at: Any, count: Any, storage: Any, stochastic: Any, random_bits: Any,
    bits_at: Any,
) -> None:  # fmt: skip
    """Round tile_values[at : at + count] as a commit's end does, kept as float32."""
    _outlined()
    if storage == FLOAT32:
        return
    if storage == BFLOAT16:
        if stochastic:
            for i in range(count):
                value, bits = tile_values[at + i], random_bits[bits_at + i]
                tile_values[at + i] = _stochastic_bfloat16(value, bits)
        else:
            for i in range(count):
                tile_values[at + i] = _nearest_bfloat16(tile_values[at + i])
    elif stochastic:
        for i in range(count):
            value, bits = tile_values[at + i], random_bits[bits_at + i]
            tile_values[at + i] = _stochastic_float16(value, bits)
    else:
        for i in range(count):
            tile_values[at + i] = _nearest_float16(tile_values[at + i])


@_compiled
def _decay(values: Any, at: Any, count: Any, decay: Any) -> None:
    """values[at : at + count] times a commit's decay."""
    if decay != np.float32(1):
        for i in range(count):
            values[at + i] *= decay


# --- a range of a tensor ------------------------------------------------------------------------
#
# Both take: out and base, 1-D, or their addresses; the range begin .. end of them; `start`, the
# element index of out[0]; the journal's pairs; for each commit the number of pairs up to its end
# (uint64) and its decay; and a thread's scratch. They return FINITE, or the offset in out of the
# first result that is NaN or infinite. float32 pairs of full rank, which need neither rounding nor
# rows, have a kernel that works in `out` itself. In float32 a commit's end changes nothing, so that
# commits without a decay come as a part of the one before.


@_kernel
def apply_float32(
    out: Any, base: Any, out_of_place: Any, begin: Any, end: Any, start: Any, tensor: Any,
    gaussian: Any, seeds: Any, coefficients: Any, commit_ends: Any, decays: Any,
    words: Any, tile_values: Any,
) -> Any:  # fmt: skip
    """float32, full rank."""
    commits = U64(commit_ends.shape[0])
    at = begin
    while at < end:
        element = start + at
        tile, first = element // _TILE, element % _TILE
        last = min(_TILE, first + (end - at))
        row_begin, row_end = first // _ROW, (last + _ROW - _ONE) // _ROW
        largest = np.uint32(0)
        if last - first == _TILE:
            pair = _ZERO
            if (
                out_of_place
                and not gaussian
                and commits > _ZERO
                and commit_ends[0] > _ZERO
                and decays[0] == np.float32(1)
            ):
                _set_rademacher(out, at, base, at, tile, tensor, seeds[0], coefficients[0], words)
                pair = _ONE
            elif out_of_place:
                for i in range(_TILE):
                    out[at + i] = base[at + i]
            for commit in range(commits):
                _decay(out, at, _TILE, decays[commit])
                if gaussian:
                    _add_gaussian(out, at, _ZERO, _ROWS, tile, tensor, seeds,
                                  coefficients, pair, commit_ends[commit], words)  # fmt: skip
                else:
                    _add_rademacher(out, at, _ZERO, _ROWS, tile, tensor, seeds,
                                    coefficients, pair, commit_ends[commit], words)  # fmt: skip
                pair = commit_ends[commit]
            for i in range(_TILE):
                largest = _larger_magnitude(largest, out[at + i])
        else:
            for i in range(last - first):
                tile_values[first + i] = base[at + i]
            pair = _ZERO
            for commit in range(commits):
                _decay(tile_values, first, last - first, decays[commit])
                if gaussian:
                    _add_gaussian(tile_values, _ZERO, row_begin, row_end, tile, tensor, seeds,
                                  coefficients, pair, commit_ends[commit], words)  # fmt: skip
                else:
                    _add_rademacher(tile_values, _ZERO, row_begin, row_end, tile, tensor, seeds,
                                    coefficients, pair, commit_ends[commit], words)  # fmt: skip
                pair = commit_ends[commit]
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
def apply_tiles(
    out_address: Any, base_address: Any, begin: Any, end: Any, start: Any, tensor: Any,
    storage: Any, stochastic: Any, gaussian: Any, rank: Any, columns: Any,
    seeds: Any, coefficients: Any, commit_ends: Any, rounding_seeds: Any, decays: Any,
    words: Any, tile_values: Any, row_patterns: Any, patterns: Any, used: Any, random_bits: Any,
) -> Any:  # fmt: skip
    """Any storage and distribution, rounded after each commit."""
    commits = U64(commit_ends.shape[0])
    at, stop = U64(begin), U64(end)
    origin, base_at, out_at = U64(start), U64(base_address), U64(out_address)
    tensor_id, rank_, stride = U64(tensor), U64(rank), U64(columns)
    item_bytes = U64(4 if storage == FLOAT32 else 2)
    found = stop
    while at < stop and found == stop:
        rows, band_width, strip = _band(
            origin + at, stop - at, rank_, stride, U64(MATRIX_ELEMENTS), U64(16) << rank_
        )
        done = _ZERO
        while done < band_width:
            width = min(strip, band_width - done)
            begin_tile, element = at + done, origin + at + done
            first = element % _TILE if rank_ == _ZERO else _ZERO
            # Rows without gaps between them are one run.
            runs, run = (_ONE, rows * width) if width == band_width else (rows, width)
            for r in range(runs):
                _load_run(tile_values, first + r * run, storage, base_at,
                          begin_tile + r * stride, run)  # fmt: skip
            in_band = done + width < band_width
            next_begin = begin_tile + (width if in_band else rows * stride - done)
            next_tile = base_at + next_begin * item_bytes
            pair = _ZERO
            for commit in range(commits):
                _decay(tile_values, first, rows * width, decays[commit])
                _add_pairs(tile_values, first, rows, width, element, tensor_id, gaussian, rank_,
                           stride, seeds, coefficients, pair, commit_ends[commit],
                           words, row_patterns, patterns, used,
                           next_tile, stride * item_bytes, item_bytes)  # fmt: skip
                pair = commit_ends[commit]
                if storage == FLOAT32:
                    continue
                for r in range(runs):
                    offset = _ZERO
                    while offset < run:
                        e = element + r * stride + offset
                        count = min(_TILE - e % _TILE, run - offset)
                        if stochastic:
                            _set_random_bits(random_bits, _ZERO, e, count, tensor_id, storage,
                                             rounding_seeds[commit], words)  # fmt: skip
                        _round_run(tile_values, first + r * run + offset, count, storage,
                                   stochastic, random_bits, _ZERO)  # fmt: skip
                        offset += count
            largest = np.uint32(0)
            for r in range(runs):
                largest = _store_run(storage, out_at, begin_tile + r * stride,
                                     tile_values, first + r * run, run, largest)  # fmt: skip
            if largest >= _INFINITY:
                for i in range(rows * width):
                    if not np.isfinite(tile_values[first + i]):
                        found = min(found, begin_tile + i // run * stride + i % run)
            done += width
        at += rows * band_width
    return np.int64(FINITE) if found == stop else np.int64(found)


# --- several outputs from one base --------------------------------------------------------------
#
# outs[g] = base + the pairs of `seeds` and `coefficients` + at most one more pair of its own, which
# `last_seeds`, `last_coefficients` and `steps` (a step for each output, below) give. Operands are
# addresses: making an array of a tensor costs more than a small block's arithmetic. They return
# whether every magnitude before the last pair stayed within `ceiling` (float32 bits), chosen by the
# caller so that no last pair can then make a result infinite.

SHARED_STEP: Final = 0
"""The output has no pair of its own."""
OWN_STEP: Final = 1
"""The output has a pair of its own."""
BOTH_STEP: Final = 2
"""The output has a pair of its own; the next has its opposite: one seed, minus the coefficient."""
DONE_STEP: Final = 3
"""The output is the second of such two: a `BOTH_STEP` has made it."""


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
    seeds: Any, coefficients: Any, steps: Any, last_seeds: Any, last_coefficients: Any,
    ceiling: Any, words: Any, tile_values: Any, products: Any,
) -> Any:  # fmt: skip
    """float32, full rank."""
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
                    in_tile = _set_both_rademacher(
                        out, other, at, source, source_at, tile, U64(tensor), seed, coefficient,
                        words,
                    )  # fmt: skip
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


@_kernel
def fan_tiles(
    outs: Any, base_address: Any, begin: Any, end: Any, start: Any, tensor: Any,
    storage: Any, stochastic: Any, gaussian: Any, rank: Any, columns: Any,
    seeds: Any, coefficients: Any, steps: Any, last_seeds: Any, last_coefficients: Any,
    rounding_seeds: Any, ceiling: Any,
    words: Any, tile_values: Any, row_patterns: Any, patterns: Any, used: Any, random_bits: Any,
    products: Any, sums: Any,
) -> Any:  # fmt: skip
    """Any storage and distribution: an output's pairs are one commit, rounded at its end."""
    largest = np.uint32(0)
    at, stop = U64(begin), U64(end)
    origin, base_at, tensor_id = U64(start), U64(base_address), U64(tensor)
    rank_, stride = U64(rank), U64(columns)
    while at < stop:
        rows, band_width, strip = _band(
            origin + at, stop - at, rank_, stride, U64(FAN_ELEMENTS), _TWO << rank_
        )
        done = _ZERO
        while done < band_width:
            width = min(strip, band_width - done)
            begin_tile, element = at + done, origin + at + done
            first = element % _TILE if rank_ == _ZERO else _ZERO
            runs, run = (_ONE, rows * width) if width == band_width else (rows, width)
            for r in range(runs):
                _load_run(tile_values, first + r * run, storage, base_at,
                          begin_tile + r * stride, run)  # fmt: skip
            _add_pairs(tile_values, first, rows, width, element, tensor_id, gaussian, rank_, stride,
                       seeds, coefficients, _ZERO, U64(seeds.shape[0]),
                       words, row_patterns, patterns, used, _ZERO, _ZERO, _ZERO)  # fmt: skip
            for i in range(rows * width):
                largest = _larger_magnitude(largest, tile_values[first + i])
            for g in range(U64(steps.shape[0])):
                step, seed = steps[g], rounding_seeds[g]
                if (
                    storage != FLOAT32
                    and stochastic
                    and (g == 0 or seed != rounding_seeds[g - _ONE])
                ):
                    for r in range(runs):
                        _set_random_bits(random_bits, first + r * run, element + r * stride, run,
                                         tensor_id, storage, seed, words)  # fmt: skip
                if step != DONE_STEP:
                    # The one float whose sum changes nothing.
                    products[first : first + rows * width] = np.float32(-0.0)
                if step in (OWN_STEP, BOTH_STEP):
                    _add_pairs(
                        products, first, rows, width, element, tensor_id, gaussian, rank_, stride,
                        last_seeds, last_coefficients, g, g + _ONE,
                        words, row_patterns, patterns, used, _ZERO, _ZERO, _ZERO,
                    )  # fmt: skip
                sign = np.float32(-1 if step == DONE_STEP else 1)
                for r in range(runs):
                    offset = _ZERO
                    while offset < run:
                        t = first + r * run + offset
                        count = min(_TILE, run - offset)
                        for e in range(count):
                            sums[e] = tile_values[t + e] + sign * products[t + e]
                        _round_run(sums, _ZERO, count, storage, stochastic, random_bits, t)
                        _store_run(storage, outs[g], begin_tile + r * stride + offset,
                                   sums, _ZERO, count, _NOTHING)  # fmt: skip
                        offset += count
            done += width
        at += rows * band_width
    return largest <= ceiling


# --- factors of low-rank directions -------------------------------------------------------------


@_kernel
def factor_signs(
    out_address: Any, wide: Any, one: Any, seeds: Any, tensor: Any, domain: Any, length: Any,
    rank: Any, words: Any,
) -> None:  # fmt: skip
    """out[s, k, i] = `one` with sign k of row or column i under seeds[s]: [seeds, rank, length].

    `one`: the bits of 1, in 32 bits if `wide`, else in 16.
    """
    signs, bits = U64(rank), np.uint32(one)
    count = U64(seeds.shape[0]) * signs * U64(length)
    out_32 = carray(_uint32_at(U64(out_address)), count)
    out_16 = carray(_uint16_at(U64(out_address)), count)
    for s in range(U64(seeds.shape[0])):
        for begin in range(_ZERO, U64(length), _ROW):
            row = begin // _ROW
            if row % _SLOTS == _ZERO:
                _generate(words, _ZERO, row // _SLOTS * _LANES, seeds[s],
                          U64(tensor), U64(domain))  # fmt: skip
            in_row = min(_ROW, U64(length) - begin)
            for k in range(signs):
                shift = np.uint32(_FOUR * (row % _SLOTS) + k)
                at = (s * signs + k) * U64(length) + begin
                if wide:
                    for i in range(in_row):
                        out_32[at + i] = _signed_32(words[i], shift, bits)
                else:
                    for i in range(in_row):
                        out_16[at + i] = _signed_16(words[i], shift, bits)
