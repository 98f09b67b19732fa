"""Ten thousand federations, and proof that the simulator notices each fault it is made for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmezo_core.events import AnswerReceived, Ready, RoundEvent, Ticket
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Record, Summed
from tests.sim.checker import ViolationError
from tests.sim.slow_worker import play
from tests.sim.world import SecureWorld, World, draw_scenario

SEEDS = 10_000
SEEDS_A_BLOCK = 250
CONTROL_SEEDS = 60
SECURE_SEEDS = 300
SECURE_SEEDS_A_BLOCK = 100


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_BLOCK))
def test_every_federation_stays_sound_and_finishes(first: int) -> None:
    for seed in range(first, first + SEEDS_A_BLOCK):
        World(seed).run()


def test_the_seeds_try_every_kind_of_fault() -> None:
    faults: Counter[str] = Counter()
    for seed in range(300):
        world = World(seed)
        world.run()
        faults += world.faults
    assert len(faults) == 13
    assert min(faults.values()) >= 5, faults


@pytest.mark.parametrize("first", range(0, SECURE_SEEDS, SECURE_SEEDS_A_BLOCK))
def test_every_federation_with_secure_aggregation_stays_sound(first: int) -> None:
    """Each commit is the plain sum of those in it, or none; most are, and some lack a worker."""
    sizes: Counter[str] = Counter()
    for seed in range(first, first + SECURE_SEEDS_A_BLOCK):
        world = SecureWorld(seed)
        world.run()
        for size in world.checker.sum_sizes:
            whole = min(world.scenario.workers, world.scenario.config.cohort_size_max)
            sizes["none" if not size else "all" if size == whole else "some"] += 1
    assert sizes["all"] > sizes["some"] > sizes["none"] > 0, sizes


def test_control_a_second_sum_of_a_round_is_caught() -> None:
    """Workers that helped to unmask the first one say nothing more, so nothing goes on."""

    def make(seed: int) -> World:
        scenario = SecureWorld(seed).scenario
        scenario = replace(scenario, coordinator_crash_rate=0.3, heal_at_ms=20_000)
        return SecureWorld(seed, scenario=scenario, machine=SecondSumMachine)

    assert len(_caught(make, seeds=10)) >= 2


def test_control_a_sum_that_is_off_by_one_is_caught() -> None:
    found = _caught(lambda seed: SecureWorld(seed, machine=OffByOneMachine), seeds=10)
    assert sum("is not the plain sum" in violation for violation in found) >= 5


def test_a_seed_replays_exactly() -> None:
    transcripts: list[list[str]] = [[], []]
    for transcript in transcripts:
        World(11, transcript=transcript).run()
    assert transcripts[0] == transcripts[1]
    assert len(transcripts[0]) > 50


class RoundOnlyMachine(RoundMachine):
    """A machine that matches answers by worker and round alone, as if there were no tickets."""

    def step(self, event: RoundEvent) -> Ready:
        """Credit any answer for the open round to the worker's own slot."""
        current = self.state.open
        if isinstance(event, AnswerReceived) and current and event.ticket.round == current.round:
            slot = current.slots.get(event.worker)
            if slot is not None:
                ticket = Ticket(self.epoch, current.round, slot)
                event = replace(event, ticket=ticket)
        return super().step(event)


class SecondSumMachine(RoundMachine):
    """A machine that forgets at its start that a sum was being unmasked."""

    def start(self, now_ms: int = 0) -> Ready:
        """Begin as if nobody had been asked to unmask anything."""
        if self.state.open is not None:
            self.state.open.masked = None
        return super().start(now_ms)


class OffByOneMachine(RoundMachine):
    """A machine that does not take masks off quite right."""

    def _record(self, record: Record) -> None:
        if isinstance(record, Summed) and record.sums:
            first, *rest = record.sums
            record = Summed(record.round, (first + 1, *rest))
        super()._record(record)


class AgelessMachine(RoundMachine):
    """A machine that takes a late answer for one to the newest assignment, as if it had no age."""

    def step(self, event: RoundEvent) -> Ready:
        """Credit an answer of an earlier round to the worker's own slot of the open one."""
        current = self.state.open
        if isinstance(event, AnswerReceived) and current and event.ticket.round < current.round:
            slot = current.slots.get(event.worker)
            if slot is not None:
                event = replace(event, ticket=Ticket(self.epoch, current.round, slot))
        return super().step(event)


