"""Pages of the journal: who waits for whom, what is told of the run, and what nobody reads."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.serving.swarm import call_frame, frame, message_frame
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving import journal_pages, poll_sessions
from fedmezo_coordinator.serving import loop as serving
from fedmezo_coordinator.serving.journal_pages import (
    ENDLESS_PLACES,
    PLACES,
    PLACES_AWAITED_MAX,
    PagePlaces,
)
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.poll_sessions import PollSessions
from fedmezo_coordinator.serving.service import bind_server, start_server
from fedmezo_core.errors import JournalCompactedError, NotReadyError, UnavailableError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from tests.integration.support.harness import (
    ScriptedWorker,
    Served,
    config_of,
    genesis_of,
    relayed,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=3, local_steps=3, workers_min=2, quorum=2))
LARGE = genesis_of(
    config_of(
        rounds=40,
        local_steps=4096,
        probes=1,
        workers_min=1,
        quorum=1,
        cohort_size_max=1,
        digest_every_rounds=1000,
    )
)
"""Each of its commits has 16 kB."""


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "journal.db", GENESIS) as running:
        yield running


@contextmanager
def held_up(thread: Any) -> Iterator[None]:
    """Keep a thread busy with something else."""
    over = threading.Event()
    thread.submit(over.wait)
    try:
        yield
    finally:
        over.set()


async def test_no_read_is_left_without_an_answer_when_the_journal_is_closed(
    tmp_path: Path,
) -> None:
    """A read that waited for another one was cancelled, and gRPC never answered its caller."""
    async with served(tmp_path / "journal.db", GENESIS) as running:
        pages = running.daemon._pages
        with held_up(pages._thread):
            waiting = asyncio.create_task(pages.rows_from(0, 1))
            await asyncio.sleep(0)
            closing = asyncio.create_task(pages.close())
            await asyncio.sleep(0)
        assert len(await waiting) == 1
        await closing
        with pytest.raises(UnavailableError, match="journal is being closed; ask again"):
            await pages.rows_from(0, 1)


async def do_nothing() -> None:
    """A place that is free."""


# ---------------------------------------------------------------- what is durable


async def test_nobody_hears_of_a_round_before_its_commit_is_on_the_disk(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(rounds=1, workers_min=2, quorum=2))
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
        scripted_workers(at.address, genesis, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        assigns = [await hand.assigned() for hand in both]
        before = await client.get_run()
        with held_up(at.daemon._writer):
            for hand, assign in zip(both, assigns, strict=True):
                await hand.answer(assign)

            async def decided() -> bool:
                return at.daemon._machine.round == 1

            await until(decided, "the round to be decided")
            assert replace(await client.get_run(), unix_ms=before.unix_ms) == before
            assert before.round == 0
            status = await client.get_status()
            assert (status.round, len(status.recent_rounds)) == (0, 0)
            assert status.phase == wire.PHASE_OPEN
            page = await client.read_journal(commits_only=True)
            assert [entry.seqno for entry in page.entries] == [0]
            assert not page.finished

        async def told() -> bool:
            return (await client.get_run()).round == 1

        await until(told, "the round to be told")
        assert (await client.get_status()).phase == wire.PHASE_FINISHED
        assert (await client.read_journal(page.next_seqno, commits_only=True)).finished


async def test_a_relay_tells_no_round_before_it_is_in_its_copy(at: Served, tmp_path: Path) -> None:
    genesis = GENESIS
    async with (
        relayed(at.address, tmp_path, "site", workers_min=1) as site,
        CoordinatorClient(site.address) as client,
        scripted_workers(at.address, genesis, "w1") as [above],
        scripted_workers(site.address, genesis, "w2") as [below],
    ):
        await above.open()
        await _open_when_ready(below)
        answers = [(hand, await hand.assigned()) for hand in (above, below)]
        for hand, assign in answers:
            await hand.answer(assign)
        # The site's answer is durable above as soon as that coordinator acknowledges it, so only
        # the relay's own thread is held up from here on.
        with held_up(site.relay._writer):

            async def decided() -> bool:
                return site.relay._machine.round >= 1

            await until(decided, "the relay to get the commit")
            assert (await client.get_run()).round == 0

        async def told() -> bool:
            return (await client.get_run()).round >= 1

        await until(told, "the relay to tell the round")


async def _open_when_ready(hand: ScriptedWorker) -> None:
    async def opened() -> bool:
        try:
            await hand.open()
        except Exception:  # the relay has yet to catch up
            return False
        return True

    await until(opened, "the relay to welcome a worker")


# ---------------------------------------------------------------- who waits for whom


async def test_a_run_does_not_wait_for_readers(at: Served) -> None:
    async with (
        CoordinatorClient(at.address) as client,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        with held_up(at.daemon._pages._thread):
            reading = asyncio.create_task(client.read_journal())
            for hand in both:
                await hand.open()
            assert await asyncio.gather(*(hand.work_to_the_end() for hand in both)) == [3, 3]
            assert not reading.done()
        assert (await reading).entries


async def test_readers_do_not_wait_for_an_append(at: Served) -> None:
    async with CoordinatorClient(at.address) as client:
        with held_up(at.daemon._writer):
            page = await client.read_journal()
            assert [entry.seqno for entry in page.entries] == [0, 1]
            assert (await client.read_journal(from_origin=True)).entries == page.entries


async def test_a_new_session_gets_its_commits_from_memory_or_is_sent_to_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_pages, "RECENT_BYTES_MAX", 100_000)
    async with (
        served(tmp_path / "journal.db", LARGE) as at,
        scripted_workers(at.address, LARGE, "w1", "late") as [hand, late],
    ):
        await hand.open()
        heads = [hand.head]
        for _ in range(10):
            await hand.answer(await hand.assigned())
            await hand.next("commit")
            heads.append(at.daemon._journal.head)
        with held_up(at.daemon._pages._thread):
            kept = at.daemon._pages.rounds_in_memory
            assert 5 <= kept < 10
            with pytest.raises(NotReadyError, match=f"more than {kept}; read the journal first"):
                await late.open(round=10 - kept - 1, head=heads[10 - kept - 1])
            await late.open(round=10 - kept, head=heads[10 - kept])
            for _ in range(kept):
                await late.next("commit")


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("inside", "waits"), [(PLACES - 2, False), (PLACES - 1, False), (PLACES, True)]
)
async def test_so_many_pages_are_under_way_at_most(inside: int, waits: bool) -> None:
    places = PagePlaces()
    for number in range(inside):
        await places.take(f"c{number}", 20.0)
    next_one = asyncio.create_task(places.take("next", 20.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert next_one.done() is not waits
    places.leave("c0")
    await next_one


@pytest.mark.parametrize("deadline_s", [None, journal_pages.DEADLINE_MAX_S + 1])
async def test_calls_without_a_deadline_leave_places_to_the_others(
    deadline_s: float | None,
) -> None:
    places = PagePlaces()
    for number in range(ENDLESS_PLACES):
        await places.take(f"c{number}", deadline_s)
    one_more = asyncio.create_task(places.take("one more", deadline_s))
    await asyncio.sleep(0.01)
    assert not one_more.done()
    for number in range(PLACES - ENDLESS_PLACES):
        await places.take(f"d{number}", journal_pages.DEADLINE_MAX_S)
    places.leave("d0")
    await asyncio.sleep(0.01)
    assert not one_more.done()
    places.leave("c0")
    await one_more


async def test_a_connection_has_one_place_and_places_go_in_the_order_of_asking() -> None:
    places = PagePlaces()
    await places.take("a", 20.0)
    order: list[int] = []

    async def take(number: int) -> None:
        await places.take("a", 20.0)
        order.append(number)

    tasks = [asyncio.create_task(take(number)) for number in range(3)]
    await asyncio.wait_for(places.take("b", 20.0), 10)
    tasks[1].cancel()
    for _ in range(3):
        await asyncio.sleep(0.01)
        places.leave("a")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2]


async def test_a_call_that_ends_at_the_moment_of_its_admission_leaves_its_place() -> None:
    places = PagePlaces()
    await places.take("a", 20.0)
    waiting = asyncio.create_task(places.take("a", 20.0))
    await asyncio.sleep(0.01)
    places.leave("a")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(places.take("a", 20.0), 10)


async def test_whoever_waits_too_long_is_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal_pages, "PLACE_WAIT_S", 0.05)
    places = PagePlaces()
    await places.take("a", 20.0)
    with pytest.raises(NotReadyError, match="yet to read its last one") as caught:
        await places.take("a", 20.0)
    assert caught.value.retry_after_s == 0.05
    places.leave("a")
    await places.take("a", 20.0)


@pytest.mark.parametrize("waiting", [-1, 0])
async def test_so_many_calls_wait_for_a_place_at_most(waiting: int) -> None:
    places = PagePlaces()
    await places.take("a", 20.0)
    tasks = [
        asyncio.create_task(places.take("a", 20.0)) for _ in range(PLACES_AWAITED_MAX + waiting)
    ]
    await asyncio.sleep(0.01)
    last = asyncio.create_task(places.take("a", 20.0))
    await asyncio.sleep(0.01)
    assert last.done() is (waiting == 0)
    for task in (*tasks, last):
        task.cancel()
    await asyncio.gather(*tasks, last, return_exceptions=True)


# ---------------------------------------------------------------- pages that nobody reads


class _Reads:
    """Counts the pages that a served daemon reads."""

    def __init__(self, loop: ServingLoop[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        journal = loop._journal
        read_beside = journal.read_beside

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return read_beside(*arguments)

        monkeypatch.setattr(journal, "read_beside", counted)

    async def first(self) -> None:
        """Wait until a page is read."""

        async def one_was_read() -> bool:
            return self.count >= 1

        await until(one_was_read, "the first page to be read")


@contextmanager
def unread_calls(address: str, count: int) -> Iterator[socket.socket]:
    """A connection that asks for so many pages, has the smallest window, and reads nothing."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        request = wire.ReadJournalRequest().SerializeToString()
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        for number in range(count):
            stream = 2 * number + 1
            connection.sendall(
                call_frame("ReadJournal", host, stream)
                + message_frame(request, stream=stream, last=True)
            )
        yield connection


