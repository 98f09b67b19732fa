"""A coordinator behind an HTTP proxy, which the environment names."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedmezo_core.errors import UnavailableError
from fedmezo_core.service import proxies
from fedmezo_core.service.proxies import NO_PROXY_VARIABLES, PROXY_VARIABLES, connect, proxy_for
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import config_of, genesis_of, served

GENESIS = genesis_of(config_of(rounds=1, local_steps=1, workers_min=1, quorum=1))
FAR = "fleet.example.org:7465"
"""An address that only the proxy knows."""


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, *NO_PROXY_VARIABLES):
        monkeypatch.delenv(name, raising=False)


class HttpProxy:
    """Answers CONNECT, and leads every connection to the same port of this machine."""

    def __init__(self) -> None:
        self.to_port = 0
        self.refuses = False
        self.asked: list[list[str]] = []
        """The lines of each request."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(4096)
            self.asked.append(head.decode().split("\r\n"))
            if self.refuses:
                near.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self.to_port)) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                threading.Thread(target=_pass, args=(far, near), daemon=True).start()
                _pass(near, far)


def _pass(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    running = HttpProxy()
    yield running
    running.close()


async def test_a_run_is_reached_through_the_proxy(
    proxy: HttpProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path / "j.db", GENESIS) as at:
        proxy.to_port = int(at.address.rpartition(":")[2])
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        async with CoordinatorClient(FAR) as client:
            assert (await client.get_run()).genesis.config.run_id == GENESIS.config.run_id
        assert proxy.asked[0][0] == f"CONNECT {FAR} HTTP/1.1"
        # This machine is never asked for by way of another.
        async with CoordinatorClient(at.address) as client:
            await client.get_run()
        assert len(proxy.asked) == 1


def test_enrolment_takes_the_same_way_and_shows_who_it_is(
    proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        proxy.to_port = there.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
        with connect(FAR, 5.0) as near:
            far, _ = there.accept()
            with far:
                near.sendall(b"hello")
                assert far.recv(5) == b"hello"
    shown = base64.b64encode(b"me:p@ss").decode()
    assert f"Proxy-Authorization: Basic {shown}" in proxy.asked[0]
    proxy.refuses = True
    with pytest.raises(OSError, match="403"):
        connect(FAR, 5.0)


async def test_a_proxy_that_refuses_is_told_as_nobody_there(
    proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refuses = True
    monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.port}")
    async with CoordinatorClient(FAR) as client:
        with pytest.raises(UnavailableError, match="No coordinator answers at fleet"):
            await client.get_run()


@pytest.mark.parametrize(
    ("spared", "address", "is_used"),
    [
        ("", FAR, True),
        ("example.org", FAR, False),
        ("other.org, fleet.example.org", FAR, False),
        ("", "127.0.0.1:7465", False),
        ("", "[::1]:7465", False),
        ("", "localhost:7465", False),
        ("", "unix:/run/x.sock", False),
        ("", "10.0.0.7:7465", True),
    ],
)
def test_who_is_reached_without_it(
    spared: str, address: str, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", spared)
    assert bool(proxies.proxy_for(address)) is is_used
    monkeypatch.setenv("https_proxy", "http://first:3128")
    assert proxy_for(address) == ("http://first:3128" if is_used else "")
