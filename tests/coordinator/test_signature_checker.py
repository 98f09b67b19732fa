"""Signatures that are checked in another process: the same verdicts, whatever becomes of it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator import signature_checker
from fedmezo_coordinator.event_queue import EventQueue
from fedmezo_coordinator.signature_checker import AWAY_MAX, BATCH_MIN, MANY, SignatureChecker
from fedmezo_core.events import AnswerReceived, Ticket
from fedmezo_core.records import Scalars
from fedmezo_core.wire import admission
from fedmezo_core.wire.admission import SignedAnswer
from tests.integration.support.harness import until

Signed = tuple[bytes, bytes, bytes]

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(MANY)]
GOOD: list[Signed] = [
    (key.public_key().public_bytes_raw(), b"text" * n, key.sign(b"text" * n))
    for n, key in enumerate(KEYS)
]
BAD: list[Signed] = [
    (GOOD[0][0], b"another text", GOOD[0][2]),
    (GOOD[1][0], GOOD[0][1], GOOD[0][2]),
    (GOOD[1][0], GOOD[1][1], bytes(64)),
    (GOOD[1][0], GOOD[1][1], b"short"),
]


class Line:
    """A queue, and a checker for what is in it."""

    def __init__(self) -> None:
        self.queue: EventQueue[SignedAnswer] = EventQueue(10_000)
        self.checker = SignatureChecker(self.queue.look_again)

    async def put(self, batch: Sequence[Signed]) -> list[SignedAnswer]:
        """Queue answers, whose checks begin."""
        event = AnswerReceived("w1", Ticket(1, 1, 1), Scalars((0.5,), None, None))
        answers = [SignedAnswer(event, *one) for one in batch]
        for answer in answers:
            self.checker.begin(answer)
            await self.queue.put(answer, answer)
        return answers

    async def verdicts(self, batch: Sequence[Signed]) -> list[bool]:
        """Each of the batch when it is its turn, as the loop takes it."""
        await self.put(batch)
        return [(await self.taken()).is_good() for _ in batch]

    async def taken(self) -> SignedAnswer:
        """The first answer of the queue, as soon as it can be taken."""
        return await asyncio.wait_for(self.queue.get(), 20)

    async def started(self) -> asyncio.SubprocessTransport:
        """The other process, once it is ready."""
        await self.verdicts(GOOD)

        async def is_ready() -> bool:
            return self.checker._is_ready

        await until(is_ready, "the other process to start")
        assert self.checker._process is not None
        return self.checker._process


@pytest.fixture
async def line(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    monkeypatch.setattr(signature_checker, "_cores", lambda: 2)
    made = Line()
    yield made
    await made.checker.close()


def check_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_signed(key: bytes, text: bytes, signature: bytes) -> bool:
        raise AssertionError("checked in this process")

    monkeypatch.setattr(admission, "is_signed", is_signed)


@pytest.mark.parametrize("count", [1, MANY, BATCH_MIN + 1, AWAY_MAX])
async def test_the_other_process_gives_all_verdicts_once_it_is_there(
    line: Line, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    await line.started()
    check_nothing_here(monkeypatch)
    mixed = [GOOD[0], BAD[0], *GOOD[1:], *BAD[1:3]]
    batch = [mixed[n % len(mixed)] for n in range(count)]
    assert await line.verdicts(batch) == [one in GOOD for one in batch]


async def test_the_loop_does_not_wait_for_a_verdict_and_takes_nothing_before_it(line: Line) -> None:
    await line.started()
    first, *_ = await line.put([BAD[0], GOOD[0]])
    unsigned = SignedAnswer(first.event, b"", b"", b"")
    await line.queue.put(unsigned)
    assert line.queue.qsize() == 3
    assert line.queue.empty()  # The last one could be taken, but not out of its order.
    assert [(await line.taken()).good for _ in range(3)] == [False, True, None]
    await line.queue.put(unsigned)
    assert not line.queue.empty()


@pytest.mark.parametrize("count", [1, MANY - 1, MANY, AWAY_MAX + MANY])
async def test_verdicts_are_right_however_many_come(line: Line, count: int) -> None:
    await line.started()
    mixed = [*GOOD, *BAD]
    batch = [mixed[n % len(mixed)] for n in range(count)]
    assert await line.verdicts(batch) == [one in GOOD for one in batch]


async def test_a_few_and_one_core_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, batch in ((2, [*GOOD[: MANY - 3], BAD[0]]), (1, [*GOOD, *BAD])):
        monkeypatch.setattr(signature_checker, "_cores", lambda cores=cores: cores)
        line = Line()
        assert await line.verdicts(batch) == [one in GOOD for one in batch]
        assert line.checker._starting is None


async def test_a_process_that_dies_changes_no_verdict(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    process = await line.started()
    process.kill()
    for _ in range(2):
        batch = [*GOOD, *BAD, *GOOD]
        assert await line.verdicts(batch) == [one in GOOD for one in batch]
    assert caplog.text.count("signatures are checked in this process from now on") == 1


async def test_a_process_that_does_not_answer_changes_no_verdict(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = await line.started()
    monkeypatch.setattr(signature_checker, "PATIENCE_S", 0.05)
    process.send_signal(signal.SIGSTOP)
    batch = [*GOOD, *BAD]
    assert await line.verdicts(batch) == [one in GOOD for one in batch]
    assert "it does not answer" in caplog.text


async def test_a_process_that_cannot_start_changes_no_verdict(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for _ in range(3):
        assert all(await line.verdicts(GOOD))
        await asyncio.sleep(0.05)


async def test_room_in_a_full_queue_goes_to_those_who_wait_for_it() -> None:
    queue: EventQueue[int] = EventQueue(1)
    await queue.put(0)
    writers = [asyncio.create_task(queue.put(number)) for number in (1, 2, 3)]
    await asyncio.sleep(0)
    writers[1].cancel()
    assert await queue.get() == 0
    writers[0].cancel()  # It has been told that there is room, and lets the third one have it.
    assert await asyncio.wait_for(queue.get(), 10) == 3
    assert await asyncio.gather(*writers, return_exceptions=True) != [None] * 3
