"""How many tasks may go on in one turn of the event loop.

gRPC reports hundreds of finished writes at once, and every one of their tasks has a next message to
write, at a tenth of a millisecond each: all in one turn they would keep the loop from everything else.
"""

from __future__ import annotations

import asyncio
from collections import deque


class WritePacing:
    """Lets so many through in each turn of the loop, in the order in which they came."""

    def __init__(self, each_turn: int) -> None:
        self._each_turn = each_turn
        self._left = each_turn
        self._is_turning = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def through(self) -> None:
        """Return at once, or in one of the next turns."""
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
        self._left = self._each_turn
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # whoever waited may be gone
                turn.set_result(None)
                self._left -= 1
        self._is_turning = self._left < self._each_turn
        if self._is_turning:
            loop.call_soon(self._turn, loop)
