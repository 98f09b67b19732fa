"""Takes the readings that a proposal is made of: losses at several distances from the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, DataError, MeasurementError
from fedmezo_core.zo.assignment import open_batches, open_estimator, open_row_states
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.row_states import SpooledRows
from fedmezo_core.zo.party import Party
from fedmezo_core.zo.probing.proposal import (
    AGREEMENT,
    COST_SHARE_MAX,
    Proposal,
    Reading,
    difference_of,
    forwards_of,
    limited_values,
    propose,
    reports_of,
)

SHARE_MAX: Final = 0.05
"""Part of a run's forward passes that a probe may take."""
PASSES_MIN: Final = 44
"""Fewest forward passes of a probe: 2 directions at 10 lengths, and the estimator's own 4."""
DIRECTIONS_MAX: Final = 8
STEP: Final = 4.0
"""Factor between two neighbouring lengths."""
LENGTHS_MAX: Final = 14
FRESH_BATCHES_MAX: Final = 8
_TEST_PASSES: Final = 4
"""The estimator's test whether points can share a pass."""


def passes_of(config: RunConfig, workers: int) -> int:
    """Forward passes that are `SHARE_MAX` of those of a run of `workers` workers."""
    return int(SHARE_MAX * forwards_of(config, workers))


def passes_allowed(config: RunConfig, workers: int, passes_max: int | None) -> int:
    """Most forward passes of a probe; raises `ConfigError` if the run cannot be probed with them.

    `passes_max` None: `SHARE_MAX` of the passes of a run of `workers` workers.
    """
    if config.task.objective:
        raise ConfigError(
            f"A probe measures losses, and this run scores batches by {config.task.objective}; "
            "choose its learning_rate by trial."
        )
    allowed = passes_of(config, workers) if passes_max is None else passes_max
    if allowed < PASSES_MIN:
        given = f"--passes gives it {allowed}"
        if passes_max is None:
            run = forwards_of(config, workers)
            given = f"{SHARE_MAX:.0%} of this run's {run} are {allowed}"
        raise ConfigError(
            f"A probe takes at least {PASSES_MIN} forward passes of a batch, and {given}; give "
            f"--passes {PASSES_MIN} to fedmezo probe, or take a rate from docs/choosing.md."
        )
    return allowed


def probe_party(
    party: Party,
    rows: Sequence[Example],
    workers: int,
    *,
    passes_max: int | None = None,
    threads: int | None = None,
    row_states_max: int = 0,
    told: Callable[[str], None] = lambda _: None,
) -> tuple[Proposal, int]:
    """Probe for a run of `workers` workers with the contract and at the base of `party`.

    Returns the proposal and how many forward passes it took. Arguments are those of `Probe` and
    `open_estimator`; `rows` are like the workers'. row_states_max: most bytes of a temporary file
    for the states of rows. Raises `DataError` if the rows are too few, and as `Probe` and `propose`
    do.
    """
    probe = _probe_of(party, rows, workers, passes_max, threads, row_states_max, told)
    return propose(probe.readings(), party.config, workers), probe.passes


def probe_for_limits(
    party: Party,
    rows: Sequence[Example],
    workers: int,
    *,
    threads: int | None = None,
    row_states_max: int = 0,
) -> dict[str, float]:
    """The contract's learning rate, or a shorter one if `rows` show that it is too long; and eps.

    As `limited_values` says. Arguments are those of `probe_party`. Even a short run takes
    `PASSES_MIN` passes. Raises as `probe_party` does, and `limited_values`.
    """
    config = party.config
    passes_max = max(PASSES_MIN, passes_of(config, workers))
    probe = _probe_of(party, rows, workers, passes_max, threads, row_states_max)
    # What it took until then tells why it ends, or is enough.
    with contextlib.suppress(MeasurementError):
        probe.readings()
    return limited_values(probe.taken, config, workers)


