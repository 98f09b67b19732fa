"""Who may come in now: bounds on open sessions, and on those that are on their way in.

After a restart thousands of workers come back at once. Whoever finds no permit is refused at once, at the
price of one small message, and told when to come back: the longer, the more were refused just before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedmezo_core.errors import NotReadyError

SESSIONS_MAX = 16_000
SESSIONS_LIMIT = 20_000
"""What `sessions_max` may be set to: as many names as the coordinator remembers."""
JOINS_AT_A_TIME = 256
RETRY_UNIT_S = 0.5
"""Time in which so many as may join at a time have joined, at the rate that one core manages."""
RETRY_AFTER_MAX_S = 30.0


@dataclass(slots=True)
class SessionPermit:
    """A session's permit, from its first message to its end."""

    joining: bool = True


class SessionLimit:
    """Counts who is inside. `sessions_max` and `joins_at_a_time` are the coordinator's settings."""

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
        """Open ones, those that are still joining included."""
        self.joining = 0
        self.refused = 0
        """Since this start."""

    @contextmanager
    def session(self) -> Iterator[SessionPermit]:
        """A permit for as long as the block runs; `NotReadyError` if there is none."""
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
        """It has been welcomed, or is gone: the next one may join."""
        if permit.joining:
            permit.joining = False
            self.joining -= 1

    def _check(self) -> None:
        if self.sessions >= self._sessions_max:
            raise self._refusal(
                f"{self.sessions} sessions are open, the most that this coordinator takes "
                "(sessions_max); try later, or raise it.",
                RETRY_AFTER_MAX_S,
            )
        if self.joining >= self._joins_at_a_time:
            raise self._refusal(
                f"{self.joining} workers are joining, as many as may at a time "
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
