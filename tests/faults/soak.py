"""The long version: power cuts and simulated federations on all cores, with seeds that count up.

    python -m tests.faults.soak --minutes 30 --seed 1000000

Prints what was tried and writes build/reports/soak.json. Ends with 1 if a promise was broken, or if
a control that must break one did not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

from benchmarks.figures import REPORTS, Figure, show, write
from tests.faults.crash_states import KINDS, SCENARIOS, replay_command, scratch, tried
from tests.sim.checker import ViolationError
from tests.sim.hierarchy import HierarchyWorld
from tests.sim.world import World

MINUTES: Final = 30.0
SEED: Final = 1_000_000
"""Far from the seeds of the tests."""
SEEDS_A_JOB: Final = 100
SITES_EVERY: Final = 4
"""Of the federations, one in so many has relays among its workers."""
GOAL: Final = 1_000_000
"""States and seeds of a whole soak."""
SHOWN_MAX: Final = 20
"""Violations that are printed; all are counted."""


@dataclass
class Found:
    """What one job, or all of them, tried and found."""

    states: int = 0
    seeds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    state_cpu_s: float = 0.0
    seed_cpu_s: float = 0.0

    def add(self, other: Found) -> None:
        """Take another's into this."""
        self.states += other.states
        self.seeds += other.seeds
        self.faults += other.faults
        self.violations += other.violations
        self.state_cpu_s += other.state_cpu_s
        self.seed_cpu_s += other.seed_cpu_s


def cut_power(scenario: str, seed: int, kind: str = "full") -> Found:
    """Every state of one recording."""
    began_s = time.process_time()
    with scratch() as folder:
        tally = tried(scenario, seed, folder, kind)
    texts = [f"{text}; replay: {replay_command(state, kind)}" for state, text in tally.failures]
    return Found(states=tally.states, violations=texts, state_cpu_s=time.process_time() - began_s)


def simulate(first: int, append_first: bool = True) -> Found:
    """Some federations."""
    began_s = time.process_time()
    found = Found()
    for seed in range(first, first + SEEDS_A_JOB):
        has_sites = append_first and seed % SITES_EVERY == 0
        world = HierarchyWorld(seed) if has_sites else World(seed, append_first=append_first)
        if not append_first:
            # The control: crashes come often enough to hit the moment between the two.
            scenario = replace(world.scenario, coordinator_crash_rate=0.2, heal_at_ms=10_000)
            world = World(seed, scenario=scenario, append_first=False)
        try:
            world.run()
        except ViolationError as violation:
            found.violations.append(str(violation))
        found.seeds += 1
        found.faults += world.faults
    found.seed_cpu_s = time.process_time() - began_s
    return found


def controls(pool: ProcessPoolExecutor, seed: int) -> dict[str, int]:
    """Violations that each control was caught at."""
    kinds = [kind for kind in KINDS if kind != "full"]
    jobs = {f"store: {k}": pool.submit(cut_power, KINDS[k].caught_in, seed, k) for k in kinds}
    jobs["coordinator: sends before it appends"] = pool.submit(simulate, seed, False)
    return {name: len(job.result().violations) for name, job in jobs.items()}


def jobs_from(pool: ProcessPoolExecutor, seed: int) -> Iterator[Future[Found]]:
    """Jobs without end: all scenarios of one seed, and as many simulations."""
    for number in count():
        for place, scenario in enumerate(SCENARIOS):
            yield pool.submit(cut_power, scenario, seed + number)
            first = seed + (number * len(SCENARIOS) + place) * SEEDS_A_JOB
            yield pool.submit(simulate, first)


def soak(pool: ProcessPoolExecutor, seed: int, minutes: float, cores: int) -> Found:
    """Keep all cores busy for so long."""
    end_s = time.monotonic() + 60 * minutes
    total, running = Found(), set[Future[Found]]()
    jobs = jobs_from(pool, seed)
    while True:
        while len(running) < 2 * cores and time.monotonic() < end_s:
            running.add(next(jobs))
        if not running:
            return total
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for job in done:
            found = job.result()
            for text in found.violations[: max(0, SHOWN_MAX - len(total.violations))]:
                print(text, flush=True)
            total.add(found)


def figures_of(total: Found, caught: dict[str, int]) -> list[Figure]:
    """The report."""
    figures = [
        Figure("crash states and simulated federations", total.states + total.seeds, "", goal()),
        Figure("promises broken", len(total.violations), "", "at most 0"),
        Figure("crash states", total.states, "states"),
        Figure("crash states a second", total.states / total.state_cpu_s, "states/core-s"),
        Figure("simulated federations", total.seeds, "seeds"),
        Figure("simulated federations a second", total.seeds / total.seed_cpu_s, "seeds/core-s"),
        Figure("faults in simulated federations", sum(total.faults.values()), "faults"),
    ]
    figures += [Figure(f"of these, {name}", n, "faults") for name, n in total.faults.most_common()]
    return figures + [
        Figure(f"control, {name}: caught", times, "times", "at least 1")
        for name, times in caught.items()
    ]


def goal() -> str:
    """Of states and seeds together."""
    return f"at least {GOAL}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long, at least")
    parser.add_argument("--seed", type=int, default=SEED, help="where seeds begin to count")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {options.minutes:g} minutes, seeds from {options.seed}", flush=True)
    with ProcessPoolExecutor(cores) as pool:
        caught = controls(pool, options.seed)
        total = soak(pool, options.seed, options.minutes, cores)
    figures = figures_of(total, caught)
    show(figures, "make soak")
    write(figures, REPORTS / "soak.json")
    return int(bool(total.violations) or not all(caught.values()))


if __name__ == "__main__":
    sys.exit(main())
