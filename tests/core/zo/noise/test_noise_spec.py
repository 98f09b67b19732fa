"""The noise standard's specification: known answers, golden vectors, layout, quality."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.zo.noise import NOISE_VERSION, Distribution, noise, spec

GOLDEN = Path(__file__).parents[3] / "golden" / "noise" / "v1.json"

seeds = st.integers(0, 2**64 - 1)
tensor_ids = st.integers(0, 2**32 - 1)
starts = st.integers(0, 2**40) | st.integers(0, 300) | st.integers(2**48 - 2000, 2**48 - 1000)


LOW_RANK = [distribution for distribution in Distribution if distribution.rank]
columns_of = (
    st.integers(1, 40) | st.sampled_from([127, 128, 768, 4096, 5000]) | st.integers(1, 2**48)
)


def golden_noise(part: str = "noise") -> list[dict[str, Any]]:
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == NOISE_VERSION == 1
    cases: list[dict[str, Any]] = golden[part]
    return cases


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        # Random123's kat_vectors, philox4x32-10.
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (np.array([value], dtype=np.uint32) for value in counter)
    assert tuple(int(word[0]) for word in spec.philox4x32((c0, c1, c2, c3), seed)) == words


@pytest.mark.parametrize("case", golden_noise(), ids=lambda case: f"{case['start']}")
def test_golden_vectors(case: dict[str, Any]) -> None:
    seed, tensor_id, start = int(case["seed"], 16), case["tensor_id"], case["start"]
    elements = np.arange(start, start + len(case["rademacher"]), dtype=np.int64)
    signs = spec.rademacher(elements, seed, tensor_id)
    assert "".join("+" if sign == 1 else "-" for sign in signs) == case["rademacher"]
    normals = spec.gaussian(elements, seed, tensor_id)
    assert " ".join(f"{bits:08x}" for bits in normals.view(np.uint32)) == case["gaussian"]
    bits_16 = spec.rounding_bits(elements, seed, tensor_id)
    assert " ".join(f"{bits:04x}" for bits in bits_16) == case["rounding"]


@pytest.mark.parametrize("case", golden_noise("noise_added"), ids=lambda case: f"{case['start']}")
def test_golden_vectors_of_added_domains(case: dict[str, Any]) -> None:
    seed, tensor_id, start = int(case["seed"], 16), case["tensor_id"], case["start"]
    words = case["rounding_float16"].split()
    elements = np.arange(start, start + len(words), dtype=np.int64)
    for distribution in LOW_RANK:
        values = noise(elements, seed, tensor_id, distribution, case["columns"])
        assert [f"{bits:08x}" for bits in values.view(np.uint32)] == case[distribution].split()
    got = spec.rounding_words_float16(elements, seed, tensor_id)
    assert [f"{word:08x}" for word in got] == words


@pytest.mark.parametrize("slots", [1, 2, 8, 32])
def test_layout_gives_each_element_its_own_bits(slots: int) -> None:
    elements = np.arange(3 * 128 * slots, dtype=np.int64) + 2**40
    block, word, slot = spec.locate(elements, slots)
    inverse = (block // 32 * slots + slot) * 128 + word * 32 + block % 32
    assert np.array_equal(inverse, elements)
    assert len(set(zip(block.tolist(), word.tolist(), slot.tolist(), strict=True))) == elements.size
    assert np.array_equal(np.unique(block), np.arange(3 * 32) + 2**40 // (4 * slots))


@given(
    seeds,
    tensor_ids,
    starts,
    st.sampled_from(Distribution),
    columns_of,
    st.randoms(use_true_random=False),
)
def test_an_element_does_not_depend_on_its_company(
    seed: int, tensor_id: int, start: int, distribution: Distribution, columns: int, random: Any
) -> None:
    elements = np.arange(start, start + 300, dtype=np.int64)
    values = noise(elements, seed, tensor_id, distribution, columns)
    assert values.dtype == np.float32
    picked = random.sample(range(300), 20)
    again = noise(elements[picked], seed, tensor_id, distribution, columns)
    assert np.array_equal(again, values[picked])


def exact_box_muller(radius_word: Any, angle_word: Any) -> tuple[Any, Any]:
    """The same transform in float64 and libm."""
    uniform = ((radius_word >> 1) | 1).astype(np.float64) / 2**31
    radius = np.sqrt(-2 * np.log(uniform))
    signed = ((angle_word << 2) | 2).view(np.int32).astype(np.float64)
    angle = signed / 2**31 * math.pi / 4
    cosine = np.where(angle_word >> 30 & 1, -np.cos(angle), np.cos(angle))
    sine = np.sin(angle)
    swap = angle_word >> 31 == 1
    return radius * np.where(swap, sine, cosine), radius * np.where(swap, cosine, sine)


def test_box_muller_is_accurate() -> None:
    generator = np.random.default_rng(1)
    radius_word = generator.integers(0, 2**32, 400_000, dtype=np.uint32)
    angle_word = generator.integers(0, 2**32, 400_000, dtype=np.uint32)
    got = np.stack(spec.box_muller(radius_word, angle_word))
    assert got.dtype == np.float32
    error = np.abs(got - np.stack(exact_box_muller(radius_word, angle_word)))
    assert error.max() < 1e-4
    assert error[:, radius_word < 0xF0000000].max() < 1e-6


def test_box_muller_at_the_ends() -> None:
    words = [0, 1, 2, 3, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1]
    pairs = np.array(list(itertools.product(words, words)), dtype=np.uint32)
    values = np.stack(spec.box_muller(pairs[:, 0].copy(), pairs[:, 1].copy()))
    assert np.isfinite(values).all()
    assert np.abs(values).max() == pytest.approx(math.sqrt(2 * 31 * math.log(2)), abs=1e-5)


def test_gaussian_follows_the_normal_law() -> None:
    count = 1 << 20
    values = spec.gaussian(np.arange(count, dtype=np.int64), 2026, 5).astype(np.float64)
    # In standard errors of each moment.
    assert abs(values.mean()) * math.sqrt(count) < 4
    assert abs(values.var() - 1) / math.sqrt(2 / count) < 4
    assert abs((values**3).mean()) / math.sqrt(15 / count) < 4
    assert abs((values**4).mean() - 3) / math.sqrt(96 / count) < 4
    for limit in (3.0, 4.0):
        expected = count * math.erfc(limit / math.sqrt(2))
        assert abs((np.abs(values) > limit).sum() - expected) < 4.5 * math.sqrt(expected)
    law = torch.special.ndtr(torch.from_numpy(np.sort(values))).numpy()
    steps = np.arange(1, count + 1) / count
    distance = max(np.max(steps - law), np.max(law - steps + 1 / count))
    assert distance * math.sqrt(count) < 1.95  # Kolmogorov-Smirnov at 0.1 %


def test_rademacher_is_balanced_and_unrelated() -> None:
    count = 1 << 18
    elements = np.arange(count, dtype=np.int64)
    values = spec.rademacher(elements, 2026, 5)
    assert set(np.unique(values)) == {np.float32(-1), np.float32(1)}
    others = [
        np.ones(count, dtype=np.float32),
        *(np.roll(values, lag) for lag in (1, 2, 31, 32, 33, 64, 128, 256, 4096)),
        spec.rademacher(elements, 2027, 5),
        spec.rademacher(elements, 2026 + 2**32, 5),
        spec.rademacher(elements, 2026, 6),
        np.sign(spec.gaussian(elements, 2026, 5)),
        np.where(spec.rounding_bits(elements, 2026, 5) >> 15 == 1, 1, -1),
    ]
    for other in others:
        assert abs(float(np.sum(values * other, dtype=np.float64))) / math.sqrt(count) < 4.5


def test_rounding_bits_are_uniform() -> None:
    bits = spec.rounding_bits(np.arange(1 << 18, dtype=np.int64), 2026, 5)
    counts = np.bincount(bits >> 8, minlength=256)
    assert counts.size == 256
    expected = (1 << 18) / 256
    chi_squared = float(np.sum((counts - expected) ** 2 / expected))
    assert chi_squared < 255 + 5 * math.sqrt(2 * 255)
    assert abs(float((bits & 0xFF).mean()) - 127.5) < 4 * 73.9 / math.sqrt(1 << 18)


@pytest.mark.parametrize("distribution", LOW_RANK)
def test_a_low_rank_direction_is_what_its_name_says(distribution: Distribution) -> None:
    rows, columns, rank = 200, 300, distribution.rank
    elements = np.arange(rows * columns, dtype=np.int64)
    matrix = noise(elements, 2026, 5, distribution, columns).reshape(rows, columns)
    u = spec.factor_signs(np.arange(rows, dtype=np.int64), 2026, 5, spec.DOMAIN_ROW_SIGNS)
    v = spec.factor_signs(np.arange(columns, dtype=np.int64), 2026, 5, spec.DOMAIN_COLUMN_SIGNS)
    assert set(np.unique(u)) == set(np.unique(v)) == {-1, 1}
    total = np.einsum("ki,kj->ij", u[:rank], v[:rank])
    assert np.array_equal(matrix, total.astype(np.float32) * np.float32(1 / math.sqrt(rank)))
    assert np.linalg.matrix_rank(total) == rank


@pytest.mark.parametrize("distribution", LOW_RANK)
def test_low_rank_moments(distribution: Distribution) -> None:
    """Over seeds: mean 0, variance 1, unrelated elements, unrelated directions."""
    rows, columns, count = 24, 40, 1500
    elements = np.arange(rows * columns, dtype=np.int64)
    values = np.stack([noise(elements, seed, 5, distribution, columns) for seed in range(count)])
    directions = values.astype(np.float64)
    rank = distribution.rank
    z_scores = directions.sum(axis=0) / math.sqrt(count)
    assert np.abs(z_scores).max() < 5.5
    # The variance of z * z is 2 - 2 / rank: a direction's norm is fixed at rank 1.
    squares = (directions**2 - 1).sum(axis=0) / math.sqrt(count)
    assert np.abs(squares).max() < 1e-6 + 5.5 * math.sqrt(2 - 2 / rank)
    # Two elements of one direction, in one row, in one column, and in neither.
    grid = directions.reshape(count, rows, columns)
    others = (grid[:, 0, 1:], grid[:, 1:, 0], grid[:, 1, 1:])
    for other in others:
        products = np.einsum("n,nk->k", grid[:, 0, 0], other) / math.sqrt(count)
        assert np.abs(products).max() < 5.5
    # The inner product of two directions has variance rows * columns, as of full rank.
    inner = np.einsum("nd,nd->n", directions[:-1], directions[1:]) / math.sqrt(rows * columns)
    assert abs(inner.mean()) * math.sqrt(count) < 4.5
    assert 0.8 < inner.var() < 1.25


def test_factors_are_unrelated_to_each_other_and_to_other_noise() -> None:
    count = 1 << 16
    indices = np.arange(count, dtype=np.int64)
    factors = [
        *spec.factor_signs(indices, 2026, 5, spec.DOMAIN_ROW_SIGNS),
        *spec.factor_signs(indices, 2026, 5, spec.DOMAIN_COLUMN_SIGNS),
        spec.factor_signs(indices, 2027, 5, spec.DOMAIN_ROW_SIGNS)[0],
        spec.factor_signs(indices, 2026, 6, spec.DOMAIN_ROW_SIGNS)[0],
        spec.rademacher(indices, 2026, 5),
        np.where(spec.rounding_words_float16(indices, 2026, 5) >> 31 == 1, -1, 1),
        np.ones(count),
    ]
    for one, other in itertools.combinations(factors, 2):
        assert abs(float(np.sum(one * other, dtype=np.float64))) / math.sqrt(count) < 4.5
    for factor in factors[:4]:
        for lag in (1, 2, 8, 31, 32, 33, 64, 128, 1024):
            total = float(np.sum(factor * np.roll(factor, lag), dtype=np.float64))
            assert abs(total) / math.sqrt(count) < 4.5
