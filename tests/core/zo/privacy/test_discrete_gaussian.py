"""The noise has the distribution that the account reckons with."""

from __future__ import annotations

import math
import random

import pytest

from fedmezo_core.zo.privacy.discrete_gaussian import discrete_gaussian


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_small_sigmas_have_the_exact_probabilities(sigma: int) -> None:
    """Pearson's statistic over all values within 3 sigma; its chance to be larger is 1e-6."""
    below, count = random.Random(sigma).randrange, 20_000
    samples = [discrete_gaussian(sigma, below) for _ in range(count)]
    weights = {x: math.exp(-x * x / (2 * sigma * sigma)) for x in range(-60, 61)}
    total = sum(weights.values())
    values = range(-3 * sigma, 3 * sigma + 1)
    statistic = sum(
        (samples.count(x) - count * weights[x] / total) ** 2 / (count * weights[x] / total)
        for x in values
    )
    degrees = len(values)
    assert statistic < degrees + 6 * math.sqrt(2 * degrees) + 20


def test_a_large_sigma_is_a_gaussian() -> None:
    """Mean, variance and share within one and two sigma of samples as large as the product's."""
    sigma, count, below = 1 << 20, 8_000, random.Random(7).randrange
    samples = [discrete_gaussian(sigma, below) / sigma for _ in range(count)]
    assert abs(math.fsum(samples) / count) < 5 / math.sqrt(count)
    assert abs(math.fsum(x * x for x in samples) / count - 1) < 5 * math.sqrt(2 / count)
    for limit in (0.5, 1.0, 2.0, 3.0):
        share = sum(abs(x) < limit for x in samples) / count
        expected = math.erf(limit / math.sqrt(2))
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count) + 1e-3


def test_the_noise_comes_from_the_operating_system() -> None:
    """No seed that anything in the process knows repeats it."""
    random.seed(1)
    first = [discrete_gaussian(1 << 40) for _ in range(8)]
    random.seed(1)
    assert first != [discrete_gaussian(1 << 40) for _ in range(8)]