@asynccontextmanager
async def with_large_pages(folder: Path) -> AsyncIterator[tuple[Served, ScriptedWorker]]:
    """A daemon with some 200 kB of commits, and the worker that made them."""
    async with (
        served(folder / "journal.db", LARGE) as at,
        scripted_workers(at.address, LARGE, "w1") as [hand],
    ):
        await hand.open()
        for _ in range(12):
            await hand.answer(await hand.assigned())
            await hand.next("commit")
        yield at, hand


async def test_a_connection_that_does_not_read_keeps_one_page_and_only_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_large_pages(tmp_path) as (at, _), CoordinatorClient(at.address) as client:
        reads = _Reads(at.daemon, monkeypatch)
        with unread_calls(at.address, 16):
            await reads.first()
            assert reads.count == 1
            for number in range(2, 5):
                assert (await client.read_journal()).entries
                assert reads.count == number
            await asyncio.sleep(0.2)
            assert reads.count == 4


async def test_an_unread_page_is_dropped_at_the_calls_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_pages, "PLACES", 1)
    async with (
        with_large_pages(tmp_path) as (at, _),
        grpc.aio.insecure_channel(at.address) as channel,
    ):
        stub, reads = rpc.CoordinatorServiceStub(channel), _Reads(at.daemon, monkeypatch)
        with unread_calls(at.address, 1) as connection:
            await reads.first()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ReadJournal(wire.ReadJournalRequest(), timeout=0.5)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            waiting = asyncio.create_task(_read(stub))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            connection.close()
            assert (await waiting).entries
        assert (await _read(stub)).entries


