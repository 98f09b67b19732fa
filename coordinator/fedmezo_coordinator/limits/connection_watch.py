"""Closing connections that gRPC leaves open: of callers with too many, and without any call.

gRPC tells a server about calls, not about connections. So this looks at the process's own sockets,
which Linux lists in `/proc/self/fd`; on other systems nothing is closed. A socket is shut down by a
duplicate of its descriptor. gRPC then sees the other side's end, and cleans up as it always does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedmezo_coordinator.limits.caller_limits import address_of

LOOK_EVERY_S = 1.0
"""Shortest time between two looks."""
LOOKING_SHARE = 0.005
"""Largest share of a core that looking takes; with thousands of connections, looks come later."""
FIRST_CALL_S = 30.0
"""Longest time from the moment a connection is seen to its first call; a handshake has 20 s."""
SLICE = 256
"""Descriptors that are looked at before other threads get their turn."""
SLICE_PAUSE_S = 0.005

_DESCRIPTORS = "/proc/self/fd"
_INTERNET = (socket.AF_INET, socket.AF_INET6)


@dataclass(slots=True)
class _Seen:
    """An open connection."""

    descriptor: int
    peer: str
    """As `ServicerContext.peer` names it."""
    address: str
    at_s: float
    """When it was first seen."""


class ConnectionWatch:
    """Watches the connections to one port of this process."""

    def __init__(self, connections_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`connections_max` is the most connections of one caller."""
        self._connections_max = connections_max
        self._clock = clock
        self._is_watching = False
        self._callers: dict[str, str] = {}
        """Peer -> who called, for connections that had a call."""
        self._seen: dict[str, _Seen] = {}
        """What `/proc` calls a socket -> the connection; oldest first."""
        self.closed = 0
        """Count of connections that were closed."""

    def called(self, peer: str, caller: str) -> None:
        """Note that `caller` made a call on the connection from `peer`."""
        if self._is_watching:
            self._callers[peer] = caller

    async def watch(self, port: int) -> None:
        """Look at the connections to `port` again and again, until cancelled."""
        if not sys.platform.startswith("linux"):
            return
        self._is_watching = True
        looked_s = 0.0
        while True:
            await asyncio.sleep(max(LOOK_EVERY_S, looked_s / LOOKING_SHARE))
            looked_s = await asyncio.to_thread(self.look, port)

    def look(self, port: int) -> float:
        """Close what is beyond the limits; returns the CPU seconds that this took."""
        self._is_watching = True
        begin_s = time.thread_time()
        callers = dict(self._callers)
        self._look_for(port)
        now_s, counts = self._clock(), Counter[str]()
        for seen in self._seen.values():
            caller = callers.get(seen.peer)
            counts[key := caller or seen.address] += 1
            is_idle = caller is None and now_s - seen.at_s > FIRST_CALL_S
            if is_idle or counts[key] > self._connections_max:
                self._shut_down(seen)
        open_peers = {seen.peer for seen in self._seen.values()}
        # Not those that came meanwhile: their sockets were not looked for.
        for peer in callers.keys() - open_peers:
            self._callers.pop(peer, None)
        return time.thread_time() - begin_s

    def _look_for(self, port: int) -> None:
        """Find the connections that came since the last time, and forget those that are gone."""
        found: set[str] = set()
        with os.scandir(_DESCRIPTORS) as entries:
            descriptors = [entry.name for entry in entries]
        for number, descriptor in enumerate(descriptors):
            if number % SLICE == SLICE - 1:
                time.sleep(SLICE_PAUSE_S)
            try:
                name = os.readlink(f"{_DESCRIPTORS}/{descriptor}")  # noqa: PTH115 - ten times as fast
            except OSError:
                continue  # closed meanwhile
            if not name.startswith("socket:"):
                continue
            found.add(name)
            seen = self._seen.get(name)
            if seen is not None:
                seen.descriptor = int(descriptor)
            elif (peer := _peer_of(int(descriptor), port)) is not None:
                self._seen[name] = _Seen(int(descriptor), peer, address_of(peer), self._clock())
        for name in self._seen.keys() - found:
            del self._seen[name]

    def _shut_down(self, seen: _Seen) -> None:
        """End a connection; a descriptor that was closed meanwhile may stand for another one."""
        connection = _duplicate(seen.descriptor)
        if connection is None:
            return
        with connection, contextlib.suppress(OSError):
            if _name_of(connection.getpeername()) == seen.peer:
                connection.shutdown(socket.SHUT_RDWR)
                self.closed += 1


def _peer_of(descriptor: int, port: int) -> str | None:
    """The other side of an open connection to `port`; None for any other descriptor."""
    connection = _duplicate(descriptor)
    if connection is None:
        return None
    with connection, contextlib.suppress(OSError):
        if connection.family in _INTERNET and connection.getsockname()[1] == port:
            return _name_of(connection.getpeername())
    return None


def _duplicate(descriptor: int) -> socket.socket | None:
    """A second descriptor of the same socket; None if it is no socket, or was closed meanwhile."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return None


def _name_of(name: tuple[Any, ...]) -> str:
    """A socket's peer as `ServicerContext.peer` names it."""
    host, port = str(name[0]).partition("%")[0].removeprefix("::ffff:"), name[1]
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    # Link-local addresses have the number of a network interface, which is 0 for all others.
    scope = f"%25{name[3]}" if name[3] else ""
    return f"ipv6:%5B{host}{scope}%5D:{port}"
