"""One worker cannot hold a secure run for ever, unseen: the run pauses and says what to look at."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedmezo import Coordinator, Session
from fedmezo_core.journal.journal import JournalStore, MemoryStore
from fedmezo_core.machines.rounds import EMPTY_SUMS_MAX, FAILED_ATTEMPTS_MAX
from fedmezo_core.records import Answered, Committed, Genesis, Masked
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.library.light_engine import LightEngine
from tests.library.test_both_sides import records_in
from tests.secure.test_secure_runs import NAMES, cut_after, run_in_order, secure_run

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
    """Workers a and b reveal wrong shares in rounds that a test chooses.

    The shares of three of four workers are used, so those of one of the two always are.
    """

    def __init__(self, is_wrong: Callable[[int], bool]) -> None:
        self.is_wrong = is_wrong

    def __call__(self, name: str, message: wire.SessionRequest) -> None:
        reply = message.sum_reply
        is_its_turn = name in "ab" and reply.HasField("shares_revealed")
        if is_its_turn and self.is_wrong(reply.step.round):
            for share in reply.shares_revealed.shares:
                share.share = (1).to_bytes(len(share.share), "little")


def test_shares_that_nobody_can_decrypt_pause_the_run_and_name_who_gave_them() -> None:
    store = MemoryStore()
    fleet = Fleet(secure_run(workers_min=3), store)
    fleet.run(undecryptable)
    coordinator = fleet.coordinator
    assert coordinator.phase == "paused"
    round_ = coordinator.round + 1
    assert f"{FAILED_ATTEMPTS_MAX} attempts at the sum of round {round_}" in coordinator.reason
    assert "the shares of worker d cannot be decrypted" in coordinator.reason
    masked = [record.round for record in records_in(store) if isinstance(record, Masked)]
    assert masked == list(range(1, round_))

    coordinator.exclude("d", "it gives shares that nobody can decrypt")
    coordinator.resume(1.0)
    fleet.run(undecryptable)
    assert coordinator.finished
    assert coordinator.round == 4


def test_a_run_that_is_resumed_with_the_same_worker_pauses_again() -> None:
    fleet = Fleet(secure_run(), MemoryStore())
    fleet.run(undecryptable)
    first = fleet.coordinator.reason
    fleet.coordinator.resume(1.0)
    fleet.run(undecryptable)
    assert fleet.coordinator.phase == "paused"
    assert fleet.coordinator.reason == first


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
    assert "do not fit" in coordinator.reason

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
    fleet = Fleet(secure_run(pause_rounds=0, rounds=2 * EMPTY_SUMS_MAX), MemoryStore())
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
