"""`make bench`: our figures on this machine's CPU, each compared with plain torch, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain

import torch

from benchmarks.engine import catching_up, drift, measuring, measuring_memory, replay
from benchmarks.engine.subjects import GPT2_SMALL, GPT2_TINY, gpt2
from benchmarks.figures import REPORTS, Figure, Group, arguments_of, collect, publish
from benchmarks.machine import Machine
from fedmezo_core.zo.materialize import warm_up
from fedmezo_core.zo.model.allocator import keep_freed_memory

REPORT = REPORTS / "bench.json"
ELEMENTS = 124_000_000
"""Parameters of GPT-2 small."""
BFLOAT16_SHAPE = {**GPT2_TINY, "n_embd": 64}


def groups(elements: int, *, tiny: bool = False) -> dict[str, Group]:
    """Everything that can be measured alone. `tiny`: only to see that it runs."""
    machine = Machine()
    shape = GPT2_TINY if tiny else GPT2_SMALL

    def measurements() -> Iterator[Figure]:
        subject = gpt2(shape)
        for tokens, turns, goal in ((64, 10, "at most 2.1"), (1024, 3, "at most 2.15")):
            yield from measuring.figures(
                machine, subject, tokens // 16 if tiny else tokens, turns=turns, goal=goal
            )

    return {
        "replay": lambda: chain(
            replay.figures(machine, replay.FULL_RANK, elements),
            replay.speed_up(elements),
            replay.small_call(),
        ),
        "low-rank": lambda: chain(
            replay.figures(machine, replay.LOW_RANK, elements),
            replay.products(machine, elements),
            measuring.low_rank(machine, gpt2(shape), 16 if tiny else 64, turns=3),
        ),
        "measuring": measurements,
        "memory": lambda: measuring_memory.figures(16 if tiny else 64, tiny=tiny),
        "catch-up": lambda: catching_up.figures(machine, gpt2(shape), 80 if tiny else 2000),
        "drift": lambda: drift.figures(
            gpt2(BFLOAT16_SHAPE, dtype=torch.bfloat16), 8, 10 if tiny else 1000
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the replayed tensor")
    arguments = arguments_of(parser, REPORT, groups(1))
    keep_freed_memory()  # as a worker does
    torch.set_num_threads(1)
    warm_up()
    available = groups(arguments.elements)
    figures = collect(available[name] for name in arguments.only)
    publish(figures, REPORT, f"{Machine().describe()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
