"""Freed memory is used again, but for large blocks, which would cut the heap to pieces."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from fedmezo_core.zo.model.allocator import keep_freed_memory
assert keep_freed_memory()
import torch

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(int(sys.argv[1]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with ThreadPoolExecutor(1) as pool:  # a worker measures in a thread of its own
    # A few rounds until the blocks lie as they are asked for.
    print(*[pool.submit(pages).result() for _ in range(30)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize(("elements", "is_kept"), [(375_000, True), (1_500_000, False)])
def test_a_block_that_was_freed_needs_no_new_pages(elements: int, is_kept: bool) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE, f"{elements}"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[4])},
    )
    pages = [int(count) for count in run.stdout.split()]
    assert (pages[-1] < pages[0] / 20) is is_kept
