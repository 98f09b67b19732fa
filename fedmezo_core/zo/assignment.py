"""What a worker computes between an assignment and its answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from fedmezo_core.events import Measure, Measured
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.row_states import RowStates, RowStore
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.objectives import Predictions
from fedmezo_core.zo.party import Party
from fedmezo_core.zo.plain.measurements import measure_order

_VISITS_MIN = 2
"""Least visits of a row that pay: in float32, a row alone takes 1.6 times its time in a batch."""


def open_estimator(
    party: Party,
    *,
    threads: int | None = None,
    pass_tokens_max: int | None = None,
    objective: Callable[[Predictions], float] | None = None,
    row_states: RowStates | None = None,
    before_pass: Callable[[], None] = lambda: None,
) -> Estimator:
    """The estimator of a party's run on its model; takes and raises what `Estimator` does."""
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
    """Kept results of the frozen part of a party's model, or None where keeping them does not pay.

    visits: how often each row comes, in batches of `batch_size`. Each row's first visit runs alone.
    On a GPU that never pays: a pass takes as long as its launches, whatever its size. In 16 bits,
    how long a row alone takes depends on the CPU; it is no longer than a batch (decision 0024).
    """
    model = party.loaded.model
    visits_min = _VISITS_MIN if party.config.dtype == "float32" else batch_size
    if execution_device(model).type != "cpu" or visits < visits_min:
        return None
    return RowStates(model, party.loaded.manifest, party.task, rows)


def collate_for(party: Party) -> Callable[[Sequence[EncodedExample], str], Batch]:
    """What makes a batch of rows and a name, on the device that computes."""
    return functools.partial(party.task.collate, device=execution_device(party.loaded.model))


def open_batches(party: Party, dataset: Dataset, worker: str) -> Batches[Batch]:
    """The batches that one worker of the run takes from its data."""
    config = party.config
    return Batches(
        collate_for(party),
        dataset,
        run_seed=config.seed,
        worker_name=worker,
        batch_size=config.batch_size,
        local_steps=config.local_steps,
    )


def measure(
    party: Party,
    estimator: Estimator,
    batches: Batches[Batch],
    order: Measure,
    *,
    digest: Callable[[], bytes],
) -> Measured:
    """Measure one assignment on the party's weights, which are not written.

    digest: gives the weights' digest; called only if the order wants it. Raises as
    `Estimator.measure` does.
    """
    return measure_order(estimator, batches, order, party.config, digest)
