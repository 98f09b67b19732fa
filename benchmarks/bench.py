"""`make bench`: how fast the journal is replayed, beside the plain torch loop, in one run.

A rate is billions of (parameter, pair) products per second of CPU time of all threads together, so
that other programs on the machine disturb it little; the best of a few repeats. "torch" regenerates
one whole tensor per pair with a generator seeded for that pair and adds it, as MeZO and its federated
descendants do; its scratch tensor is kept between pairs, which is kinder than they are.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedmezo_core.zo.materialize import Commit, Rounding, materialize, warm_up
from fedmezo_core.zo.noise import Distribution

ELEMENTS = 124_000_000
"""Parameters of GPT-2 small, as one tensor."""
REPORT = Path(__file__).parents[1] / "build" / "reports" / "bench.json"
RATE = "G param·pair/core-s"


@dataclass(frozen=True)
class Figure:
    """One measured value; `goal` is empty where there is none."""

    name: str
    value: float
    unit: str
    goal: str = ""


def pairs(count: int) -> Commit:
    generator = np.random.default_rng(count)
    return Commit(
        generator.integers(0, 2**64, count, dtype=np.uint64),
        (generator.normal(size=count) * 1e-6).astype(np.float32),
        rounding_seed=count,
    )


def best_seconds(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    seconds = []
    for _ in range(repeats):
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return min(seconds)


def replay(
    out: torch.Tensor,
    base: torch.Tensor,
    count: int,
    distribution: Distribution,
    threads: int = 1,
) -> Callable[[], None]:
    commit = pairs(count)

    def call() -> None:
        materialize(
            out,
            base,
            [commit],
            tensor_id=0,
            distribution=distribution,
            rounding=Rounding.STOCHASTIC,
            threads=threads,
        )

    return call


def torch_loop(
    weights: torch.Tensor, scratch: torch.Tensor, count: int, distribution: Distribution
) -> Callable[[], None]:
    commit = pairs(count)
    generator = torch.Generator()

    def call() -> None:
        for seed, coefficient in zip(commit.seeds, commit.coefficients, strict=True):
            generator.manual_seed(int(seed) >> 1)  # torch takes signed seeds
            if distribution is Distribution.GAUSSIAN:
                scratch.normal_(generator=generator)
            else:
                scratch.random_(0, 2, generator=generator).mul_(2).sub_(1)
            weights.add_(scratch, alpha=float(coefficient))

    return call


def measure() -> list[Figure]:
    torch.set_num_threads(1)
    warm_up()
    weights = torch.randn(ELEMENTS).mul_(0.02)
    other = torch.empty_like(weights)
    other.zero_()  # touched: page faults are not what is measured
    figures = []
    for distribution, count, goal in (
        (Distribution.RADEMACHER, 64, "at least 5"),
        (Distribution.GAUSSIAN, 8, "at least 0.4"),
    ):
        seconds = best_seconds(replay(weights, weights, count, distribution), 4)
        ours = ELEMENTS * count / seconds / 1e9
        name = f"{distribution}, {count} pairs, float32, 1 thread"
        figures.append(Figure(f"materialize {name}", ours, RATE, goal))
        seconds = best_seconds(torch_loop(weights, other, 2, distribution), 2)
        plain = ELEMENTS * 2 / seconds / 1e9
        figures.append(Figure(f"torch, {distribution}, one tensor per pair, 1 thread", plain, RATE))
        figures.append(Figure(f"materialize / torch, {distribution}", ours / plain, "ratio"))

    cores = len(os.sched_getaffinity(0))
    call = replay(weights, weights, 64, Distribution.RADEMACHER)
    one = best_seconds(call, 4, time.perf_counter)
    call = replay(weights, weights, 64, Distribution.RADEMACHER, threads=cores)
    many = best_seconds(call, 4, time.perf_counter)
    figures.append(Figure(f"speed-up from 1 to {cores} threads, wall clock", one / many, "ratio"))

    for distribution in Distribution:
        seconds = best_seconds(replay(other, weights, 1, distribution), 4)
        rate = ELEMENTS / seconds / 1e9
        figures.append(
            Figure(f"perturbation {distribution}, 1 pair, out of place, 1 thread", rate, RATE)
        )
    halves = weights.bfloat16()
    seconds = best_seconds(replay(halves, halves, 64, Distribution.RADEMACHER), 3)
    name = "materialize rademacher, 64 pairs, bfloat16, stochastic rounding, 1 thread"
    figures.append(Figure(name, ELEMENTS * 64 / seconds / 1e9, RATE))

    few = replay(other[:16], weights[:16], 1, Distribution.RADEMACHER)
    calls = 1000
    seconds = best_seconds(lambda: [few() for _ in range(calls)], 20) / calls
    figures.append(Figure("a call on 16 elements", seconds * 1e6, "us of CPU", "at most 20"))
    return figures


def show(figures: Sequence[Figure]) -> None:
    table = Table(
        title=f"{ELEMENTS / 1e6:.0f} M parameters, {platform.machine()}, torch {torch.__version__}"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("goal")
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.2f}", figure.unit, figure.goal)
    Console(width=120).print(table)


def main() -> None:
    figures = measure()
    show(figures)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    print(
        f"wrote {REPORT.relative_to(Path.cwd())}" if REPORT.is_relative_to(Path.cwd()) else REPORT
    )


if __name__ == "__main__":
    main()
