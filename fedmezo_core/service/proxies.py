"""HTTP proxies on the way to a coordinator, where the environment names them."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import os
import socket
import urllib.parse

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables that may name the proxy, the first one first; they are gRPC's."""
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")
"""Environment variables that may list hosts which are reached without it."""


def is_of_this_machine(address: str) -> bool:
    """Whether host:port, or a socket's path, can only be on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


def proxy_for(address: str) -> str:
    """URL of the proxy to host:port, which gRPC uses too; empty: there is none on the way."""
    host = address.rpartition(":")[0].strip("[]")
    proxy = next(filter(None, map(os.environ.get, PROXY_VARIABLES)), "")
    spared = next(filter(None, map(os.environ.get, NO_PROXY_VARIABLES)), "")
    hosts = [one.strip().lstrip(".").lower() for one in spared.split(",")]
    is_spared = any(f".{host.lower()}".endswith(f".{one}") for one in hosts if one)
    return "" if is_spared or is_of_this_machine(address) else proxy


def connect(address: str, timeout_s: float) -> socket.socket:
    """A TCP connection to host:port, through the proxy if there is one; raises `OSError`."""
    host, _, port = address.rpartition(":")
    proxy = urllib.parse.urlsplit(proxy_for(address))
    if not proxy.hostname:
        return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    way = http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=timeout_s)
    headers = {}
    if proxy.username is not None:
        named = (proxy.username, proxy.password or "")
        user = ":".join(map(urllib.parse.unquote, named))
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    way.set_tunnel(host, int(port), headers)
    try:
        way.connect()
    except http.client.HTTPException as error:
        raise OSError(f"the proxy {proxy.hostname} answers with no HTTP: {error!r}") from None
    # The connection is the caller's from now on.
    connection, way.sock = way.sock, None
    return connection
