"""Tiny models, of which a part may be frozen, and measurements on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import TaskConfig
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.estimator import PASS_TOKENS_MAX, Estimator
from fedmezo_core.zo.forward.row_states import RowStates
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.objectives import Predictions
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.measurements import Measurement, Pair
from tests.core.zo.conftest import SENTENCES

EPS = 1e-2
LOCAL: list[Pair] = [(11, 0.02), (12, -0.03)]
LAST_LAYER = {"gpt2": "h.1", "opt": "layers.1", "mamba": "backbone.layers.1"}


def last_layer(kind: str) -> str:
    return LAST_LAYER.get(kind, "model.layers.1")


def task_of(
    tokenizer: PreTrainedTokenizerBase, kind: Any = "classification", **changes: Any
) -> Task:
    config = TaskConfig(
        kind=kind,
        template="{text} All in all, it was",
        verbalizers={"0": " terrible", "1": " great"},
        response_column="text",
        tokens_max=64,
        **changes,
    )
    return Task(config, tokenizer, 384)


def batch_of(task: Task, rows: int = 4) -> Batch:
    sentences = itertools.islice(itertools.cycle(SENTENCES), rows)
    data = [
        Example({"text": text, "label": "01"[k % 2]}, "d", k) for k, text in enumerate(sentences)
    ]
    return task.collate(task.encode(data).examples, "the test")


def estimator_on(
    model: nn.Module,
    manifest: Manifest,
    task: Task,
    distribution: Distribution = Distribution.RADEMACHER,
    *,
    once: bool = True,
    one_sided: bool = False,
    pass_tokens_max: int = PASS_TOKENS_MAX,
    row_states: RowStates | None = None,
    objective: Callable[[Predictions], float] | None = None,
) -> Estimator:
    estimator = Estimator(
        model,
        manifest,
        task,
        distribution=distribution,
        rounding=Rounding.STOCHASTIC,
        one_sided=one_sided,
        threads=1,
        pass_tokens_max=pass_tokens_max,
        row_states=row_states,
        objective=objective,
    )
    if not once:
        estimator._forward.frozen.compute_every_copy()
    return estimator


def losses_of(measured: Sequence[Measurement]) -> list[float]:
    return [loss for m in measured for loss in (m.loss_plus, m.loss_other)]


class ShapesSeen:
    """The shape of what each call of a module has seen."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[torch.Size] = []
        kind: Any = type(module)
        plain = kind.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            self._seen.append(first.shape)
            return plain(module, *args, **kwargs)

        module.__dict__["forward"] = forward

    def shapes(self) -> list[torch.Size]:
        """Those since the call before."""
        seen, self._seen = self._seen, []
        return seen


class RowsSeen(ShapesSeen):
    """How many rows each call of a module has seen."""

    def taken(self) -> list[int]:
        return [shape[0] for shape in self.shapes()]
