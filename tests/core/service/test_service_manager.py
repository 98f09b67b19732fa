"""What a service manager hears, over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmezo_core.service.service_manager import ServiceManager


class Heard:
    """The manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)

    def lines(self) -> list[str]:
        found: list[str] = []
        while True:
            try:
                found += self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def heard(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Heard]:
    address = str(tmp_path / "s") if request.param == "path" else f"@{tmp_path}/s"
    there = Heard(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    yield there
    there.close()


def test_ready_and_stopping_are_told_and_children_do_not_speak(heard: Heard) -> None:
    manager = ServiceManager()
    assert "NOTIFY_SOCKET" not in os.environ
    manager.ready("run r is served\nat once")
    manager.stopping()
    assert heard.lines() == [
        "READY=1", "STATUS=run r is served at once", "STOPPING=1", "STATUS=stopping",
    ]  # fmt: skip


async def test_a_start_that_takes_long_asks_for_time_and_says_what_it_does(heard: Heard) -> None:
    telling = asyncio.create_task(ServiceManager().keep_told(lambda: "loading m: 40 s so far"))
    await asyncio.sleep(0)
    telling.cancel()
    assert heard.lines() == ["EXTEND_TIMEOUT_USEC=60000000", "STATUS=loading m: 40 s so far"]


async def test_the_watchdog_hears_an_event_loop_that_runs_and_misses_one_that_hangs(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    manager = ServiceManager()
    manager.ready("serves")
    telling = asyncio.create_task(manager.keep_told(str))
    await asyncio.sleep(0.2)
    assert heard.lines().count("WATCHDOG=1") >= 2
    time.sleep(0.2)  # noqa: ASYNC251 - the event loop hangs
    assert heard.lines() == []
    telling.cancel()


async def test_another_process_is_watched_or_none(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    manager = ServiceManager()
    manager.ready("serves")
    heard.lines()
    telling = asyncio.create_task(manager.keep_told(str))
    await asyncio.sleep(0.15)
    telling.cancel()
    assert heard.lines() == []


async def test_nobody_there_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    ServiceManager().ready("serves")
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    await ServiceManager().keep_told(str)