@pytest.mark.parametrize(("workers", "needs_a_place"), [(-1, False), (0, False), (1, True)])
async def test_a_status_of_many_workers_needs_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, needs_a_place: bool
) -> None:
    monkeypatch.setattr(journal_pages, "PLACES", 1)
    monkeypatch.setattr(journal_pages, "PLACE_WAIT_S", 0.2)
    async with with_large_pages(tmp_path) as (at, _), CoordinatorClient(at.address) as client:
        known = len((await client.get_status()).workers)
        monkeypatch.setattr(serving, "STATUS_WORKERS", known - workers)
        reads = _Reads(at.daemon, monkeypatch)
        with unread_calls(at.address, 1):
            await reads.first()
            if needs_a_place:
                with pytest.raises(NotReadyError, match="under way"):
                    await client.get_status()
            else:
                assert await client.get_status()


async def _read(stub: Any) -> wire.ReadJournalResponse:
    answer: wire.ReadJournalResponse = await stub.ReadJournal(wire.ReadJournalRequest(), timeout=10)
    return answer


async def test_a_page_that_cannot_be_read_leaves_its_place(
    at: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with CoordinatorClient(at.address) as client:
        with monkeypatch.context() as patch:
            patch.setattr(at.daemon._journal, "read_beside", lambda *_: ())
            for _ in range(2):
                with pytest.raises(JournalCompactedError):
                    await asyncio.wait_for(client.read_journal(), 10)
        assert (await client.read_journal()).entries


async def test_the_replica_reads_whatever_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_pages, "PLACES", 0)
    monkeypatch.setattr(journal_pages, "PLACE_WAIT_S", 0.1)
    async with served(tmp_path / "journal.db", GENESIS) as at:
        server, port = bind_server("127.0.0.1:0", None, f"unix:{tmp_path}/replica.sock")
        (await start_server(server, "coordinator")).begin(Runs.of(at.daemon))
        try:
            async with CoordinatorClient(f"127.0.0.1:{port}") as worker:
                with pytest.raises(NotReadyError, match="read that, or try later"):
                    await worker.read_journal()
            async with CoordinatorClient(f"unix:{tmp_path}/replica.sock") as replica:
                assert (await replica.read_journal()).entries
        finally:
            await server.stop(0)


