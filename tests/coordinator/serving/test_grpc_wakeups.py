"""The bytes that wake an event loop: all at once in a program of ours, singly elsewhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from fedmezo_coordinator import __main__ as programs
from fedmezo_coordinator.serving import grpc_wakeups
from fedmezo_coordinator.serving.grpc_wakeups import reading_all_wakeups
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from tests.integration.support.harness import config_of, genesis_of, served


def read_of_200_bytes() -> bytes:
    """What one read of a socket pair gives that was made while a server was."""
    make = socket.socketpair
    with reading_all_wakeups():
        reading, writing = socket.socketpair()
    assert socket.socketpair is make
    with reading, writing:
        for _ in range(200):
            writing.send(b"1")
        return reading.recv(1)


@pytest.mark.parametrize("program", [programs.main, programs.relay])
def test_a_program_reads_all_wakeups_at_once(
    program: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_wakeups, "_has_one_loop", False)
    monkeypatch.setattr(programs, "launch", lambda module: None)
    assert read_of_200_bytes() == b"1"
    program()
    assert read_of_200_bytes() == b"1" * 200


async def test_a_loop_that_ends_holds_no_other_up(tmp_path: Path) -> None:
    """Other parts of a user's process may use gRPC in loops of their own, and end these."""
    kept = []

    async def come_and_go(address: str) -> None:
        channels = [grpc.aio.insecure_channel(address) for _ in range(4)]
        for channel in channels:
            call = rpc.CoordinatorServiceStub(channel).Session()
            kept.append((channel, call, asyncio.ensure_future(call.read())))
        await asyncio.sleep(0.1)
        for channel in channels:
            await channel.close()

    async with (
        served(tmp_path / "run.db", genesis_of(config_of())) as coordinator,
        grpc.aio.insecure_channel(coordinator.address) as channel,
    ):
        stub = rpc.CoordinatorServiceStub(channel)
        for _ in range(10):
            await asyncio.to_thread(asyncio.run, come_and_go(coordinator.address))
            await asyncio.wait_for(stub.GetRun(wire.GetRunRequest(protocol_versions=[1])), 10)
