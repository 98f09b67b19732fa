"""`make bench-host`: what a GPU's measurement costs the host, on a machine without a GPU.

A model so small that a device would wait for the host (a Llama of 22 layers with width 64 in
bfloat16, 8 tokens) goes through the CUDA path, with a stand-in for the device
(`engine/stand_in.py`).
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from typing import Any, Final

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch

from benchmarks.engine import measuring
from benchmarks.engine.stand_in import StandIn
from benchmarks.engine.subjects import LLAMA_TINY, Subject, llama
from benchmarks.figures import REPORTS, Figure, arguments_of, collect, publish
from benchmarks.machine import Call, Machine
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.noise import Distribution

REPORT: Final = REPORTS / "bench-host.json"
SHAPE: Final[dict[str, Any]] = {
    **LLAMA_TINY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 22,
}  # fmt: skip
TOKENS: Final = 8
TURNS: Final = 60
FORWARDS_GOAL: Final = "at most 1.5"
LAUNCH_GOAL: Final = "at most 20"
LAUNCHES_MIN: Final = 40
"""Fewer launches are not what a measurement's host time goes to."""


def figures(shape: dict[str, Any] = SHAPE, turns: int = TURNS) -> Iterator[Figure]:
    """Two kinds of measurements, and an evaluation, of one model."""
    subject = llama(shape, torch.device("cpu"), torch.bfloat16)
    batch = subject.batch(TOKENS)
    stand_in = StandIn()
    probes = list(range(1, measuring.PROBES + 1))
    with stand_in.active():
        for recorder, how in ((None, ""), (stand_in, ", recorded")):
            full_rank = subject.estimator(Distribution.RADEMACHER, recorder=recorder)
            low_rank = subject.estimator(Distribution.LOW_RANK_1, one_sided=True, recorder=recorder)
            yield from _of(
                f"measurement, full rank, 2 points{how}", stand_in, subject, batch, 2, turns,
                functools.partial(full_rank.measure, batch, [(7, 1e-3)], [1], measuring.EPS),
            )  # fmt: skip
            yield from _of(
                f"measurement, low-rank-1, {measuring.PROBES} one-sided probes{how}", stand_in,
                subject, batch, measuring.PROBES + 1, max(1, turns // 2),
                functools.partial(low_rank.measure, batch, [(7, 1e-3)], probes, measuring.EPS),
            )  # fmt: skip
        yield from _of(
            "evaluation", stand_in, subject, batch, 1, turns,
            lambda: subject.task.outcome(subject.model, batch),
        )  # fmt: skip


def _of(
    name: str,
    stand_in: StandIn,
    subject: Subject,
    batch: Batch,
    copies: int,
    turns: int,
    call: Call,
) -> Iterator[Figure]:
    """Host time and launches of `call`, which computes as many `copies` of `batch`."""
    for _ in range(4):
        call()  # the first measurements compile, see what a pass may do, and record it
    stand_in.launches = 0
    call()
    launches = stand_in.launches
    repeated = batch.repeated(copies)
    seconds = Machine().best(
        {
            "forward": measuring.forward(subject, batch),
            "copies": lambda: subject.task.losses(subject.model, repeated, copies),
            "call": call,
        },
        turns,
    )
    forward, more = seconds["forward"], seconds["call"] - seconds["copies"]
    yield Figure(f"{name}: host time", 1e3 * seconds["call"], "ms")
    yield Figure(f"{name}: one forward of 1 copy", 1e3 * forward, "ms")
    yield Figure(f"{name}: host time ÷ forward", seconds["call"] / forward, "ratio", FORWARDS_GOAL)
    if copies > 1:
        beside = f"losses of {copies} copies ÷ forward"
        yield Figure(f"{name}: {beside}", seconds["copies"] / forward, "ratio")
    yield Figure(f"{name}: launches of ours", launches, "launches")
    if launches >= LAUNCHES_MIN:
        beyond = "host time beyond these losses ÷ launches of ours"
        yield Figure(f"{name}: {beyond}", 1e6 * more / launches, "µs", LAUNCH_GOAL)


def main() -> None:
    arguments_of(argparse.ArgumentParser(description=__doc__), REPORT)
    torch.set_num_threads(1)
    publish(
        collect([figures]), REPORT, f"{Machine().describe()}, torch {torch.__version__}, no GPU"
    )


if __name__ == "__main__":
    main()
