"""What one slow worker costs a federation: `python -m tests.sim.slow_worker`.

In a simulated federation without faults a measurement takes 100 ms, and ten times as long at one
worker. Prints a Markdown table, in simulated time: synchronous rounds, synchronous rounds with a
deadline, and buffered rounds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from tests.sim.world import World

WORKERS = 8
ROUNDS = 400
MEASURING_MS = 100
SLOW_MS = 10 * MEASURING_MS
VARIANTS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "synchronous, deadline 200 ms": {"deadline_ms": 2 * MEASURING_MS},
    "buffered, 8 answers": {"buffer_answers": 8},
    "buffered, 4 answers": {"buffer_answers": 4},
}


@dataclass(frozen=True)
class Outcome:
    """One run, in simulated time."""

    answers_a_second: float
    """Committed answers."""
    rounds_a_second: float
    slow_share: float
    """Of the committed answers, those of the slow worker."""
    age_mean: float
    """In rounds, over all committed answers."""
    age_max: int


def play(**values: Any) -> Outcome:
    """One federation from its first to its last round."""
    base = World(0).scenario
    config = base.config.model_copy(
        update={
            "workers_min": WORKERS,
            "quorum": 1,
            "cohort_size_max": WORKERS,
            "rounds": ROUNDS,
            "deadline_ms": 60_000,
            "seed_policy": "per_worker",
            "aggregation": "mean",
            "buffer_answers": 0,
            "staleness_max_rounds": 40,
        }
        | values
    )
    scenario = replace(
        base,
        workers=WORKERS,
        config=config,
        replica=False,
        hostile=False,
        flips_max=0,
        heal_at_ms=0,
        delay_ms_max=5,
    )
    world = World(0, scenario=scenario)
    for worker in world.workers:
        worker.duration_ms = MEASURING_MS
    slow = world.workers[-1]
    slow.duration_ms = SLOW_MS
    world.run()
    seconds = world.now_ms / 1000
    checker = world.checker
    owners = Counter(checker.cohorts[round_][slot] for round_, slot in checker.committed)
    return Outcome(
        answers_a_second=len(checker.ages) / seconds,
        rounds_a_second=ROUNDS / seconds,
        slow_share=owners[slow.name] / owners.total(),
        age_mean=statistics.fmean(checker.ages),
        age_max=max(checker.ages),
    )


def main() -> None:
    """Print the table."""
    print("| rounds | answers/s | rounds/s | slow worker's share | age, mean | age, most |")
    print("|---|---|---|---|---|---|")
    for name, values in VARIANTS.items():
        found = play(**values)
        print(
            f"| {name} | {found.answers_a_second:.1f} | {found.rounds_a_second:.2f} "
            f"| {100 * found.slow_share:.1f} % | {found.age_mean:.2f} | {found.age_max} |"
        )


if __name__ == "__main__":
    main()
