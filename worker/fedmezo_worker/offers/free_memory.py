"""How much memory a device has left for a further model."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")
"""The control group of a container, if this process is in one."""


def free_bytes(device: str) -> int:
    """Free bytes of the memory of `device`, as the worker's setting names it."""
    if device != "cpu":
        free = _free_on_gpu(device)
        if free is not None:
            return free
    free = int(psutil.virtual_memory().available)
    in_container = _free_in_container()
    return free if in_container is None else min(free, in_container)


def _free_on_gpu(device: str) -> int | None:
    # A worker on a form of the base does without it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    where = "cuda" if device == "auto" else device
    # torch keeps freed memory for itself, and uses it for the next model.
    kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return int(torch.cuda.mem_get_info(where)[0] + kept)


def _free_in_container() -> int | None:
    """What the container's limit leaves; None without a limit."""
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        if not limit.isdecimal():
            return None
        used = int((_GROUP / "memory.current").read_text())
        facts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # Pages of files that nobody uses make way by themselves.
        return int(limit) - used + int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
