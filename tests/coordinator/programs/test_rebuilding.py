"""Which records a model is rebuilt from, by the round that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fedmezo_coordinator.programs.taking_home.rebuilding import plan_of
from fedmezo_core.errors import ConfigError, DivergedError
from fedmezo_core.events import ReplicaEvaluated
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import state_to_pb
from fedmezo_core.records import Committed, Evaluated, Record, Snapshotted
from tests.core.machines.rounds_driver import RoundsDriver

LOSSES = (0.9, 0.5, 0.8, 0.7, 0.7, 0.8)
"""Held-out losses after rounds 1 to 6."""


def journal_of(records: Sequence[Record]) -> Journal:
    journal = Journal(MemoryStore())
    journal.append(encode_records(records))
    return journal


def records() -> list[Record]:
    run = RoundsDriver(rounds=10)
    run.ready("a")
    for round_, loss in enumerate(LOSSES, start=1):
        run.answer("a")
        digest = bytes([round_]) * 32
        run.step(ReplicaEvaluated(Evaluated(round_, loss, 0.5, 10, digest)))
        if round_ >= 3:
            snapshotted = Snapshotted(round_, digest, bytes(32), 9)
            run.machine.apply(snapshotted)
            run.records.append(snapshotted)
    return run.records


def compacted(all_records: list[Record], first_round: int) -> Journal:
    """The journal without the records up to the commit of `first_round`."""
    state, count = RunState(), 0
    for record in all_records:
        state.apply(record)
        count += 1
        if isinstance(record, Committed) and record.round == first_round:
            break
    entries = list(journal_of(all_records).load())
    store = MemoryStore()
    store.append([entry.row for entry in entries])
    last = entries[count - 1]
    body = entries[0].row.body
    sealed = SealedState(count, last.row.chain, last.head, body, state_to_pb(state))
    store.drop_before(seal(sealed))
    return Journal(store)


def test_the_best_round_is_that_of_the_smallest_loss() -> None:
    plan = plan_of(journal_of(records()), None, best=True)
    assert [commit.round for commit in plan.commits] == [1, 2]
    last = plan_of(journal_of(records()), None)
    assert [commit.round for commit in last.commits] == [1, 2, 3, 4, 5, 6]


def test_weights_are_compared_with_each_digest_that_the_journal_has() -> None:
    plan = plan_of(journal_of(records()), None, best=True)
    plan.check(2, bytes([2]) * 32)
    with pytest.raises(DivergedError, match="weights rebuilt for round 2 have digest 0303"):
        plan.check(2, bytes([3]) * 32)
    plan.check(3, b"anything, because what came later is not the plan's")


def test_without_an_evaluation_there_is_no_best_round() -> None:
    left = [record for record in records() if not isinstance(record, Evaluated)]
    with pytest.raises(ConfigError, match="the journal holds no evaluation"):
        plan_of(journal_of(left), None, best=True)


def test_a_best_round_whose_records_were_dropped_leaves_the_best_of_the_others() -> None:
    with pytest.raises(
        ConfigError, match=r"round 2 cannot be rebuilt.* of which 4 has the best evaluation"
    ):
        plan_of(compacted(records(), 3), None, best=True)
    # The evaluation itself is remembered even if its record was dropped.
    plan = plan_of(compacted(records(), 2), 4)
    assert plan.snapshot is not None
    assert (plan.snapshot.round, plan.commits) == (4, [])
