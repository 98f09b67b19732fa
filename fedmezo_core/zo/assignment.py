"""From an assignment to its answer: what a worker computes, wherever that worker runs."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Scalars, digest64_of
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.task import Dataset
from fedmezo_core.zo.estimator import PASS_TOKENS_MAX, Estimator, local_steps
from fedmezo_core.zo.forward.row_states import RowStates, RowStore
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.objectives import Predictions
from fedmezo_core.zo.party import Party

_VISITS_MIN = 2
"""In float32 a row by itself takes 1.6 times as long as in a batch."""


def open_estimator(
    party: Party,
    *,
    threads: int | None = None,
    pass_tokens_max: int = PASS_TOKENS_MAX,
    objective: Callable[[Predictions], float] | None = None,
    row_states: RowStates | None = None,
    before_pass: Callable[[], None] = lambda: None,
) -> Estimator:
    """The run's estimator on a party's model; arguments and errors as of `Estimator`."""
    return Estimator(
        party.loaded.model,
        party.loaded.manifest,
        party.task,
        distribution=party.distribution,
        rounding=party.rounding,
        one_sided=party.config.estimator == "one_sided",
        threads=threads,
        pass_tokens_max=pass_tokens_max,
        objective=objective,
        row_states=row_states,
        before_pass=before_pass,
    )


def open_row_states(
    party: Party, rows: RowStore, *, visits: float, batch_size: int
) -> RowStates | None:
    """What comes before the trained part of a party's model, if it pays to send rows there by themselves.

    `visits` is how often each row comes, in batches of `batch_size`. None on a GPU; its passes take as
    long as their launches, whatever their size. In 16 bits it depends on the CPU what a row costs by
    itself, but no more than a batch (decision 0024).
    """
    model = party.loaded.model
    visits_min = _VISITS_MIN if party.config.dtype == "float32" else batch_size
    if execution_device(model).type != "cpu" or visits < visits_min:
        return None
    return RowStates(model, party.loaded.manifest, party.task, rows)


def open_batches(party: Party, dataset: Dataset, worker: str) -> Batches:
    """The batches that one worker of the run takes from its data."""
    config = party.config
    return Batches(
        party.task,
        dataset,
        run_seed=config.seed,
        worker_name=worker,
        batch_size=config.batch_size,
        local_steps=config.local_steps,
        device=execution_device(party.loaded.model),
    )


def measure(
    party: Party,
    estimator: Estimator,
    batches: Batches,
    order: Measure,
    *,
    digest: Callable[[], bytes],
) -> Measured:
    """Measure one assignment on the party's weights, which are not written.

    `digest` is asked for the weights' digest if the order wants it. Raises as `Estimator.measure` does.
    """
    digest64 = digest64_of(digest()) if order.work.want_digest else None

    batch_of = functools.partial(batches.batch, order.ticket.round)
    steps = local_steps(estimator, batch_of, order.work, party.config)
    return Measured(
        order.ticket,
        Scalars(
            projected_grads=tuple(steps.projected_grads.tolist()),
            mean_loss=steps.loss,
            weights_digest64=digest64,
            rows=batches.row_count,
        ),
    )
