"""Every limit of docs/limits.md: one less, the limit itself, one more."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving import loop as serving
from fedmezo_coordinator.serving import worker_session
from fedmezo_coordinator.serving.journal_pages import PAGE_RECORDS_MAX, WAIT_MS_MAX
from fedmezo_coordinator.serving.service import bind_server, start_server
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.serving.worker_session import OUTBOX_BYTES_MAX, OUTBOX_MAX, WorkerSession
from fedmezo_core.config import MESSAGE_BYTES_MAX
from fedmezo_core.errors import FedMezoError, NotReadyError, ProtocolError, UnavailableError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal, head_after
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from fedmezo_proto.v1.journal_pb2 import Record
from tests.integration.support.harness import (
    ScriptedWorker,
    config_of,
    genesis_of,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(workers_min=4, quorum=4))
MESSAGE = wire.SessionResponse(ack=wire.Ack())


# ---------------------------------------------------------------- sessions


async def test_one_session_too_many_is_told_when_to_come_back(tmp_path: Path) -> None:
    session_limit = SessionLimit(sessions_max=2)
    async with (
        served(tmp_path / "j.db", GENESIS, session_limit=session_limit) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2", "w3") as [first, second, third],
    ):
        await first.open()
        await second.open()
        with pytest.raises(NotReadyError, match=r"sessions_max") as caught:
            await third.open()
        assert caught.value.retry_after_s == 30.0
        assert at.daemon.status("").sessions == 2
        assert at.daemon.status("").sessions_refused == 1
        first.stream.cancel()

        async def left() -> bool:
            return at.daemon.status("").sessions == 1

        await until(left, "the first worker to leave")
        await third.open()


async def test_one_join_too_many_at_a_time_is_told_when_to_come_back(tmp_path: Path) -> None:
    session_limit = SessionLimit(joins_at_a_time=2)
    async with (
        served(tmp_path / "j.db", GENESIS, session_limit=session_limit) as at,
        grpc.aio.insecure_channel(at.address) as channel,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        stub = rpc.CoordinatorServiceStub(channel)
        silent = [stub.Session() for _ in range(2)]

        async def joining(count: int) -> None:
            async def reached() -> bool:
                return session_limit.joining == count

            await until(reached, f"{count} to be joining")

        await joining(2)
        refused = stub.Session()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = dict(tuple(caught.value.trailing_metadata() or ()))
        assert metadata[REASON_KEY] == "NotReadyError"
        assert metadata[RETRY_AFTER_KEY] == "750"
        silent[0].cancel()
        await joining(1)
        await hand.open()
        assert session_limit.joining == 1  # the other silent one


# ---------------------------------------------------------------- connections

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What opens a connection: the preface and empty settings."""


@pytest.mark.parametrize("says", [b"", HTTP2], ids=["silent", "idle"])
async def test_connections_without_a_session_leave_files_to_the_others(
    tmp_path: Path, says: bytes
) -> None:
    store = SqliteStore(tmp_path / "j.db")
    journal = Journal(store)
    journal.append(encode_records([GENESIS]))
    daemon = Daemon(journal)
    await daemon.load()
    server, port = bind_server("127.0.0.1:0", None, f"unix:{tmp_path}/r.sock", connections_max=3)
    (await start_server(server, "coordinator")).begin(Runs.of(daemon))
    try:
        async with CoordinatorClient(f"127.0.0.1:{port}") as first:
            await first.get_run()
            with contextlib.ExitStack() as stack:
                open_ones = [await connection_to(stack, port, says) for _ in range(2)]
                assert [await is_open(one) for one in open_ones] == [True, True]
                more = [await connection_to(stack, port, says) for _ in range(3)]
                assert [await is_open(one) for one in more] == [False] * 3
                assert (await first.get_run()).round == 0
                # The replica has an address of its own.
                async with CoordinatorClient(f"unix:{tmp_path}/r.sock") as replica:
                    assert (await replica.get_run()).round == 0
            async with CoordinatorClient(f"127.0.0.1:{port}") as later:

                async def welcome() -> bool:
                    try:
                        return (await later.get_run()).round == 0
                    except UnavailableError:
                        return False

                await until(welcome, "the connections that were closed to make room")
    finally:
        await server.stop(0)
        await daemon.close()


async def connection_to(stack: contextlib.ExitStack, port: int, says: bytes) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    connection.setblocking(False)
    connection.sendall(says)
    await asyncio.sleep(0.2)
    return connection


async def is_open(connection: socket.socket) -> bool:
    """Whether a connection is open after what it has received so far."""
    with contextlib.suppress(BlockingIOError):
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
        return False
    return True


# ---------------------------------------------------------------- queues


@pytest.mark.parametrize(
    ("count", "ends"), [(OUTBOX_MAX - 2, False), (OUTBOX_MAX - 1, False), (OUTBOX_MAX, True)]
)
def test_an_outbox_takes_all_messages_but_one_for_the_end(count: int, ends: bool) -> None:
    session = WorkerSession("slow")
    for _ in range(count):
        session.put(MESSAGE)
    assert (session.ended is not None) is ends
    assert session.outbox.qsize() == min(count, OUTBOX_MAX)


