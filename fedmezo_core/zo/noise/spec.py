"""The noise standard v1 as obvious, slow NumPy. This file *is* the specification.

Every value is a pure function of (64-bit seed, tensor id, element index); those of the low-rank
families depend on the length of the tensor's last dimension as well. A Philox4x32-10 block (Salmon,
Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four 32-bit words.
Each word is cut into `slots` values, the most significant bits first, laid out so that a *row* of
128 consecutive elements takes the same slot of the four words of 32 blocks:

    element = ((block // 32) * slots + slot) * 128 + word * 32 + block % 32

A row is a run of SIMD registers on a CPU; with a block per lane it is coalesced across a GPU warp.

All arithmetic is on unsigned integers, or on IEEE 754 binary32 with rounding to nearest even after
each single operation and with subnormals kept: NumPy stays in float32 when both operands are
float32, and never fuses.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

Elements = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

NOISE_VERSION: Final = 1
"""Version of the standard: another version means that some value has other bits."""

ELEMENTS_MAX: Final = 2**48
"""Element indices are below this; the largest tensor of a 100 B model ends near 2**33."""
TENSOR_ID_MAX: Final = 2**32 - 1
"""Tensor ids are unsigned 32-bit."""
SEED_MAX: Final = 2**64 - 1
"""Seeds are unsigned 64-bit."""

LANES: Final = 32
"""Blocks that share a row."""
ROW_ELEMENTS: Final = 4 * LANES
"""Consecutive elements that take one slot of 32 blocks."""

DOMAIN_RADEMACHER: Final = 1
DOMAIN_GAUSSIAN: Final = 2
DOMAIN_ROUNDING: Final = 3
DOMAIN_ROW_SIGNS: Final = 4
DOMAIN_COLUMN_SIGNS: Final = 5
DOMAIN_ROUNDING_FLOAT16: Final = 6
"""Fourth counter word: what the block's bits are for."""

RANK_MAX: Final = 4
"""Signs that each row and each column of a matrix has."""


class Distribution(StrEnum):
    """What the perturbation's elements are drawn from; mean 0 and variance 1.

    In the low-rank families a tensor is a matrix, whose columns are its last dimension, and the
    perturbation is the sum of `rank` products of a sign for each row and one for each column.
    """

    RADEMACHER = "rademacher"
    GAUSSIAN = "gaussian"
    LOW_RANK_1 = "low_rank_1"
    LOW_RANK_2 = "low_rank_2"
    LOW_RANK_4 = "low_rank_4"

    @property
    def rank(self) -> int:
        """Rank of a perturbation; 0 for the families whose perturbations have full rank."""
        return _RANKS.get(self, 0)


_RANKS: Final = {
    Distribution.LOW_RANK_1: 1,
    Distribution.LOW_RANK_2: 2,
    Distribution.LOW_RANK_4: 4,
}


def _binary32(*patterns: int) -> Floats:
    return np.array(patterns, dtype=np.uint32).view(np.float32)


# The Gaussian's constants, as bit patterns so that no decimal conversion can change them. The
# polynomials were fitted for least relative error over their interval, then rounded to binary32.
SQRT_HALF: Final = 0x3F3504F3
"""Bits of sqrt(1/2): mantissas are reduced to [sqrt(1/2), sqrt(2))."""
ONE: Final = 0x3F800000
"""Bits of 1."""
TWO_LN2: Final = _binary32(0x3FB17218)[0]
"""2 ln 2 = 1.3862944."""
TWO_TO_MINUS_31: Final = _binary32(0x30000000)[0]
LOG: Final = _binary32(
    # -2 ln(1 + x) / x on [sqrt(1/2) - 1, sqrt(2) - 1], constant term first; error 3.0e-8
    0xC0000000, 0x3F7FFFFD, 0xBF2AAB7A, 0x3F00024D, 0xBECC6960, 0x3EA9AE98, 0xBE98C293, 0x3E92824D,
    0xBE32E3B3,
)  # fmt: skip
SIN: Final = _binary32(0x3F490FDB, 0xBDA55DDD, 0x3B232F49, 0xB816C981)
"""sin(pi/4 y) / y in y*y on [-1, 1], constant term first; error 3.2e-9."""
COS: Final = _binary32(0x3F800000, 0xBE9DE9CE, 0x3C81D848, 0xB9A74225)
"""cos(pi/4 y) in y*y on [-1, 1], constant term first; error 3.8e-8."""
LOW_RANK_SCALE: Final = {
    1: _binary32(0x3F800000)[0],
    2: _binary32(0x3F3504F3)[0],
    4: _binary32(0x3F000000)[0],
}
"""1 / sqrt(rank): 1, 0.70710677 and 0.5."""


