"""The machine that is measured, and how time is taken on it.

On a CPU, time is the CPU time of all threads of this process, so that other programs disturb it
little. On a CUDA device it is the time between two events. Things to be compared are measured in
turns, and the best turn of each counts.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


def cpu_seconds(call: Call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def wall_seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def cuda_seconds(call: Call) -> float:
    event: Any = torch.cuda.Event  # torch leaves its constructor without types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Machine:
    """A device and the units of its rates."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rate_scale(self) -> float:
        """What a param·pair per second is divided by."""
        return 1e12 if self.cuda else 1e9

    @property
    def rate_unit(self) -> str:
        return "T param·pair/s" if self.cuda else "G param·pair/core-s"

    @property
    def time_unit(self) -> str:
        return "s" if self.cuda else "core-s"

    @property
    def suffix(self) -> str:
        """How names say what computed."""
        return "" if self.cuda else ", 1 thread"

    def seconds(self, call: Call) -> float:
        """Of one call: CPU time, or the CUDA device's."""
        return cuda_seconds(call) if self.cuda else cpu_seconds(call)

    def best(
        self,
        calls: Mapping[str, Call],
        turns: int,
        clock: Callable[[Call], float] | None = None,
        seconds_max: float = float("inf"),
    ) -> dict[str, float]:
        """Best seconds of each call, all measured in turns, after one turn that does not count on a
        CUDA device (kernels are compiled in it). No new turn begins after `seconds_max` of all."""
        clock = clock or self.seconds
        if self.cuda:
            for call in calls.values():
                call()
        begin = time.perf_counter()
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(turns):
            for name, call in calls.items():
                best[name] = min(best[name], clock(call))
            if time.perf_counter() - begin > seconds_max:
                break
        return best

    def describe(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
