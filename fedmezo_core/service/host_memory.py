"""How much memory this machine has left for a program, or the container that it runs in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_MACHINE: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")
"""The control group of a container, if this process is in one."""


def memory_available() -> int | None:
    """Bytes of memory that programs can still take here, or in this container.

    None on a system that does not say it as Linux does.
    """
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MACHINE.read_text())
    except OSError:
        return None
    if found is None:
        return None
    free, in_container = int(found[1]) * 1024, _left_in_container()
    return free if in_container is None else max(0, min(free, in_container))


def _left_in_container() -> int | None:
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
