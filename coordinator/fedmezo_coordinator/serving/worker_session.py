"""A worker's open session, and the messages that wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from fedmezo_core.errors import FedMezoError, NotReadyError
from fedmezo_core.events import Assign
from fedmezo_core.trust.authorisation import Caller
from fedmezo_core.wire.admission import Signing
from fedmezo_proto.v1 import coordinator_pb2 as wire

OUTBOX_MAX = 1024
"""Most messages that wait for one worker; a worker that reads too slowly is cut off."""
OUTBOX_BYTES_MAX = 8 * 1024 * 1024
"""Most bytes that wait for one worker; the largest commit has a little more than 1 MiB."""

Outgoing = wire.SessionResponse | bytes
"""A message, or its bytes: a commit is serialised once for all the workers that it goes to."""


class HalfClosedError(FedMezoError):
    """The worker has nothing more to send: its session ends without an error."""


class Outbox:
    """A queue with one reader; small, because a coordinator keeps ten thousand of them."""

    __slots__ = ("_items", "_waiter", "bytes_waiting")

    def __init__(self) -> None:
        self._items: deque[tuple[Outgoing | FedMezoError, int]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.bytes_waiting = 0
        """Bytes of the serialised messages in it; those are the large ones."""

    def put_nowait(self, item: Outgoing | FedMezoError) -> None:
        """Append an item; the caller checks `qsize` and `bytes_waiting` first."""
        size = len(item) if isinstance(item, bytes) else 0
        self.bytes_waiting += size
        self._items.append((item, size))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def get_nowait(self) -> Outgoing | FedMezoError:
        """Remove and return the first item; the queue must not be empty."""
        item, size = self._items.popleft()
        self.bytes_waiting -= size
        return item

    async def get(self) -> Outgoing | FedMezoError:
        """Remove and return the first item, as soon as there is one."""
        await self.wait()
        return self.get_nowait()

    async def wait(self) -> None:
        """Return as soon as the queue holds an item."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def qsize(self) -> int:
        """Count of items in the queue."""
        return len(self._items)


@dataclass(slots=True)
class Traffic:
    """Counters of one worker since this start, over all its sessions."""

    bytes_up: int = 0
    bytes_down: int = 0
    assigned_at_s: float | None = None
    """When its newest assignment was sent, on the monotonic clock."""
    answered_after_ms: int = 0
    """Time from its newest answered assignment to the answer."""


@dataclass(eq=False, slots=True)
class WorkerSession:
    """A worker's open session: what waits for it, and how it ended."""

    worker: str
    exchanges: bool = False
    """Whether each of its calls says hello anew, and so opens a session that goes on from the last
    one."""
    caller: Caller = Caller.ANYONE
    """Who opened it."""
    signing: Signing | None = None
    """How its answers are signed; None if they are not."""
    assign: Assign | None = None
    """The newest assignment that was sent in it."""
    outbox: Outbox = field(default_factory=Outbox)
    ended: FedMezoError | None = None
    traffic: Traffic = field(default_factory=Traffic)
    """The worker's counters, shared by all its sessions once it has joined."""

    def put(self, message: Outgoing) -> None:
        """Queue a message; a full queue ends the session, so that nobody waits for this worker."""
        if self.ended is not None:
            return
        full = self.outbox.qsize() >= OUTBOX_MAX - 1
        # An empty queue takes a message of any size.
        if full or self.outbox.bytes_waiting > OUTBOX_BYTES_MAX:
            self.end(
                NotReadyError(
                    f"Worker {self.worker} reads more slowly than the run writes; "
                    "reconnect to catch up."
                )
            )
            return
        self.outbox.put_nowait(message)

    def unread_replies(self) -> list[wire.SessionResponse]:
        """Remove and return what waits about single answers and sums; the rest can be made anew."""
        items = [self.outbox.get_nowait() for _ in range(self.outbox.qsize())]
        return [
            item
            for item in items
            if isinstance(item, wire.SessionResponse)
            and item.WhichOneof("kind") in ("ack", "refused", "sum_ask")
        ]

    def cut(self, error: FedMezoError) -> None:
        """End the session with `error` in place of the messages that are queued."""
        while self.outbox.qsize():
            self.outbox.get_nowait()
        self.ended = error
        self.outbox.put_nowait(error)

    def end(self, error: FedMezoError) -> None:
        """End the session with `error` after the messages that are queued."""
        if self.ended is None:
            self.ended = error
            self.outbox.put_nowait(error)
