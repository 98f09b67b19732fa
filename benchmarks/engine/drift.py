"""What measuring leaves behind in bfloat16 when the learning rate is zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.engine.measuring import EPS, forward
from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.subjects import Subject
from benchmarks.figures import Figure
from fedmezo_core.config import RunConfig
from fedmezo_core.events import Work
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.noise import Distribution
from fedmezo_core.zo.plain.measurements import local_steps


def figures(subject: Subject, tokens: int, cycles: int) -> Iterator[Figure]:
    """Measure and commit, over and over; then MeZO's way on the same weights."""
    batch = subject.batch(tokens)
    estimator = subject.estimator(Distribution.RADEMACHER)
    weights = subject.weights(Distribution.RADEMACHER)
    before, changed = weights.digest(), 0
    config = RunConfig(run_id="drift", model="none", task=subject.task.config)
    for cycle in range(cycles):
        first_seed = cycle << 16
        [measured] = local_steps(
            estimator,
            lambda _: batch,
            Work((first_seed,), learning_rate=0.0, eps=EPS, want_digest=False),
            config,
        )
        coefficients = np.float32(-0.0) * np.array([measured.projected_grad], np.float32)
        commit = Commit(np.array([first_seed], np.uint64), coefficients, rounding_seed=cycle)
        weights.apply(cycle + 1, [commit])
        changed += weights.digest() != before
    name = f"{cycles:,} cycles of learning rate 0, bfloat16"
    yield Figure(f"{name}: cycles that changed a digest", changed, "cycles", "at most 0")

    tensors = trained_tensors(subject.model, subject.manifest)
    start = [tensor.float() for tensor in tensors]
    plain = PlainTorch(tensors, Distribution.GAUSSIAN)
    loss = forward(subject, batch)
    for cycle in range(cycles):
        plain.measure(loss, cycle + 1, EPS)
    moved = sum(
        float((tensor.float() - old).square().sum())
        for tensor, old in zip(tensors, start, strict=True)
    )
    size = sum(float(old.square().sum()) for old in start)
    drift = 100 * (moved / size) ** 0.5
    yield Figure(f"torch, MeZO in place, {name}: relative drift of the weights", drift, "%")


def digests_that_differ(make: list[Subject], pairs: int) -> int:
    """Of distributions, after the same journal, between two subjects on two devices."""
    different = 0
    for number, distribution in enumerate(Distribution):
        digests = set()
        for subject in make:
            weights = subject.weights(distribution)
            generator = np.random.default_rng(number)
            seeds = generator.integers(0, 2**64, pairs, dtype=np.uint64)
            coefficients = (generator.normal(size=pairs) * 1e-3).astype(np.float32)
            weights.apply(1, [Commit(seeds, coefficients, number)])
            digests.add(weights.digest())
        different += len(digests) > 1
    return different
