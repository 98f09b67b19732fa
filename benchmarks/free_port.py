"""A port for a server that is started on it later, or again."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

FIRST, COUNT = 20_000, 12_768
"""Below the ports that Linux chooses for connections and for port 0, which begin at 32768: while
nobody listens, another process cannot get one of these by chance."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on now."""
    while True:
        port = FIRST + secrets.randbelow(COUNT)
        with suppress(OSError), socket.create_server((host, port)):
            return port
