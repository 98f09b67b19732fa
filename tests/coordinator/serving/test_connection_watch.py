"""Connections that gRPC would leave open are closed, and only those."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.limits.connection_watch import FIRST_CALL_S, ConnectionWatch, _name_of
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.service import bind_server, start_server
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.wire.client import CoordinatorClient
from tests.coordinator.serving.test_limits import HTTP2, connection_to, is_open
from tests.integration.support.harness import (
    Served,
    config_of,
    genesis_of,
    scripted_workers,
    until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's sockets")

GENESIS = genesis_of(config_of(workers_min=1, quorum=1, cohort_size_max=1))


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@contextlib.asynccontextmanager
async def watched(
    tmp_path: Path, watch: ConnectionWatch, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Served, int]]:
    """A daemon whose connections `watch` sees when the test lets it look, and its port."""
    journal = Journal(SqliteStore(tmp_path / "j.db"))
    journal.append(encode_records([GENESIS]))
    daemon = Daemon(journal)
    await daemon.load()
    server, port = bind_server(listen, None)
    (await start_server(server, watch=watch)).begin(Runs.of(daemon))
    serving = asyncio.create_task(daemon.serve())
    try:
        watch.look(port)
        yield Served(daemon, listen.replace(":0", f":{port}"), serving), port
    finally:
        daemon.end_sessions()
        await server.stop(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await daemon.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"])
@pytest.mark.parametrize("says", [b"", HTTP2], ids=["silent", "idle"])
async def test_a_connection_without_any_call_is_closed_after_a_while(
    tmp_path: Path, listen: str, says: bytes
) -> None:
    clock = Clock()
    watch = ConnectionWatch(100, clock)
    async with watched(tmp_path, watch, listen) as (at, port):
        address = f"127.0.0.1:{port}"
        with contextlib.ExitStack() as stack:
            idle = await connection_to(stack, port, says)
            async with (
                CoordinatorClient(address) as reader,
                scripted_workers(address, GENESIS, "w1") as [hand],
            ):
                await hand.open()
                await reader.get_run()
                watch.look(port)
                clock.now_s += FIRST_CALL_S
                watch.look(port)
                assert await is_open(idle)
                clock.now_s += 0.1
                watch.look(port)
                await asyncio.sleep(0.1)
                assert not await is_open(idle)
                assert watch.closed == 1
                # Those that have called stay.
                await hand.answer(await hand.assigned())
                await hand.next("ack")
                assert (await reader.get_run()).round == at.daemon.status("").round


@pytest.mark.parametrize("count", [2, 3, 4])
async def test_a_caller_has_so_many_connections(tmp_path: Path, count: int) -> None:
    watch = ConnectionWatch(3)
    async with watched(tmp_path, watch) as (at, port):
        with contextlib.ExitStack() as stack:
            held = [await connection_to(stack, port, HTTP2) for _ in range(count)]
            watch.look(port)
            await asyncio.sleep(0.1)
            assert [await is_open(one) for one in held] == [True] * min(count, 3) + [False] * (
                count - min(count, 3)
            )
            assert watch.closed == max(0, count - 3)
            elsewhere = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.9", 0))
            )
            elsewhere.setblocking(False)
            elsewhere.sendall(HTTP2)
            await asyncio.sleep(0.1)
            watch.look(port)
            assert await is_open(elsewhere)
        assert at.daemon.status("").sessions == 0


async def test_nothing_is_kept_of_connections_that_are_gone(tmp_path: Path) -> None:
    watch = ConnectionWatch(100)
    async with watched(tmp_path, watch) as (at, port):
        for _ in range(3):
            async with CoordinatorClient(at.address) as client:
                await client.get_run()
        assert len(watch._callers) == 3

        async def forgotten() -> bool:
            watch.look(port)
            return not watch._callers and not watch._seen

        await until(forgotten, "the connections to be forgotten")


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        (("10.0.0.7", 50), "ipv4:10.0.0.7:50"),
        (("::1", 50, 0, 0), "ipv6:%5B::1%5D:50"),
        (("::ffff:10.0.0.7", 50, 0, 0), "ipv4:10.0.0.7:50"),
        (("fe80::1", 50, 0, 4), "ipv6:%5Bfe80::1%254%5D:50"),
        (("fe80::1%eth0", 50, 0, 12), "ipv6:%5Bfe80::1%2512%5D:50"),
    ],
)
def test_peers_are_named_as_grpc_names_them(name: tuple[Any, ...], peer: str) -> None:
    assert _name_of(name) == peer


async def test_a_peer_on_a_link_local_address_that_called_stays(tmp_path: Path) -> None:
    found = _link_local()
    if found is None:
        pytest.skip("this machine has no link-local IPv6 address")
    clock = Clock()
    watch = ConnectionWatch(100, clock)
    async with watched(tmp_path, watch, "[::]:0") as (_, port):
        async with CoordinatorClient(f"[{found}]:{port}") as client:
            await client.get_run()
            watch.look(port)
            clock.now_s += 2 * FIRST_CALL_S
            watch.look(port)
            await client.get_run()
        assert watch.closed == 0


def _link_local() -> str | None:
    """This machine's first link-local address, with the name of its interface."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, *_, interface = line.split()
        if digits.startswith("fe80"):
            groups = (digits[start : start + 4] for start in range(0, 32, 4))
            return f"{':'.join(groups)}%{interface}"
    return None


async def test_descriptors_that_are_no_connections_are_left_alone(tmp_path: Path) -> None:
    watch = ConnectionWatch(1, lambda: 0.0)
    inside, outside = socket.socketpair()
    read, write = os.pipe()
    async with watched(tmp_path, watch) as (_, port):
        watch.look(port)
        os.write(write, b"x")
        inside.send(b"x")
        assert (os.read(read, 1), outside.recv(1)) == (b"x", b"x")
        assert watch.closed == 0
    for end in (inside, outside):
        end.close()
    os.close(read)
    os.close(write)
