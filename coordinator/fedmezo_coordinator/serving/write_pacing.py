"""A limit on the tasks that write in one turn of the event loop.

gRPC reports hundreds of finished writes at once. Each of their tasks then has a next message to
write, which takes a tenth of a millisecond. All of them in one turn would block the loop's other
tasks.
"""

from __future__ import annotations

import asyncio
from collections import deque


class WritePacing:
    """Lets `writes_a_turn` tasks continue in each turn of the event loop, in order of arrival."""

    def __init__(self, writes_a_turn: int) -> None:
        self._writes_a_turn = writes_a_turn
        self._left = writes_a_turn
        self._is_turning = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next_write(self) -> None:
        """Return when the caller may write: at once, or in one of the next turns."""
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._writes_a_turn
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # The task may have been cancelled.
                turn.set_result(None)
                self._left -= 1
        self._is_turning = self._left < self._writes_a_turn
        if self._is_turning:
            loop.call_soon(self._turn, loop)
