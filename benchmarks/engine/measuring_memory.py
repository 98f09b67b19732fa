"""Peak memory of a measurement, compared with that of inference.

On a CPU each runs in a process of its own, and the system tells the process's peak since the model
was built. On a CUDA device torch's allocator tells it. A process does only what its name says. The
first measurement makes three more passes, to see whether the architecture lets both points share
one; they count as part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from benchmarks.engine.measuring import EPS, forward
from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.subjects import GPT2_SMALL, GPT2_TINY, Subject, gpt2
from benchmarks.figures import Figure
from benchmarks.machine import Call, Machine
from fedmezo_core.zo.materialize import warm_up
from fedmezo_core.zo.model.allocator import keep_freed_memory
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.noise import Distribution

WAYS: Final = ("inference", "doubled inference", "measurement", "MeZO in place")
PASSES: Final = 3
EXTRA_GOAL: Final = "at most 10"


def passes(subject: Subject, way: str, tokens: int) -> Call:
    """One pass of a way."""
    batch = subject.batch(tokens)
    if way == "inference":
        return forward(subject, batch)
    if way == "doubled inference":
        doubled = batch.repeated(2)
        return lambda: subject.task.losses(subject.model, doubled, 2)
    if way == "measurement":
        estimator = subject.estimator(Distribution.RADEMACHER)
        return lambda: estimator.measure(batch, [], [1], EPS)
    plain = PlainTorch(trained_tensors(subject.model, subject.manifest), Distribution.GAUSSIAN)
    return lambda: plain.measure(forward(subject, batch), 1, EPS)


def peak_mb(way: str, tokens: int, *, tiny: bool = False) -> float:
    """Largest resident memory of a fresh process that makes a few passes."""
    command = [sys.executable, "-m", "benchmarks.engine.measuring_memory", way, str(tokens)]
    finished = subprocess.run(
        command + ["--tiny"] * tiny, check=True, capture_output=True, text=True
    )
    return float(finished.stdout.split()[-1]) / 1024


def figures(tokens: int, *, tiny: bool = False) -> Iterator[Figure]:
    """In megabytes over inference."""
    with ThreadPoolExecutor(2) as pool:  # memory, not time, is measured
        peaks = dict(
            zip(WAYS, pool.map(lambda way: peak_mb(way, tokens, tiny=tiny), WAYS), strict=True)
        )
    name = f"{tokens:,} tokens, 1 thread"
    doubled = peaks["doubled inference"]
    yield Figure(
        f"peak memory of inference on one copy of the batch, {name}", peaks["inference"], "MB"
    )
    yield Figure(f"peak memory of inference on the doubled batch, {name}", doubled, "MB")
    yield Figure(
        f"measurement: extra memory over inference on the doubled batch, {name}",
        peaks["measurement"] - doubled,
        "MB",
        EXTRA_GOAL,
    )
    yield Figure(
        f"torch, MeZO in place: extra memory over inference on one copy, {name}",
        peaks["MeZO in place"] - peaks["inference"],
        "MB",
    )


def figures_cuda(machine: Machine, subject: Subject, tokens: int) -> Iterator[Figure]:
    """Allocated bytes at their peak, over those of inference on the doubled batch."""
    peaks: dict[str, int] = {}
    for way in WAYS:
        call = passes(subject, way, tokens)
        call()
        torch.cuda.reset_peak_memory_stats(machine.device)
        call()
        peaks[way] = torch.cuda.max_memory_allocated(machine.device)
    for way in WAYS:
        yield Figure(f"peak memory of {way}, {tokens:,} tokens", peaks[way] / 1e6, "MB")
    yield Figure(
        f"peak memory of a measurement ÷ inference on the doubled batch, {tokens:,} tokens",
        peaks["measurement"] / peaks["doubled inference"],
        "ratio",
        "at most 1.1",
    )
    yield Figure(
        f"torch, MeZO in place: peak memory ÷ inference on one copy, {tokens:,} tokens",
        peaks["MeZO in place"] / peaks["inference"],
        "ratio",
    )


def forget_peak() -> None:
    """Begin the peak anew: that of building the model would hide that of the passes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_kib() -> int:
    """Largest resident memory since then."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """The process that is looked at: prints its peak in KiB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    warm_up()
    subject = gpt2(GPT2_TINY if arguments.tiny else GPT2_SMALL)
    call = passes(subject, arguments.way, arguments.tokens)
    forget_peak()
    for _ in range(PASSES):
        call()
    print(peak_kib())


if __name__ == "__main__":
    main()
