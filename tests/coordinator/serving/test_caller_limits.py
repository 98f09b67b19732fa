"""Limits of one caller: so many calls, and so many bytes of responses, for each address."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from pathlib import Path

import pytest

from fedmezo_coordinator.limits import caller_limits
from fedmezo_coordinator.limits.caller_limits import (
    BYTES_PER_TOKEN,
    CALLERS_MAX,
    CALLS_AT_ONCE,
    WAIT_MAX_S,
    CallerLimits,
    address_of,
)
from fedmezo_coordinator.limits.said_seldom import LINES_A_MINUTE, SaidSeldom
from fedmezo_core.errors import NotReadyError, UnknownWorkerError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.fleets import served_fleet
from tests.integration.support.harness import config_of, genesis_of, scripted_workers, served

GENESIS = genesis_of(config_of(workers_min=1, quorum=1, cohort_size_max=1, rounds=100))


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def limits(calls_per_s: float = 10.0) -> tuple[CallerLimits, Clock]:
    clock = Clock()
    return CallerLimits(calls_per_s, clock), clock


@pytest.mark.parametrize(("calls", "waits"), [(-1, False), (0, False), (1, True)])
def test_a_rested_caller_makes_so_many_calls_at_once(calls: int, waits: bool) -> None:
    taken, _ = limits()
    waited = [taken.take("a") for _ in range(CALLS_AT_ONCE + calls)]
    assert (waited[-1] > 0) is waits
    assert not any(waited[:-1])
    assert taken.take("b") == 0  # another caller


def test_tokens_come_back_at_the_steady_rate() -> None:
    taken, clock = limits(calls_per_s=10)
    taken.take("a", CALLS_AT_ONCE)
    assert taken.take("a") == pytest.approx(0.1)
    clock.now_s += 0.2
    assert taken.take("a") == pytest.approx(0.0)
    clock.now_s += 1e6
    assert taken.take("a", CALLS_AT_ONCE) == 0
    assert taken.take("a") == pytest.approx(0.1)


def test_whoever_would_wait_too_long_takes_no_token() -> None:
    taken, _ = limits(calls_per_s=10)
    taken.take("a", CALLS_AT_ONCE)
    waits = [taken.take("a") for _ in range(100)]
    most = round(10 * WAIT_MAX_S)
    assert waits[:most] == pytest.approx([0.1 * n for n in range(1, most + 1)])
    assert waits[most:] == pytest.approx([WAIT_MAX_S + 0.1] * (100 - most))


@pytest.mark.parametrize("more", [-1, 0])
def test_bytes_of_responses_cost_tokens(more: int) -> None:
    taken, _ = limits(calls_per_s=10)
    taken.take("a", CALLS_AT_ONCE - 1)
    taken.charge("a", BYTES_PER_TOKEN + more)
    assert taken.take("a") == pytest.approx(0.1 if more == 0 else 0.0)


def test_zero_means_no_limit() -> None:
    taken, _ = limits(calls_per_s=0)
    taken.charge("a", 2**40)
    assert taken.take("a", 10**9) == 0


def test_so_many_callers_are_remembered() -> None:
    taken, clock = limits()
    for number in range(CALLERS_MAX + 1):
        taken.take(f"caller-{number}")
        clock.now_s += 1e-6
    assert 0.8 * CALLERS_MAX < len(taken._rested_at_s) <= CALLERS_MAX


async def test_a_call_beyond_its_limit_waits_and_then_is_refused_with_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caller_limits, "WAIT_MAX_S", 0.05)
    taken, _ = limits(calls_per_s=100)
    taken.take("10.0.0.7", CALLS_AT_ONCE)
    begin_s = time.monotonic()
    await taken.admit("10.0.0.7")
    assert time.monotonic() - begin_s > 0.005
    taken.charge("10.0.0.7", 1000 * BYTES_PER_TOKEN)
    begin_s = time.monotonic()
    with pytest.raises(NotReadyError, match=r"10\.0\.0\.7 calls more than 100 times") as caught:
        await taken.admit("10.0.0.7")
    assert time.monotonic() - begin_s > 0.045
    assert caught.value.retry_after_s == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:50123", "10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:443", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::1]:443", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:443", "fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:443", "10.0.0.7"),
        ("ipv6:%5Bnonsense%5D:443", "nonsense"),
        ("somewhere", "somewhere"),
    ],
)
def test_the_address_of_a_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address


# ---------------------------------------------------------------- over the wire


@pytest.mark.parametrize("method", ["status", "journal", "run", "bad token"])
async def test_calls_of_an_address_are_held_back_and_its_workers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(caller_limits, "CALLS_AT_ONCE", 20)
    monkeypatch.setattr(caller_limits, "WAIT_MAX_S", 0.2)
    async with (
        served(tmp_path / "j.db", GENESIS, calls_per_s=10) as at,
        contextlib.AsyncExitStack() as stack,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        # A connection has 16 streams.
        floods = [await stack.enter_async_context(CoordinatorClient(at.address)) for _ in range(5)]

        async def call(flooding: CoordinatorClient) -> None:
            match method:
                case "status":
                    await flooding.get_status()
                case "journal":
                    await flooding.read_journal(0)
                case "run":
                    await flooding.get_run()
                case _:
                    with pytest.raises(UnknownWorkerError):
                        await flooding.poll_session(b"x" * 16)

        found = await asyncio.gather(
            *(call(floods[n % 5]) for n in range(60)), return_exceptions=True
        )
        refused = [error for error in found if error is not None]
        assert 20 <= len(refused) <= 40
        assert {type(error) for error in refused} == {NotReadyError}, refused
        assert all(e.retry_after_s for e in refused if isinstance(e, NotReadyError))
        # The worker's open session has tokens of its own.
        for _ in range(10):
            await hand.answer(await hand.assigned())
            await hand.next("ack")
        assert at.daemon.status("").round >= 10


async def test_messages_of_a_session_beyond_the_limit_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_limits, "CALLS_AT_ONCE", 20)
    async with (
        served(tmp_path / "j.db", GENESIS, calls_per_s=50) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        stale = wire.Answer(ticket=wire.Ticket(epoch=9, round=9), projected_grads=[0.5])
        begin_s = time.monotonic()
        for _ in range(40):
            await hand.send(answer=stale)
        for _ in range(40):
            await hand.next("refused")
        assert time.monotonic() - begin_s > 0.3


async def test_members_at_one_address_have_tokens_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_limits, "CALLS_AT_ONCE", 20)
    monkeypatch.setattr(caller_limits, "WAIT_MAX_S", 0.2)
    async with served_fleet(tmp_path, GENESIS, caller_calls_per_s=1) as fleet:
        flooding, calm = await fleet.member("flooding"), await fleet.member("calm")
        async with fleet.client(flooding) as client:
            with pytest.raises(NotReadyError, match="worker flooding calls more than 1 times"):
                await ask(client, 30)
        async with fleet.client(calm) as client:
            await ask(client, 10)


async def ask(client: CoordinatorClient, times: int) -> None:
    for _ in range(times):
        await client.get_status()


# ---------------------------------------------------------------- the log


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_kind_of_line_comes_so_often_a_minute(
    more: int, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    said = SaidSeldom(logging.getLogger("t"), clock)
    for _ in range(LINES_A_MINUTE + more):
        said.warn("line %d", 1)
    assert len(caplog.records) == LINES_A_MINUTE + min(more, 0)
    clock.now_s += 61
    said.warn("line %d", 2)
    assert caplog.messages[-1] == "line 2"
    assert ("(and 1 such lines before, in a minute)" in caplog.messages) is (more > 0)


async def test_refusals_of_many_callers_write_few_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence of each names its caller."""
    addresses = itertools.count()

    async def refuse(_limits: CallerLimits, _caller: str) -> None:
        raise NotReadyError(f"10.0.0.{next(addresses)} calls more than 10 times a second.")

    async with served(tmp_path / "j.db", GENESIS) as at:
        monkeypatch.setattr(CallerLimits, "admit", refuse)
        async with CoordinatorClient(at.address) as client:
            for _ in range(LINES_A_MINUTE + 2):
                with pytest.raises(NotReadyError):
                    await client.get_status()
    assert caplog.text.count("refused a call from") == LINES_A_MINUTE
