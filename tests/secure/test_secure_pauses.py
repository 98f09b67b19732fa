"""One worker cannot hold a secure run for ever, unseen: the run pauses and says what to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from fedmezo import Coordinator, Session
from fedmezo_core.events import AskSum, Assign, Finish, Ready
from fedmezo_core.journal.journal import JournalStore, MemoryStore
from fedmezo_core.machines.rounds import EMPTY_SUMS_MAX, FAILED_ATTEMPTS_MAX
from fedmezo_core.records import Answered, Committed, Genesis, Masked
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.core.machines.rounds_driver import RoundsDriver
from tests.library.light_engine import LightEngine
from tests.library.test_both_sides import records_in
from tests.secure.test_secure_runs import (
    NAMES,
    check_sums,
    cut_after,
    run_in_order,
    secure_run,
)

TURN_MS = 10_000
TURNS_MAX = 1_000

Tamper = Callable[[str, wire.SessionRequest], None]


class Fleet:
    """A coordinator with its workers, of which some may lie."""

    def __init__(
        self, genesis: Genesis, store: JournalStore, memories: dict[str, SumMemory] | None = None
    ) -> None:
        self.coordinator = Coordinator(genesis, store)
        self.sessions = {
            name: Session(
                genesis, name, LightEngine(name), sum_memory=memories[name] if memories else None
            )
            for name in NAMES
        }
        self.turn = 0
        for name, session in self.sessions.items():
            for up in session.connect():
                self.coordinator.receive(name, up)

    def run(self, tamper: Tamper = lambda _name, _message: None) -> None:
        """Until the run is finished or paused."""
        for _ in range(TURNS_MAX):
            if self.coordinator.phase in ("finished", "paused"):
                return
            self.turn += 1
            self.coordinator.tick(self.turn * TURN_MS)
            for name, session in self.sessions.items():
                if name not in self.coordinator.workers:
                    continue
                for down in self.coordinator.outgoing(name):
                    for up in session.receive(down):
                        message = wire.SessionRequest.FromString(up)
                        tamper(name, message)
                        self.coordinator.receive(name, message.SerializeToString())
        raise AssertionError("the run neither ended nor paused")


def undecryptable(name: str, message: wire.SessionRequest) -> None:
    """Worker d gives shares that nobody can decrypt."""
    if name == "d" and message.sum_reply.HasField("shares_given"):
        for share in message.sum_reply.shares_given.shares:
            share.share = bytes(len(share.share))


class WrongShares:
    """Some workers reveal wrong shares in rounds that a test chooses; three of four must not."""

    def __init__(self, is_wrong: Callable[[int], bool], names: str = "ab") -> None:
        self.is_wrong = is_wrong
        self.names = names

    def __call__(self, name: str, message: wire.SessionRequest) -> None:
        reply = message.sum_reply
        is_its_turn = name in self.names and reply.HasField("shares_revealed")
        if is_its_turn and self.is_wrong(reply.step.round):
            for share in reply.shares_revealed.shares:
                share.share = (1).to_bytes(len(share.share), "little")


def test_who_gives_shares_that_nobody_can_decrypt_is_named_and_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others need it for no sum, and only its first round takes a second attempt."""
    store = MemoryStore()
    fleet = Fleet(secure_run(workers_min=3), store)
    fleet.run(undecryptable)
    assert fleet.coordinator.finished
    assert check_sums(store, fleet.coordinator.config) == [3, 3, 3, 3]
    said = "worker d dealt shares that 3 of the 3 other members say they cannot use"
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    complaint = fleet.coordinator._machine.roster.view("d").complaint
    assert complaint.startswith("left out of sums: it dealt shares")
    assert fleet.turn * TURN_MS < fleet.coordinator.config.deadline_ms, "nobody waited for one"


def test_one_that_was_left_out_takes_part_again_once_it_has_joined_anew() -> None:
    store = MemoryStore()
    fleet = Fleet(secure_run(workers_min=3, rounds=6), store)

    def bad_at_first(name: str, message: wire.SessionRequest) -> None:
        if fleet.coordinator.round < 2:
            undecryptable(name, message)
        elif fleet.coordinator.round == 3 and "d" not in joined_again:
            joined_again.add("d")
            fleet.coordinator.disconnect("d")
            for up in fleet.sessions["d"].connect():
                fleet.coordinator.receive("d", up)

    joined_again: set[str] = set()
    fleet.run(bad_at_first)
    sizes = check_sums(store, fleet.coordinator.config)
    assert sizes[:3] == [3, 3, 3]
    assert sizes[-1] == 4


