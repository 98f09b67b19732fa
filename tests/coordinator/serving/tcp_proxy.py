"""A TCP proxy on loopback that can lose what goes one way, and cut every connection."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class Proxy:
    """Passes bytes between clients of `port` and a server, until it is stopped."""

    def __init__(self, server_port: int) -> None:
        self.mute = False
        """Lose what the server says."""
        self.deaf = False
        """Lose what the clients say."""
        self.swallowed = 0
        """Bytes that were lost."""
        self._server_port = server_port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection that is open now, both ends."""
        sockets, self._open = self._open, []
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open += [client, server]
                for source, sink, is_up in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self._pass, args=(source, sink, is_up), daemon=True
                    ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                if self.deaf if is_up else self.mute:
                    self.swallowed += len(chunk)
                else:
                    sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
