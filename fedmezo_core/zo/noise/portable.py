"""Commits applied by plain torch operations, for devices without kernels: the same bits, slowly.

This follows `spec` and the arithmetic standard one operation at a time. 32-bit words are kept in
int64, which every device multiplies alike (modulo 2**64). Each float operation is a torch operation
of its own, so that nothing can fuse a multiplication with an addition: no `alpha=`, no `addcmul`.
Elements are taken a piece at a time, which bounds the memory. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from fedmezo_core.zo.noise import spec
from fedmezo_core.zo.noise.operands import Operands

NO_ELEMENT: Final = 2**63 - 1
"""The index of the first bad element where there is none."""
PIECE_ELEMENTS: Final = 1 << 20
"""Elements that are computed at once; each takes about 200 bytes of scratch."""

_LOW: Final = 0xFFFFFFFF

Pairs = Sequence[tuple[int, float]]
"""Seeds and the coefficients of their directions, which float32 represents."""
PlainCommit = tuple[Pairs, int, float]
"""Pairs, the seed of their rounding, and the decay before them, which float32 represents."""


def philox(blocks: torch.Tensor, seed: int, tensor_id: int, domain: int) -> list[torch.Tensor]:
    """The four words (int64) of each block (int64), by Philox4x32-10 (Salmon et al., SC 2011).

    The counter is (block low, block high, tensor, domain); the key is the seed.
    """
    c0, c1 = blocks & _LOW, blocks >> 32
    c2, c3 = torch.full_like(blocks, tensor_id), torch.full_like(blocks, domain)
    for index in range(10):
        key_0 = (seed + index * 0x9E3779B9) & _LOW
        key_1 = ((seed >> 32) + index * 0xBB67AE85) & _LOW
        product_0, product_1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # The shift brings in sign bits, which the mask drops.
        c0, c1 = (product_1 >> 32 & _LOW) ^ c1 ^ key_0, product_1 & _LOW
        c2, c3 = (product_0 >> 32 & _LOW) ^ c3 ^ key_1, product_0 & _LOW
    return [c0, c1, c2, c3]


def _words(
    elements: torch.Tensor, slots: int, seed: int, tensor_id: int, domain: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(the words of each element's block, which word is the element's, its slot)."""
    row, column = elements >> 7, elements & 127
    block = torch.div(row, slots, rounding_mode="floor") * spec.LANES + (column & 31)
    return philox(block, seed, tensor_id, domain), column >> 5, row % slots


