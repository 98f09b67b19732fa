"""The queue of messages that wait to be sent to one worker."""

from __future__ import annotations

import asyncio
from collections import deque

from fedmezo_core.errors import FedMezoError
from fedmezo_proto.v1 import coordinator_pb2 as wire

Outgoing = wire.SessionResponse | bytes
"""A message, or its bytes: a commit is serialised once for all the workers that it goes to."""


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
