"""The threads that run the CPU kernels, and the memory that each of them needs."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.zo.noise import cpu

CHUNK_WORK_MIN: Final = 1 << 20
"""Least element-pairs (about 0.1 ms) worth handing to another thread."""
CHUNKS_PER_THREAD: Final = 32
"""Threads take chunks from a shared counter: a busy core delays the rest by one chunk at most."""


def _aligned(count: int, dtype: Any) -> npt.NDArray[Any]:
    """Zeros from a cache line's beginning on: a vector across two lines is read twice."""
    line_bytes = 64
    memory = np.zeros(count * 4 + line_bytes, dtype=np.uint8)
    begin = -memory.ctypes.data % line_bytes
    return memory[begin : begin + count * 4].view(dtype)


class Scratch(threading.local):
    """The memory that one thread's kernels need besides their operands; made once per thread."""

    def __init__(self) -> None:
        self.words = _aligned(cpu.SCRATCH_WORDS, np.uint32)
        self.tile_values = _aligned(cpu.MATRIX_ELEMENTS + cpu.VECTOR_LANES, np.float32)
        self.row_patterns = _aligned(cpu.FUSED_PATTERNS * cpu.MATRIX_ROWS_MAX, np.uint32)
        self.patterns = _aligned(cpu.PATTERN_VALUES, np.float32)
        self.used_patterns = np.zeros(cpu.FUSED_PATTERNS, dtype=np.uint64)
        self.random_bits = _aligned(cpu.FAN_ELEMENTS, np.uint32)
        self.products = _aligned(cpu.FAN_ELEMENTS + cpu.VECTOR_LANES, np.float32)
        self.sums = _aligned(cpu.TILE_ELEMENTS, np.float32)


scratch = Scratch()
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _shared_pool() -> ThreadPoolExecutor:
    """Threads of our own, started when first needed.

    torch's OpenMP pool and numba's cannot serve: on some platforms, two Python threads may not
    enter them at once.
    """
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=256, thread_name_prefix="materialize")
            os.register_at_fork(after_in_child=_forget_pool)
        return _pool


def _forget_pool() -> None:
    """After a fork, the child has the pool's object but none of its threads."""
    global _pool
    _pool = None


def spread(
    run: Callable[[int, int], None],
    start: int,
    size: int,
    pairs: int,
    rank: int,
    columns: int,
    threads: int,
) -> None:
    """Call `run(begin, end)` on chunks of 0 .. size, in up to `threads` threads.

    start, rank, columns: the first element's index in its tensor, the directions' rank (0: full)
    and the length of a row, which decide where a chunk may begin. pairs: the work per element.
    threads: the most to use. Raises what `run` raises.
    """
    grain = cpu.TILE_ELEMENTS
    if rank:
        # Whole rows of a matrix share patterns; a chunk of one long row has none to share.
        grain = cpu.MATRIX_ELEMENTS // columns * columns or cpu.MATRIX_ELEMENTS
    work = size * pairs // CHUNK_WORK_MIN
    used = min(work, size // grain)
    if used > 1:
        used = min(used, threads)
    if used <= 1:
        run(0, size)
        return
    grains = -(-(start % grain + size) // grain)
    chunks = min(used * CHUNKS_PER_THREAD, max(used, work), grains)
    edges = [max(0, grains * i // chunks * grain - start % grain) for i in range(chunks)] + [size]
    counter = itertools.count()

    def drain() -> None:
        while (chunk := next(counter)) < chunks:
            run(edges[chunk], edges[chunk + 1])

    pool = _shared_pool()
    others = [pool.submit(drain) for _ in range(used - 1)]
    try:
        drain()
    finally:
        for other in others:
            other.result()