@pytest.mark.parametrize("waiting", [-1, 0, 1])
def test_an_outbox_takes_so_many_bytes_and_then_one_more_message(waiting: int) -> None:
    session = WorkerSession("slow")
    session.put(bytes(OUTBOX_BYTES_MAX + waiting))
    session.put(b"next")
    assert (session.ended is not None) is (waiting > 0)
    assert session.outbox.get_nowait() == bytes(OUTBOX_BYTES_MAX + waiting)
    assert session.outbox.bytes_waiting == (0 if waiting > 0 else len(b"next"))


async def test_a_worker_that_fills_the_queue_of_events_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "EVENTS_MAX", 3)
    store = SqliteStore(tmp_path / "j.db")
    daemon = Daemon(Journal(store))
    session, message = WorkerSession("w1"), wire.SessionRequest()
    for _ in range(3):
        await asyncio.wait_for(daemon.receive(session, message), 10)
    fourth = asyncio.create_task(daemon.receive(session, message))
    await asyncio.sleep(0.05)
    assert not fourth.done()
    daemon._items.get_nowait()
    await asyncio.wait_for(fourth, 10)
    store.close()


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("records_max", "refused"),
    [(PAGE_RECORDS_MAX - 1, False), (PAGE_RECORDS_MAX, False), (PAGE_RECORDS_MAX + 1, True)],
)
async def test_a_page_has_so_many_records_at_most(
    tmp_path: Path, records_max: int, refused: bool
) -> None:
    async with served(tmp_path / "j.db", GENESIS) as at, CoordinatorClient(at.address) as client:
        if refused:
            with pytest.raises(ProtocolError, match="ask for less"):
                await client.read_journal(0, records_max=records_max)
        else:
            assert len((await client.read_journal(0, records_max=records_max)).entries) == 2


@pytest.mark.parametrize(
    ("wait_ms", "refused"),
    [(WAIT_MS_MAX - 1, False), (WAIT_MS_MAX, False), (WAIT_MS_MAX + 1, True)],
)
async def test_a_reader_waits_so_long_at_most(tmp_path: Path, wait_ms: int, refused: bool) -> None:
    async with served(tmp_path / "j.db", GENESIS) as at, CoordinatorClient(at.address) as client:
        if refused:
            with pytest.raises(ProtocolError, match="ask for less"):
                await client.read_journal(0, wait_ms=wait_ms)
        else:
            assert (await client.read_journal(0, wait_ms=wait_ms)).entries


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_a_message_has_so_many_bytes_at_most(tmp_path: Path, more: int) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        size = wire.SessionRequest(hello=hand.hello(recipe="r" * 60_000)).ByteSize()
        recipe = "r" * (60_000 + MESSAGE_BYTES_MAX + more - size)
        assert (
            wire.SessionRequest(hello=hand.hello(recipe=recipe)).ByteSize()
            == MESSAGE_BYTES_MAX + more
        )
        with pytest.raises(FedMezoError) as caught:
            await hand.open(recipe=recipe)
    # One that is not too large is read, and says the wrong thing.
    assert ("recipe differs" in str(caught.value)) is (more <= 0)
    assert isinstance(caught.value, NotReadyError) is (more > 0)


async def test_bytes_that_are_no_message_end_the_session_and_not_the_coordinator(
    tmp_path: Path,
) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        grpc.aio.insecure_channel(at.address) as channel,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        call: Any = channel.stream_stream("/fedmezo.v1.CoordinatorService/Session")()
        await call.write(wire.SessionRequest(hello=hand.hello()).SerializeToString())
        await call.read()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not a SessionRequest" in str(caught.value.details())
        await hand.open()


# ---------------------------------------------------------------- slow readers


@pytest.mark.slow
async def test_a_worker_that_never_reads_is_cut_off_alone_and_catches_up_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_session, "OUTBOX_MAX", 8)
    # Commits that soon fill what gRPC itself keeps between two ends.
    genesis = genesis_of(
        config_of(
            rounds=10_000,
            workers_min=1,
            quorum=1,
            cohort_size_max=1,
            local_steps=4096,
            deadline_ms=100,
            digest_every_rounds=10_000,
        )
    )
    async with (
        served(tmp_path / "j.db", genesis) as at,
        scripted_workers(at.address, genesis, "fast", "slow") as [fast, slow],
    ):
        await fast.open()
        await slow.open()

        async def a_round() -> None:
            assign = await fast.assigned()
            await fast.answer(assign)
            await fast.next("ack")

        def is_cut_off() -> bool:
            workers = {w.worker: w for w in at.daemon.status("").workers}
            return workers["fast"].connected and not workers["slow"].connected

        # Rounds go on only as this test lets them, so that `slow` never falls too far behind.
        while not is_cut_off():
            await a_round()
        cut_at = at.daemon.status("").round
        while at.daemon.status("").round < cut_at + 20:
            await a_round()
        round_, head = await _follow_to_the_end(slow)
        assert 0 < round_ <= cut_at
        welcome = await slow.open(round=round_, head=head)
        assert (await slow.next("commit")).commit.record
        assert welcome.round > round_


async def _follow_to_the_end(hand: ScriptedWorker) -> tuple[int, bytes]:
    """Take what waits until the coordinator ends the session; round and head then."""
    error = await hand.ended()
    assert isinstance(error, NotReadyError)
    assert "reads more slowly than the run writes" in str(error)
    round_, head = 0, hand.head
    for message in hand.received:
        if message.HasField("commit"):
            record = message.commit.record
            round_, head = Record.FromString(record).committed.round, head_after(head, record)
    return round_, head
