"""A worker says when its losses are too coarse for the run's eps."""

from __future__ import annotations

import numpy as np
import pytest

from fedmezo_core.config import RunConfig
from fedmezo_core.zo.edge.loss_noise import noise_points, noise_sentence
from tests.core.zo.edge.conftest import contract

SLOPES = {1: 0.8, 2: -0.3}


def losses_of(config: RunConfig, noise: float, *, curvature: float = 0.0) -> list[float]:
    """Losses at the points, of a slope along each direction, with noise of a standard deviation."""
    generator = np.random.default_rng(3)
    found = []
    for point in noise_points(config):
        [seed], [distance] = point.seeds.tolist(), point.coefficients.tolist()
        loss = 2 + SLOPES[seed] * distance + curvature * distance**3
        found.append(loss + noise * float(generator.standard_normal()))
    return found


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("noise", [1e-7, 1e-4])
def test_fine_losses_need_no_sentence(estimator: str, noise: float) -> None:
    config = contract(eps=1e-2, estimator=estimator)
    assert noise_sentence(losses_of(config, noise), config) == ""


@pytest.mark.parametrize(
    ("eps", "noise", "curvature"),
    [(1e-2, 1.5e-2, 0.0), (1e-3, 1.5e-2, 0.0), (1e-2, 0.0, 1e5), (1e-30, 0.0, 0.0)],
    ids=["noise", "more noise", "a curvature", "no change at all"],
)
def test_coarse_losses_are_named(eps: float, noise: float, curvature: float) -> None:
    config = contract(eps=eps)
    sentence = noise_sentence(losses_of(config, noise, curvature=curvature), config)
    assert f"too coarse for the run's eps of {eps:g}" in sentence
    assert "with another eps" in sentence


def test_one_sided_differences_are_half_as_large() -> None:
    both = {
        estimator: contract(eps=1e-2, estimator=estimator)
        for estimator in ("two_sided", "one_sided")
    }
    losses = losses_of(both["two_sided"], 8e-4)
    assert noise_sentence(losses, both["two_sided"]) == ""
    assert noise_sentence(losses, both["one_sided"])


def test_the_noise_that_it_names_is_the_noise() -> None:
    config = contract(eps=1e-2)
    sentence = noise_sentence(losses_of(config, 2e-2), config)
    named = float(sentence.split("off by about ")[1].split()[0])
    assert 0.5e-2 < named < 8e-2


def test_losses_that_are_no_numbers_are_left_to_the_measurement() -> None:
    config = contract(eps=1e-2)
    assert noise_sentence([float("nan")] * len(noise_points(config)), config) == ""
