"""From an assignment to the points whose losses it needs, and from the losses to its answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import MeasurementError
from fedmezo_core.events import Measure, Measured, Work
from fedmezo_core.machines.aggregate import Share, coefficients_of
from fedmezo_core.records import Scalars, digest64_of
from fedmezo_core.zo.commits import Commit

Pair = tuple[int, float]
"""A seed (u64) and the float32 coefficient of its direction."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a batch says about one seed's direction."""

    loss_plus: float
    """Mean loss at W + eps z, in nats (float64), or the objective's score."""
    loss_other: float
    """Mean loss at W - eps z, or one-sided at W, in nats, or the objective's score."""
    projected_grad: float
    """A float32 value: the difference of both over 2 eps, or over eps, rounded once."""
    loss: float
    """The loss at W (one-sided), or the mean of both losses as its estimate, in nats."""


BatchT = TypeVar("BatchT")
BatchIn = TypeVar("BatchIn", contravariant=True)
BatchOut = TypeVar("BatchOut", covariant=True)


class Measures(Protocol[BatchIn]):
    """What measures along directions on batches of one kind, such as `Estimator`."""

    def measure(
        self, batch: BatchIn, local: Sequence[Pair], seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        """One measurement for each seed, at the weights plus the pairs of `local`."""


class TakesBatches(Protocol[BatchOut]):
    """What gives a worker's batches, such as `Batches`."""

    @property
    def row_count(self) -> int:
        """Number of rows of the worker's data."""

    def batch(self, round_: int, step: int) -> BatchOut:
        """The batch of `step` (from 0) in `round_` (from 1)."""


def points_of(
    local: Sequence[Pair], seeds: Sequence[int], eps: float, *, one_sided: bool
) -> list[Commit]:
    """The commits that lead from the weights to each point whose loss a measurement needs.

    Two-sided these are, for each seed, the pairs `local` and then + eps and - eps along its
    direction; one-sided first `local` alone, then + eps for each seed. All round alike.
    """
    ends: list[list[Pair]] = [[]] if one_sided else []
    for seed in seeds:
        ends += [[(seed, eps)]] if one_sided else [[(seed, eps)], [(seed, -eps)]]
    return [_commit([*local, *end], rounding_seed=seeds[0]) for end in ends]


def measurements_of(
    losses: Sequence[float], eps: float, batch_name: str, *, one_sided: bool
) -> list[Measurement]:
    """The measurements that the losses at `points_of` come to.

    Raises `MeasurementError` if a loss is NaN or infinite.
    """
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            is_plus = index > 0 if one_sided else index % 2 == 0
            where = "" if one_sided and index == 0 else "+eps " if is_plus else "-eps "
            raise MeasurementError(
                f"The loss at {where or 'the weights '}is {loss} on the batch of {batch_name}; "
                "use a smaller eps or learning_rate, or check this worker's data."
            )
    if one_sided:
        others, pluses, distance = [losses[0]] * (len(losses) - 1), losses[1:], eps
    else:
        others, pluses, distance = list(losses[1::2]), losses[::2], 2.0 * eps
    # Scores may be as large as they like: infinity is clipped like anything beyond the clip.
    with np.errstate(over="ignore"):
        return [
            Measurement(
                loss_plus=plus,
                loss_other=other,
                projected_grad=float(np.float32((plus - other) / distance)),
                loss=other if one_sided else (plus + other) / 2.0,
            )
            for plus, other in zip(pluses, others, strict=True)
        ]


def _commit(pairs: Sequence[Pair], rounding_seed: int) -> Commit:
    return Commit(
        np.array([seed for seed, _ in pairs], dtype=np.uint64),
        np.array([coefficient for _, coefficient in pairs], dtype=np.float32),
        rounding_seed,
    )


def local_steps(
    estimator: Measures[BatchT], batch_of: Callable[[int], BatchT], work: Work, config: RunConfig
) -> list[Measurement]:
    """Run one assignment: MeZO steps from the current weights, none of them written.

    Step h measures along its `config.probes` seeds of `work.seeds` on `batch_of(h)`, at the weights
    plus the pairs of the steps before. It then appends its own pairs, with the coefficients that a
    round of this step alone would be committed with (see `coefficients_of`). Weight decay comes
    with the commit. Returns a measurement for each seed, in the order of `work.seeds`, whose
    projected gradient is clipped to ± `config.projected_grad_abs_max`. A pure function of weights,
    batches and arguments. Raises as `estimator.measure` does.
    """
    bound = np.float32(config.projected_grad_abs_max)
    if float(bound) > config.projected_grad_abs_max:
        # The nearest float32 may lie outside the run's clip, where the coordinator refuses it.
        bound = np.nextafter(bound, np.float32(0))
    measured: list[Measurement] = []
    local: list[Pair] = []
    for first in range(0, len(work.seeds), config.probes):
        seeds = work.seeds[first : first + config.probes]
        batch = batch_of(first // config.probes)
        for measurement in estimator.measure(batch, local, seeds, work.eps):
            clipped = np.clip(np.float32(measurement.projected_grad), -bound, bound)
            measured.append(replace(measurement, projected_grad=float(clipped)))
        grads = tuple(measurement.projected_grad for measurement in measured[first:])
        [coefficients] = coefficients_of([Share(seeds, grads, work.learning_rate)], config)
        local += zip(seeds, coefficients, strict=True)
    return measured


def measure_order(
    estimator: Measures[BatchT],
    batches: TakesBatches[BatchT],
    order: Measure,
    config: RunConfig,
    digest: Callable[[], bytes],
) -> Measured:
    """Measure one assignment of a run; `digest` gives the weights' digest if the order wants it.

    Raises as `estimator.measure` does.
    """
    digest64 = digest64_of(digest()) if order.work.want_digest else None
    batch_of = functools.partial(batches.batch, order.ticket.round)
    measured = local_steps(estimator, batch_of, order.work, config)
    return Measured(
        order.ticket,
        Scalars(
            projected_grads=tuple(measurement.projected_grad for measurement in measured),
            mean_loss=math.fsum(measurement.loss for measurement in measured) / len(measured),
            weights_digest64=digest64,
            rows=batches.row_count,
        ),
    )
