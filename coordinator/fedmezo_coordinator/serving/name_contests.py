"""Names over which processes fight: each session of such a name ends the one before it.

One replacement is a worker that came back. Several within a few minutes are two processes with one
name, or one process that loses its connection again and again; a person should know.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from fedmezo_core.errors import ReplacedError

CONTEST_REPLACEMENTS = 3
"""Replacements within `CONTEST_WINDOW_S` that make a contest."""
CONTEST_WINDOW_S = 600.0
NAMES_REMEMBERED = 1000
"""Most names whose replacements are remembered; those replaced longest ago are forgotten first."""
REPLACED_RETRY_S = 30.0
"""Time within which a worker that was replaced is asked to come back."""


class NameContests:
    """Counts how often each name's session was replaced lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: dict[str, deque[float]] = {}

    def replaced(self, name: str) -> int:
        """Note that a session of `name` replaced another; returns how often that was lately."""
        # The newest names are at the end.
        times = self._times.pop(name, deque(maxlen=100))
        times.append(self._clock())
        self._times[name] = times
        if len(self._times) > NAMES_REMEMBERED:
            del self._times[next(iter(self._times))]
        return self._lately(times)

    def complaint(self, name: str) -> str:
        """What to tell a person about a name; empty if it is not contested."""
        times = self._times.get(name)
        count = 0 if times is None else self._lately(times)
        if count < CONTEST_REPLACEMENTS:
            return ""
        return (
            f"{count} sessions of this name replaced one another within "
            f"{CONTEST_WINDOW_S / 60:.0f} minutes: two processes use it, or one loses its "
            "connection again and again; give each worker a name of its own"
        )

    def _lately(self, times: deque[float]) -> int:
        while times and times[0] < self._clock() - CONTEST_WINDOW_S:
            times.popleft()
        return len(times)


def replaced_error(name: str) -> ReplacedError:
    """What the older of two sessions of one name ends with."""
    error = ReplacedError(
        f"Another process has joined as worker {name}; give each worker its own --name."
    )
    error.retry_after_s = REPLACED_RETRY_S
    return error
