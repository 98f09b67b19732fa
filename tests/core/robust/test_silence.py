"""Members that join and never answer, or only now and then, cannot hold rounds up."""

from __future__ import annotations

import pytest

from fedmezo_core.events import Ready
from fedmezo_core.records import Opened
from tests.core.machines.rounds_driver import RoundsDriver

DEADLINE_MS = 1000
ROUNDS = 300
SILENT = tuple(f"s{number}" for number in range(5))


class LongRun(RoundsDriver):
    """Does not fold all records again after each step."""

    def keep(self, ready: Ready) -> Ready:
        self.records.extend(ready.records)
        return ready


def deadlines(how: str, **values: int) -> tuple[int, RoundsDriver]:
    """How many rounds of three honest workers took a whole deadline, with silent ones beside."""
    sizes = {"workers_min": 3, "quorum": 1, "cohort_size_max": 8} | values
    run = LongRun(rounds=ROUNDS, deadline_ms=DEADLINE_MS, digest_every_rounds=1000, **sizes)
    run.ready("a", "b", "c", *SILENT)
    count = now_ms = 0
    while run.machine.round < ROUNDS:
        round_ = run.machine.round
        now_ms += 1
        run.tick(now_ms)
        for number, worker in enumerate(SILENT):
            if how == "rejoins":
                run.lost(worker)
                run.ready(worker)
            misses = run.machine.roster.workers[worker].misses
            is_asked = worker in run.machine.roster.assignments
            if how == "answers now and then" and misses and is_asked and round_ % 5 == number:
                run.answer(worker)
        for worker in "abc":
            if run.machine.round == round_ and worker in run.machine.roster.assignments:
                run.answer(worker)
        if run.machine.round == round_:
            now_ms += DEADLINE_MS
            run.tick(now_ms)
            count += 1
    return count, run


@pytest.mark.parametrize(
    ("how", "most"), [("stays", 4), ("rejoins", 40), ("answers now and then", 40)]
)
def test_five_silent_members_cost_few_deadlines(how: str, most: int) -> None:
    count, _ = deadlines(how)
    assert 1 <= count <= most, "of 300"


def test_silent_members_that_fill_a_cohort_lose_their_place_in_it() -> None:
    count, run = deadlines("stays", cohort_size_max=3)
    assert count <= 20, "of 300"
    later = [record.workers for record in run.records if isinstance(record, Opened)][40:]
    assert sum(not set(SILENT) & set(workers) for workers in later) >= 0.9 * len(later)


def test_a_member_that_is_silent_once_is_waited_for_as_soon_as_it_is_back() -> None:
    run = RoundsDriver(workers_min=2, quorum=1, rounds=9, deadline_ms=DEADLINE_MS)
    run.ready("a", "b")
    run.answer("a")
    run.tick(DEADLINE_MS)
    assert run.machine.roster.workers["b"].misses == 1
    run.lost("b")
    run.ready("b")
    assert run.machine.roster.workers["b"].misses == 0
    assert "b" in run.machine.roster.waited_for
