"""A TCP proxy that disturbs: delay, little bandwidth, resets, links that go silent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

CHUNK_BYTES: Final = 4096


class Link:
    """One connection through the proxy, and its other half to the target."""

    def __init__(self, ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self.ends = ends
        self.silent = False
        """Whether bytes are still read but go nowhere: neither side is told anything."""

    def reset(self) -> None:
        """Break off, so that both sides get a RST instead of an end."""
        for end in self.ends:
            connection: socket.socket = end.get_extra_info("socket")
            with suppress(OSError):
                # Linger for no time: closing sends a RST.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.transport.abort()


class Proxy:
    """Forwards to `target` whatever connects; the attributes may change at any time."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self.address = ""
        self.delay_s = 0.0
        """Each way, added to each chunk."""
        self.bytes_per_s = 0.0
        """Of each connection and direction; 0: no limit."""
        self.links: list[Link] = []
        self.connections = 0
        """Made so far."""
        self.handlers: set[asyncio.Task[None]] = set()

    def reset_all(self) -> None:
        """Break every connection."""
        for link in self.links:
            link.reset()

    def silence_all(self) -> None:
        """Let every connection that is open now hang for good; new ones are forwarded."""
        for link in self.links:
            link.silent = True

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one more connection."""
        handler = asyncio.create_task(self._handle(reader, writer))
        self.handlers.add(handler)
        handler.add_done_callback(self.handlers.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, away = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.transport.abort()
            return
        link = Link((writer, away))
        self.links.append(link)
        self.connections += 1
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, away, link))
                both.create_task(self._pump(there, writer, link))
        except* OSError:
            pass
        finally:
            self.links.remove(link)
            for end in link.ends:
                end.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link
    ) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            wait_s = self.delay_s
            if self.bytes_per_s:
                wait_s += len(chunk) / self.bytes_per_s
            if wait_s:
                await asyncio.sleep(wait_s)
            if not link.silent:
                writer.write(chunk)
                await writer.drain()
        if not link.silent and writer.can_write_eof():
            writer.write_eof()


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy on a port of its own, until the end."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.reset_all()
        await asyncio.gather(*proxy.handlers, return_exceptions=True)
        await server.wait_closed()
