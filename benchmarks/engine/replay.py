"""Replay throughput: pairs of a commit applied to one large tensor in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.roofline import Roofline
from benchmarks.engine.subjects import commit_of
from benchmarks.figures import Figure
from benchmarks.machine import Call, Machine, wall_seconds
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.noise import Distribution, Operands, Rounding

COLUMNS: Final = 768
PLAIN_PAIRS: Final = 2
NAMES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the replay table, and its goals on a CPU and on a GPU."""

    distribution: Distribution
    pairs: int
    dtype: torch.dtype = torch.float32
    goal_cpu: str = ""
    goal_cuda: str = ""
    turns: int = 5


FULL_RANK: Final = (
    Case(Distribution.RADEMACHER, 16, goal_cpu="at least 10", goal_cuda="at least 2"),
    Case(Distribution.RADEMACHER, 64, goal_cpu="at least 10", goal_cuda="at least 2", turns=3),
    Case(Distribution.GAUSSIAN, 16, goal_cpu="at least 0.6", goal_cuda="at least 0.3", turns=3),
    Case(Distribution.RADEMACHER, 16, torch.bfloat16),
    Case(Distribution.GAUSSIAN, 16, torch.bfloat16, turns=2),
    Case(Distribution.RADEMACHER, 16, torch.float16),
)
LOW_RANK: Final = (
    Case(Distribution.LOW_RANK_1, 16, goal_cpu="at least 20"),
    Case(Distribution.LOW_RANK_1, 64, goal_cpu="at least 20"),
    Case(Distribution.LOW_RANK_4, 64),
)


def replaying(
    weights: torch.Tensor, commit: Commit, distribution: Distribution, threads: int = 1
) -> Call:
    def call() -> None:
        operands = Operands(0, distribution, Rounding.STOCHASTIC)
        materialize(weights, weights, [commit], operands, threads=threads)

    return call


def figures(
    machine: Machine,
    cases: tuple[Case, ...],
    elements: int,
    roofline: Roofline | None = None,
) -> Iterator[Figure]:
    torch.manual_seed(0)
    rows = max(1, elements // COLUMNS)
    base = torch.randn(rows, COLUMNS, device=machine.device).mul_(0.02)
    torch_rates: dict[tuple[Distribution, torch.dtype], float] = {}
    for case in cases:
        shown = case.distribution.value.replace("_", "-")
        name = f"{shown}, {NAMES[case.dtype]}"
        weights = base.to(case.dtype, copy=True)
        commit = commit_of(case.pairs)
        calls = {"ours": replaying(weights, commit, case.distribution)}
        first = (case.distribution, case.dtype) not in torch_rates
        if first:
            plain = PlainTorch([weights], case.distribution)
            calls["torch"] = partial(plain.replay, [commit], PLAIN_PAIRS)
        seconds = machine.best(calls, case.turns, seconds_max=20)
        count = weights.numel() / machine.rate_scale
        ours = count * case.pairs / seconds["ours"]
        goal = case.goal_cuda if machine.cuda else case.goal_cpu
        name_with_pairs = f"replay, {name}, {case.pairs} pairs"
        yield Figure(f"{name_with_pairs}{machine.suffix}", ours, machine.rate_unit, goal)
        if roofline is not None:
            share = 100 * roofline.replay_seconds(weights, case.pairs) / seconds["ours"]
            yield Figure(f"{name_with_pairs}, as a share of the roofline", share, "%")
        if first:
            theirs = count * PLAIN_PAIRS / seconds["torch"]
            torch_rates[case.distribution, case.dtype] = theirs
            plain_name = f"torch, {name}, one direction after the other{machine.suffix}"
            yield Figure(plain_name, theirs, machine.rate_unit)
        ratio = ours / torch_rates[case.distribution, case.dtype]
        yield Figure(f"{name_with_pairs} ÷ torch", ratio, "ratio")


def products(machine: Machine, elements: int) -> Iterator[Figure]:
    """Low-rank pairs the other plain way: one matrix product per commit, in its library's bits."""
    pairs = 64
    weights = torch.zeros(max(1, elements // COLUMNS), COLUMNS, device=machine.device)
    rows, columns = (
        torch.randint(0, 2, (length, pairs), device=machine.device).mul(2.0).sub(1.0)
        for length in weights.shape
    )
    seconds = machine.best({"product": lambda: weights.addmm_(rows, columns.t(), alpha=1e-6)}, 3)
    rate = weights.numel() * pairs / seconds["product"] / machine.rate_scale
    name = f"torch, low-rank-1, float32, 64 pairs as one product, factors given{machine.suffix}"
    yield Figure(name, rate, machine.rate_unit)


def speed_up(elements: int) -> Iterator[Figure]:
    """Of two threads over one, by the wall clock, and the same of a hash, which shows how much of a
    second core there was for anyone."""
    if len(os.sched_getaffinity(0)) < 2:
        return
    weights = torch.zeros(elements)
    commit = commit_of(16)
    data = bytes(elements // 2)
    with ThreadPoolExecutor(2) as pool:
        calls: dict[str, Call] = {
            "replay 1": replaying(weights, commit, Distribution.RADEMACHER, 1),
            "replay 2": replaying(weights, commit, Distribution.RADEMACHER, 2),
            "hash 1": lambda: [hashlib.sha256(data) for _ in range(2)],
            "hash 2": lambda: list(pool.map(hashlib.sha256, [data, data])),
        }
        seconds = Machine().best(calls, 40, wall_seconds, seconds_max=15)
    yield Figure(
        "replay, rademacher, float32, 16 pairs: 2 threads over 1, wall clock",
        seconds["replay 1"] / seconds["replay 2"],
        "ratio",
        "at least 1.8",
    )
    yield Figure(
        "two SHA-256 in the same seconds: 2 threads over 1, wall clock",
        seconds["hash 1"] / seconds["hash 2"],
        "ratio",
    )


def small_call() -> Iterator[Figure]:
    """What a call costs besides its elements: models have many small tensors."""
    calls = 1000
    few = replaying(torch.zeros(16), commit_of(1), Distribution.RADEMACHER)
    best = Machine().best({"calls": lambda: [few() for _ in range(calls)]}, 10)
    name = "replay, rademacher, float32, 1 pair on 16 elements, 1 thread"
    yield Figure(name, best["calls"] / calls * 1e6, "us of CPU", "at most 20")