def philox4x32(counter: tuple[Words, Words, Words, Words], seed: int) -> list[Words]:
    """Philox4x32-10: four uint32 words for each counter; the key is `seed`'s two halves."""
    multiplier_0, multiplier_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    for round_index in range(10):
        key_0 = np.uint64((seed + round_index * 0x9E3779B9) & 0xFFFFFFFF)
        key_1 = np.uint64(((seed >> 32) + round_index * 0xBB67AE85) & 0xFFFFFFFF)
        product_0, product_1 = multiplier_0 * c0, multiplier_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ key_0,
            product_1 & low,
            (product_0 >> shift) ^ c3 ^ key_1,
            product_0 & low,
        )
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def block_words(blocks: Elements, seed: int, tensor_id: int, domain: int) -> list[Words]:
    """The four words of each block: counter = (block low, block high, tensor id, domain)."""
    wide = blocks.astype(np.uint64)
    return philox4x32(
        (
            (wide & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (wide >> np.uint64(32)).astype(np.uint32),
            np.full(blocks.shape, tensor_id, dtype=np.uint32),
            np.full(blocks.shape, domain, dtype=np.uint32),
        ),
        seed,
    )


def locate(elements: Elements, slots: int) -> tuple[Elements, Elements, Elements]:
    """(block, word, slot) of each element: the inverse of the layout formula above."""
    row, column = elements // ROW_ELEMENTS, elements % ROW_ELEMENTS
    return row // slots * LANES + column % LANES, column // LANES, row % slots


def rademacher(elements: Elements, seed: int, tensor_id: int) -> Floats:
    """+1 where the element's bit is 0, -1 where it is 1: one bit per element, 128 per block."""
    block, word, slot = locate(elements, slots=32)
    words = np.choose(word, block_words(block, seed, tensor_id, DOMAIN_RADEMACHER))
    bit = (words >> (31 - slot).astype(np.uint32)) & np.uint32(1)
    return np.where(bit == 1, np.float32(-1), np.float32(1))


def gaussian(elements: Elements, seed: int, tensor_id: int) -> Floats:
    """Standard normals by the Box-Muller transform (1958) in strictly rounded binary32.

    Words 0 and 1 of a block give the normals of its elements 0 and 1, words 2 and 3 those of
    elements 2 and 3.
    """
    block, word, _ = locate(elements, slots=1)
    words = block_words(block, seed, tensor_id, DOMAIN_GAUSSIAN)
    normals = [*box_muller(words[0], words[1]), *box_muller(words[2], words[3])]
    return np.choose(word, normals)


def box_muller(radius_word: Words, angle_word: Words) -> tuple[Floats, Floats]:
    """Two independent standard normals from two uniform words, in a normative order of operations.

    `u` is an odd number of 2**-31, so that it is never 0 and |z| stays below 6.56. The angle takes
    its quadrant from two bits (a swap and a sign) and the rest from 30 bits.
    """
    # u in (0, 1] as mantissa * 2**-exponent, with mantissa in [sqrt(1/2), sqrt(2)).
    uniform = ((radius_word >> np.uint32(1)) | np.uint32(1)).astype(np.int32).astype(np.float32)
    shifted = uniform.view(np.uint32) + np.uint32(ONE - SQRT_HALF)
    exponent = (np.uint32(158) - (shifted >> np.uint32(23))).astype(np.int32).astype(np.float32)
    mantissa = ((shifted & np.uint32(0x007FFFFF)) + np.uint32(SQRT_HALF)).view(np.float32)
    # radius = sqrt(-2 ln u), the polynomial by Estrin's scheme.
    x = mantissa - np.float32(1)
    x2 = x * x
    x4 = x2 * x2
    low = (x * LOG[1] + LOG[0]) + x2 * (x * LOG[3] + LOG[2])
    high = (x * LOG[5] + LOG[4]) + x2 * ((x * LOG[7] + LOG[6]) + x2 * LOG[8])
    radius = np.sqrt(exponent * TWO_LN2 + x * (low + x4 * high))
    # The angle, as pi/4 * y with y in [-1, 1].
    signed = ((angle_word << np.uint32(2)) | np.uint32(2)).view(np.int32)
    y = signed.astype(np.float32) * TWO_TO_MINUS_31
    y2 = y * y
    sine = y * (SIN[0] + y2 * (SIN[1] + y2 * (SIN[2] + y2 * SIN[3])))
    cosine = COS[0] + y2 * (COS[1] + y2 * (COS[2] + y2 * COS[3]))
    # Bit 30 flips the cosine's sign; bit 31 swaps the two.
    flip = (angle_word << np.uint32(1)) & np.uint32(0x80000000)
    cosine = (cosine.view(np.uint32) ^ flip).view(np.float32)
    swap = angle_word >> np.uint32(31) == 1
    first, second = radius * cosine, radius * sine
    return np.where(swap, second, first), np.where(swap, first, second)


def rounding_bits(elements: Elements, seed: int, tensor_id: int) -> Words:
    """16 random bits an element (as uint32 below 65536), for stochastic rounding to bfloat16."""
    block, word, slot = locate(elements, slots=2)
    words = np.choose(word, block_words(block, seed, tensor_id, DOMAIN_ROUNDING))
    return (words >> (16 - 16 * slot).astype(np.uint32)) & np.uint32(0xFFFF)


def rounding_words_float16(elements: Elements, seed: int, tensor_id: int) -> Words:
    """32 random bits an element, for stochastic rounding to float16."""
    block, word, _ = locate(elements, slots=1)
    return np.choose(word, block_words(block, seed, tensor_id, DOMAIN_ROUNDING_FLOAT16))


def factor_signs(
    indices: Elements, seed: int, tensor_id: int, domain: int
) -> npt.NDArray[np.int32]:
    """The four signs of each row or column, int32 [4, ...]: its bits, the highest first; 1 is -1.

    `domain` says whether `indices` number rows or columns.
    """
    block, word, slot = locate(indices, slots=8)
    words = np.choose(word, block_words(block, seed, tensor_id, domain))
    nibble = (words >> (28 - 4 * slot).astype(np.uint32)) & np.uint32(0xF)
    bits = np.stack([nibble >> np.uint32(3 - k) & np.uint32(1) for k in range(RANK_MAX)])
    return 1 - 2 * bits.astype(np.int32)


def low_rank(elements: Elements, seed: int, tensor_id: int, rank: int, columns: int) -> Floats:
    """Elements of 1 / sqrt(rank) * (sum over k < rank of u_k v_k^T), u_k and v_k vectors of signs.

    The factors of a lower rank are the first of a higher one's.
    """
    row_signs = factor_signs(elements // columns, seed, tensor_id, DOMAIN_ROW_SIGNS)[:rank]
    column_signs = factor_signs(elements % columns, seed, tensor_id, DOMAIN_COLUMN_SIGNS)[:rank]
    total = np.sum(row_signs * column_signs, axis=0, dtype=np.int32)
    z: Floats = np.multiply(total.astype(np.float32), LOW_RANK_SCALE[rank], dtype=np.float32)
    return z


def noise(
    elements: Elements, seed: int, tensor_id: int, distribution: Distribution, columns: int = 1
) -> Floats:
    """`z(seed, tensor_id, element)` for an int64 array of element indices in any order, as float32.

    `columns`: length of the tensor's last dimension; only the low-rank families need it.
    """
    if distribution is Distribution.RADEMACHER:
        return rademacher(elements, seed, tensor_id)
    if distribution is Distribution.GAUSSIAN:
        return gaussian(elements, seed, tensor_id)
    return low_rank(elements, seed, tensor_id, distribution.rank, columns)
