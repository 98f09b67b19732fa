"""A thousand federations with sites, and proof that the simulator notices a faulty relay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedmezo_core.events import Acknowledged, SendAnswer
from fedmezo_core.machines import aggregate
from fedmezo_core.machines.aggregate import site_mean
from fedmezo_core.machines.relay import RelayMachine, RelayReady
from fedmezo_core.records import Scalars
from tests.sim.checker import ViolationError
from tests.sim.hierarchy import HierarchyWorld, SiteChecker

SEEDS = 1000
SEEDS_A_BLOCK = 250
CONTROL_SEEDS = 60


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_BLOCK))
def test_every_federation_with_sites_stays_sound_and_finishes(first: int) -> None:
    faults: Counter[str] = Counter()
    crowds: Counter[int] = Counter()
    for seed in range(first, first + SEEDS_A_BLOCK):
        world = HierarchyWorld(seed)
        world.run()
        assert isinstance(world.checker, SiteChecker)
        faults += world.faults
        crowds.update(world.checker.crowds)
        flipped = {worker.name for worker in world.workers if worker.flipped}
        for site, digest in world.reported.items():
            assert digest == world.checker.weights[-1] or flipped & {*world.checker.sites[site]}
    assert min(faults["a relay crashed"], faults["a site had to join again"]) >= 20, faults
    assert min(crowds[count] for count in (1, 2, 3, 4)) >= 20, crowds


def test_a_seed_with_sites_replays_exactly() -> None:
    transcripts: list[list[str]] = [[], []]
    for transcript in transcripts:
        HierarchyWorld(11, transcript=transcript).run()
    assert transcripts[0] == transcripts[1]
    assert len(transcripts[0]) > 50


def _caught(relay: type[RelayMachine] = RelayMachine) -> list[str]:
    found = []
    for seed in range(CONTROL_SEEDS):
        world = HierarchyWorld(seed)
        scenario = replace(world.scenario, tear_rate=0.1, delay_ms_max=400, heal_at_ms=20_000)
        try:
            HierarchyWorld(seed, scenario=scenario, sites=world.sites, relay=relay).run()
        except ViolationError as violation:
            found.append(str(violation))
    assert all("python -m tests.sim --sites --seed" in violation for violation in found)
    return found


def test_without_a_fault_in_the_relay_nothing_is_caught() -> None:
    assert _caught() == []


class EarlyAckMachine(RelayMachine):
    """A machine that acknowledges what it has sent, instead of what is durable."""

    def step(self, event: Any) -> RelayReady:
        """Take its own answer for an acknowledged one."""
        ready = super().step(event)
        for action in ready.up:
            if isinstance(action, SendAnswer):
                early = super().step(Acknowledged(action.ticket))
                return replace(ready, messages=ready.messages + early.messages)
        return ready


def test_control_acknowledging_before_the_coordinator_above_is_caught() -> None:
    found = _caught(EarlyAckMachine)
    assert sum("not in the journal" in violation for violation in found) >= CONTROL_SEEDS // 4


class UnsignedMachine(RelayMachine):
    """A machine that hands missed rounds to workers that expect a signature."""

    def _dismiss(self, sentence: str) -> None:
        """Let them stay."""


def test_control_passing_missed_rounds_on_is_caught() -> None:
    found = _caught(UnsignedMachine)
    assert sum("without a signature" in violation for violation in found) >= 5


def test_control_a_mean_that_forgets_the_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unweighted(answers: Sequence[Scalars]) -> Scalars:
        mean = site_mean([answer._replace(rows=None) for answer in answers])
        return mean._replace(rows=sum(answer.rows or 1 for answer in answers))

    monkeypatch.setattr(aggregate, "site_mean", unweighted)
    found = _caught()
    assert sum("is nobody's mean" in violation for violation in found) >= 10
