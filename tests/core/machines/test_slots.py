"""The order of a cohort's slots: the names', or in a run that hides them one that nobody knows."""

from __future__ import annotations

from collections import Counter

import pytest

from fedmezo_core.events import AnswerReceived, Assign, Ready, Ticket, WorkerReady
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Opened, Record, Scalars
from tests.integration.support.harness import config_of, genesis_of

NAMES = ("a", "b", "c", "d")


def records_of_a_run(readers: str, secret: bytes, rounds: int = 12) -> list[Record]:
    genesis = genesis_of(
        config_of(rounds=rounds, workers_min=4, quorum=4, local_steps=1, journal_readers=readers)
    )
    machine = RoundMachine(slot_secret=secret)
    machine.apply(genesis)
    records: list[Record] = [genesis]

    def take(ready: Ready) -> list[Assign]:
        records.extend(ready.records)
        return [message for message in ready.messages if isinstance(message, Assign)]

    waiting = take(machine.start())
    for name in NAMES:
        waiting += take(machine.step(WorkerReady(name)))
    while waiting:
        assign = waiting.pop()
        ticket = Ticket(assign.ticket.epoch, assign.ticket.round, assign.ticket.slot)
        scalars = Scalars((1.0,), None, 7 if assign.work.want_digest else None)
        waiting += take(machine.step(AnswerReceived(assign.worker, ticket, scalars)))
    assert machine.round == rounds
    again = RunState()
    for record in records:
        again.apply(record)
    assert again == machine.state
    return records


def orders(readers: str, secret: bytes, rounds: int = 12) -> list[tuple[str, ...]]:
    found = records_of_a_run(readers, secret, rounds)
    return [record.workers for record in found if isinstance(record, Opened)]


def test_in_a_run_for_everyone_slots_are_in_the_order_of_names_whatever_the_secret() -> None:
    assert set(orders("everyone", b"")) == {NAMES}
    assert set(orders("everyone", b"s" * 32)) == {NAMES}


def test_in_a_run_for_observers_the_order_is_another_one_each_round_and_secret() -> None:
    one, other = orders("observers", b"s" * 32), orders("observers", b"t" * 32)
    assert one == orders("observers", b"s" * 32)
    assert one != other
    assert len(set(one)) > 6
    assert all(sorted(order) == list(NAMES) for order in one)


def test_every_worker_has_every_slot_about_as_often() -> None:
    found = orders("observers", b"s" * 32, rounds=400)
    for slot in range(len(NAMES)):
        counts = Counter(order[slot] for order in found)
        assert all(60 < counts[name] < 140 for name in NAMES), counts


def test_a_run_for_observers_does_not_begin_without_a_secret() -> None:
    with pytest.raises(AssertionError, match="needs a secret"):
        records_of_a_run("observers", b"")
