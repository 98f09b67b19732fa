"""How grpc.aio wakes the event loop: a program of ours takes all its wakeups in one turn.

grpc.aio has a thread of its own, which writes one byte to a socket pair for each finished operation
(https://github.com/grpc/grpc/pull/22259). In each turn the event loop reads one byte and completes
all operations that have finished, so the bytes that are left cost empty turns. About 278 bytes fill
the socket; then the thread waits for the loop, and one operation a turn is all that happens. While
a commit goes to thousands of workers, a worker that wants to join waits for all those writes.

Reading every byte at once saves 10 to 15 % of the CPU time of a submission and lets workers join
under full load (decision 0023). An operation is in grpc's queue before its byte is written, so that
one loop misses none. All loops of a process share the queue. If one of them was closed, a turn ends
with an exception at the first of its operations, and the bytes of those behind it are needed to get
on. So only a process that has one event loop reads them all at once: a program, and no library.

grpc offers no setting for it, and makes the pair with `socket.socketpair` when the first server or
channel is made. So that function is replaced while the server is made. A grpc that makes no such
pair loses the gain and nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READ_BYTES = 4096

_has_one_loop = False


class _ReadWhole(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:
        """Read every byte that is there, up to `READ_BYTES`, even if `size` is smaller."""
        return super().recv(max(size, READ_BYTES), flags)


def this_process_has_one_loop() -> None:
    """Say that no other event loop of this process uses grpc, for as long as it lives."""
    global _has_one_loop
    _has_one_loop = True


@contextmanager
def reading_all_wakeups() -> Iterator[None]:
    """In this block, the first socket of a `socket.socketpair` reads all bytes at once.

    Nothing changes in a process that may have several event loops.
    """
    if not _has_one_loop:
        yield
        return
    make = socket.socketpair

    def make_pair(*arguments: Any) -> tuple[socket.socket, socket.socket]:
        reading, writing = make(*arguments)
        return _ReadWhole(fileno=reading.detach()), writing

    socket.socketpair = make_pair  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.socketpair = make
