"""`make bench-gpu`: the figures of `make bench` on a CUDA device, with shares of its roofline.

A share of the roofline is the least time that the device's measured copy bandwidth and arithmetic
would allow, over the time taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from benchmarks.bench import BFLOAT16_SHAPE, ELEMENTS
from benchmarks.engine import catching_up, drift, measuring, measuring_memory, replay
from benchmarks.engine.roofline import Roofline
from benchmarks.engine.subjects import GPT2_SMALL, GPT2_TINY, LLAMA_1B, LLAMA_TINY, gpt2, llama
from benchmarks.figures import REPORTS, Figure, Group, arguments_of, collect, publish
from benchmarks.machine import Machine

REPORT = REPORTS / "bench-gpu.json"
TOKENS = 2048


def groups(machine: Machine, elements: int, *, tiny: bool = False) -> dict[str, Group]:
    """Everything that can be measured alone. `tiny`: only to see that it runs, on any device."""
    device = machine.device
    roofline = Roofline.of(machine, 64 if tiny else 8192)
    tokens = 16 if tiny else TOKENS
    shape = LLAMA_TINY if tiny else LLAMA_1B

    def large() -> Iterator[Figure]:
        subject = llama(shape, device, torch.bfloat16)
        yield from measuring.figures(
            machine, subject, tokens, turns=10, goal="at most 2.2", roofline=roofline
        )
        yield from measuring.low_rank(machine, subject, 4 if tiny else 256, turns=5)
        if machine.cuda:
            yield from measuring_memory.figures_cuda(machine, subject, tokens)

    def digests() -> Iterator[Figure]:
        for dtype, shown in replay.NAMES.items():
            pair = [gpt2(GPT2_TINY, where, dtype) for where in (torch.device("cpu"), device)]
            yield Figure(
                f"digests that differ from the CPU's, {shown}, each distribution, 200 pairs",
                drift.digests_that_differ(pair, 2 if tiny else 200),
                "digests",
                "at most 0",
            )

    return {
        "roofline": lambda: iter(roofline.figures()),
        "digests": digests,
        "replay": lambda: replay.figures(
            machine, replay.FULL_RANK + replay.LOW_RANK, elements, roofline
        ),
        "low-rank": lambda: replay.products(machine, elements),
        "measuring": large,
        "catch-up": lambda: catching_up.figures(
            machine, gpt2(GPT2_TINY if tiny else GPT2_SMALL, device), 80 if tiny else 10_000
        ),
        "drift": lambda: drift.figures(
            gpt2(BFLOAT16_SHAPE, device, torch.bfloat16), 8, 10 if tiny else 1000
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the replayed tensor")
    arguments = arguments_of(parser, REPORT)
    if not torch.cuda.is_available():
        print(
            "make bench-gpu needs a CUDA device, and PyTorch sees none on this machine; "
            "make bench measures the CPU.",
            file=sys.stderr,
        )
        return 1
    machine = Machine(torch.device("cuda", 0))
    figures = collect(groups(machine, arguments.elements).values())
    publish(figures, REPORT, f"{machine.describe()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
