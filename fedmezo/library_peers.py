"""Who of a stack's nodes is which worker, and what each is sent: where the server begins.

A stack such as Flower or NVFlare sends a message to a node, and gets a reply or an error, or
neither. Each message and its reply are one exchange of a `Coordinator`, and each is complete in
itself. So a message that may be lost is sent again, and that changes nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fedmezo.library_coordinator import Coordinator
from fedmezo_core.errors import FedMezoError, NotReadyError

PEER_LEASE_MS = 30 * 24 * 3600 * 1000
"""A coordinator's lease on the workers of peers: no limit, because the stack knows who is there."""

Peer = TypeVar("Peer", bound=Hashable)
"""What a stack calls a node by, such as its id."""


@dataclass(slots=True)
class _State:
    """What is known of one peer."""

    worker: str = ""
    """The name that its worker has in the run; empty before it is known, or if it is not there."""
    message: Hashable | None = None
    """The message that is on the way; None: none."""
    sent_at_s: float = 0.0
    again_at_s: float = -math.inf
    """Nothing is sent before this time."""
    refusal: bytes = b""
    """What its worker is told next, because what it sent was refused."""
    complaint: str = ""
    """The newest complaint, which the log has."""
    failures: int = 0
    """Errors in a row."""
    is_there: bool = True


class Peers(Generic[Peer]):
    """The peers of one run: when each is due, and what its replies come to.

    All times are in seconds of one clock that never goes back. The coordinator has the lease
    `PEER_LEASE_MS`.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        named: Callable[[Peer], str],
        log: logging.Logger,
        again_after_s: float,
        resend_after_s: float = math.inf,
    ) -> None:
        """`named` gives a peer's name for `log`.

        again_after_s: time until a peer that failed gets its next message. resend_after_s: time
        after which a message without a reply is sent again; infinite where the stack says what is
        lost.
        """
        self._coordinator = coordinator
        self._named = named
        self._log = log
        self._again_after_s = again_after_s
        self._resend_after_s = resend_after_s
        self._states: dict[Peer, _State] = {}

    # ------------------------------------------------------------ who is there

    def see(self, peers: Iterable[Peer]) -> None:
        """Take note of who is there; the workers of all others are disconnected."""
        there = set(peers)
        for peer in there:
            self._state(peer).is_there = True
        for peer in self._states.keys() - there:
            state = self._states[peer]
            state.is_there, state.message = False, None
            self._disconnect(state)

    def failures(self, peer: Peer) -> int:
        """How often in a row a peer failed."""
        return self._state(peer).failures

    # ------------------------------------------------------------ down

    def due(self, peer: Peer, now_s: float) -> bytes | None:
        """What a peer is to be sent now; None for nothing, empty if its worker must say hello."""
        state = self._state(peer)
        is_waited_for = state.message is not None
        if is_waited_for and now_s < state.sent_at_s + self._resend_after_s:
            return None
        if not state.is_there or now_s < state.again_at_s:
            return None
        if state.worker not in self._coordinator.workers:
            refusal, state.refusal = state.refusal, b""
            return refusal
        if is_waited_for or self._coordinator.has_news(state.worker):
            return self._coordinator.down_for(state.worker)
        return None

    def sent(self, peer: Peer, message: Hashable | None, now_s: float) -> None:
        """Note that `message` is on the way to a peer; None: the stack did not take it."""
        state = self._state(peer)
        state.message, state.sent_at_s = message, now_s
        if message is None:
            state.again_at_s = now_s + self._again_after_s

    def on_the_way(self) -> dict[Hashable, Peer]:
        """Message -> peer, for all that have no reply yet."""
        return {
            state.message: peer for peer, state in self._states.items() if state.message is not None
        }

    # ------------------------------------------------------------ up

    def take(
        self, peer: Peer, message: Hashable | None, worker: str, up: bytes, now_s: float
    ) -> None:
        """Take a peer's reply to `message`, or to an older one: what its worker sent up.

        `worker` is the name that the stack, or the reply, gives the worker. If `up` is of no use,
        the worker is told why with the next message.
        """
        state = self._ended(peer, message)
        try:
            self._check_name(peer, worker)
            state.worker = self._coordinator.take(up, worker=worker)
            state.complaint, state.failures = "", 0
        except FedMezoError as error:
            self._put_off(peer, now_s, str(error))
            state.refusal = self._coordinator.refusal(up, error)

    def fail(self, peer: Peer, message: Hashable | None, sentence: str, now_s: float) -> None:
        """Note that a peer replied with an error, which `sentence` tells."""
        self._ended(peer, message).failures += 1
        self._put_off(peer, now_s, sentence)

    def lose(self, peer: Peer, message: Hashable | None, now_s: float) -> None:
        """Note that no reply to `message` will come; nothing changes if one came."""
        if message is not None and self._state(peer).message == message:
            self._ended(peer, message)
            self._put_off(peer, now_s)

    def begin_again(self, peer: Peer, message: Hashable | None) -> None:
        """Note that a peer replied that it knows nothing of the run; it greets next."""
        self._disconnect(self._ended(peer, message))

    # ------------------------------------------------------------ small parts

    def _state(self, peer: Peer) -> _State:
        return self._states.setdefault(peer, _State())

    def _ended(self, peer: Peer, message: Hashable | None) -> _State:
        state = self._state(peer)
        if message == state.message:
            state.message = None
        return state

    def _put_off(self, peer: Peer, now_s: float, complaint: str = "") -> None:
        """Send a peer nothing for a while, in which it has no worker."""
        state = self._state(peer)
        state.again_at_s = now_s + self._again_after_s
        self._disconnect(state)
        if complaint and complaint != state.complaint:
            state.complaint = complaint
            self._log.warning("%s: %s", self._named(peer), complaint)

    def _disconnect(self, state: _State) -> None:
        self._coordinator.disconnect(state.worker)
        state.worker = ""

    def _check_name(self, peer: Peer, worker: str) -> None:
        """Refuse a worker whose name another peer's worker has."""
        for other, state in self._states.items():
            if other != peer and state.worker == worker:
                raise NotReadyError(
                    f"its worker is named {worker}, as that of {self._named(other)} is; give each "
                    "worker a name of its own"
                )
