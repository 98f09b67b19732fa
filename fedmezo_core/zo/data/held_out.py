"""Loss and accuracy of a model on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedmezo_core.errors import MeasurementError
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.task import Batch, Outcome, Task
from fedmezo_core.zo.model.offload import execution_device


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one set of weights on held-out data."""

    loss: float
    """Mean loss over rows (classification) or over response tokens (instruction), in nats."""
    accuracy: float
    """Share of rows (classification) or of response tokens (instruction) that have the largest
    logit among the verbalizers or the vocabulary."""
    auc: float | None
    """Two classes: probability that a row of the second class scores above a row of the first (area
    under the ROC curve). Unlike accuracy, it does not change with a bias towards one class. None if
    there are not two classes, or one of them is absent."""
    calibrated_accuracy: float | None
    """Two classes: accuracy if exactly the rows above the median margin are assigned to the second
    class. Like `auc`, it does not change with a bias, but it has the unit of accuracy. It assumes
    that the classes are of equal size. None where `auc` is None."""
    row_count: int
    """Rows of the data."""
    target_count: int
    """What `loss` and `accuracy` are means over: rows, or response tokens."""


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    *,
    before_batch: Callable[[], None] = lambda: None,
    around_batch: Callable[[Batch], AbstractContextManager[Batch]] | None = None,
) -> Evaluation:
    """Compute the loss and accuracy of `model` over all of `dataset`, `batch_size` rows at a time.

    `before_batch` is called before each batch, and may raise to end the evaluation. Inside the
    context that `around_batch` gives for a batch, such as `RowStates.known`, what that yields is
    computed in its place. Raises `MeasurementError` if a loss is NaN or infinite.
    """
    # Rows of similar length share a batch, so that little of it is padding. The sort is stable.
    examples = sorted(dataset.examples, key=lambda example: example.token_count)
    device = execution_device(model)
    outcomes: list[Outcome] = []
    with long_step("evaluating", len(examples), "rows") as step:
        for start in range(0, len(examples), batch_size):
            before_batch()
            batch = task.collate(examples[start : start + batch_size], "evaluation", device)
            with around_batch(batch) if around_batch else nullcontext(batch) as computed:
                outcome = task.outcome(model, computed)
            if not math.isfinite(sum(outcome.row_losses)):
                raise MeasurementError(
                    "The held-out loss is NaN or infinite; the weights have diverged, so use a "
                    "smaller learning_rate or eps."
                )
            outcomes.append(outcome)
            step.advance(len(batch.examples))
    target_count = sum(outcome.target_count for outcome in outcomes)
    margins = [margin for outcome in outcomes for margin in outcome.margins]
    labels = [example.label for example in examples]
    auc = _auc(margins, labels) if margins else None
    return Evaluation(
        loss=math.fsum(loss for outcome in outcomes for loss in outcome.row_losses) / target_count,
        accuracy=sum(outcome.correct_count for outcome in outcomes) / target_count,
        auc=auc,
        calibrated_accuracy=None if auc is None else _calibrated_accuracy(margins, labels),
        row_count=len(dataset),
        target_count=target_count,
    )


def _auc(margins: Sequence[float], labels: Sequence[int]) -> float | None:
    """Area under the ROC curve by ranks; ties count half (Mann and Whitney 1947)."""
    scores = np.asarray(margins)
    second = np.asarray(labels) == 1
    count_first, count_second = int((~second).sum()), int(second.sum())
    if not count_first or not count_second:
        return None
    _, groups, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2.0)[groups]
    above = float(ranks[second].sum()) - count_second * (count_second + 1) / 2.0
    return above / (count_first * count_second)


def _calibrated_accuracy(margins: Sequence[float], labels: Sequence[int]) -> float:
    scores = np.asarray(margins)
    return float(np.mean((scores > np.median(scores)) == (np.asarray(labels) == 1)))
