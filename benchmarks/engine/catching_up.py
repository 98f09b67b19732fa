"""Catching up: a worker that comes late applies a journal of 10,000 pairs to its base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.subjects import COMMIT_PAIRS, Subject, journal_of
from benchmarks.figures import Figure
from benchmarks.machine import Machine
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.noise import Distribution

JOURNAL_PAIRS: Final = 10_000
PLAIN_PAIRS: Final = 2
GAUSSIAN_SHARE: Final = 16
"""Gaussian pairs take about this many times longer, so fewer of them are measured."""


def figures(machine: Machine, subject: Subject, pairs: int) -> Iterator[Figure]:
    """`pairs` of the journal are measured, all of their commits applied at once."""
    journal = journal_of(pairs)
    for distribution in (Distribution.RADEMACHER, Distribution.GAUSSIAN):
        commits = journal
        if distribution is Distribution.GAUSSIAN:
            commits = journal[: -(-len(journal) // GAUSSIAN_SHARE)]
        measured = COMMIT_PAIRS * len(commits)
        weights = subject.weights(distribution)
        plain = PlainTorch(trained_tensors(subject.model, subject.manifest), distribution)
        # Once: weights move on to the next round with each call.
        ours = machine.seconds(partial(weights.apply, 1, commits)) * JOURNAL_PAIRS / measured
        theirs = machine.seconds(partial(plain.replay, commits, PLAIN_PAIRS))
        theirs *= JOURNAL_PAIRS / PLAIN_PAIRS
        name = f"catch-up, {subject.name}, {distribution.value}, {JOURNAL_PAIRS:,} pairs"
        unit = machine.time_unit
        yield Figure(f"{name}{machine.suffix} ({_scaled(measured)})", ours, unit)
        yield Figure(f"torch, {name}{machine.suffix} ({_scaled(PLAIN_PAIRS)})", theirs, unit)
        yield Figure(f"torch ÷ ours, {name}", theirs / ours, "ratio")


def _scaled(measured: int) -> str:
    if measured == JOURNAL_PAIRS:
        return "measured whole"
    return f"measured on {measured:,} pairs, times {JOURNAL_PAIRS:,}/{measured:,}"
