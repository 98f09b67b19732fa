"""How good the global model is: the same held-out rows and the same code for every method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmezo_core.zo.party import Party
from fedmezo_core.zo.rows import Row
from fedmezo_core.zo.task import Evaluation


@dataclass(frozen=True, slots=True)
class Point:
    """The global model after a round."""

    round: int
    loss: float
    accuracy: float
    calibrated_accuracy: float | None
    auc: float | None
    rows: int


@dataclass
class Judge:
    """Evaluates a party's model when it is due: before the first round, every n rounds, and at the end.

    In between it may take fewer rows, which are the first of them: then points on the way are less sure
    than the first and the last.
    """

    party: Party
    rows: Sequence[Row]
    every_rounds: int
    batch_size: int = 64
    rows_between: int | None = None
    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    """CPU time so far."""

    def __post_init__(self) -> None:
        """Raises as `Task.encode` does."""
        task = self.party.task
        self._all = task.encode(self.rows)
        few = self.rows_between is not None and self.rows_between < len(self.rows)
        self._few = task.encode(self.rows[: self.rows_between]) if few else self._all

    def is_due(self, round_: int) -> bool:
        """Whether the model after `round_` is to be judged."""
        return round_ % self.every_rounds == 0 or round_ == self.party.config.rounds

    def judge(self, round_: int) -> Evaluation:
        """Evaluate and remember; raises as `Task.evaluate` does."""
        begin = time.process_time()
        party = self.party
        dataset = self._all if round_ in (0, party.config.rounds) else self._few
        found = party.task.evaluate(party.loaded.model, dataset, self.batch_size)
        self.points.append(
            Point(
                round=round_,
                loss=found.loss,
                accuracy=found.accuracy,
                calibrated_accuracy=found.calibrated_accuracy,
                auc=found.auc,
                rows=found.row_count,
            )
        )
        self.seconds += time.process_time() - begin
        return found
