"""Our own worker's weights and measurements, to compare another worker's with; imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fedmezo_core.config import RunConfig
from fedmezo_core.events import Measure
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.model.loading import SharedBases
from fedmezo_core.zo.party import Party, open_party


class Reference:
    """A run's model at the base, which follows commits as a worker does."""

    def __init__(self, party: Party, dataset: Dataset | None) -> None:
        """`dataset` is the tested worker's rows; None: nothing is measured."""
        self._party = party
        self._dataset = dataset
        self._estimator = None if dataset is None else open_estimator(party, threads=1)

    @property
    def genesis(self) -> Genesis:
        """Record 0 of a run from this base."""
        return self._party.genesis()

    def apply(self, commit: Committed) -> None:
        """Move the weights on."""
        self._party.weights.apply(commit.round, commits_of([commit]))

    def digest(self) -> bytes:
        """Digest of the weights, 32 bytes."""
        return self._party.weights.digest()

    def measure(self, order: Measure, worker: str) -> Sequence[float] | None:
        """The projected gradients of `worker` at these weights; None without its rows."""
        if self._dataset is None or self._estimator is None:
            return None
        batches = open_batches(self._party, self._dataset, worker)
        measured = measure(self._party, self._estimator, batches, order, digest=self.digest)
        return measured.scalars.projected_grads


def open_reference(
    config: RunConfig,
    model: str,
    data: Path | None,
    *,
    adapter: Path | None = None,
    threads: int | None = None,
    bases: SharedBases | None = None,
) -> Reference:
    """Load the base of a run, as `open_party` does, and the rows of the worker that is tested."""
    party = open_party(config, model, adapter=adapter, threads=threads, bases=bases)
    dataset = None if data is None else party.encode(data, read_rows(data, config.task))
    return Reference(party, dataset)


def likeness(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """How alike projected gradients are: their correlation, and their greatest difference.

    The difference is relative to the root mean square of ours. Means are not subtracted, because a
    projected gradient has a zero of its own.
    """
    products = math.fsum(a * b for a, b in zip(ours, theirs, strict=True))
    sizes = [math.sqrt(math.fsum(value * value for value in values)) for values in (ours, theirs)]
    if sizes[0] == 0.0 or sizes[1] == 0.0:
        return (1.0, 0.0) if sizes[0] == sizes[1] else (0.0, math.inf)
    usual = sizes[0] / math.sqrt(len(ours))
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return products / (sizes[0] * sizes[1]), difference / usual
