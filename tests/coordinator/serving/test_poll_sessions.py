"""Sessions without a stream, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedmezo_coordinator.serving import poll_sessions as poll_module
from fedmezo_core.errors import (
    MismatchError,
    ProtocolError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.records import Answered
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    ScriptedWorker,
    Served,
    answer_to,
    config_of,
    genesis_of,
    records_of,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=3, local_steps=2, workers_min=2, quorum=2))


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "journal.db", GENESIS) as running:
        yield running


@pytest.fixture
async def hand(at: Served) -> AsyncIterator[ScriptedWorker]:
    async with scripted_workers(at.address, GENESIS, "polling") as [one]:
        yield one


def hello_of(hand: ScriptedWorker) -> wire.SessionRequest:
    return wire.SessionRequest(hello=hand.hello())


async def work_to_the_end(client: CoordinatorClient, token: bytes) -> set[int]:
    """Answer whatever is assigned until the run is finished; the rounds acknowledged."""
    acknowledged: set[int] = set()
    answers: list[wire.SessionRequest] = []
    while True:
        answer = await client.poll_session(token, *answers, wait_ms=30_000)
        answers = []
        for message in answer.messages:
            match message.WhichOneof("kind"):
                case "assign":
                    answers.append(wire.SessionRequest(answer=answer_to(message.assign)))
                case "ack":
                    acknowledged.add(message.ack.ticket.round)
                case "finished":
                    await client.poll_session(token, leave=True)
                    return acknowledged
                case _:
                    pass


async def test_a_run_is_finished_by_one_worker_that_streams_and_one_that_polls(
    tmp_path: Path,
) -> None:
    journal = tmp_path / "journal.db"
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "polling", "streaming") as [polling, streaming],
    ):
        await streaming.open()
        first = await polling.client.poll_session(b"", hello_of(polling))
        assert first.messages[0].WhichOneof("kind") == "welcome"
        assert first.lease_ms == 90_000
        rounds, acknowledged = await asyncio.gather(
            streaming.work_to_the_end(), work_to_the_end(polling.client, first.token)
        )
        assert rounds == 3
        assert acknowledged == {1, 2, 3}

        async def left() -> bool:
            return (
                at.daemon.status("").sessions == 0
                or not next(
                    w for w in at.daemon.status("").workers if w.worker == "polling"
                ).connected
            )

        await until(left, "the polling worker to leave")
    assert sum(isinstance(record, Answered) for record in records_of(journal)) == 6


@pytest.mark.parametrize("way", ["breaks off its stream", "half-closes it", "leaves its polls"])
async def test_a_worker_that_leaves_in_mid_round_is_not_waited_for(
    tmp_path: Path, way: str
) -> None:
    config = config_of(rounds=1, local_steps=2, workers_min=2, quorum=1, deadline_ms=3_600_000)
    genesis = genesis_of(config)
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        scripted_workers(at.address, genesis, "leaving", "staying") as [leaving, staying],
    ):
        token = b""
        if way == "leaves its polls":
            token = (await leaving.client.poll_session(b"", hello_of(leaving))).token
        else:
            await leaving.open()
        await staying.open()
        await staying.answer(await staying.assigned())
        await staying.next("ack")
        assert at.daemon.status("").round == 0
        if way == "leaves its polls":
            await leaving.client.poll_session(token, leave=True)
        elif way == "half-closes it":
            await leaving.stream.end()
        else:
            leaving.stream.cancel()
        assert (await staying.next("finished")).finished.round == 1


async def test_a_call_waits_for_the_first_message_and_no_longer(
    at: Served, hand: ScriptedWorker
) -> None:
    first = await hand.client.poll_session(b"", hello_of(hand))
    assert [m.WhichOneof("kind") for m in first.messages] == ["welcome"]
    assert not (await hand.client.poll_session(first.token)).messages
    waiting = asyncio.create_task(hand.client.poll_session(first.token, wait_ms=30_000))
    async with scripted_workers(at.address, GENESIS, "other") as [other]:
        await other.open()
        assert (await waiting).messages[0].WhichOneof("kind") == "assign"


async def test_a_session_has_one_call_at_a_time(at: Served, hand: ScriptedWorker) -> None:
    first = await hand.client.poll_session(b"", hello_of(hand))
    waiting = asyncio.create_task(hand.client.poll_session(first.token, wait_ms=30_000))
    await asyncio.sleep(0.2)

    async def refused() -> bool:
        """Whether the call above has come first."""
        try:
            await hand.client.poll_session(first.token)
        except ProtocolError as error:
            return "one call at a time" in str(error)
        return False

    await until(refused, "the call that waits")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    async def free() -> bool:
        try:
            await hand.client.poll_session(first.token)
        except ProtocolError:
            return False
        return True

    await until(free, "the call that was given up to be over")


async def test_a_session_that_is_not_polled_ends_with_its_lease(
    at: Served, hand: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll_module, "LEASE_S", 0.1)
    first = await hand.client.poll_session(b"", hello_of(hand))

    async def gone() -> bool:
        status = at.daemon.status("")
        return status.sessions == 0 and not status.workers[0].connected

    await until(gone, "the lease to end")
    with pytest.raises(UnknownWorkerError, match="say hello again"):
        await hand.client.poll_session(first.token)


async def test_a_poll_without_a_sound_hello_is_refused(at: Served, hand: ScriptedWorker) -> None:
    client = hand.client
    with pytest.raises(ProtocolError, match="begins with a hello"):
        await client.poll_session(b"")
    with pytest.raises(MismatchError, match="recipe differs"):
        await client.poll_session(b"", wire.SessionRequest(hello=hand.hello(recipe="other")))
    for token in (b"guess", bytes(16)):
        with pytest.raises(UnknownWorkerError, match="No session has this token"):
            await client.poll_session(token)
    assert at.daemon.status("").sessions == 0


@pytest.mark.parametrize(("wait_ms", "refused"), [(29_999, False), (30_000, False), (30_001, True)])
async def test_a_poll_waits_at_most_the_longest_time(
    at: Served, hand: ScriptedWorker, wait_ms: int, refused: bool
) -> None:
    if refused:
        with pytest.raises(ProtocolError, match="wait_ms is at most 30000"):
            await hand.client.poll_session(b"", hello_of(hand), wait_ms=wait_ms)
    else:  # the welcome is there at once
        assert (await hand.client.poll_session(b"", hello_of(hand), wait_ms=wait_ms)).messages


async def test_a_poll_session_learns_that_it_was_replaced_and_that_the_coordinator_stops(
    at: Served, hand: ScriptedWorker
) -> None:
    first = await hand.client.poll_session(b"", hello_of(hand))
    second = await hand.client.poll_session(b"", hello_of(hand))
    with pytest.raises(ProtocolError, match="Another process has joined as worker polling"):
        await hand.client.poll_session(first.token)
    at.daemon.end_sessions()
    with pytest.raises(UnavailableError, match="The coordinator is stopping"):
        await hand.client.poll_session(second.token)
    with pytest.raises(UnknownWorkerError):
        await hand.client.poll_session(second.token)
