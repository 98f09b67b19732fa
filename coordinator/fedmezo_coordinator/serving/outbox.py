"""What waits to be sent to one worker."""

from __future__ import annotations

import asyncio
from collections import deque

from fedmezo_core.errors import FedMezoError
from fedmezo_proto.v1 import coordinator_pb2 as wire

Outgoing = wire.SessionResponse | bytes
"""A message, or one already serialised: a commit is serialised once, however many get it."""


class Outbox:
    """A queue for one reader. Ten thousand of these wait at a time: it holds nothing that it need not."""

    __slots__ = ("_items", "_waiter", "bytes_waiting")

    def __init__(self) -> None:
        self._items: deque[tuple[Outgoing | FedMezoError, int]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.bytes_waiting = 0
        """Of the serialised messages in it, which are the large ones."""

    def put_nowait(self, item: Outgoing | FedMezoError) -> None:
        """Add at the end; whoever fills it looks at `qsize` and `bytes_waiting` first."""
        size = len(item) if isinstance(item, bytes) else 0
        self.bytes_waiting += size
        self._items.append((item, size))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def get_nowait(self) -> Outgoing | FedMezoError:
        """Take the first; there must be one."""
        item, size = self._items.popleft()
        self.bytes_waiting -= size
        return item

    async def get(self) -> Outgoing | FedMezoError:
        """Take the first, once there is one."""
        await self.wait()
        return self.get_nowait()

    async def wait(self) -> None:
        """Return once there is something in it."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def qsize(self) -> int:
        """Count of items in it."""
        return len(self._items)
