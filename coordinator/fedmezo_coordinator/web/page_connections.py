"""The connections of the page's port: so many at a time, and none for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

from aiohttp import web

CONNECTIONS_MAX = 64
"""Most connections at a time; further ones are closed as soon as they come."""
HANDSHAKE_S = 5.0
"""Longest TLS handshake."""
CONNECTION_LIFE_S = 60.0
"""A connection is closed after so long, unless it carries a live stream."""
LAST_REQUEST_S = 5.0
"""Time that a request has to end which is under way then."""
ACCEPT_AGAIN_S = 1.0
"""Pause after a connection could not be accepted, for example because no file may be opened."""


class PageConnections:
    """Accepts connections at a socket and gives them to an HTTP server of aiohttp."""

    def __init__(
        self, listening: socket.socket, server: web.Server, tls: ssl.SSLContext | None
    ) -> None:
        self._server, self._tls = server, tls
        self._handshaking: set[asyncio.Task[None]] = set()
        self.streaming: set[Any] = set()
        """Protocols of the connections that carry a live stream."""
        self._socket = listening
        self.port: int = listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Accept no more; the caller ends the connections that there are."""
        tasks = [self._accepting, *self._handshaking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._socket)
            except OSError:
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if len(self._handshaking) + len(self._server.connections) >= CONNECTIONS_MAX:
                accepted.close()
                continue
            task = asyncio.create_task(self._take(accepted))
            self._handshaking.add(task)
            task.add_done_callback(self._handshaking.discard)

    async def _take(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            _, protocol = await loop.connect_accepted_socket(
                self._server,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
            )
        except OSError:  # ssl.SSLError is one too.
            accepted.close()
            return
        loop.call_later(CONNECTION_LIFE_S, self._end, protocol)

    def _end(self, protocol: Any) -> None:
        if protocol not in self.streaming:
            protocol.close()
            asyncio.get_running_loop().call_later(LAST_REQUEST_S, protocol.force_close)
