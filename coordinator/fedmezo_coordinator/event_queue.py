"""The queue of a serving loop, in which an answer waits while its signature is being checked."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from fedmezo_core.wire.admission import SignedAnswer

ItemT = TypeVar("ItemT")


class EventQueue(Generic[ItemT]):
    """A bounded queue with one reader.

    An item whose signature is being checked elsewhere cannot be taken yet, nor can those behind it.
    """

    def __init__(self, items_max: int) -> None:
        """Whoever puts more than `items_max` items waits until there is room."""
        self._items_max = items_max
        self._items: deque[tuple[ItemT, SignedAnswer | None]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()

    async def put(self, item: ItemT, signed: SignedAnswer | None = None) -> None:
        """Append an item, as soon as there is room; `signed` is the signed answer in it."""
        while len(self._items) >= self._items_max:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._writers.append(room)
            try:
                await room
            except asyncio.CancelledError:
                if not room.cancelled():
                    self._let_write()  # The room is another writer's now.
                raise
        self._append(item, signed)

    def put_anyway(self, item: ItemT) -> None:
        """Append an item whether there is room or not: something that comes once a session."""
        self._append(item, None)

    def _append(self, item: ItemT, signed: SignedAnswer | None) -> None:
        self._items.append((item, signed))
        self.look_again()

    async def get(self) -> ItemT:
        """Remove and return the first item, as soon as it can be taken."""
        while self.empty():
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self.get_nowait()

    def get_nowait(self) -> ItemT:
        """Remove and return the first item, whether it can be taken or not; there must be one."""
        item, _ = self._items.popleft()
        self._let_write()
        return item

    def empty(self) -> bool:
        """Whether nothing can be taken now."""
        if not self._items:
            return True
        signed = self._items[0][1]
        return signed is not None and signed.is_awaited

    def qsize(self) -> int:
        """Count of items, whether they can be taken or not."""
        return len(self._items)

    def look_again(self) -> None:
        """Wake the reader if the first item can be taken."""
        if self._reader is not None and not self._reader.done() and not self.empty():
            self._reader.set_result(None)

    def _let_write(self) -> None:
        while self._writers:
            room = self._writers.popleft()
            if not room.done():
                room.set_result(None)
                return
