"""Who may look at the page: members with the right to, for as long as they are members.

A member asks for a link over gRPC, where its certificate says who it is. The secret in the link can
be used once, for a session of the browser that opens it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedmezo_core.errors import FedMezoError, ForbiddenError, TokenError
from fedmezo_core.trust.authorisation import Caller, check_allowed

OPEN_PAGE = "/fedmezo.v1.RunService/OpenPage"
"""Path of the RPC that gives links: whoever may call it may look at the page."""
LINK_LIFE_S = 300.0
"""How long a link can be used."""
LINKS_MAX = 256
"""Most links that are not used yet; the oldest goes first."""
SESSION_LIFE_S = 12 * 3600.0
"""How long a browser's session lasts."""
SESSIONS_MAX = 256
"""Most sessions; the oldest goes first."""
OF_A_MEMBER_MAX = 16
"""Most links, and most sessions, of one member."""


@dataclass(frozen=True, slots=True)
class _Pass:
    caller: Caller
    ends_s: float


class _Passes:
    """Secrets and whose they are, with an end; only the secrets' hashes are kept."""

    def __init__(self, life_s: float, most: int, clock: Callable[[], float]) -> None:
        self._life_s, self._most, self._clock = life_s, most, clock
        self._passes: dict[bytes, _Pass] = {}  # oldest first

    def new(self, caller: Caller) -> str:
        """A new secret of `caller`."""
        now_s = self._clock()
        self._passes = {key: one for key, one in self._passes.items() if one.ends_s > now_s}
        own = [key for key, one in self._passes.items() if one.caller.name == caller.name]
        if len(own) >= OF_A_MEMBER_MAX:
            del self._passes[own[0]]
        elif len(self._passes) >= self._most:
            del self._passes[next(iter(self._passes))]
        secret = secrets.token_urlsafe(32)
        self._passes[_key(secret)] = _Pass(caller, now_s + self._life_s)
        return secret

    def find(self, secret: str) -> Caller | None:
        """Whose secret this is; None if it is nobody's now."""
        found = self._passes.get(_key(secret))
        return None if found is None or found.ends_s <= self._clock() else found.caller

    def take(self, secret: str) -> Caller | None:
        """As `find`; the secret cannot be used again."""
        caller = self.find(secret)
        self._passes.pop(_key(secret), None)
        return caller


def _key(secret: str) -> bytes:
    # What a look-up's time could tell is about a hash, from which nothing follows.
    return hashlib.sha256(secret.encode(errors="replace")).digest()


class PageAccess:
    """The links and sessions of a fleet's page."""

    def __init__(
        self, member: Callable[[bytes], Caller], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`member` gives the member whose key has a fingerprint, as `Members.caller` does."""
        self._member = member
        self._links = _Passes(LINK_LIFE_S, LINKS_MAX, clock)
        self._sessions = _Passes(SESSION_LIFE_S, SESSIONS_MAX, clock)

    def new_link(self, caller: Caller) -> str:
        """The secret of a link for a member, who has the right to it."""
        return self._links.new(caller)

    def enter(self, secret: str) -> str:
        """Exchange a link's secret for a session's; raises `TokenError` if it is of no use."""
        caller = self._links.take(secret)
        if caller is None or not self._may_look(caller):
            raise TokenError(
                "This link was used before, or is older than five minutes; get a new one with: "
                "fedmezo page"
            )
        return self._sessions.new(caller)

    def check(self, secret: str) -> Caller:
        """The member of a session; raises `ForbiddenError` if there is none who may look."""
        caller = self._sessions.find(secret)
        if caller is None or not self._may_look(caller):
            raise ForbiddenError(
                "This page is for the fleet's observers and operators; get a link with: "
                "fedmezo page"
            )
        return caller

    def _may_look(self, caller: Caller) -> bool:
        """Whether the member, with the key that it had, is one now that may look."""
        try:
            check_allowed(OPEN_PAGE, self._member(caller.fingerprint))
        except FedMezoError:
            return False
        return True