def _probe_of(
    party: Party,
    rows: Sequence[Example],
    workers: int,
    passes_max: int | None,
    threads: int | None,
    row_states_max: int,
    told: Callable[[str], None] = lambda _: None,
) -> Probe:
    config = party.config
    if len(rows) < 2 * config.batch_size:
        raise DataError(
            f"{len(rows)} rows, from {rows[0].location} on, are fewer than two batches of "
            f"{config.batch_size}; give more, because what batches have in common is what a run "
            "can learn."
        )
    batches = open_batches(party, party.task.encode(rows), "probe")

    def batch_of(number: int) -> Batch:
        return batches.batch(number // config.local_steps + 1, number % config.local_steps)

    # The slope of a loss and its curvature need a point on either side of the weights.
    two_sided = replace(party, config=config.model_copy(update={"estimator": "two_sided"}))
    row_states = None
    if row_states_max:
        row_states = open_row_states(
            party, SpooledRows(row_states_max), visits=LENGTHS_MAX, batch_size=config.batch_size
        )
    estimator = open_estimator(two_sided, threads=threads, row_states=row_states)
    return Probe(estimator, batch_of, config, workers, passes_max=passes_max, told=told)


class Probe:
    """Measures on a few batches: first one batch at many lengths, then others where it matters."""

    def __init__(
        self,
        estimator: Estimator,
        batch_of: Callable[[int], Batch],
        config: RunConfig,
        workers: int,
        *,
        passes_max: int | None = None,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare to probe for a run of `workers` workers, with a two-sided `estimator`.

        batch_of: gives batch number 0, 1, ... of the contract's `batch_size` rows. passes_max: most
        forward passes of such a batch; None: `SHARE_MAX` of the run's. told: called with a line for
        each length. Raises `ConfigError` if that is too few.
        """
        self.passes_max = passes_allowed(config, workers, passes_max)
        self.passes = 0
        """Forward passes so far."""
        self._estimator = estimator
        self._batch_of = batch_of
        self._config = config
        self._workers = workers
        self._told = told
        self._count = max(2, min(DIRECTIONS_MAX, self.passes_max // 40))
        self.taken: list[Reading] = []
        """All readings so far."""

    def readings(self) -> list[Reading]:
        """Measure, within the budget; raises as `propose` does."""
        self.passes += _TEST_PASSES
        batch = self._batch_of(0)
        eps = self._config.eps
        for length in (eps, eps / STEP, eps * STEP):
            self._read(0, batch, length)
        shortest, longest = eps / STEP, eps * STEP
        # A length counts if both of its neighbours are known too.
        while self._may_read() and (
            self._cost_share(shortest * STEP) > COST_SHARE_MAX / 30
            or math.isinf(self._cost_share(shortest * STEP**2))
        ):
            shortest /= STEP
            self._read(0, batch, shortest)
        while self._cost_share(longest) < 1.2 * COST_SHARE_MAX and self._may_read():
            longest *= STEP**2 if self._is_near(longest) else STEP
            self._read(0, batch, longest)
        below = longest / STEP  # Perhaps it was left out.
        is_new = all(reading.length != below for reading in self.taken)
        if is_new and math.isinf(self._cost_share(longest)) and self._may_read():
            self._read(0, batch, below)
        self._read_fresh_batches()
        return self.taken

    def _read_fresh_batches(self) -> None:
        """Measure on other rows too, at the lengths that the proposal is about."""
        for number in range(1, FRESH_BATCHES_MAX + 1):
            # What was measured last says where it matters now.
            found = propose(self.taken, self._config, self._workers)
            walk = float(f"{found.walk_length:.2g}")
            lengths = sorted({found.eps, walk, 2 * walk})
            if self.passes + len(lengths) * 2 * self._count > self.passes_max:
                return
            batch = self._batch_of(number)
            for length in lengths:
                self._read(number, batch, length)

    def _is_near(self, length: float) -> bool:
        """Whether the loss is nearly linear as far as `length`, so that one can be left out."""
        _, reports = reports_of(self.taken)
        below = max(report.length for report in reports if report.length < length)
        agrees = difference_of(self.taken, below, length) <= AGREEMENT
        return agrees and self._cost_share(length) < COST_SHARE_MAX / 300

    def _may_read(self) -> bool:
        lengths = len({reading.length for reading in self.taken})
        return lengths < LENGTHS_MAX and self.passes + 2 * self._count <= self.passes_max

    def _cost_share(self, length: float) -> float:
        """What a length that was measured costs, as a part of the loss at W."""
        loss, reports = reports_of(self.taken)
        cost = next(report.cost for report in reports if report.length == length)
        return abs(cost / loss) if math.isfinite(cost) and loss else math.inf

    def _read(self, number: int, batch: Batch, length: float) -> None:
        # Seeds that a run may use too: they are as good as any, and the weights are not written.
        seeds: Sequence[int] = range(1, self._count + 1)
        try:
            measured = self._estimator.measure(batch, (), seeds, length)
            plus = tuple(one.loss_plus for one in measured)
            minus = tuple(one.loss_other for one in measured)
        except MeasurementError:
            plus = minus = (math.inf,) * len(seeds)
        self.passes += 2 * len(seeds)
        self.taken.append(Reading(number, length, plus, minus))
        self._told(
            f"batch {number + 1}, {length:.2g} away: mean loss {self.taken[-1].middle:.4f} "
            f"({self.passes} of at most {self.passes_max} passes)"
        )
