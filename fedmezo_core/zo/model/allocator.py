"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
from typing import Final

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
_KEPT_BYTES_MAX: Final = 2 << 20
"""Larger blocks go back to the system when they are freed. Kept, they cut the heap to pieces that
fit nothing, as aligned blocks of many sizes do in glibc, and it grows by some MB a pass, more in
one process than in the next. 31 probes on an adapter in the last layer peaked at 1.06 to 1.20 times
what inference takes where blocks up to 8 MiB were kept, with this at 1.05 times, in nine tenths of
the time; 7 probes in eight layers at 1.12 and 1.07, in 1.09 times the time; all weights, two-sided,
at 1.02 and 0.99, in 1.07 times."""
_KEPT_AT_TOP_BYTES: Final = 64 << 20
"""Free memory at the heap's end beyond this goes back, too."""


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that it frees; True where the C library can be told so.

    Every pass over a model asks for the same activations again. By default glibc gives blocks of
    that size back to the system and takes them anew, page by page: a tenth to a fifth of a
    measurement on 1,024 tokens. Call it before there are threads: memory that several arenas keep
    would be kept several times.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = (
        (_ARENA_MAX, 1),
        (_MMAP_THRESHOLD, _KEPT_BYTES_MAX),
        (_TRIM_THRESHOLD, _KEPT_AT_TOP_BYTES),
    )
    accepted = [mallopt(option, value) == 1 for option, value in options]
    return all(accepted)
