"""The CUDA backend in Triton: commits applied in one launch, equal to `spec` bit for bit.

One warp a program and one Philox block a lane: the four words of a lane's block are the values of
four columns of its rows, so a program keeps four tensors, one for each word, and a value's bit is
brought up by a shift that is known when the kernel is compiled. A program's values stay in
registers while it goes through all pairs: each weight is read and written once.

- Elements come as rows of 128 (`spec.ROW_ELEMENTS`), whole row pairs at a time, because a block of
  rounding bits serves two rows. Of low-rank directions a program takes a rectangle of its matrix
  instead.
- No multiply is fused with an add: every launch says `enable_fp_fusion=False`. Values are rounded
  to the storage type by integer arithmetic of our own, and sqrt is the correctly rounded one.
- Nothing is told about alignment (`do_not_specialize`): Triton would vectorise accesses, and then
  give a lane values of four blocks, so that each block's words were made by four lanes.
- Addresses and element indices are 64-bit; within a program's tile, 32 bits are enough.
- A result that is NaN or infinite leaves the smallest such element index in `bad`; nothing else is
  told, so that no launch has to be waited for.

This file imports Triton, so it is itself imported only where there is a CUDA device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from fedmezo_core.zo.noise import spec
from fedmezo_core.zo.noise.operands import Operands
from fedmezo_core.zo.noise.portable import NO_ELEMENT

# Families, storage types and sides as the kernels know them.
RADEMACHER: Final = tl.constexpr(0)
GAUSSIAN: Final = tl.constexpr(1)
LOW_RANK: Final = tl.constexpr(2)
FLOAT32: Final = tl.constexpr(0)
BFLOAT16: Final = tl.constexpr(1)
FLOAT16: Final = tl.constexpr(2)

_SIGN: Final = tl.constexpr(0x80000000)
_MAGNITUDE: Final = tl.constexpr(0x7FFFFFFF)
_INFINITY: Final = tl.constexpr(0x7F800000)
_NO_ELEMENT: Final = tl.constexpr(NO_ELEMENT)

_DOMAIN_RADEMACHER: Final = tl.constexpr(spec.DOMAIN_RADEMACHER)
_DOMAIN_GAUSSIAN: Final = tl.constexpr(spec.DOMAIN_GAUSSIAN)
_DOMAIN_ROUNDING: Final = tl.constexpr(spec.DOMAIN_ROUNDING)
_DOMAIN_ROUNDING_FLOAT16: Final = tl.constexpr(spec.DOMAIN_ROUNDING_FLOAT16)
_DOMAIN_ROW_SIGNS: Final = tl.constexpr(spec.DOMAIN_ROW_SIGNS)
_DOMAIN_COLUMN_SIGNS: Final = tl.constexpr(spec.DOMAIN_COLUMN_SIGNS)

_ONE_MINUS_SQRT_HALF: Final = tl.constexpr(spec.ONE - spec.SQRT_HALF)
_SQRT_HALF: Final = tl.constexpr(spec.SQRT_HALF)
_TWO_LN2: Final = tl.constexpr(float(spec.TWO_LN2))
_TWO_TO_MINUS_31: Final = tl.constexpr(float(spec.TWO_TO_MINUS_31))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(float(value)) for value in spec.LOG)
_S0, _S1, _S2, _S3 = (tl.constexpr(float(value)) for value in spec.SIN)
_C0, _C1, _C2, _C3 = (tl.constexpr(float(value)) for value in spec.COS)


# --- words --------------------------------------------------------------------------------------


@triton.jit
def _philox(
    low: tl.tensor,
    high: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    tensor: tl.tensor,
    domain: tl.constexpr,
) -> tl.tensor:
    """Philox4x32-10 of the blocks `low + high * 2**32`: four uint32 tensors shaped like `low`."""
    c0 = low
    c1 = high
    c2 = tensor
    c3 = tl.full((), domain, tl.uint32)
    k0 = seed_low
    k1 = seed_high
    for _ in tl.static_range(10):
        # One 32 by 32 to 64 bit multiplication gives both halves.
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _blocks(
    blocks: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    tensor: tl.tensor,
    domain: tl.constexpr,
) -> tl.tensor:
    """`_philox` of blocks that are 64-bit, each with a high half of its own."""
    high = (blocks >> 32).to(tl.uint32)
    return _philox(blocks.to(tl.uint32), high, seed_low, seed_high, tensor, domain)


@triton.jit
def _chosen(
    which: tl.tensor, w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor
) -> tl.tensor:
    """Word `which` of the four."""
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def _line(table: tl.tensor, index: tl.tensor) -> tl.tensor:
    """A line of a table, as four uint32."""
    place = table + index * 4
    return (
        tl.load(place).to(tl.uint32, bitcast=True),
        tl.load(place + 1).to(tl.uint32, bitcast=True),
        tl.load(place + 2).to(tl.uint32, bitcast=True),
        tl.load(place + 3).to(tl.uint32, bitcast=True),
    )


# --- where a program's values are ---------------------------------------------------------------


@triton.jit
def _tile(
    program: tl.tensor, start: tl.tensor, size: tl.tensor, columns: tl.tensor,
    first_row: tl.tensor, end_row: tl.tensor, first_column: tl.tensor, end_column: tl.tensor,
    FAMILY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(begin, within, low, high, rows, origin) of a program's values of word 0.

    `program`: its number among those of the tensor, int64. Words: those of word w are 32 w further.

    The tensor's elements are begin + within, [A, B, 32]: int64 [A or 1, 1, 1] and int32, so that an
    address is a sum of 64-bit numbers which few values share and of constants. Those from `low` to
    below `high` within are asked for. rows: int64 [A, 1, 1] (low rank). origin: the tile's first
    element, or column (low rank). [A, B] are [row of a pair, pair], or [row, run of 128 columns]
    (low rank).
    """
    a = tl.arange(0, A)[:, None, None]
    b = tl.arange(0, B)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    if FAMILY == LOW_RANK:
        first = first_column // (B * 128)
        across = (end_column - 1) // (B * 128) - first + 1
        origin = (first + program % across) * (B * 128)
        rows = (first_row + program // across * A) + a.to(tl.int64)
        within = b * 128 + lane
        begin = rows * columns + origin
        low, high = first_column - origin, end_column - origin
    else:
        origin = (start // (A * B * 128) + program) * (A * B * 128)
        rows = tl.zeros([1, 1, 1], tl.int64)
        within = (b * A + a) * 128 + lane
        begin = rows + origin
        low, high = start - origin, start + size - origin
    low = tl.maximum(low, 0).to(tl.int32)
    high = tl.minimum(high, A * B * 128).to(tl.int32)
    return begin, within, low, high, rows, origin


@triton.jit
def _is_whole(
    low: tl.tensor, high: tl.tensor, rows: tl.tensor, end_row: tl.tensor,
    FAMILY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Whether all of a program's values are asked for: then no access needs a mask."""
    if FAMILY == LOW_RANK:
        return (high - low == B * 128) & (tl.max(tl.ravel(rows), axis=0) < end_row)
    else:
        return high - low == A * B * 128


@triton.jit
def _inside(
    within: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    rows: tl.tensor,
    end_row: tl.tensor,
    FAMILY: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """Which values of word W are asked for."""
    inside = (within + 32 * W >= low) & (within + 32 * W < high)
    if FAMILY == LOW_RANK:
        inside = inside & (rows < end_row)
    return inside


# --- noise --------------------------------------------------------------------------------------


@triton.jit
def _normals(radius_word: tl.tensor, angle_word: tl.tensor) -> tl.tensor:
    """`spec.box_muller`, operation by operation."""
    odd = ((radius_word >> 1) | 1).to(tl.int32, bitcast=True).to(tl.float32)
    shifted = odd.to(tl.uint32, bitcast=True) + _ONE_MINUS_SQRT_HALF
    exponent = (158 - (shifted >> 23)).to(tl.int32).to(tl.float32)
    mantissa = ((shifted & 0x007FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True)
    x = mantissa - 1.0
    x2 = x * x
    x4 = x2 * x2
    low = (x * _L1 + _L0) + x2 * (x * _L3 + _L2)
    high = (x * _L5 + _L4) + x2 * ((x * _L7 + _L6) + x2 * _L8)
    radius = tl.sqrt_rn(exponent * _TWO_LN2 + x * (low + x4 * high))
    y = ((angle_word << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_TO_MINUS_31
    y2 = y * y
    sine = y * (_S0 + y2 * (_S1 + y2 * (_S2 + y2 * _S3)))
    cosine = _C0 + y2 * (_C1 + y2 * (_C2 + y2 * _C3))
    flip = (angle_word << 1) & _SIGN
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    p = radius * cosine
    q = radius * sine
    swap = angle_word >= _SIGN
    return tl.where(swap, q, p), tl.where(swap, p, q)


@triton.jit
def _draw(
    seed_low: tl.tensor, seed_high: tl.tensor, tensor: tl.tensor, origin: tl.tensor,
    rows: tl.tensor, FAMILY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A direction in a program's tile, as `_moved` takes it: four words and the rows' word."""
    lane = tl.arange(0, 32)[None, None, :]
    line = origin // 128
    row_word = tl.zeros([1, 1, 1], tl.uint32)
    if FAMILY == GAUSSIAN:
        place = (tl.arange(0, B)[None, :, None] * A + tl.arange(0, A)[:, None, None]) * 32 + lane
        block = line * 32
        low = block.to(tl.uint32) + place.to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = _philox(low, high, seed_low, seed_high, tensor, _DOMAIN_GAUSSIAN)
        n0, n1 = _normals(w0, w1)
        n2, n3 = _normals(w2, w3)
    else:
        SLOTS: tl.constexpr = 32 if FAMILY == RADEMACHER else 8
        WIDTH: tl.constexpr = 32 // SLOTS
        DOMAIN: tl.constexpr = _DOMAIN_RADEMACHER if FAMILY == RADEMACHER else _DOMAIN_COLUMN_SIGNS
        block = line // SLOTS * 32
        low = block.to(tl.uint32) + lane.to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        n0, n1, n2, n3 = _philox(low, high, seed_low, seed_high, tensor, DOMAIN)
        # The slots of this tile's first row or columns come to the top.
        shift = ((line % SLOTS) * WIDTH).to(tl.uint32)
        n0, n1, n2, n3 = n0 << shift, n1 << shift, n2 << shift, n3 << shift
        if FAMILY == LOW_RANK:
            blocks = (rows >> 10) * 32 + (rows & 31)
            r0, r1, r2, r3 = _blocks(blocks, seed_low, seed_high, tensor, _DOMAIN_ROW_SIGNS)
            row_word = _chosen((rows >> 5) & 3, r0, r1, r2, r3)
            row_word = row_word << (((rows >> 7) & 7) * 4).to(tl.uint32)
    return n0, n1, n2, n3, row_word


@triton.jit
def _flipped(bits: tl.tensor, word: tl.tensor) -> tl.tensor:
    """The bits of a float, its sign flipped where the top bit of `word` is 1."""
    return bits ^ (word & _SIGN)


@triton.jit
def _signed(bits: tl.tensor, word: tl.tensor) -> tl.tensor:
    """`_flipped` as a float."""
    return _flipped(bits, word).to(tl.float32, bitcast=True)


@triton.jit
def _moved(
    acc: tl.tensor, noise: tl.tensor, row_word: tl.tensor, coefficient: tl.tensor,
    FAMILY: tl.constexpr, RANK: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc + fl(coefficient * z) for one word; `coefficient` as the bits of a float."""
    if FAMILY == GAUSSIAN:
        product = coefficient.to(tl.float32, bitcast=True) * noise
    elif FAMILY == RADEMACHER:
        slot = tl.arange(0, B)[None, :, None] * A + tl.arange(0, A)[:, None, None]
        product = _signed(coefficient, noise << slot.to(tl.uint32))
    else:
        # The row's sign goes into the constant first, once for all columns.
        column_word = noise << (tl.arange(0, B)[None, :, None] * 4).to(tl.uint32)
        if RANK == 1:
            product = _signed(_flipped(coefficient, row_word), column_word)
        else:
            # Sums of a few +-1 / sqrt(rank) are exact, and a zero is +0.
            SCALE: tl.constexpr = 0x3F3504F3 if RANK == 2 else 0x3F000000
            unit = tl.full((), SCALE, tl.uint32)
            z = _signed(_flipped(unit, row_word), column_word)
            z += _signed(_flipped(unit, row_word << 1), column_word << 1)
            if RANK == 4:
                z += _signed(_flipped(unit, row_word << 2), column_word << 2)
                z += _signed(_flipped(unit, row_word << 3), column_word << 3)
            product = coefficient.to(tl.float32, bitcast=True) * z
    return acc + product


# --- storage ------------------------------------------------------------------------------------


@triton.jit
def _widened(stored: tl.tensor, STORAGE: tl.constexpr) -> tl.tensor:
    """What is stored, as float32, exactly."""
    if STORAGE == BFLOAT16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif STORAGE == FLOAT16:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def _narrowed(value: tl.tensor, STORAGE: tl.constexpr) -> tl.tensor:
    """The inverse of `_widened`, for values that the storage type represents."""
    if STORAGE == BFLOAT16:
        return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)
    elif STORAGE == FLOAT16:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return value


@triton.jit
def _rounding_words(
    seed_low: tl.tensor, seed_high: tl.tensor, tensor: tl.tensor, origin: tl.tensor,
    STORAGE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `_rounded` needs for whole row pairs: a tensor per word, [1, B, 32] or [A, B, 32]."""
    HALVES: tl.constexpr = STORAGE == BFLOAT16
    DOMAIN: tl.constexpr = _DOMAIN_ROUNDING if HALVES else _DOMAIN_ROUNDING_FLOAT16
    place = tl.arange(0, B)[None, :, None]
    block = origin // 256 * 32
    if not HALVES:
        place = place * A + tl.arange(0, A)[:, None, None]
        block = origin // 128 * 32
    place = place * 32 + tl.arange(0, 32)[None, None, :]
    low = block.to(tl.uint32) + place.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return _philox(low, high, seed_low, seed_high, tensor, DOMAIN)


@triton.jit
def _rounding_word(
    seed_low: tl.tensor, seed_high: tl.tensor, tensor: tl.tensor, element: tl.tensor,
    STORAGE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `_rounded` needs for any elements, whose rows begin anywhere: one Philox block each."""
    line = element >> 7
    if STORAGE == BFLOAT16:
        blocks = (line >> 1) * 32 + (element & 31)
        w0, w1, w2, w3 = _blocks(blocks, seed_low, seed_high, tensor, _DOMAIN_ROUNDING)
        word = _chosen((element >> 5) & 3, w0, w1, w2, w3) << ((line & 1) * 16).to(tl.uint32)
    else:
        blocks = line * 32 + (element & 31)
        w0, w1, w2, w3 = _blocks(blocks, seed_low, seed_high, tensor, _DOMAIN_ROUNDING_FLOAT16)
        word = _chosen((element >> 5) & 3, w0, w1, w2, w3)
    return word


@triton.jit
def _rounded(
    value: tl.tensor, word: tl.tensor,
    FAMILY: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr, A: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A float32 rounded to what the storage type represents (arithmetic standard, `round`)."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    if STORAGE == BFLOAT16:
        if STOCHASTIC:
            if FAMILY != LOW_RANK:
                word = word << (tl.arange(0, A)[:, None, None] * 16).to(tl.uint32)
            addend = word >> 16
        else:
            addend = 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(magnitude < _INFINITY, bits + addend, bits) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    elif STORAGE == FLOAT16:
        # From 2**-14 on, 13 bits of the significand go; below, float16 is in units of 2**-24.
        small = magnitude < 0x38800000
        units = tl.where(small, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
        if STOCHASTIC:
            addend = word >> 19
            whole = units.to(tl.int32).to(tl.float32)
            uniform = (word >> 8).to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-24)
            whole = tl.where(uniform < units - whole, whole + 1.0, whole)
        else:
            addend = 0x0FFF + ((bits >> 13) & 1)
            # Above 2**23, float32 has no fractions: the addition rounds, ties to even.
            whole = (units + 8388608.0) - 8388608.0
        normal = (magnitude + addend) & 0xFFFFE000
        normal = tl.where(normal < 0x47800000, normal, _INFINITY)
        normal = tl.where(magnitude > _INFINITY, magnitude, normal)
        tiny = (whole * (2.0**-24)).to(tl.uint32, bitcast=True)
        return (tl.where(small, tiny, normal) | (bits & _SIGN)).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def _all_rounding_words(
    seed_low: tl.tensor, seed_high: tl.tensor, tensor: tl.tensor, origin: tl.tensor,
    element: tl.tensor,
    FAMILY: tl.constexpr, STORAGE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `_rounded` needs, for each of the four words."""
    if FAMILY == LOW_RANK:
        return (
            _rounding_word(seed_low, seed_high, tensor, element, STORAGE),
            _rounding_word(seed_low, seed_high, tensor, element + 32, STORAGE),
            _rounding_word(seed_low, seed_high, tensor, element + 64, STORAGE),
            _rounding_word(seed_low, seed_high, tensor, element + 96, STORAGE),
        )
    else:
        return _rounding_words(seed_low, seed_high, tensor, origin, STORAGE, A, B)


@triton.jit
def _all_rounded(
    v0: tl.tensor, v1: tl.tensor, v2: tl.tensor, v3: tl.tensor,
    seed_low: tl.tensor, seed_high: tl.tensor, tensor: tl.tensor, origin: tl.tensor,
    element: tl.tensor, FAMILY: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """All four words of a tile, `_rounded` with bits made here."""
    r0, r1, r2, r3 = seed_low, seed_low, seed_low, seed_low
    if STOCHASTIC:
        r0, r1, r2, r3 = _all_rounding_words(
            seed_low, seed_high, tensor, origin, element, FAMILY, STORAGE, A, B
        )
    return (
        _rounded(v0, r0, FAMILY, STORAGE, STOCHASTIC, A),
        _rounded(v1, r1, FAMILY, STORAGE, STOCHASTIC, A),
        _rounded(v2, r2, FAMILY, STORAGE, STOCHASTIC, A),
        _rounded(v3, r3, FAMILY, STORAGE, STOCHASTIC, A),
    )


@triton.jit
def _read(
    base: tl.tensor, begin: tl.tensor, within: tl.tensor, low: tl.tensor, high: tl.tensor,
    rows: tl.tensor, end_row: tl.tensor, whole: tl.tensor,
    FAMILY: tl.constexpr, STORAGE: tl.constexpr, W: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The values of word W as float32; zeros where nothing is asked for."""
    if whole:
        stored = tl.load(base + begin + (within + 32 * W))
    else:
        mask = _inside(within, low, high, rows, end_row, FAMILY, W)
        stored = tl.load(base + begin + (within + 32 * W), mask=mask, other=0)
    return _widened(stored, STORAGE)


@triton.jit
def _write(
    out: tl.tensor, value: tl.tensor, begin: tl.tensor, within: tl.tensor, low: tl.tensor,
    high: tl.tensor, rows: tl.tensor, end_row: tl.tensor, whole: tl.tensor,
    FAMILY: tl.constexpr, STORAGE: tl.constexpr, W: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    stored = _narrowed(value, STORAGE)
    if whole:
        tl.store(out + begin + (within + 32 * W), stored)
    else:
        mask = _inside(within, low, high, rows, end_row, FAMILY, W)
        tl.store(out + begin + (within + 32 * W), stored, mask=mask)


@triton.jit
def _magnitude_of(value: tl.tensor) -> tl.tensor:
    return (value.to(tl.uint32, bitcast=True) & _MAGNITUDE).to(tl.int32)


@triton.jit
def _first_bad(value: tl.tensor, element: tl.tensor, mask: tl.tensor, W: tl.constexpr) -> tl.tensor:
    """The least index of a value of word W that is asked for and not finite."""
    bad = mask & (_magnitude_of(value) >= _INFINITY)
    return tl.min(tl.ravel(tl.where(bad, element + 32 * W, _NO_ELEMENT)), axis=0)


@triton.jit
def _largest(v0: tl.tensor, v1: tl.tensor, v2: tl.tensor, v3: tl.tensor) -> tl.tensor:
    """The largest of four magnitudes, as bits: integers order as magnitudes do, NaN on top."""
    return tl.maximum(
        tl.maximum(_magnitude_of(v0), _magnitude_of(v1)),
        tl.maximum(_magnitude_of(v2), _magnitude_of(v3)),
    )


@triton.jit
def _note_bad(
    bad: tl.tensor, v0: tl.tensor, v1: tl.tensor, v2: tl.tensor, v3: tl.tensor,
    element: tl.tensor, within: tl.tensor, low: tl.tensor, high: tl.tensor,
    rows: tl.tensor, end_row: tl.tensor, FAMILY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Leave the index of the first of these values that is NaN or infinite in `bad`."""
    first = _first_bad(v0, element, _inside(within, low, high, rows, end_row, FAMILY, 0), 0)
    at = _first_bad(v1, element, _inside(within, low, high, rows, end_row, FAMILY, 1), 1)
    first = tl.minimum(first, at)
    at = _first_bad(v2, element, _inside(within, low, high, rows, end_row, FAMILY, 2), 2)
    first = tl.minimum(first, at)
    at = _first_bad(v3, element, _inside(within, low, high, rows, end_row, FAMILY, 3), 3)
    first = tl.minimum(first, at)
    tl.atomic_min(bad, first)


# --- kernels ------------------------------------------------------------------------------------

_NUMBERS: Final = [
    "pairs", "commits", "stride", "place", "tensor", "start", "size", "columns",
    "first_row", "end_row", "first_column", "end_column", "base_rows",
]  # fmt: skip
_POINTERS: Final = [
    "out", "base", "table", "bad", "looked_up", "seeds", "tensors", "owners",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def apply(
    out: tl.tensor, base: tl.tensor, table: tl.tensor, bad: tl.tensor,
    pairs: tl.int64, commits: tl.int64, tensor: tl.int64, start: tl.int64, size: tl.int64,
    columns: tl.int64, first_row: tl.int64, end_row: tl.int64,
    first_column: tl.int64, end_column: tl.int64,
    FAMILY: tl.constexpr, RANK: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """out = base + commits, rounded at each commit's end.

    `table`: a line for each pair (seed low, seed high, coefficient), then one for each commit
    (rounding seed low, high, number of pairs up to its end, decay).
    """
    tensor_word = tensor.to(tl.uint32)
    begin, within, low, high, rows, origin = _tile(
        tl.program_id(0).to(tl.int64), start, size, columns,
        first_row, end_row, first_column, end_column, FAMILY, A, B,
    )  # fmt: skip
    element = begin + within
    whole = _is_whole(low, high, rows, end_row, FAMILY, A, B)
    read = base - start
    a0 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
    a1 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
    a2 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
    a3 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
    for commit in range(commits.to(tl.int32)):
        line = pairs.to(tl.int32) + commit
        rounding_low, rounding_high, end, decay = _line(table, line)
        last = end.to(tl.int32, bitcast=True)
        # Read again, not carried on: Triton 3.6 and 3.7 take a bound that a loop carries for its
        # first value.
        first = tl.load(table + (line - 1) * 4 + 2, mask=commit > 0, other=0)
        # Times 1 is exact; a branch around it would take a third more registers.
        factor = decay.to(tl.float32, bitcast=True)
        a0, a1, a2, a3 = a0 * factor, a1 * factor, a2 * factor, a3 * factor
        for pair in range(first, last):
            seed_low, seed_high, coefficient, _ = _line(table, pair)
            n0, n1, n2, n3, row_word = _draw(
                seed_low, seed_high, tensor_word, origin, rows, FAMILY, A, B
            )
            a0 = _moved(a0, n0, row_word, coefficient, FAMILY, RANK, A, B)
            a1 = _moved(a1, n1, row_word, coefficient, FAMILY, RANK, A, B)
            a2 = _moved(a2, n2, row_word, coefficient, FAMILY, RANK, A, B)
            a3 = _moved(a3, n3, row_word, coefficient, FAMILY, RANK, A, B)
        if STORAGE != FLOAT32:
            a0, a1, a2, a3 = _all_rounded(
                a0, a1, a2, a3, rounding_low, rounding_high, tensor_word, origin, element,
                FAMILY, STORAGE, STOCHASTIC, A, B,
            )  # fmt: skip
    write = out - start
    _write(write, a0, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
    _write(write, a1, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
    _write(write, a2, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
    _write(write, a3, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
    if tl.max(tl.ravel(_largest(a0, a1, a2, a3)), axis=0) >= _INFINITY:
        _note_bad(bad, a0, a1, a2, a3, element, within, low, high, rows, end_row, FAMILY)


@triton.jit
def _lines(table: tl.tensor) -> tl.tensor:
    """(pairs, draws, the lines after the first one) of a table for a fan."""
    return tl.load(table), tl.load(table + 1), table + 4


@triton.jit
def _fan_tile(
    program: tl.tensor, out: tl.tensor, stride: tl.tensor, base: tl.tensor, table: tl.tensor,
    bad: tl.tensor, tensor: tl.tensor, start: tl.tensor, size: tl.tensor, columns: tl.tensor,
    first_row: tl.tensor, end_row: tl.tensor, first_column: tl.tensor, end_column: tl.tensor,
    FAMILY: tl.constexpr, RANK: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SHARED_BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """What `fan` does in one program."""
    tensor_word = tensor.to(tl.uint32)
    pairs, draws, table = _lines(table)
    outputs = pairs + draws
    read = base - start
    write = out - start
    begin, within, low, high, rows, origin = _tile(
        program, start, size, columns, first_row, end_row, first_column, end_column, FAMILY, A, B
    )
    element = begin + within
    whole = _is_whole(low, high, rows, end_row, FAMILY, A, B)
    a0 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
    a1 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
    a2 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
    a3 = _read(read, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
    for pair in range(pairs):
        seed_low, seed_high, coefficient, _ = _line(table, pair)
        n0, n1, n2, n3, row_word = _draw(
            seed_low, seed_high, tensor_word, origin, rows, FAMILY, A, B
        )
        a0 = _moved(a0, n0, row_word, coefficient, FAMILY, RANK, A, B)
        a1 = _moved(a1, n1, row_word, coefficient, FAMILY, RANK, A, B)
        a2 = _moved(a2, n2, row_word, coefficient, FAMILY, RANK, A, B)
        a3 = _moved(a3, n3, row_word, coefficient, FAMILY, RANK, A, B)
    ROUNDED: tl.constexpr = STORAGE != FLOAT32
    MADE_ONCE: tl.constexpr = SHARED_BITS and ROUNDED and STOCHASTIC
    if MADE_ONCE:
        bits_low, bits_high, _, _ = _line(table, outputs)
        r0, r1, r2, r3 = _all_rounding_words(
            bits_low, bits_high, tensor_word, origin, element, FAMILY, STORAGE, A, B
        )
    largest = tl.zeros([A, B, 32], tl.int32)
    for draw in range(draws):
        seed_low, seed_high, first, end = _line(table, pairs + draw)
        n0, n1, n2, n3, row_word = _draw(
            seed_low, seed_high, tensor_word, origin, rows, FAMILY, A, B
        )
        for g in range(first.to(tl.int32, bitcast=True), end.to(tl.int32, bitcast=True)):
            rounding_low, rounding_high, coefficient, moves = _line(table, outputs + g)
            v0, v1, v2, v3 = a0, a1, a2, a3
            if moves != 0:
                v0 = _moved(v0, n0, row_word, coefficient, FAMILY, RANK, A, B)
                v1 = _moved(v1, n1, row_word, coefficient, FAMILY, RANK, A, B)
                v2 = _moved(v2, n2, row_word, coefficient, FAMILY, RANK, A, B)
                v3 = _moved(v3, n3, row_word, coefficient, FAMILY, RANK, A, B)
            if MADE_ONCE:
                v0 = _rounded(v0, r0, FAMILY, STORAGE, STOCHASTIC, A)
                v1 = _rounded(v1, r1, FAMILY, STORAGE, STOCHASTIC, A)
                v2 = _rounded(v2, r2, FAMILY, STORAGE, STOCHASTIC, A)
                v3 = _rounded(v3, r3, FAMILY, STORAGE, STOCHASTIC, A)
            elif ROUNDED:
                v0, v1, v2, v3 = _all_rounded(
                    v0, v1, v2, v3, rounding_low, rounding_high, tensor_word, origin, element,
                    FAMILY, STORAGE, STOCHASTIC, A, B,
                )  # fmt: skip
            to = write + stride * g
            _write(to, v0, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
            _write(to, v1, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
            _write(to, v2, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
            _write(to, v3, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
            largest = tl.maximum(largest, _largest(v0, v1, v2, v3))
    # To say where inside the loop would keep indices and masks in registers that it needs.
    if tl.max(tl.ravel(largest), axis=0) >= _INFINITY:
        _, _, _, end = _line(table, outputs - 1)
        for g in range(end.to(tl.int32, bitcast=True)):
            to = write + stride * g
            v0 = _read(to, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
            v1 = _read(to, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
            v2 = _read(to, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
            v3 = _read(to, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
            _note_bad(bad, v0, v1, v2, v3, element, within, low, high, rows, end_row, FAMILY)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def fan(
    out: tl.tensor, stride: tl.int64, base: tl.tensor, table: tl.tensor, bad: tl.tensor,
    place: tl.int64, tensor: tl.int64, start: tl.int64, size: tl.int64, columns: tl.int64,
    first_row: tl.int64, end_row: tl.int64, first_column: tl.int64, end_column: tl.int64,
    FAMILY: tl.constexpr, RANK: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SHARED_BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Several outputs, `stride` elements apart, from one reading of the base.

    `table`: a line with the numbers of pairs and of draws; a line for each pair that all outputs
    begin with (seed low, seed high, coefficient); one for each further direction, a draw (seed low,
    high, its first output, the one after its last); and one for each output (rounding seed low,
    high, coefficient of its direction, the number of that draw plus one, or 0 for none).
    SHARED_BITS: all rounding seeds are the same. `bad[place]` gets the first index that is not
    finite.
    """
    _fan_tile(
        tl.program_id(0).to(tl.int64), out, stride, base, table, bad + place, tensor, start, size,
        columns, first_row, end_row, first_column, end_column,
        FAMILY, RANK, STORAGE, STOCHASTIC, SHARED_BITS, A, B,
    )  # fmt: skip


@triton.jit
def _address(number: tl.tensor, STORAGE: tl.constexpr) -> tl.tensor:
    """The pointer to stored weights that a 64-bit number is."""
    if STORAGE == FLOAT32:
        return number.to(tl.pointer_type(tl.float32))
    else:
        return number.to(tl.pointer_type(tl.int16))


@triton.jit(do_not_specialize_on_alignment=_POINTERS)
def fans(
    tensors: tl.tensor, owners: tl.tensor, table: tl.tensor, bad: tl.tensor,
    FAMILY: tl.constexpr, RANK: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SHARED_BITS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """The `fan` of several whole tensors, whose outputs lie one after the other.

    `tensors`: for each its first program, the addresses of its outputs and of its base, its number,
    its size and columns, and its place in `bad`. `owners`: for each program, the index of its
    tensor.
    """
    tensor = tensors + tl.load(owners + tl.program_id(0)).to(tl.int64) * 8
    size = tl.load(tensor + 4)
    columns = tl.load(tensor + 5)
    nothing = tl.zeros([], tl.int64)
    _fan_tile(
        tl.program_id(0).to(tl.int64) - tl.load(tensor), _address(tl.load(tensor + 1), STORAGE),
        size, _address(tl.load(tensor + 2), STORAGE), table, bad + tl.load(tensor + 6),
        tl.load(tensor + 3), nothing, size, columns, nothing, size // columns, nothing, columns,
        FAMILY, RANK, STORAGE, STOCHASTIC, SHARED_BITS, A, B,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def look_up(
    out: tl.tensor, base: tl.tensor, table: tl.tensor, bad: tl.tensor, place: tl.int64,
    tensor: tl.int64, columns: tl.int64, looked_up: tl.tensor, base_rows: tl.int64,
    FAMILY: tl.constexpr, RANK: tl.constexpr, STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Rows of a base, one after the other, each output of `fan`'s `table` by rows of its own.

    `looked_up` and `out` have those of the first output first. The rows of one output are axis 0 of
    the launch, the only one that CUDA lets be longer than 65,535; a row's programs are axis 1, the
    outputs axis 2. `bad[place]` gets the first index that is not finite, or the base's size for a
    row that is not there.
    """
    tensor_word = tensor.to(tl.uint32)
    pairs, draws, table = _lines(table)
    output = tl.program_id(2)
    place_of_row = output.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tl.load(looked_up + place_of_row)
    known = (row >= 0) & (row < base_rows)
    if not known:
        tl.atomic_min(bad + place, base_rows * columns)
    start = row * columns
    size = tl.where(known, columns, 0)
    end_row = tl.where(known, row + 1, row)
    write = out + (place_of_row * columns - start)
    begin, within, low, high, rows, origin = _tile(
        tl.program_id(1).to(tl.int64), start, size, columns,
        row, end_row, tl.zeros([], tl.int64), columns, FAMILY, A, B,
    )  # fmt: skip
    element = begin + within
    whole = _is_whole(low, high, rows, end_row, FAMILY, A, B)
    a0 = _read(base, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
    a1 = _read(base, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
    a2 = _read(base, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
    a3 = _read(base, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
    rounding_low, rounding_high, own, draw = _line(table, pairs + draws + output)
    draw = draw.to(tl.int32, bitcast=True)
    for pair in range(pairs + tl.minimum(draw, 1)):
        # The output's own direction comes last.
        line = tl.where(pair < pairs, pair, pairs + draw - 1)
        seed_low, seed_high, coefficient, _ = _line(table, line)
        coefficient = tl.where(pair < pairs, coefficient, own)
        n0, n1, n2, n3, row_word = _draw(
            seed_low, seed_high, tensor_word, origin, rows, FAMILY, A, B
        )
        a0 = _moved(a0, n0, row_word, coefficient, FAMILY, RANK, A, B)
        a1 = _moved(a1, n1, row_word, coefficient, FAMILY, RANK, A, B)
        a2 = _moved(a2, n2, row_word, coefficient, FAMILY, RANK, A, B)
        a3 = _moved(a3, n3, row_word, coefficient, FAMILY, RANK, A, B)
    if STORAGE != FLOAT32:
        a0, a1, a2, a3 = _all_rounded(
            a0, a1, a2, a3, rounding_low, rounding_high, tensor_word, origin, element,
            FAMILY, STORAGE, STOCHASTIC, A, B,
        )  # fmt: skip
    _write(write, a0, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 0)
    _write(write, a1, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 1)
    _write(write, a2, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 2)
    _write(write, a3, begin, within, low, high, rows, end_row, whole, FAMILY, STORAGE, 3)
    if tl.max(tl.ravel(_largest(a0, a1, a2, a3)), axis=0) >= _INFINITY:
        _note_bad(bad + place, a0, a1, a2, a3, element, within, low, high, rows, end_row, FAMILY)


@triton.jit(do_not_specialize_on_alignment=_POINTERS)
def signs(
    out: tl.tensor, seeds: tl.tensor, tensors: tl.tensor, owners: tl.tensor,
    DOMAIN: tl.constexpr, RANK: tl.constexpr,
) -> None:  # fmt: skip
    """Signs k of row (or column) i of several tensors under `seeds[s]`; s is axis 1 of the launch.

    `tensors`: for each its first program, the index in `out` of its signs, [seeds, RANK, length],
    its number and its length. `owners`: for each program of axis 0, the index of its tensor.
    """
    seed = tl.load(seeds + tl.program_id(1)).to(tl.uint64, bitcast=True)
    tensor = tensors + tl.load(owners + tl.program_id(0)).to(tl.int64) * 4
    length = tl.load(tensor + 3)
    slot = tl.arange(0, 8)[:, None]
    lane = tl.arange(0, 32)[None, :]
    group = tl.program_id(0).to(tl.int64) - tl.load(tensor)
    blocks = group * 32 + lane.to(tl.int64)
    w0, w1, w2, w3 = _blocks(
        blocks, seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
        tl.load(tensor + 2).to(tl.uint32), DOMAIN,
    )  # fmt: skip
    place = out + tl.load(tensor + 1) + tl.program_id(1).to(tl.int64) * RANK * length
    first = group * 1024 + slot * 128 + lane
    for k in tl.static_range(RANK):
        shift = (slot * 4 + k).to(tl.uint32)
        _store_signs(place + k * length, w0 << shift, first, length)
        _store_signs(place + k * length, w1 << shift, first + 32, length)
        _store_signs(place + k * length, w2 << shift, first + 64, length)
        _store_signs(place + k * length, w3 << shift, first + 96, length)


@triton.jit
def _store_signs(
    place: tl.tensor, word: tl.tensor, index: tl.tensor, length: tl.tensor
) -> tl.tensor:
    value = tl.where(word >= _SIGN, -1.0, 1.0)
    tl.store(place + index, value.to(place.dtype.element_ty), mask=index < length)


# --- launches -----------------------------------------------------------------------------------

_FAMILIES: Final = {
    spec.Distribution.RADEMACHER: RADEMACHER.value,
    spec.Distribution.GAUSSIAN: GAUSSIAN.value,
}
_STORAGES: Final = {
    torch.float32: FLOAT32.value,
    torch.bfloat16: BFLOAT16.value,
    torch.float16: FLOAT16.value,
}


def options(kernel: str, distribution: spec.Distribution) -> dict[str, Any]:
    """How a kernel is compiled: one warp a program, and no fused multiply-add."""
    chosen: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
    if kernel != "apply" and distribution is spec.Distribution.GAUSSIAN:
        # Left alone, the assembler spills to stay at 128. (Others take fewer registers if left
        # alone.)
        chosen["maxnreg"] = 160
    elif kernel == "fans" and distribution.rank:
        chosen["maxnreg"] = 232  # here it would spill to stay at 168
    return chosen


def constants(
    kernel: str, distribution: spec.Distribution, dtype: torch.dtype, stochastic: bool
) -> dict[str, Any]:
    """The compile-time arguments that all kernels of weights have, tile shapes among them.

    The shapes are chosen by the assembly (docs/decisions/0011).
    """
    rounded = dtype != torch.float32 and stochastic
    if distribution.rank:
        large = kernel == "apply" and dtype == torch.float32
        a, b = (2, 2) if rounded else (4, 4) if large else (4, 2)
    elif distribution is spec.Distribution.GAUSSIAN or (
        kernel != "apply" and rounded and dtype == torch.float16
    ):
        a, b = 2, 2
    elif kernel != "apply" or rounded:
        a, b = 2, 4
    else:
        a, b = 2, 16 if dtype == torch.float32 else 8
    return {
        "FAMILY": _FAMILIES.get(distribution, LOW_RANK.value),
        "RANK": distribution.rank,
        "STORAGE": _STORAGES[dtype],
        "STOCHASTIC": rounded,
        "A": a,
        "B": b,
    }


Launch = Callable[[], object]
"""Launches one kernel with the arguments that it was prepared with, and does no more."""
_compiled: dict[tuple[object, ...], Any] = {}
_LAUNCHES_TAKE_CONSTANTS: Final = [int(part) for part in triton.__version__.split(".")[:2]] >= [
    3,
    3,
]
"""Whether Triton's launcher is also given the compile-time arguments, and passes over them."""


def _prepared(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[torch.Tensor | int],
    constants: dict[str, Any],
    options: dict[str, Any],
    keeps: Sequence[torch.Tensor] = (),
) -> Launch:
    """A launch of `kernel` on the current device, with the memory that `arguments` have now.

    It keeps the memory of `keeps`; whoever launches keeps the other. Nothing in these kernels
    depends on an argument's value, so one compilation serves all.
    """
    if not isinstance(kernel, triton.JITFunction):  # Triton interprets
        return functools.partial(kernel[grid], *arguments, **constants, **options)
    driver = triton.runtime.driver.active
    device, stream_of = driver.get_current_device(), driver.get_current_stream
    stored = [value.dtype for value in arguments if isinstance(value, torch.Tensor)]
    key = (kernel, device, stored[0], *constants.items())
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants, **options)
        # Triton may compile in another thread.
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        _compiled[key] = compiled
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    if _LAUNCHES_TAKE_CONSTANTS:
        values += constants.values()
    x, y, z = grid

    def launch(keeps: object = keeps) -> None:
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *values)

    return launch


def apply_launches(
    out: torch.Tensor,
    base: torch.Tensor,
    table: torch.Tensor,
    pairs: int,
    commits: int,
    bad: torch.Tensor,
    operands: Operands,
) -> list[Launch]:
    """One launch of `apply`, or up to three if a low-rank slice begins or ends inside a row."""
    columns = operands.columns_of(out)
    chosen = constants("apply", operands.distribution, base.dtype, operands.stochastic)
    fixed = (_stored(out), _stored(base), table, bad, pairs, commits)
    place = (operands.tensor_id, operands.start, base.numel(), columns)
    return [
        _prepared(
            apply, (programs, 1, 1), (*fixed, *place, *box), chosen,
            options("apply", operands.distribution),
        )
        for box, programs in _boxes(operands.start, base.numel(), columns, chosen)
    ]  # fmt: skip


def fan_launches(
    first_out: torch.Tensor,
    stride: int,
    base: torch.Tensor,
    table: torch.Tensor,
    shared_bits: bool,
    bad: torch.Tensor,
    place: int,
    operands: Operands,
) -> list[Launch]:
    """As many launches of `fan` as `apply_launches` has."""
    columns = operands.columns_of(base)
    chosen = _constants_of_fans(base, operands, shared_bits)
    fixed = (_stored(first_out), stride, _stored(base), table, bad, place)
    where = (operands.tensor_id, operands.start, base.numel(), columns)
    return [
        _prepared(
            fan, (programs, 1, 1), (*fixed, *where, *box), chosen,
            options("fan", operands.distribution),
        )
        for box, programs in _boxes(operands.start, base.numel(), columns, chosen)
    ]  # fmt: skip


def fans_launch(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor, int, Operands]],
    table: torch.Tensor,
    shared_bits: bool,
    bad: torch.Tensor,
) -> Launch:
    """One launch for several whole tensors of one dtype and one noise.

    tensors: for each its outputs, contiguous [outputs, ...]; its base; its place in `bad`.
    """
    _, base, _, first = tensors[0]
    chosen = _constants_of_fans(base, first, shared_bits)
    lines: list[list[int]] = []
    owners: list[int] = []
    for index, (outs, base, place, operands) in enumerate(tensors):
        size, columns = base.numel(), operands.columns_of(base)
        [(_, programs)] = _boxes(0, size, columns, chosen)
        addresses = outs.data_ptr(), base.data_ptr()
        lines.append([len(owners), *addresses, operands.tensor_id, size, columns, place, 0])
        owners += [index] * programs
    described = _described(lines, owners, bad.device)
    return _prepared(
        fans, (len(owners), 1, 1), (*described, table, bad), chosen,
        options("fans", first.distribution), described,
    )  # fmt: skip


def look_up_launch(
    outs: torch.Tensor,
    base: torch.Tensor,
    table: torch.Tensor,
    bad: torch.Tensor,
    place: int,
    operands: Operands,
    rows: torch.Tensor,
) -> Launch:
    """One launch that looks up `rows`, contiguous int64 [outputs, rows], for all outputs."""
    columns = operands.columns_of(base)
    chosen = constants("look_up", operands.distribution, base.dtype, operands.stochastic)
    grid = rows.shape[1], _programs_of_any_row(columns, chosen), rows.shape[0]
    return _prepared(
        look_up, grid,
        (_stored(outs), _stored(base), table, bad, place, operands.tensor_id, columns, rows,
         base.numel() // columns),
        chosen, options("look_up", operands.distribution),
    )  # fmt: skip


def signs_launch(
    out: torch.Tensor,
    seeds: torch.Tensor,
    tensors: Sequence[tuple[int, int]],
    domain: int,
    rank: int,
) -> Launch:
    """One launch for the signs, 1 or -1, of several tensors, each (number, length).

    out: those of one tensor after the other, contiguous [seeds, rank, length], of any float type.
    seeds: int64, the bits of the seeds.
    """
    lines: list[list[int]] = []
    owners: list[int] = []
    offset = 0
    for index, (tensor_id, length) in enumerate(tensors):
        lines.append([len(owners), offset, tensor_id, length])
        owners += [index] * -(-length // 1024)
        offset += seeds.numel() * rank * length
    described = _described(lines, owners, out.device)
    return _prepared(
        signs, (len(owners), seeds.numel(), 1), (out, seeds, *described),
        {"DOMAIN": domain, "RANK": rank}, {"num_warps": 1, "enable_fp_fusion": False}, described,
    )  # fmt: skip


def _constants_of_fans(base: torch.Tensor, operands: Operands, shared_bits: bool) -> dict[str, Any]:
    chosen = constants("fan", operands.distribution, base.dtype, operands.stochastic)
    tiles = {name: chosen.pop(name) for name in ("A", "B")}
    return {**chosen, "SHARED_BITS": shared_bits, **tiles}


def _described(
    lines: list[list[int]], owners: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tensors` and `owners` as `fans` and `signs` take them; nothing waits for the device."""
    return (
        torch.tensor(lines, dtype=torch.int64).to(device, non_blocking=True),
        torch.tensor(owners, dtype=torch.int32).to(device, non_blocking=True),
    )


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """As the kernels take it: float32, or the bits of bfloat16 and float16."""
    plain = tensor.detach()
    return plain if plain.dtype == torch.float32 else plain.view(torch.int16)


def _shape(chosen: dict[str, Any]) -> tuple[int, int]:
    """(rows of a program's rectangle, its columns); their product is a program's elements."""
    return int(chosen["A"]), int(chosen["B"]) * spec.ROW_ELEMENTS


def _boxes(
    start: int, size: int, columns: int, chosen: dict[str, Any]
) -> list[tuple[tuple[int, int, int, int], int]]:
    """What each launch covers, (first row, end row, first column, end column), and its programs.

    Low-rank directions are made by rectangles: a range that begins or ends inside a row takes more.
    """
    height, width = _shape(chosen)
    if chosen["FAMILY"] != LOW_RANK.value:
        tile, last = height * width, start + size - 1
        return [((0, 0, 0, 0), last // tile - start // tile + 1)]
    first, end = start // columns, (start + size) // columns
    head, tail = start % columns, (start + size) % columns
    boxes = []
    if first == end:
        boxes.append((first, first + 1, head, tail))
    else:
        if head:
            boxes.append((first, first + 1, head, columns))
            first += 1
        if first < end:
            boxes.append((first, end, 0, columns))
        if tail:
            boxes.append((end, end + 1, 0, tail))
    return [
        (box, -(-(box[1] - box[0]) // height) * ((box[3] - 1) // width - box[2] // width + 1))
        for box in boxes
    ]


def _programs_of_any_row(columns: int, chosen: dict[str, Any]) -> int:
    """Enough programs for one row of `columns` elements, wherever it begins."""
    height, width = _shape(chosen)
    if chosen["FAMILY"] == LOW_RANK.value:
        return -(-columns // width)
    tile = height * width
    return (columns + tile - 2) // tile + 1
