"""Reconnecting to a peer: how long to wait after a failure, and when to give up.

Ours, because stamina and tenacity know no progress between attempts and give a server's hint no
jitter: an adapter to either would be longer than this. What retries other things, such as a child
process or a database with its own rules, uses `delay_s` alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time

from fedmezo_core.errors import FedMezoError, StartingError
from fedmezo_core.wire.backoff import delay_s


class Reconnecting:
    """Paces the attempts to reach one peer, and ends them after too long without progress.

    Call `reached` at every sign of progress, `wait_after` for every error that a retry may help.
    """

    def __init__(self, log: logging.Logger, *, give_up_after_s: float = math.inf) -> None:
        """`give_up_after_s` counts from the last progress; by default attempts never end."""
        self._log = log
        self._give_up_after_s = give_up_after_s
        self.reached()

    def reached(self) -> None:
        """Note progress: delays are short again, and the time until giving up begins anew."""
        self._attempt = 0
        self._seen: set[type[FedMezoError]] = set()
        self._is_peer_starting = False
        self._reached_at_s = time.monotonic()

    async def wait_after(self, error: FedMezoError, message: str = "") -> None:
        """Wait before the next attempt; follows the peer's hint if `error` carries one.

        Logs `message` (default: the error) at the 1st, the 5th and every 20th failure in a row, and
        when a failure is of a class that no failure before it in this row had.
        Raises `error` itself once `give_up_after_s` have passed. Can be cancelled. A peer that is
        starting is there: this never gives it up, and logs only its first such answer in a row.
        """
        if isinstance(error, StartingError):
            was_starting = self._is_peer_starting
            self.reached()
            self._is_peer_starting = True
            if not was_starting:
                self._log.info("%s", message or f"{error} Waiting until then.")
            await asyncio.sleep(delay_s(0, random.random(), error.retry_after_s))
            return
        self._is_peer_starting = False
        if time.monotonic() - self._reached_at_s > self._give_up_after_s:
            raise error
        wait_s = delay_s(self._attempt, random.random(), error.retry_after_s)
        self._attempt += 1
        is_new = type(error) not in self._seen
        self._seen.add(type(error))
        if is_new or self._attempt == 5 or self._attempt % 20 == 0:
            self._log.warning("%s", message or f"{error} Trying again.")
        await asyncio.sleep(wait_s)
