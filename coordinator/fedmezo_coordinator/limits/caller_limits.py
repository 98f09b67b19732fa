"""How many calls one caller may make: a member, or an address of callers that show no identity.

Each caller has tokens, which come back at a steady rate. A call takes one, and one more for each
`BYTES_PER_TOKEN` of its response. Whoever has none left waits for the next ones; if they are too
far away, the call is refused. It is refused only after a wait: a refusal at once would cost nearly
as much as an answer, and a caller that does not listen would ask again at once.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import random
import time
from collections.abc import Callable

from fedmezo_core.errors import NotReadyError

CALLS_AT_ONCE = 1000
"""Tokens that a caller has after a rest."""
BYTES_PER_TOKEN = 64 * 1024
"""Bytes of a response that cost as much as a call."""
WAIT_MAX_S = 2.0
"""Longest wait for a token, and the shortest before a refusal."""
REFUSALS_SPREAD = 2.0
"""How much longer, as a multiple of that, a refusal may take."""
CALLERS_MAX = 20_000
"""Callers whose tokens are counted."""


class CallerLimits:
    """Tokens of all callers.

    A caller is one number: when it has all its tokens again. Every token that it takes moves that
    time on.
    """

    def __init__(self, calls_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`calls_per_s` is how many tokens come back each second; 0: callers are not limited."""
        self._token_s = 1 / calls_per_s if calls_per_s else 0.0
        self._clock = clock
        self._rested_at_s: dict[str, float] = {}

    def take(self, caller: str, tokens: float = 1.0) -> float:
        """Take tokens; returns the seconds until the caller has them.

        Beyond `WAIT_MAX_S` they are not taken.
        """
        if not self._token_s:
            return 0.0
        now_s = self._clock()
        rested_at_s = max(self._rested_at_s.get(caller, now_s), now_s) + tokens * self._token_s
        wait_s = rested_at_s - now_s - CALLS_AT_ONCE * self._token_s
        if wait_s <= WAIT_MAX_S:
            if len(self._rested_at_s) >= CALLERS_MAX:
                self._forget(now_s)
            self._rested_at_s[caller] = rested_at_s
        return wait_s if wait_s > 0.0 else 0.0

    def charge(self, caller: str, size_bytes: int) -> None:
        """Take the tokens of a response, however many; the caller's next calls wait for them."""
        tokens = size_bytes // BYTES_PER_TOKEN
        if tokens and self._token_s:
            now_s = self._clock()
            rested_at_s = max(self._rested_at_s.get(caller, now_s), now_s)
            self._rested_at_s[caller] = rested_at_s + tokens * self._token_s

    async def admit(self, caller: str) -> None:
        """Take the token of a call, and wait until it is there.

        Raises `NotReadyError` if that would take more than `WAIT_MAX_S`, after at least as long a
        wait.
        """
        wait_s = self.take(caller)
        if not wait_s:
            return
        if wait_s <= WAIT_MAX_S:
            await asyncio.sleep(wait_s)
        else:
            # Calls that came together are not refused together: thousands would stop everyone.
            await asyncio.sleep(WAIT_MAX_S * (1 + REFUSALS_SPREAD * random.random()))
            error = NotReadyError(
                f"{caller} calls more than {1 / self._token_s:g} times a second "
                "(caller_calls_per_s); call less often, or raise that setting."
            )
            error.retry_after_s = max(WAIT_MAX_S, wait_s - WAIT_MAX_S)
            raise error

    def _forget(self, now_s: float) -> None:
        """Forget callers that have all their tokens, and a tenth of all, which came first."""
        first = list(itertools.islice(self._rested_at_s, CALLERS_MAX // 10))
        rested = [caller for caller, at_s in self._rested_at_s.items() if at_s <= now_s]
        for caller in {*first, *rested}:
            del self._rested_at_s[caller]


def worker_caller(worker: str) -> str:
    """The caller that stands for a worker's open session."""
    return f"worker {worker}"


@functools.lru_cache(4096)
def address_of(peer: str) -> str:
    """The address in a gRPC peer, such as `ipv4:10.0.0.7:50123`, without its port.

    Of IPv6 addresses it is the network of 64 bits, because one machine has all of its addresses.
    """
    kind, _, rest = peer.partition(":")
    if kind != "ipv6":
        return rest.rpartition(":")[0] or peer
    host = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]")
    host = host.partition("%")[0]
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))
