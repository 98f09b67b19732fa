"""How grpc.aio wakes the event loop: all its wakeups so far are taken at once.

Its own thread writes one byte to a socket pair for each finished operation, and the loop takes one byte a
turn, with all the operations that are finished by then. So every operation costs a turn of the loop, even
those that have been seen to; and once a few hundred bytes fill the socket, that thread waits, and one
operation a turn is all that goes on: under a fan-out to thousands, a worker that wants to join waits for
all of its writes. Reading every byte that is there is as safe: a byte is written after its operation can
be found.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READ_BYTES = 4096


class _Drained(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:
        """Take whatever is there."""
        return super().recv(max(size, READ_BYTES), flags)


@contextmanager
def drained() -> Iterator[None]:
    """Socket pairs made in this block, which is grpc's as long as it makes one, are read until empty."""
    make = socket.socketpair

    def make_drained(*arguments: Any) -> tuple[socket.socket, socket.socket]:
        reading, writing = make(*arguments)
        return _Drained(fileno=reading.detach()), writing

    socket.socketpair = make_drained  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.socketpair = make
