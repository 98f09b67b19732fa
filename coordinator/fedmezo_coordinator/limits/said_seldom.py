"""Lines of the log that callers cause: so many a minute, and then only their count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES_A_MINUTE = 20
"""Lines of one kind that the log has in a minute at most."""


class SaidSeldom:
    """Logs warnings of one kind until they are too many; the next minute says how many were not."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._since_s = clock()
        self._count = 0

    def warn(self, line: str, *values: object) -> None:
        """Log a warning, or only count it."""
        now_s = self._clock()
        if now_s - self._since_s >= 60.0:
            unsaid, self._count, self._since_s = self._count - LINES_A_MINUTE, 0, now_s
            if unsaid > 0:
                self._log.warning("(and %d such lines before, in a minute)", unsaid)
        self._count += 1
        if self._count <= LINES_A_MINUTE:
            self._log.warning(line, *values)