async def test_a_large_response_to_a_poll_needs_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll_sessions, "LARGE_BYTES", 30_000)

    async def no_place() -> None:
        raise NotReadyError("no place")

    async with (
        with_large_pages(tmp_path) as (at, busy),
        scripted_workers(at.address, LARGE, "polling") as [hand],
    ):
        sessions = PollSessions(lambda _: at.daemon)
        hello = wire.PollSessionRequest(messages=[wire.SessionRequest(hello=hand.hello())])
        with pytest.raises(NotReadyError, match="no place"):
            await sessions.poll(hello, no_place)
        assert not sessions._sessions
        opened = await sessions.poll(hello, do_nothing)
        assert [message.WhichOneof("kind") for message in opened.messages[:2]] == [
            "welcome",
            "commit",
        ]
        for _ in range(2):
            await busy.answer(await busy.assigned())
            await busy.next("commit")
        poll = wire.PollSessionRequest(token=opened.token)
        with pytest.raises(NotReadyError, match="no place"):
            await sessions.poll(poll, no_place)
        assert len((await sessions.poll(poll, do_nothing)).messages) >= 2
        await sessions.poll(wire.PollSessionRequest(token=opened.token, leave=True), do_nothing)


async def test_a_call_that_waits_for_a_place_looks_at_no_other_that_waits() -> None:
    looks = 0

    class Counted(PagePlaces):
        def _has_room(self, one: Any) -> bool:
            nonlocal looks
            looks += 1
            return super()._has_room(one)

    places = Counted()
    waiting = [asyncio.create_task(places.take(f"c{n}", None)) for n in range(200)]
    await asyncio.sleep(0)
    assert sum(task.done() for task in waiting) == journal_pages.ENDLESS_PLACES
    assert looks == 200
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
