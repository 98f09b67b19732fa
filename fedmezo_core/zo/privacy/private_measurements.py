"""A worker's measurements under a budget of differential privacy; it stops when that is spent."""

from __future__ import annotations

import functools
import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, PrivacyBudgetError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Genesis, Scalars, digest64_of
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.plain.measurements import Measures, local_steps
from fedmezo_core.zo.privacy.accounting import (
    NoisyStep,
    PrivacyBudget,
    epsilon_of,
    noise_multiplier_for,
)
from fedmezo_core.zo.privacy.ledger import Entry, Ledger
from fedmezo_core.zo.privacy.mechanism import PoissonBatches, PrivateMeasures

log = logging.getLogger("fedmezo.privacy")

BatchT = TypeVar("BatchT")


class PrivateMeasurements(Generic[BatchT]):
    """Measures assignments of one run with noise, and keeps the account of them."""

    def __init__(
        self,
        budget: PrivacyBudget,
        genesis: Genesis,
        measures: Measures[BatchT],
        collate: Callable[[Sequence[EncodedExample], str], BatchT],
        dataset: Dataset,
    ) -> None:
        """Open the ledger, and choose the least noise with which the whole run fits.

        `measures` measures on what `collate` makes of rows of `dataset` and a name. Raises
        `ConfigError` for a run or data that the guarantee does not allow, and for a budget that is
        spent; `PrivacyError` for a ledger that cannot be used.
        """
        config, row_count = genesis.config, len(dataset)
        check_allows_privacy(config, row_count, budget.delta)
        self._budget, self._config = budget, config
        self._run = _name_of(genesis)
        self._ledger = Ledger(budget.ledger)
        probability = config.batch_size / row_count
        steps = config.rounds * config.local_steps - self._ledger.steps_of(self._run)
        self._planned_steps_left = max(steps, 0)
        self.step: Final = self._chosen_step(probability)
        """How each step is made noisy."""
        log.info(
            "privacy: noise multiplier %.3f, each of %d rows in a step with probability %.4f; "
            "the run's %d further steps bring epsilon to %.2f of %g at delta %g",
            self.step.noise_multiplier,
            row_count,
            probability,
            self._planned_steps_left,
            self._epsilon_after(self._planned_steps_left, self.step),
            budget.epsilon,
            budget.delta,
        )
        self._batches = PoissonBatches(collate, dataset, config.batch_size)
        self._measures = PrivateMeasures(
            measures,
            clip=budget.clip,
            noise_multiplier=self.step.noise_multiplier,
            batch_size=config.batch_size,
        )

    def measure_order(self, order: Measure, digest: Callable[[], bytes]) -> Measured:
        """Measure one assignment, or repeat what was said to it before.

        Its mean loss is 0 and its number of rows 1, because neither may leave the worker. Raises
        `PrivacyBudgetError` if the budget allows no further measurement, `PrivacyError` if the
        ledger takes no entry, `CutShortError`.
        """
        weights_digest = digest()
        key = self._key(order, weights_digest)
        grads = self._ledger.said(key)
        if grads is None:
            self._check_affordable()
            batch_of = functools.partial(self._batches.batch, order.ticket.round)
            measured = local_steps(self._measures, batch_of, order.work, self._config)
            grads = tuple(measurement.projected_grad for measurement in measured)
            count = self._config.local_steps
            self._ledger.add(Entry(key, self._run, order.ticket.round, self.step, count, grads))
            self._planned_steps_left -= count
        return Measured(
            order.ticket,
            Scalars(
                projected_grads=grads,
                mean_loss=0.0,
                weights_digest64=digest64_of(weights_digest) if order.work.want_digest else None,
                rows=self._batches.row_count,
            ),
        )

    def _chosen_step(self, probability: float) -> NoisyStep:
        """The noise that this run's rows had so far, if that will do; otherwise the least."""
        budget, steps = self._budget, self._planned_steps_left
        known = self._ledger.newest_step_of(self._run)
        is_same = known is not None and known.sampling_probability == probability
        if known is not None and is_same and self._epsilon_after(steps, known) <= budget.epsilon:
            return known
        noise = noise_multiplier_for(
            budget.epsilon, budget.delta, probability, max(steps, 1), self._ledger.spent
        )
        return NoisyStep(noise, probability)

    def _epsilon_after(self, step_count: int, step: NoisyStep) -> float:
        """Epsilon when so many more steps of this kind have been made."""
        spent = self._ledger.spent
        spent[step] += step_count
        return epsilon_of(spent, self._budget.delta)

    def _check_affordable(self) -> None:
        """Refuse a measurement that the budget does not allow.

        The noise was chosen for the steps of the whole run, so that only what goes beyond them
        needs the accountant.
        """
        steps = self._config.local_steps
        if self._planned_steps_left >= steps:
            return
        if self._epsilon_after(steps, self.step) > self._budget.epsilon:
            raise PrivacyBudgetError(
                f"One more measurement would bring epsilon above privacy_epsilon = "
                f"{self._budget.epsilon:g} for the data of {self._budget.ledger}; this worker "
                "leaves the run. Raise privacy_epsilon if its data may give away more."
            )

    def _key(self, order: Measure, weights_digest: bytes) -> str:
        """Names what is measured. The epoch is no part of it: a restart changes no answer."""
        work = order.work
        seeds = struct.pack(f"<{len(work.seeds)}Q", *work.seeds)
        numbers = struct.pack("<Qdd", order.ticket.round, work.eps, work.learning_rate)
        return hashlib.sha256(self._run.encode() + weights_digest + numbers + seeds).hexdigest()


def check_allows_privacy(config: RunConfig, row_count: int, delta: float) -> None:
    """Raise `ConfigError` for a contract or data with which the guarantee would not hold."""
    if config.report_losses:
        raise ConfigError(
            "Differential privacy allows no report_losses: the losses would leave the worker "
            "without noise. Begin a run with report_losses = false."
        )
    if config.weighting == "rows":
        raise ConfigError(
            'Differential privacy allows no weighting = "rows": the number of rows would leave the '
            'worker without noise. Begin a run with weighting = "uniform".'
        )
    if row_count < config.batch_size:
        raise ConfigError(
            f"There are {row_count} rows, fewer than batch_size = {config.batch_size}; with "
            "differential privacy give many times more, or begin a run with a smaller batch_size."
        )
    if delta * row_count >= 1.0:
        raise ConfigError(
            f"privacy_delta = {delta:g} is not below 1 / {row_count}, the number of rows: it would "
            "allow a whole row to be given away; set a smaller one."
        )


def _name_of(genesis: Genesis) -> str:
    """What tells a run from every other in the ledger."""
    config = genesis.config
    hashed = hashlib.sha256(struct.pack("<Q", config.seed))
    hashed.update(genesis.manifest_digest + genesis.base_digest + genesis.tokenizer_digest)
    return f"{config.run_id}:{hashed.hexdigest()[:16]}"
