"""Reconnecting to a peer: how long to wait after a failure, and when to give up.

Written here because stamina and tenacity count attempts but know no progress between them, and
neither follows a server's hint with full jitter: an adapter would be longer than this.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time

from fedmezo_core.errors import FedMezoError
from fedmezo_core.wire.backoff import BASE_S, CAP_S, delay_s


class Reconnecting:
    """Paces the attempts to reach one peer, and ends them after too long without success.

    Call `reached` at every sign of progress and `wait_after` for every failure that a retry may help.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        give_up_after_s: float = math.inf,
        base_s: float = BASE_S,
        cap_s: float = CAP_S,
    ) -> None:
        """`give_up_after_s` counts from the last progress; without it, attempts never end."""
        self._log = log
        self._give_up_after_s = give_up_after_s
        self._base_s = base_s
        self._cap_s = cap_s
        self._attempt = 0
        self._reached_at_s = time.monotonic()

    def reached(self) -> None:
        """Note progress: the delays begin small again, and so does the time until giving up."""
        self._attempt = 0
        self._reached_at_s = time.monotonic()

    def next_delay_s(self, retry_after_s: float | None = None) -> float:
        """Count a failed attempt; return the seconds to wait before the next one."""
        attempt, self._attempt = self._attempt, self._attempt + 1
        uniform = random.random()
        return delay_s(attempt, uniform, retry_after_s, base_s=self._base_s, cap_s=self._cap_s)

    async def wait_after(self, error: FedMezoError, message: str = "") -> None:
        """Wait before the next attempt, as long as the peer asks if `error` carries its hint.

        Logs `message` (by default the error) at the 1st, the 5th and every 20th failure in a row.
        Raises `error` itself once `give_up_after_s` have passed. May be cancelled.
        """
        if time.monotonic() - self._reached_at_s > self._give_up_after_s:
            raise error
        wait_s = self.next_delay_s(error.retry_after_s)
        if self._attempt in (1, 5) or self._attempt % 20 == 0:
            self._log.warning("%s", message or f"{error} Trying again.")
        await asyncio.sleep(wait_s)
