"""Calling a coordinator's handlers in this process, as gRPC calls them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc

from fedmezo_proto.v1 import coordinator_pb2 as wire


class ChangedStateError(AssertionError):
    """A call that was refused has changed something."""


class EndedError(Exception):
    """A call was ended with a status."""


class Context:
    """A call's context: what a handler sees of gRPC."""

    def __init__(self, messages: list[bytes] | None = None) -> None:
        self._messages = messages or []
        self._callbacks: list[Callable[[Any], None]] = []

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50123"  # Without a fleet, orders come from this machine alone.

    def time_remaining(self) -> float:
        return 10.0

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    async def read(self) -> Any:
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, message: bytes) -> None:
        wire.SessionResponse.FromString(message)

    async def abort(self, code: grpc.StatusCode, details: str, **_: Any) -> NoReturn:
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), details
        # It travels in a header, which is bounded.
        assert len(details.encode()) < 8192, details
        raise EndedError

    def done(self) -> None:
        """The call is over."""
        for callback in self._callbacks:
            callback(self)


async def awaited(what: Awaitable[None]) -> None:
    """Await `what`, as a coroutine."""
    await what
