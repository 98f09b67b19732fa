"""Real coordinators on a real PostgreSQL: a standby takes over, an outage is waited out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmezo_coordinator.stores.location import journal_shown
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.journal.codec import decode_record, encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.records import Answered, Record, Started
from tests.coordinator.stores.postgres_server import Server, running, skip_without_server
from tests.integration.support.harness import (
    Program,
    Programs,
    config_of,
    genesis_of,
    run_values,
    scripted_workers,
)

skip_without_server()

CHANGES = {"rounds": 3, "workers_min": 1, "quorum": 1, "local_steps": 1}
RUN = run_values(**CHANGES)
GENESIS = genesis_of(config_of(**CHANGES))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A journal that has begun, so that no coordinator need load a model."""
    place = server.url(f"run-{abs(hash(request.node.name)) % 10**9}")
    store = open_store(place)
    Journal(store).append(encode_records([GENESIS]))
    store.close()
    return place


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    try:
        yield started
    finally:
        started.end()
        for path in tmp_path.glob("*.log"):
            assert "sesame" not in path.read_text(), "a password was printed"


def standby(programs: Programs, url: str) -> Program:
    return programs.start(
        "fedmezo_coordinator",
        *("--config", programs.settings(RUN), "--listen", "127.0.0.1:0", "--no-replica"),
        "--standby",
        # Flags can be seen by every user of a machine; the environment cannot.
        FEDMEZO_COORDINATOR_JOURNAL=url,
    )


def records_at(url: str) -> list[Record]:
    store = open_store(url, read_only=True)
    try:
        return [decode_record(entry.row.body) for entry in Journal(store).load()]
    finally:
        store.close()


def session_of(server: Server) -> str:
    """The process of the one session that holds an advisory lock."""
    return server.query("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted")


async def test_a_standby_takes_over_from_a_coordinator_that_was_killed_and_ends_the_run(
    programs: Programs, url: str
) -> None:
    first, address = await programs.coordinator(url, RUN, "--no-replica")
    second = standby(programs, url)
    await second.says("standing by")
    assert "is served at" not in second.said
    async with scripted_workers(address, GENESIS, "w1") as [hand]:
        await hand.open()
        await hand.answer(await hand.assigned())
        await hand.next("ack")
    first.send(signal.SIGKILL)
    address = (await second.says(r"is served at (127\.0\.0\.1:\d+)"))[1]
    async with scripted_workers(address, GENESIS, "w1") as [hand]:
        await hand.open()
        assert await hand.work_to_the_end() == 3
    second.send(signal.SIGTERM)
    assert await second.wait() == 0
    records = records_at(url)
    assert [r.epoch for r in records if isinstance(r, Started)] == [1, 2]
    assert len([r for r in records if isinstance(r, Answered)]) == 3
    verified = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "journal", "verify", url
    )
    assert await verified.wait() == 0
    assert "2 coordinator starts, 3 rounds committed" in verified.said


async def test_a_coordinator_that_slept_through_a_takeover_ends_and_has_written_nothing(
    programs: Programs, server: Server, url: str
) -> None:
    first, _ = await programs.coordinator(url, RUN, "--no-replica")
    second = standby(programs, url)
    await second.says("standing by")
    first.send(signal.SIGSTOP)
    server.query(f"SELECT pg_terminate_backend({session_of(server)})")
    await second.says("is served at")
    first.send(signal.SIGCONT)
    assert await first.wait() == 1
    assert "Another coordinator has taken over the journal " + journal_shown(url) in first.said
    assert second.running
    assert records_at(url) == [GENESIS, Started(1), Started(2)]


async def test_a_standby_that_waits_ends_with_a_signal(programs: Programs, url: str) -> None:
    await programs.coordinator(url, RUN, "--no-replica")
    waiting = standby(programs, url)
    await waiting.says("standing by")
    waiting.send(signal.SIGTERM)
    assert await waiting.wait() == 0


async def test_without_standby_a_second_coordinator_ends_with_a_sentence(
    programs: Programs, url: str
) -> None:
    await programs.coordinator(url, RUN, "--no-replica")
    second = programs.start(
        "fedmezo_coordinator",
        *("--config", programs.settings(RUN), "--journal", url, "--listen", "127.0.0.1:0"),
    )
    assert await second.wait() == 1
    assert f"The journal {journal_shown(url)} is held by another session" in second.said
    assert second.said.count("\n") == 1


async def test_nothing_is_acknowledged_while_postgresql_is_away_and_the_round_goes_on_after(
    programs: Programs, server: Server, url: str
) -> None:
    coordinator, address = await programs.coordinator(url, RUN, "--no-replica")
    async with scripted_workers(address, GENESIS, "w1") as [hand]:
        await hand.open()
        assign = await hand.assigned()
        server.stop("immediate")
        await hand.answer(assign)
        acknowledged = asyncio.create_task(hand.next("ack"))
        await asyncio.wait({acknowledged}, timeout=1.0)
        assert not acknowledged.done()
        server.start()
        await acknowledged
        await hand.work_to_the_end()
    await coordinator.says("PostgreSQL is back")
    coordinator.send(signal.SIGTERM)
    assert await coordinator.wait() == 0
    answers = [r for r in records_at(url) if isinstance(r, Answered)]
    assert [a.round for a in answers] == [1, 2, 3]


async def test_a_signal_ends_a_coordinator_that_waits_for_its_postgresql(
    programs: Programs, server: Server, url: str
) -> None:
    coordinator, address = await programs.coordinator(url, RUN, "--no-replica")
    async with scripted_workers(address, GENESIS, "w1") as [hand]:
        await hand.open()
        assign = await hand.assigned()
        server.stop("immediate")
        try:
            await hand.answer(assign)
            await coordinator.says("trying for 30 s")
            coordinator.send(signal.SIGTERM)
            assert await coordinator.wait(15) == 0
        finally:
            server.start()
    assert not any(isinstance(record, Answered) for record in records_at(url))
