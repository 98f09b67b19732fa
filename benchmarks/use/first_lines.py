"""How soon a worker says what it does, and that its data is missing, on a machine that is busy."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figures import Figure

BUSY_PROCESSES = 2
FIRST_LINE_MAX_S = 1.0
MISSING_FILE_MAX_S = 3.0
NOBODY = "127.0.0.1:9"
"""An address at which no coordinator answers."""


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep `count` cores busy for the time of the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def started_worker(data: Path) -> subprocess.Popen[str]:
    """A worker process that has just been started."""
    flags = ("--name", "w1", "--data", str(data), "--coordinator", NOBODY)
    return subprocess.Popen(
        [sys.executable, "-m", "fedmezo_worker", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def first_line_s(data: Path) -> float:
    """Seconds from a worker's start to its first line."""
    begin_s = time.perf_counter()
    with started_worker(data) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        seconds = time.perf_counter() - begin_s
        worker.kill()
    assert "is starting" in line, line
    return seconds


def missing_file_s(data: Path) -> float:
    """Seconds from a worker's start to its end because there is no file `data`."""
    begin_s = time.perf_counter()
    with started_worker(data) as worker:
        said, _ = worker.communicate()
    seconds = time.perf_counter() - begin_s
    assert worker.returncode == 1
    assert "There is no data file or folder" in said, said
    return seconds


def figures(small: bool) -> Iterator[Figure]:
    """Both times, as the median and the worst of several starts beside two busy loops."""
    starts = 5 if small else 15
    with tempfile.TemporaryDirectory() as folder, busy_cores(BUSY_PROCESSES):
        rows = Path(folder) / "rows.jsonl"
        rows.write_text('{"text": "a", "label": "b"}\n')
        for what, goal_s, times in (
            (
                "a worker's first line",
                FIRST_LINE_MAX_S,
                [first_line_s(rows) for _ in range(starts)],
            ),
            (
                "a worker's end because its data is missing",
                MISSING_FILE_MAX_S,
                [missing_file_s(rows.with_name("gone")) for _ in range(starts)],
            ),
        ):
            goal = f"at most {goal_s:g}"
            name = f"{what}, {BUSY_PROCESSES} busy cores"
            yield Figure(f"{name}, median", statistics.median(times), "s", goal)
            yield Figure(f"{name}, worst of {starts}", max(times), "s", goal)
