"""The computing side of a worker without torch: it applies commits and measures with any runtime.

Only the losses at perturbed adapters matter to a run. So the adapter, its directions and the
commits are computed here, with the bits of every other party, and a runtime that the caller chooses
gives the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.zo.commits import Commit, commits_of
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.edge.array_losses import EdgeBatch, edge_batch
from fedmezo_core.zo.edge.array_weights import Adapter, ArrayWeights
from fedmezo_core.zo.edge.base_form import BaseForm
from fedmezo_core.zo.edge.loss_noise import noise_points, noise_sentence
from fedmezo_core.zo.plain.measurements import (
    Measurement,
    Pair,
    measure_order,
    measurements_of,
    points_of,
)
from fedmezo_core.zo.privacy.accounting import PrivacyBudget
from fedmezo_core.zo.privacy.private_measurements import PrivateMeasurements

PASS_TOKENS_MAX: Final = 1 << 10
"""Tokens of one pass, padding too: more is little faster on a CPU, and takes memory."""

Losses = Callable[[Iterable[Adapter], EdgeBatch], Sequence[float]]
"""The mean loss of a batch, in nats, at each adapter. An adapter is whole (frozen matrices too), in
float32, and valid until the next one is asked for. A loss that cannot be computed is NaN."""


class EdgeEngine:
    """Measures and applies for one worker of a run; its digests are those of every party."""

    def __init__(
        self,
        genesis: Genesis,
        worker: str,
        form: BaseForm,
        losses: Losses,
        rows: Sequence[Example],
        *,
        threads: int | None = None,
        before_pass: Callable[[], None] = lambda: None,
        privacy: PrivacyBudget | None = None,
    ) -> None:
        """Take a `form` that `read_form` has checked, and the worker's rows.

        threads: the most that apply commits. before_pass: called before the losses at each point;
        may raise to end a measurement. privacy: makes each measurement differentially private.
        Raises what is wrong with the rows.
        """
        config = genesis.config
        dataset = form.encoder.encode(rows)
        longest = max(one.token_count for one in dataset.examples)
        positions = form.description.positions_max
        if positions is not None and longest > positions:
            raise ConfigError(
                f"A row has {longest} tokens, but {config.model} knows {positions} positions; make "
                "the rows shorter."
            )
        self.base_form: Final = form.name
        """Which form of the base the losses come from, as in the run's `base_forms`."""
        self.weights: Final = ArrayWeights(form.start, form.manifest, config, threads=threads)
        self._config = config
        self._losses = losses
        self._estimator = _Estimator(self.weights, losses, config, before_pass)

        def collate(examples: Sequence[EncodedExample], name: str) -> EdgeBatch:
            return edge_batch(
                examples,
                name,
                form.encoder.target_count(examples),
                form.description.vocabulary_size,
                tokens_max=PASS_TOKENS_MAX,
            )

        self._batches = Batches(
            collate,
            dataset,
            run_seed=config.seed,
            worker_name=worker,
            batch_size=config.batch_size,
            local_steps=config.local_steps,
        )
        self._private: PrivateMeasurements[EdgeBatch] | None = None
        if privacy is not None:
            self._private = PrivateMeasurements(privacy, genesis, self._estimator, collate, dataset)

    def noise_sentence(self) -> str:
        """A sentence if the losses are too coarse for the run's eps; empty if they are not.

        It takes as long as four two-sided measurements along one direction.
        """
        points = map(self.weights.moved, noise_points(self._config))
        losses = list(self._losses(points, self._batches.batch(1, 0)))
        return noise_sentence(losses, self._config)

    def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights; raises as `ArrayWeights.apply` does."""
        self.weights.apply(commits[0].round, commits_of(commits))

    def measure(self, order: Measure) -> Measured:
        """Measure one assignment; raises `MeasurementError` if a loss is not finite.

        Raises `PrivacyBudgetError` if the rows have given away what they may.
        """
        if self._private is not None:
            return self._private.measure_order(order, self.weights.digest)
        return measure_order(
            self._estimator, self._batches, order, self._config, self.weights.digest
        )

    def digest(self) -> bytes:
        """Digest of the weights, 32 bytes."""
        return self.weights.digest()


class _Estimator:
    def __init__(
        self,
        weights: ArrayWeights,
        losses: Losses,
        config: RunConfig,
        before_pass: Callable[[], None],
    ) -> None:
        self._weights = weights
        self._before_pass = before_pass
        self._losses = losses
        self._one_sided = config.estimator == "one_sided"

    def measure(
        self, batch: EdgeBatch, local: Sequence[Pair], seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        points = points_of(local, seeds, eps, one_sided=self._one_sided)
        losses = list(self._losses(map(self._adapter_at, points), batch))
        return measurements_of(losses, eps, batch.name, one_sided=self._one_sided)

    def _adapter_at(self, point: Commit) -> Adapter:
        self._before_pass()
        return self._weights.moved(point)
