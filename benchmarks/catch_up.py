"""Catching up: a worker that comes late applies a journal of 10,000 pairs to its base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from benchmarks.figures import Figure
from benchmarks.machine import Machine, wall_seconds
from benchmarks.plain_torch import PlainTorch
from benchmarks.subjects import Subject, journal_of
from fedmezo_core.zo.manifest import trained_tensors
from fedmezo_core.zo.noise import Distribution

JOURNAL_PAIRS: Final = 10_000
PLAIN_PAIRS: Final = 2


def figures(machine: Machine, subject: Subject, pairs: int) -> Iterator[Figure]:
    """`pairs` of the journal are measured, in commits of 40 pairs, all applied at once."""
    journal = journal_of(pairs)
    pairs = 40 * len(journal)
    cores = 1 if machine.cuda else len(os.sched_getaffinity(0))
    for distribution in (Distribution.RADEMACHER, Distribution.GAUSSIAN):
        commits = (
            journal
            if distribution is Distribution.RADEMACHER
            else journal[: len(journal) // 16 + 1]
        )
        measured = 40 * len(commits)
        weights = subject.weights(distribution, threads=cores)
        plain = PlainTorch(trained_tensors(subject.model, subject.manifest), distribution)
        calls = {
            "ours": lambda: weights.apply(weights.round + 1, commits),  # noqa: B023
            "torch": lambda: plain.replay(commits, PLAIN_PAIRS),  # noqa: B023
        }
        seconds = machine.best(calls, 1, machine.seconds if machine.cuda else wall_seconds)
        ours = seconds["ours"] * JOURNAL_PAIRS / measured
        theirs = seconds["torch"] * JOURNAL_PAIRS / PLAIN_PAIRS
        threads = "" if machine.cuda else f", {cores} threads"
        name = f"catch-up, {subject.name}, {distribution.value}, {JOURNAL_PAIRS:,} pairs"
        yield Figure(f"{name}{threads} ({_scaled(measured)})", ours, "s")
        yield Figure(f"torch, {name}, one after the other ({_scaled(PLAIN_PAIRS)})", theirs, "s")
        yield Figure(f"torch ÷ {name}", theirs / ours, "ratio")


def _scaled(measured: int) -> str:
    if measured == JOURNAL_PAIRS:
        return "measured whole"
    return f"measured on {measured:,} pairs, times 10,000/{measured:,}"
