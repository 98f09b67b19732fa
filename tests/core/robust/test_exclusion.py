"""Workers that the operator excludes from the run, and readmits."""

from __future__ import annotations

import pytest

from fedmezo_core.errors import ConfigError, JournalCorruptError
from fedmezo_core.events import Assign, Expel
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.sealed import SealedState, seal, unseal
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import state_of, state_to_pb
from fedmezo_core.records import Committed, Excluded, Opened, Readmitted, Record
from tests.core.machines.rounds_driver import RoundsDriver, kinds, refusal


def three(**values: object) -> RoundsDriver:
    run = RoundsDriver(**{"workers_min": 2, "quorum": 2, "rounds": 9} | values)
    run.ready("a", "b", "c")
    return run


def test_an_excluded_worker_is_told_once_and_takes_no_part_any_more() -> None:
    run = three()
    ready = run.keep(run.machine.exclude("c", "its answers\n are noise"))
    assert ready.records[0] == Excluded(0, "c", "its answers are noise")
    assert ready.messages[0] == Expel(
        "c",
        "The run's operator excluded worker c after round 0: its answers are noise. Its answers no "
        "longer count; ask the operator to readmit it.",
        "ExcludedError",
    )
    assert refusal(run.answer("c")) == "UnknownWorkerError"
    for _ in range(3):
        run.answer("a")
        ready = run.answer("b")
    assert [r.workers for r in ready.records if isinstance(r, Opened)] == [("a", "b")]
    # A restart knows it, and so does its next session.
    run.restart()
    run.ready("a", "b")
    assert [type(m) for m in run.ready("c").messages] == [Expel]
    assert run.machine.round == 3


def test_answers_of_an_excluded_worker_that_no_commit_holds_never_count() -> None:
    run = three(workers_min=3, quorum=2)
    run.answer("c")
    run.answer("a")
    run.keep(run.machine.exclude("c", "noise"))
    ready = run.answer("b")
    [commit] = [r for r in ready.records if isinstance(r, Committed)]
    assert len(commit.seed_ranges) == 2, "those of a and b"


def test_a_round_closes_when_the_last_worker_that_it_waits_for_is_excluded() -> None:
    run = three(workers_min=3)
    run.answer("a")
    run.answer("b")
    ready = run.keep(run.machine.exclude("c", "silent"))
    assert kinds(ready)[:2] == ["Excluded", "Committed"]


def test_nobody_waits_for_an_excluded_worker_after_a_restart() -> None:
    run = three(workers_min=3)
    run.answer("a")
    run.keep(run.machine.exclude("c", "silent"))
    run.restart()
    run.ready("a", "b")
    assert "Committed" in kinds(run.answer("b"))


@pytest.mark.parametrize("has_answered", [False, True])
def test_a_readmitted_worker_takes_part_again(*, has_answered: bool) -> None:
    run = three(workers_min=3, quorum=3)
    if has_answered:
        run.answer("c")
    run.keep(run.machine.exclude("c", "noise"))
    ready = run.keep(run.machine.readmit("c"))
    assert ready.records == (Readmitted(0, "c"),)
    run.lost("c")
    asked = [*run.ready("c").messages, *run.answer("a").messages, *run.answer("b").messages]
    assert [m.worker for m in asked if isinstance(m, Assign)] == ["c"]
    assert "Committed" in kinds(run.answer("c"))


def test_a_buffered_run_drops_what_waits_of_an_excluded_worker() -> None:
    run = three(buffer_answers=3, quorum=2)
    run.answer("c")
    run.answer("a")
    run.keep(run.machine.exclude("c", "noise"))
    assert run.machine.state.counting == 1
    run.answer("b")
    ready = run.answer("a")
    [commit] = [r for r in ready.records if isinstance(r, Committed)]
    held = run.machine.state.held(1)
    assert held is not None
    assert all(s.round == 1 and held.cohort[s.slot] != "c" for s in commit.answers)


def test_what_cannot_be_excluded_or_readmitted_is_refused_with_a_reason() -> None:
    run = three()
    run.keep(run.machine.exclude("c", "noise"))
    with pytest.raises(ConfigError, match="Worker c is excluded already: noise; readmit it first"):
        run.machine.exclude("c", "again")
    with pytest.raises(ConfigError, match="Worker a is not excluded"):
        run.machine.readmit("a")
    with pytest.raises(ConfigError, match="is the coordinator's own"):
        run.machine.exclude("replica", "why not")
    for reason in ("", " ", "x" * 513):
        with pytest.raises(ConfigError, match="say in 1 to 512 why worker a is excluded"):
            run.machine.exclude("a", reason)
    assert run.machine.phase is Phase.OPEN


def test_exclusions_stand_in_the_journal_and_in_sealed_states() -> None:
    run = three()
    for worker in "ca":
        run.keep(run.machine.exclude(worker, f"{worker} sends noise"))
    run.keep(run.machine.readmit("a"))
    assert [decode_record(encode_record(r)) for r in run.records[-3:]] == run.records[-3:]
    state = run.machine.state
    sealed = SealedState(9, b"c" * 32, b"h" * 32, encode_record(run.records[0]), state_to_pb(state))
    assert state_of(unseal(seal(sealed))) == state
    assert list(state.excluded) == ["c"]


@pytest.mark.parametrize(
    "records",
    [
        (Readmitted(0, "a"),),
        (Excluded(0, "a", "x"), Excluded(0, "a", "y")),
        (Excluded(1, "a", "x"),),
    ],
)
def test_a_misplaced_record_is_corruption(records: tuple[Record, ...]) -> None:
    state = RunState()
    *before, last = (RoundsDriver().records[0], *records)
    for record in before:
        state.apply(record)
    with pytest.raises(JournalCorruptError, match="in turn, after round 0"):
        state.apply(last)
