"""The socket of the page's port, which is bound before anything of the page is loaded."""

from __future__ import annotations

import socket

from fedmezo_core.errors import ConfigError

BACKLOG = 64


def page_socket(listen: str) -> socket.socket:
    """A socket that listens at `listen` (host:port); browsers wait there until it is served.

    Raises `ConfigError` for an address that cannot be used.
    """
    host, _, port = listen.rpartition(":")
    try:
        return _bound(host.strip("[]"), int(port))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on page = {listen} ({error.strerror or error}): another process "
            "uses the address, or it is not this machine's; choose another --page."
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
