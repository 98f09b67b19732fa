"""How late the event loop runs its timers, for the status and for benchmarks."""

from __future__ import annotations

import asyncio
import time
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
