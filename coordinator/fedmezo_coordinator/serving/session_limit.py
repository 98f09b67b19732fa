"""Limits on open sessions, and on the workers that join at the same time.

After a restart thousands of workers come back at once. A worker that gets no permit is refused
immediately, which costs one small message, and is asked to retry later. The more workers were
refused within the last second, the longer that time is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedmezo_coordinator.coordinator_settings import JOINS_AT_A_TIME, SESSIONS_MAX
from fedmezo_core.errors import NotReadyError

RETRY_UNIT_S = 0.5
"""Time in which one core lets `joins_at_a_time` workers join."""
RETRY_AFTER_MAX_S = 30.0
"""Longest time after which a refused worker is asked to retry."""


@dataclass(slots=True)
class SessionPermit:
    """Permit of one session, from its first message to its end."""

    joining: bool = True
    """Whether the session counts as one that is joining."""


class SessionLimit:
    """Counts sessions; `sessions_max` and `joins_at_a_time` are the coordinator's settings."""

    def __init__(
        self,
        sessions_max: int = SESSIONS_MAX,
        joins_at_a_time: int = JOINS_AT_A_TIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions_max = sessions_max
        self._joins_at_a_time = joins_at_a_time
        self._clock = clock
        self._second = 0
        self._refused_lately = 0
        self.sessions = 0
        """Count of open sessions, including those that are joining."""
        self.joining = 0
        """Count of sessions that are joining."""
        self.refused = 0
        """Count of refusals since this start."""

    @contextmanager
    def session(self) -> Iterator[SessionPermit]:
        """Give a permit for as long as the block runs; raises `NotReadyError` if none is free."""
        self._check()
        permit = SessionPermit()
        self.sessions += 1
        self.joining += 1
        try:
            yield permit
        finally:
            self.joined(permit)
            self.sessions -= 1

    def joined(self, permit: SessionPermit) -> None:
        """Note that a session was welcomed or is gone, so that the next worker may join."""
        if permit.joining:
            permit.joining = False
            self.joining -= 1

    def _check(self) -> None:
        if self.sessions >= self._sessions_max:
            raise self._refusal(
                f"{self.sessions} sessions are open, the most that this coordinator takes "
                "(sessions_max); try later, or raise that setting.",
                RETRY_AFTER_MAX_S,
            )
        if self.joining >= self._joins_at_a_time:
            raise self._refusal(
                f"{self.joining} workers are joining, the most at a time "
                "(joins_at_a_time); try again in a moment.",
                0.0,
            )

    def _refusal(self, sentence: str, at_least_s: float) -> NotReadyError:
        second = int(self._clock())
        if second != self._second:
            self._second, self._refused_lately = second, 0
        self._refused_lately += 1
        self.refused += 1
        crowd_s = RETRY_UNIT_S * (1 + self._refused_lately / self._joins_at_a_time)
        error = NotReadyError(sentence)
        error.retry_after_s = min(max(crowd_s, at_least_s), RETRY_AFTER_MAX_S)
        return error
