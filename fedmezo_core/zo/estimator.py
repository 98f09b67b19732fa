"""Measurements of projected gradients, forward only, that never write to the model's weights.

SPSA (Spall 1992) as MeZO uses it (Malladi et al. 2023, arXiv 2305.17333): for a direction z,

    projected_grad = (loss(W + eps z) - loss(W - eps z)) / (2 eps)     two-sided
    projected_grad = (loss(W + eps z) - loss(W)) / eps                 one-sided

Existing systems add eps z to the weights in place, run, and subtract it again, which in low
precision doesn't lead back to the same weights. Here `Forward` computes all the losses in one pass,
with weights that are built block by block through the one primitive `materialize`:
`W + local pairs ± eps z`, so a worker's uncommitted local steps need no copy of the weights either.

Nothing asks the loss for a gradient, so an objective may replace it: any number that can be
computed from the model's predictions on a batch.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch
from torch import nn

from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.forward.copies import Copies, DistinctRows, InseparableError
from fedmezo_core.zo.forward.forward import Forward
from fedmezo_core.zo.forward.frozen import FROZEN_SHARE_MIN, FrozenResult
from fedmezo_core.zo.forward.graphs import (
    RECORDED_TOKENS_MAX,
    Graphs,
    Recorder,
    padded,
    recorder_for,
)
from fedmezo_core.zo.forward.guard import DirectReadError
from fedmezo_core.zo.forward.row_states import RowStates
from fedmezo_core.zo.model.modules import computing_elements, loss_tolerance
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.objectives import Predictions
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.measurements import Measurement, Pair, measurements_of, points_of

log = logging.getLogger("fedmezo.estimator")

POINTS_MAX: Final = 16
"""Most points in one pass through the whole model, whose activations are a batch's per point."""
FROZEN_POINTS_MAX: Final = 64
"""Most points in one pass where `FROZEN_SHARE_MIN` of the model runs first and is frozen."""
PASS_TOKENS_MAX: Final = 1 << 11
"""Most tokens, those of all copies together, in one pass behind such a frozen part.

The frozen part is computed once per batch, so small passes cost nothing and their activations are a
few per cent of inference's memory. A pass has at least 2 points. A GPU is faster with more tokens.
"""

GROUP_TOKENS: Final = 16
"""What a group of rows costs beside its own tokens and padding, in tokens of each point: passes of
fewer rows are a little slower, and each group builds the weights anew."""
SAVED_SHARE_MIN: Final = 0.125
"""Least share of a batch's work that groups must save."""
BUILT_SHARE_MAX: Final = 0.1
"""Most trained weights, for each weight behind the frozen part, whose building is little work."""

Result = TypeVar("Result")