def test_who_reveals_wrong_shares_is_named_and_stops_no_sum(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    fleet = Fleet(secure_run(), store)
    fleet.run(WrongShares(lambda _round: True, "b"))
    assert check_sums(store, fleet.coordinator.config) == [4, 4, 4, 4]
    said = "worker b revealed other shares than it was dealt: 4"
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [said in warning for warning in warnings] == [True] * 4
    assert said.removeprefix("worker b ") in fleet.coordinator._machine.roster.view("b").complaint


def test_sums_that_need_who_gives_useless_shares_pause_the_run_and_name_it() -> None:
    """Also after it is resumed with the same worker."""
    store = MemoryStore()
    fleet = Fleet(secure_run(quorum=4), store)
    fleet.run(undecryptable)
    coordinator = fleet.coordinator
    assert coordinator.phase == "paused"
    assert f"{FAILED_ATTEMPTS_MAX} attempts at the sum of round 1" in coordinator.reason
    assert "worker d dealt shares that 3 of the 3 other members" in coordinator.reason
    assert not [record for record in records_in(store) if isinstance(record, Masked)]
    first = coordinator.reason
    coordinator.resume(1.0)
    fleet.run(undecryptable)
    assert coordinator.phase == "paused"
    assert coordinator.reason == first

    coordinator.resume(1.0)
    fleet.run()
    assert coordinator.finished


def commits_of(store: MemoryStore) -> int:
    return sum(isinstance(record, Committed) for record in records_in(store))


def test_sums_that_never_come_out_pause_the_run() -> None:
    store = MemoryStore()
    fleet = Fleet(secure_run(rounds=30), store)
    fleet.run(WrongShares(lambda _round: True))
    coordinator = fleet.coordinator
    assert coordinator.phase == "paused"
    assert coordinator.round == commits_of(store) == EMPTY_SUMS_MAX
    assert f"the newest {EMPTY_SUMS_MAX} rounds were committed without a step" in coordinator.reason
    assert "worker a revealed other shares than it was dealt: 4" in coordinator.reason
    assert "worker b revealed" in coordinator.reason

    coordinator.resume(1.0)
    fleet.run(WrongShares(lambda round_: round_ < 2 * EMPTY_SUMS_MAX))
    assert coordinator.finished


def test_a_sum_that_comes_out_begins_the_count_anew() -> None:
    fleet = Fleet(secure_run(rounds=20), MemoryStore())
    fleet.run(WrongShares(lambda round_: round_ % EMPTY_SUMS_MAX != 0))
    assert fleet.coordinator.finished


def test_a_restart_goes_on_counting_rounds_without_a_sum() -> None:
    genesis, store = secure_run(rounds=30), MemoryStore()
    Fleet(genesis, store).run(WrongShares(lambda _round: True))
    rest = MemoryStore()
    for row, record in zip(store.read(0, 10**6), records_in(store), strict=True):
        rest.append([row])
        if isinstance(record, Committed) and record.round == EMPTY_SUMS_MAX - 1:
            break
    again = Fleet(genesis, rest)
    again.run(WrongShares(lambda _round: True))
    assert again.coordinator.phase == "paused"
    assert again.coordinator.round == EMPTY_SUMS_MAX


@pytest.mark.parametrize(
    "tamper", [undecryptable, WrongShares(lambda _round: True)], ids=["shares", "unmasking"]
)
def test_no_run_pauses_whose_contract_says_never(tamper: Tamper) -> None:
    genesis = secure_run(pause_rounds=0, rounds=2 * EMPTY_SUMS_MAX, quorum=4)
    if tamper is not undecryptable:
        genesis = secure_run(pause_rounds=0, rounds=2 * EMPTY_SUMS_MAX)
    fleet = Fleet(genesis, MemoryStore())
    if tamper is undecryptable:
        with pytest.raises(AssertionError, match="neither ended nor paused"):
            fleet.run(tamper)
    else:
        fleet.run(tamper)
        assert fleet.coordinator.finished


def test_a_round_whose_workers_say_nothing_more_pauses() -> None:
    """The journal went back to a round that all of them have helped to unmask."""
    genesis, store = secure_run(rounds=1), MemoryStore()
    memories = {name: SumMemory() for name in NAMES}
    Fleet(genesis, store, memories).run()
    rest = cut_after(store, Answered)
    again = Fleet(genesis, rest, memories)
    again.run()
    assert again.coordinator.phase == "paused"
    assert "no worker could measure round 1" in again.coordinator.reason
    assert "begin another run with another seed" in again.coordinator.reason
    # Other processes know nothing of it, as the sentence for the operator says.
    other, _ = run_in_order(genesis, cut_after(store, Answered))
    assert other.finished


def paused_run(answering: str) -> RoundsDriver:
    """A run with four workers that was paused after the answers of some."""
    run = RoundsDriver(**secure_run(quorum=4).config.model_dump())
    run.ready(*NAMES)
    for name in answering:
        run.answer(name, grads=())
    run.keep(run.machine.pause("a look"))
    return run


def told(ready: Ready) -> list[tuple[type, str]]:
    return [(type(message), message.worker) for message in ready.messages]


def test_who_joins_a_paused_run_anew_need_not_hold_its_measurement_any_more() -> None:
    run = paused_run("abc")
    run.lost("c")
    run.ready("c")
    run.answer("d", grads=())
    assert told(run.keep(run.machine.resume(1.0))) == [(Assign, "c")]
    assert told(run.answer("c", grads=()))[1:] == [(AskSum, name) for name in NAMES]


def test_who_joins_a_paused_run_anew_stays_in_the_sum_that_goes_on() -> None:
    run = paused_run("abcd")
    run.lost("d")
    assert told(run.ready("d")) == [(AskSum, "d")]
    assert (AskSum, "d") not in told(run.keep(run.machine.resume(1.0)))
    assert run.machine._sum is not None
    assert len(run.machine._sum.members) == 4


def test_a_run_that_is_ended_goes_on_with_no_sum() -> None:
    run = RoundsDriver(**secure_run(quorum=4).config.model_dump())
    run.ready(*NAMES)
    for name in NAMES:
        run.answer(name, grads=())
    assert run.machine.asked_of("a")
    run.keep(run.machine.stop("enough"))
    assert run.machine.asked_of("a") == ()
    assert told(run.ready("a")) == [(Finish, "a")]
