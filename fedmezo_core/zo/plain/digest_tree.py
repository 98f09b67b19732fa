"""The digest of many tensors: a SHA-256 tree over their bytes, hashed by several threads."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from fedmezo_core.zo.plain.entries import Manifest

CHUNK_BYTES: Final = 1 << 22
"""Bytes of a tensor hashed as one leaf (4 MiB). Part of the definition of every weights digest."""

Chunk = TypeVar("Chunk")


def tree_digest(
    header: bytes,
    chunks: Iterable[Chunk],
    bytes_of: Callable[[Chunk], memoryview],
    *,
    threads: int | None = None,
) -> bytes:
    """SHA-256 of `header` and the SHA-256 of each of `chunks`, in their order: 32 bytes.

    `bytes_of` gives a chunk's bytes, in one of `threads` threads (default: one for each core that
    this process may use), which do not change the result. `chunks` is read as an iterator, so few
    of them are in memory at a time.
    """

    def leaf(chunk: Chunk) -> bytes:
        # hashlib releases the GIL, so threads hash leaves in parallel.
        return hashlib.sha256(bytes_of(chunk)).digest()

    root = hashlib.sha256(header)
    workers = threads or len(os.sched_getaffinity(0))
    leaves: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for chunk in chunks:
            leaves.append(pool.submit(leaf, chunk))
            # A few chunks keep the threads busy; all of them would keep every tensor in memory.
            if len(leaves) > 2 * workers:
                root.update(leaves.popleft().result())
        for future in leaves:
            root.update(future.result())
    return root.digest()


def weights_header(manifest: Manifest) -> bytes:
    """What the digest of a run's weights begins with: a line, and the manifest's bytes."""
    return b"fedmezo weights 1\n" + manifest.canonical_bytes()


def array_weights_digest(
    arrays: Sequence[npt.NDArray[Any]], manifest: Manifest, *, threads: int | None = None
) -> bytes:
    """The `weights_digest` of trained tensors that are contiguous arrays, in manifest order."""
    octets = [array.reshape(-1).view(np.uint8) for array in arrays]
    chunks = (
        one[first : first + CHUNK_BYTES]
        for one in octets
        for first in range(0, len(one), CHUNK_BYTES)
    )
    return tree_digest(weights_header(manifest), chunks, lambda chunk: chunk.data, threads=threads)