class Estimator:
    """Measures projected gradients of one task on one model."""

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        task: Task,
        *,
        distribution: Distribution,
        rounding: Rounding,
        one_sided: bool = False,
        threads: int | None = None,
        pass_tokens_max: int = PASS_TOKENS_MAX,
        objective: Callable[[Predictions], float] | None = None,
        row_states: RowStates | None = None,
        before_pass: Callable[[], None] = lambda: None,
        recorder: Recorder | None = None,
    ) -> None:
        """Take a model at its base weights, and the manifest of what is perturbed.

        threads: how many build perturbed weights (default: as `materialize` chooses).
        pass_tokens_max: most tokens in one pass behind a frozen part that is most of the model.
        objective: returns finite numbers or raises; its score of the predictions at a point
        replaces the loss there. row_states: of the same model and task; passes begin with what it
        knows of the rows. before_pass: called before each pass over the model; may raise to end a
        measurement. recorder: records whole passes; by default CUDA graphs, for a model that lies
        on a CUDA device as a whole. Raises as `Forward` does.
        """
        self._model = model
        self._task = task
        self._one_sided = one_sided
        self._pass_tokens_max = pass_tokens_max
        self._objective = objective
        self._row_states = row_states
        self._before_pass = before_pass
        self._on_cpu = execution_device(model).type == "cpu"
        self._built_share = (
            0.0
            if distribution.rank
            else manifest.element_count / max(1, computing_elements([model]))
        )
        """The share of the model's parameters that are built for each point of a pass."""
        self._forward = Forward(
            model, manifest, distribution=distribution, rounding=rounding, threads=threads
        )
        recorder = recorder or recorder_for(model)
        self._graphs = None if recorder is None else Graphs(recorder)
        self._together: bool | None = None
        """Whether all points go through the model in one pass; None until the first measurement."""

    def measure(
        self, batch: Batch, local: Sequence[Pair], seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        """One measurement for each seed's direction, on one batch, at the weights plus `local`.

        In low precision the perturbed weights of all points are rounded with the same random bits,
        those of the rounding seed `seeds[0]`: rounding then moves all losses alike, and cancels out
        of their differences. The weights are never written. Raises `MeasurementError` if a loss is
        NaN or infinite, `ModelError` if the architecture reads a parameter where it can't be
        perturbed.
        """
        points = points_of(local, seeds, eps, one_sided=self._one_sided)
        losses = self._losses(batch, points)
        return measurements_of(losses, eps, batch.name, one_sided=self._one_sided)

    def _losses(self, batch: Batch, points: Sequence[Commit]) -> list[float]:
        """The loss at every point, in as few passes over the model as it allows."""
        if self._together is None:
            self._together = self._can_share_a_pass(batch, points[:2])
        try:
            return self._grouped_losses(batch, points)
        except InseparableError as error:
            self._go_singly(f"{error}")
            return self._losses(batch, points)

    def _grouped_losses(self, batch: Batch, points: Sequence[Commit]) -> list[float]:
        """The loss at every point, from groups of rows of which little is padding."""
        rest, known = self._begun(batch)
        groups = self._groups(rest)
        if len(groups) == 1:
            return self._begun_losses(rest, known, points)
        losses, device = [0.0] * len(points), batch.input_ids.device
        whole = self._task.target_count(batch.examples)
        for rows in groups:
            part = self._task.collate([batch.examples[row] for row in rows], batch.name, device)
            share = self._task.target_count(part.examples) / whole
            own = self._begun_losses(*self._begun(part), points)
            losses = [loss + share * mean for loss, mean in zip(losses, own, strict=True)]
        return losses

    def _groups(self, batch: Batch) -> list[list[int]]:
        """The rows of what passes compute, in groups of similar length with the least work.

        There is one group, of all rows in their order, if several would save less than
        `SAVED_SHARE_MIN`, or if passes don't begin behind most of a model on a CPU.
        """
        whole = [list(range(len(batch.examples)))]
        begins = self._together and self._is_small
        if not (begins and self._on_cpu and self._objective is None):
            return whole
        lengths = batch.attention_mask.sum(dim=1).tolist()
        groups = groups_of(lengths)
        work = sum(len(rows) * max(lengths[row] for row in rows) for rows in groups)
        saves = work + GROUP_TOKENS * len(groups) <= (1 - SAVED_SHARE_MIN) * batch.input_ids.numel()
        return groups if saves else whole

    def _begun_losses(
        self, rest: Batch, known: Sequence[FrozenResult], points: Sequence[Commit]
    ) -> list[float]:
        """The loss at every point on `rest`, in passes that begin with `known`."""
        length = self._points_max(rest, len(points)) if self._together else 1
        measure = self._task_losses if self._objective is None else self._scores
        losses: list[float] = []
        keeps = bool(self._together) and length < len(points)
        if self._graphs is not None and self._objective is None and not (keeps or known):
            longer, copies = padded(rest), min(length, len(points))
            fits = copies * longer.input_ids.numel() <= RECORDED_TOKENS_MAX
            if fits and not self._task.is_sliced(self._model, longer, copies):
                rest = longer
                measure = functools.partial(self._recorded_losses, self._graphs)
        with self._forward.frozen.holding(known, keeps=keeps):
            for first in range(0, len(points), length):
                losses += measure(rest, points[first : first + length])
        return losses

    @property
    def _is_small(self) -> bool:
        """Whether passes begin behind most of the model, and build few of the weights behind it.

        On a GPU they must build none: there small passes take as long as large ones.
        """
        share = self._forward.frozen.share
        built_share_max = BUILT_SHARE_MAX * (1.0 - share) if self._on_cpu else 0.0
        return share >= FROZEN_SHARE_MIN and self._built_share <= built_share_max

    def _begun(self, batch: Batch) -> tuple[Batch, Sequence[FrozenResult]]:
        """What passes have to compute, and what they begin with (see `RowStates.begun`).

        They begin with nothing if they compute the frozen part for every copy.
        """
        one_copy = not self._together or self._forward.frozen.share > 0
        if self._row_states is None or not one_copy:
            return batch, ()
        return self._row_states.begun(batch, self._before_pass)

    def _points_max(self, batch: Batch, count: int) -> int:
        """Most points in a pass. No small pass has a single one, which would compute all anew."""
        if not self._is_small:
            return POINTS_MAX
        most = min(max(2, self._pass_tokens_max // batch.input_ids.numel()), FROZEN_POINTS_MAX)
        lengths = (*range(most, 1, -1), most + 1, most + 2)
        return next((length for length in lengths if count % length != 1), most)

    def _task_losses(self, batch: Batch, points: Sequence[Commit]) -> list[float]:
        return self._pass(
            points,
            batch if len(points) == 1 else batch.repeated(len(points)),
            lambda copies: self._task.losses(self._model, copies, len(points)),
        )

    def _recorded_losses(
        self, graphs: Graphs, batch: Batch, points: Sequence[Commit]
    ) -> list[float]:
        """The same from a recorded pass, as soon as there is one."""

        def once(rows: Batch) -> torch.Tensor:
            self._forward.restart()
            return self._task.row_losses(self._model, rows)

        def compute(copies: Batch) -> list[float]:
            row_losses = graphs.run(self._forward.prepared, copies, once)
            return self._task.means(row_losses.tolist(), copies, len(points))

        return self._pass(points, batch.repeated(len(points)), compute)

    def _scores(self, batch: Batch, points: Sequence[Commit]) -> list[float]:
        """The objective's score at each point: one pass, and one more per generated token."""
        assert self._objective is not None
        task, copies = self._task, batch.repeated(len(points))

        def next_tokens(rows: Batch) -> torch.Tensor:
            # Most points write the same, so that most copies of a row are still alike.
            distinct = self._distinct(rows, points)
            kinds = rows
            if distinct is not None:
                examples = [rows.examples[row] for row in distinct.first.tolist()]
                kinds = task.collate(examples, rows.name, rows.input_ids.device)
            rest, known = self._begun(kinds)
            if rest is not kinds:
                rows = rows.read()
                distinct = distinct and distinct.of_tokens(rows.input_ids.shape[1])
            with self._forward.frozen.holding(known, keeps=False):
                return self._pass(
                    points, rows, lambda rows: task.next_tokens(self._model, rows), distinct
                )

        tokens_max = task.config.generated_tokens_max
        texts = task.generated(copies, tokens_max, next_tokens) if tokens_max else []
        predictions = self._pass(
            points,
            copies,
            lambda copies: task.predictions(self._model, copies, len(points), texts),
        )
        return [self._objective(part) for part in predictions]

    def _distinct(self, rows: Batch, points: Sequence[Commit]) -> DistinctRows | None:
        """Which rows of all points' copies are alike; None if there is only one point."""
        if len(points) == 1:
            return None
        total, tokens = rows.input_ids.shape
        copies = Copies(len(points), total // len(points), tokens)
        prompts = [example.prompt for example in rows.examples]
        return DistinctRows.of(prompts, copies, rows.input_ids.device)

    def _pass(
        self,
        points: Sequence[Commit],
        copies: Batch,
        compute: Callable[[Batch], Result],
        distinct: DistinctRows | None = None,
    ) -> Result:
        """What `compute` gives while the model computes each of the `copies` at its own point.

        `distinct` tells which rows are alike if the copies are not.
        """
        rows, tokens = copies.input_ids.shape
        while True:
            self._before_pass()
            try:
                with self._forward.at(points, rows // len(points), tokens, distinct):
                    return compute(copies)
            except DirectReadError as error:
                self._forward.build_further_out(error)
            except torch.OutOfMemoryError:
                if self._graphs is None or not self._graphs.give_up_memory():
                    raise

    def _can_share_a_pass(self, batch: Batch, points: Sequence[Commit]) -> bool:
        """Whether two points in one pass give the losses that they give alone.

        They do unless an architecture mixes the rows of a batch. This compares losses, because an
        objective's scores may be equal although the losses are not.
        """
        alone = [self._task_losses(batch, [point])[0] for point in points]
        if not all(map(math.isfinite, alone)):
            return True
        try:
            shared = self._task_losses(batch, points)
        except InseparableError as error:
            self._go_singly(f"{error}")
            return False
        tolerance = 0.1 * abs(alone[0] - alone[1]) + loss_tolerance(self._model) * alone[0]
        if all(abs(a - b) <= tolerance for a, b in zip(alone, shared, strict=True)):
            return True
        if self._forward.frozen.compute_every_copy():
            return self._can_share_a_pass(batch, points)
        self._go_singly(f"losses {shared} in one pass are {alone} in two")
        return False

    def _go_singly(self, reason: str) -> None:
        self._together = False
        log.warning(
            "%s: measuring with one pass for each loss, which takes longer: %s.",
            type(self._model).__name__,
            reason,
        )


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """The rows of these `lengths`, in groups that take the least work when each is padded.

    A group takes its rows times the longest of them, and `GROUP_TOKENS`. Groups come shortest rows
    first, and rows of one length in their order.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [*(lengths[row] for row in order)]
    # The best way to group the first rows ends before a row of another length.
    cuts = [n for n in range(len(order)) if n == 0 or ends[n] > ends[n - 1]] + [len(order)]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for last in cuts[1:]:
        work = [
            (best[first][0] + (last - first) * ends[last - 1] + GROUP_TOKENS, first)
            for first in cuts
            if first < last
        ]
        least, first = min(work)
        best[last] = least, [*best[first][1], first]
    firsts = best[len(order)][1]
    return [order[a:b] for a, b in itertools.pairwise([*firsts, len(order)])]