def _chosen(which: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    first = torch.where(which == 0, values[0], values[1])
    second = torch.where(which == 2, values[2], values[3])
    return torch.where(which < 2, first, second)


def noise(
    elements: torch.Tensor,
    seed: int,
    tensor_id: int,
    distribution: spec.Distribution,
    columns: int = 1,
) -> torch.Tensor:
    """z(seed, tensor_id, element) of int64 elements in any order: float32, as of `spec.noise`."""
    if distribution is spec.Distribution.RADEMACHER:
        words, which, slot = _words(elements, 32, seed, tensor_id, spec.DOMAIN_RADEMACHER)
        bit = _chosen(which, words) >> (31 - slot) & 1
        return (1 - 2 * bit).to(torch.float32)
    if distribution is spec.Distribution.GAUSSIAN:
        words, which, _ = _words(elements, 1, seed, tensor_id, spec.DOMAIN_GAUSSIAN)
        normals = [*box_muller(words[0], words[1]), *box_muller(words[2], words[3])]
        return _chosen(which, normals)
    row = torch.div(elements, columns, rounding_mode="floor")
    row_signs = factor_signs(row, seed, tensor_id, spec.DOMAIN_ROW_SIGNS)
    column_signs = factor_signs(elements % columns, seed, tensor_id, spec.DOMAIN_COLUMN_SIGNS)
    rank = distribution.rank
    total = torch.zeros_like(elements)
    for u, v in zip(row_signs[:rank], column_signs[:rank], strict=True):
        total = total + u * v
    return total.to(torch.float32) * float(spec.LOW_RANK_SCALE[rank])


def box_muller(
    radius_word: torch.Tensor, angle_word: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 normals from two uniform words in int64, as `spec.box_muller` gives them."""
    log, sin, cos = ([float(c) for c in series] for series in (spec.LOG, spec.SIN, spec.COS))
    uniform = ((radius_word >> 1) | 1).to(torch.int32).to(torch.float32)
    shifted = uniform.view(torch.int32).to(torch.int64) + (spec.ONE - spec.SQRT_HALF)
    exponent = (158 - (shifted >> 23)).to(torch.float32)
    mantissa = ((shifted & 0x007FFFFF) + spec.SQRT_HALF).to(torch.int32).view(torch.float32)
    x = mantissa - 1.0
    x2 = x * x
    x4 = x2 * x2
    low = (x * log[1] + log[0]) + x2 * (x * log[3] + log[2])
    high = (x * log[5] + log[4]) + x2 * ((x * log[7] + log[6]) + x2 * log[8])
    square = exponent * float(spec.TWO_LN2) + x * (low + x4 * high)
    # torch's sqrt of float32 is not correctly rounded on every CPU; through float64, it is.
    radius = square.to(torch.float64).sqrt().to(torch.float32)
    signed = _wrapped((angle_word << 2 | 2) & _LOW)
    y = signed.to(torch.float32) * float(spec.TWO_TO_MINUS_31)
    y2 = y * y
    sine = y * (sin[0] + y2 * (sin[1] + y2 * (sin[2] + y2 * sin[3])))
    cosine = cos[0] + y2 * (cos[1] + y2 * (cos[2] + y2 * cos[3]))
    cosine = torch.where((angle_word >> 30 & 1) == 1, -cosine, cosine)
    p, q = radius * cosine, radius * sine
    swap = angle_word >> 31 == 1
    return torch.where(swap, q, p), torch.where(swap, p, q)


def factor_signs(
    indices: torch.Tensor, seed: int, tensor_id: int, domain: int
) -> list[torch.Tensor]:
    """The four signs, 1 or -1 (int64), of each row or column that `indices` (int64) names."""
    words, which, slot = _words(indices, 8, seed, tensor_id, domain)
    nibble = _chosen(which, words) >> (28 - 4 * slot) & 0xF
    return [1 - 2 * (nibble >> (3 - k) & 1) for k in range(spec.RANK_MAX)]


def _wrapped(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word in int64 as int32: two's complement."""
    return ((word ^ 0x80000000) - 0x80000000).to(torch.int32)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values, in int64."""
    return value.view(torch.int32).to(torch.int64) & _LOW


def _float(bits: torch.Tensor) -> torch.Tensor:
    """The inverse of `_bits`."""
    return _wrapped(bits).view(torch.float32)


def rounded(
    value: torch.Tensor,
    dtype: torch.dtype,
    stochastic: bool,
    elements: torch.Tensor,
    rounding_seed: int,
    tensor_id: int,
) -> torch.Tensor:
    """float32 `value` rounded to what `dtype` represents (arithmetic standard, `round`).

    elements: int64 indices in the tensor, which choose the random bits under `rounding_seed`.
    """
    if dtype == torch.float32:
        return value
    bits = _bits(value)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        addend = 0x7FFF + (bits >> 16 & 1)
        if stochastic:
            words, which, slot = _words(elements, 2, rounding_seed, tensor_id, spec.DOMAIN_ROUNDING)
            addend = _chosen(which, words) >> (16 - 16 * slot) & 0xFFFF
        return _float(torch.where(magnitude < 0x7F800000, bits + addend, bits) & 0xFFFF0000)
    small = magnitude < 0x38800000
    units = torch.where(small, value.abs(), 0.0) * 2.0**24
    if stochastic:
        domain = spec.DOMAIN_ROUNDING_FLOAT16
        words, which, _ = _words(elements, 1, rounding_seed, tensor_id, domain)
        word = _chosen(which, words)
        addend = word >> 19
        whole = units.floor()
        uniform = (word >> 8).to(torch.float32) * 2.0**-24
        whole = torch.where(uniform < units - whole, whole + 1.0, whole)
    else:
        addend = 0x0FFF + (bits >> 13 & 1)
        whole = units.round()  # ties to even
    normal = magnitude + addend & 0xFFFFE000
    normal = torch.where(normal < 0x47800000, normal, 0x7F800000)
    normal = torch.where(magnitude > 0x7F800000, magnitude, normal)
    tiny = _bits(whole * 2.0**-24)
    return _float(torch.where(small, tiny, normal) | (bits & 0x80000000))


def apply_commits(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[PlainCommit],
    elements: torch.Tensor | int,
    operands: Operands,
    columns: int,
) -> torch.Tensor:
    """out = base + commits; both flat, on one device, of `operands`' tensor.

    elements: the first one's index in the tensor, or int64 indices of all. columns: length of the
    tensor's last dimension. Returns the least index of a result that is NaN or infinite, or
    `NO_ELEMENT`: int64, a tensor without dimensions.
    """
    tensor_id, distribution = operands.tensor_id, operands.distribution
    first_bad = torch.full((), NO_ELEMENT, dtype=torch.int64, device=base.device)
    for begin in range(0, base.numel(), PIECE_ELEMENTS):
        piece = slice(begin, min(begin + PIECE_ELEMENTS, base.numel()))
        if isinstance(elements, int):
            here = torch.arange(piece.start, piece.stop, device=base.device) + elements
        else:
            here = elements[piece]
        value = base[piece].to(torch.float32, copy=True)
        for pairs, rounding_seed, decay in commits:
            if decay != 1.0:
                value = value * decay
            for seed, coefficient in pairs:
                value = value + noise(here, seed, tensor_id, distribution, columns) * coefficient
            value = rounded(value, base.dtype, operands.stochastic, here, rounding_seed, tensor_id)
        out[piece] = value.to(base.dtype)
        bad = torch.where(torch.isfinite(value), NO_ELEMENT, here).min()
        first_bad = torch.minimum(first_bad, bad)
    return first_bad
