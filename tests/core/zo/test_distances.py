"""The distance of an update from the mean, from scalars alone, against the real vectors."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedmezo_core.machines.rates import update_distances
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.noise import Distribution, Operands, Rounding

ELEMENTS = 40_000


def _vector(update: dict[int, float], distribution: Distribution) -> npt.NDArray[np.float64]:
    vector = torch.zeros(ELEMENTS // 200, 200)
    commit = Commit(
        np.array(list(update), dtype=np.uint64),
        np.array(list(update.values()), dtype=np.float32),
        0,
    )
    materialize(vector, vector, [commit], Operands(0, distribution, Rounding.NEAREST))
    return vector.numpy().reshape(-1).astype(np.float64)


def _updates(policy: str) -> list[dict[int, float]]:
    """Five workers of eight seeds each: their own, everyone's, or drawn from a pool of twelve."""
    rng = random.Random(5)
    updates = []
    for worker in range(5):
        match policy:
            case "per_worker":
                seeds = list(range(100 * worker, 100 * worker + 8))
            case "shared":
                seeds = list(range(8))
            case _:
                seeds = rng.sample(range(12), 8)
        # One worker's data pull three times as hard.
        size = 3.0 if worker == 2 else 1.0
        updates.append({seed: size * rng.gauss() for seed in seeds})
    return updates


@pytest.mark.parametrize("policy", ["per_worker", "shared", "pool"])
@pytest.mark.parametrize(
    "distribution",
    [
        Distribution.RADEMACHER,
        Distribution.GAUSSIAN,
        Distribution.LOW_RANK_1,
        Distribution.LOW_RANK_4,
    ],
)
@pytest.mark.parametrize(
    "weights", [[0.2] * 5, [0.1, 0.4, 0.2, 0.2, 0.1]], ids=["alike", "by rows"]
)
def test_distances_from_scalars_are_those_of_the_vectors(
    policy: str, distribution: Distribution, weights: list[float]
) -> None:
    updates = _updates(policy)
    vectors = [_vector(update, distribution) for update in updates]
    mean = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    true = [float(np.linalg.norm(vector - mean)) for vector in vectors]
    found = update_distances(updates, weights, ELEMENTS)
    # Products of different directions are about sqrt(d), also those of low rank.
    assert found == pytest.approx(true, rel=0.04)
    assert np.argmax(found) == np.argmax(true)


def test_one_shared_sign_direction_is_exact() -> None:
    updates = [{9: 0.5}, {9: -1.25}, {9: 2.0}]
    vectors = [_vector(update, Distribution.RADEMACHER) for update in updates]
    mean = sum(vectors) / 3
    true = [float(np.linalg.norm(vector - mean)) for vector in vectors]
    assert update_distances(updates, [1 / 3] * 3, ELEMENTS) == pytest.approx(true, rel=1e-6)
