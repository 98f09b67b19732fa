"""Freed memory is used again."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource
from concurrent.futures import ThreadPoolExecutor
from fedmezo_core.zo.allocator import keep_freed_memory
assert keep_freed_memory()
import torch

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1_500_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with ThreadPoolExecutor(1) as pool:  # a worker measures in a thread of its own
    # A few rounds until the blocks lie as they are asked for.
    print(*[pool.submit(pages).result() for _ in range(30)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_block_that_was_freed_needs_no_new_pages() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    pages = [int(count) for count in run.stdout.split()]
    assert pages[-1] < pages[0] / 50
