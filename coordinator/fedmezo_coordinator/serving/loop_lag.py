"""How late the event loop runs its timers, and how long appends take: what operators watch."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque

SAMPLE_EVERY_S = 0.05
SAMPLES_MAX = 1200
"""Samples that are kept: those of the newest minute."""


class LoopLag:
    """Samples of how late a timer fired, in seconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._watching = asyncio.Lock()

    def add(self, late_s: float) -> None:
        """Take one sample; a late one also stands for the samples that were due in the meantime.

        Without those, a loop that stands still for a second would count as one late sample in
        twenty.
        """
        while late_s > SAMPLE_EVERY_S:
            self._samples.append(late_s)
            late_s -= SAMPLE_EVERY_S
        self._samples.append(max(late_s, 0.0))

    def percentile_ms(self, fraction: float) -> float:
        """The lag that `fraction` of the samples do not exceed, in milliseconds; 0 if none."""
        ordered = sorted(self._samples)
        if not ordered:
            return 0.0
        return 1000 * ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    async def watch(self) -> None:
        """Take a sample every `SAMPLE_EVERY_S` until cancelled.

        Of several that watch the same event loop, one takes the samples at a time.
        """
        async with self._watching:
            while True:
                due_s = time.monotonic() + SAMPLE_EVERY_S
                await asyncio.sleep(SAMPLE_EVERY_S)
                self.add(time.monotonic() - due_s)


APPEND_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the classes that `AppendTimes` counts."""


class AppendTimes:
    """How long appends to the journal took, counted in classes; in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(APPEND_BOUNDS_S) + 1)
        """Appends by class: up to each bound, above the bound before; the last one has no bound."""
        self.total_s = 0.0
        """Time of all appends together."""

    def add(self, took_s: float) -> None:
        """Count an append."""
        self.counts[bisect_left(APPEND_BOUNDS_S, took_s)] += 1
        self.total_s += took_s