def _caught(make: Callable[[int], World], seeds: int = CONTROL_SEEDS) -> list[str]:
    found = []
    for seed in range(seeds):
        try:
            make(seed).run()
        except ViolationError as violation:
            found.append(str(violation))
    assert all("replay with: python -m tests.sim " in violation for violation in found)
    return found


class GreedyMachine(RoundMachine):
    """A machine that takes answers to the open round of a run that was ended."""

    def _check_not_too_late(self, event: AnswerReceived) -> None:
        if event.ticket.round <= self.state.round:
            super()._check_not_too_late(event)


def _with_lying_disk(
    seed: int, machine: Callable[[], RoundMachine] = RoundMachine, buffer_answers: int = 0
) -> World:
    """A network and a disk bad enough that a round is opened twice, with other slots."""
    scenario = replace(
        draw_scenario(random.Random(seed), is_secure=False),
        workers=4,
        hostile=True,
        lose_tail=True,
        replica=False,
        flips_max=0,
        delay_ms_max=400,
        heal_at_ms=10_000,
        coordinator_crash_rate=0.3,
        tear_rate=0.02,
    )
    config = scenario.config.model_copy(
        update={
            "workers_min": 2,
            "quorum": 2,
            "cohort_size_max": 4,
            "rounds": 9,
            "deadline_ms": 1000,
            # Of shared seeds, every slot has the same.
            "seed_policy": "per_worker",
            "aggregation": "mean",
            "buffer_answers": buffer_answers,
            "staleness_max_rounds": 3,
        }
    )
    return World(seed, scenario=replace(scenario, config=config), machine=machine)


@pytest.mark.parametrize("buffer_answers", [0, 2])
def test_tickets_hold_even_when_the_disk_loses_an_opening(buffer_answers: int) -> None:
    assert _caught(lambda seed: _with_lying_disk(seed, buffer_answers=buffer_answers)) == []


def test_control_matching_the_round_alone_is_caught() -> None:
    found = _caught(lambda seed: _with_lying_disk(seed, RoundOnlyMachine), seeds=300)
    assert sum("not measured on that slot's seed" in violation for violation in found) >= 2


def test_control_forgetting_how_old_an_answer_is_is_caught() -> None:
    def make(seed: int) -> World:
        return _with_lying_disk(seed, AgelessMachine, buffer_answers=2)

    found = _caught(make)
    assert sum("not measured on that slot's seed" in violation for violation in found) >= 2


def test_control_answers_to_a_run_that_was_ended_are_caught() -> None:
    def make(seed: int) -> World:
        scenario = replace(World(seed).scenario, orders=6)
        return World(seed, scenario=scenario, machine=GreedyMachine)

    assert any("was ended, but goes on" in violation for violation in _caught(make))


def test_orders_end_in_runs_that_are_stopped_and_in_answers_that_do_not_count() -> None:
    stopped = void = 0
    for seed in range(SEEDS_A_BLOCK):
        world = World(seed)
        world.run()
        stopped += world.checker.stopped
        void += len(world.checker.void)
    assert min(stopped, void) > 5


def test_buffered_runs_are_among_the_federations_and_their_answers_grow_old() -> None:
    ages: list[int] = []
    for seed in range(SEEDS_A_BLOCK):
        world = World(seed)
        world.run()
        if world.scenario.config.buffer_answers:
            ages += world.checker.ages
    assert 0 < sum(age > 0 for age in ages) < len(ages)


def test_a_slow_worker_does_not_hold_a_buffered_run_up_and_is_heard() -> None:
    synchronous, buffered = play(rounds=30), play(rounds=60, buffer_answers=4)
    assert buffered.answers_a_second > 5 * synchronous.answers_a_second
    assert 0 < buffered.slow_share < synchronous.slow_share


def test_control_sending_before_appending_is_caught() -> None:
    def make(seed: int) -> World:
        scenario = replace(World(seed).scenario, coordinator_crash_rate=0.2, heal_at_ms=10_000)
        return World(seed, scenario=scenario, append_first=False)

    found = _caught(make)
    assert any("not in the journal" in violation for violation in found)
    assert len(found) >= CONTROL_SEEDS // 4
