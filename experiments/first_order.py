"""The baseline: federated averaging (McMahan et al. 2017) of back-propagated AdamW steps.

A benchmark, not a part of the service. Everything but the method is as in `in_memory_federation`:
the base, what is trained (all parameters, or the LoRA adapter of the run's configuration, from the
same first values), the workers' rows and batches, the number of local steps, the held-out rows.

In each round every worker starts from the global weights with a fresh optimizer, as in the paper's
baseline, makes its local steps, and sends its weights; the global weights become their mean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

from experiments.judging import Judge
from fedmezo_core.errors import MeasurementError
from fedmezo_core.zo.assignment import open_batches
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, logits_of, target_logits
from fedmezo_core.zo.forward.row_states import RowStates
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.model.offload import stored_parameters
from fedmezo_core.zo.party import Party


class FirstOrder(BaseModel):
    """Values of a first-order run; of the run's configuration it uses all but the learning rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    average: Literal["uniform", "rows"] = "uniform"
    """Whether workers count equally, as in FedMeZO, or by their rows, as in the FedAvg paper."""


class FedAvg:
    """One run of federated averaging."""

    def __init__(
        self,
        party: Party,
        rows: Mapping[str, Sequence[Example]],
        first_order: FirstOrder,
        *,
        judge: Judge | None = None,
        row_states: RowStates | None = None,
    ) -> None:
        """`party` is at its base, which this run overwrites; raises as `Task.encode` does.

        Passes begin with what `row_states` knows of the rows.
        """
        self.party = party
        self.round = 0
        """Number of rounds done."""
        self.train_losses: dict[int, list[float]] = {}
        """Round -> mean loss of each worker over its batches."""
        self.forwards = 0
        """Forward passes of one batch, by all workers; there are as many backward passes."""
        self.forward_rows = 0
        """Rows of all these passes; a row counts once in each pass that it is in."""
        self.working_s = 0.0
        """CPU seconds of all workers' local steps."""
        self.applying_s = 0.0
        """Always 0: a worker only copies the weights that it gets."""
        self.bytes_up = 0
        self.bytes_down = 0
        self._judge = judge
        self._first_order = first_order
        self._row_states = row_states
        self._batches = {
            name: open_batches(party, party.task.encode(own), name) for name, own in rows.items()
        }
        counts = {name: len(own) for name, own in rows.items()}
        by_rows = first_order.average == "rows"
        self._shares = {
            name: counts[name] / sum(counts.values()) if by_rows else 1 / len(counts)
            for name in rows
        }
        self._tensors = trained_tensors(party.loaded.model, party.loaded.manifest)
        self._weights_bytes = sum(tensor.nbytes for tensor in self._tensors)

    def run(self) -> None:
        """Do all rounds; raises `MeasurementError` if a loss is NaN or infinite."""
        self._judge_if_due()
        while self.round < self.party.config.rounds:
            self._round()
            self._judge_if_due()

    def _round(self) -> None:
        start = [tensor.detach().clone() for tensor in self._tensors]
        mean = [torch.zeros_like(tensor) for tensor in self._tensors]
        for name, share in self._shares.items():
            with torch.no_grad():
                for tensor, value in zip(self._tensors, start, strict=True):
                    tensor.copy_(value)
            begin = time.process_time()
            batches = [
                self._batches[name].batch(self.round + 1, step)
                for step in range(self.party.config.local_steps)
            ]
            loss = train(self.party, self._first_order, batches, self._row_states)
            self.working_s += time.process_time() - begin
            self.forwards += len(batches)
            self.forward_rows += sum(len(batch.examples) for batch in batches)
            self.train_losses.setdefault(self.round + 1, []).append(loss)
            self.bytes_down += self._weights_bytes
            self.bytes_up += self._weights_bytes
            with torch.no_grad():
                for total, tensor in zip(mean, self._tensors, strict=True):
                    total.add_(tensor, alpha=share)
        with torch.no_grad():
            for tensor, value in zip(self._tensors, mean, strict=True):
                tensor.copy_(value)
        self.round += 1

    def _judge_if_due(self) -> None:
        if self._judge is not None:
            self._judge.judge(self.round)


def train(
    party: Party,
    first_order: FirstOrder,
    batches: Sequence[Batch],
    row_states: RowStates | None = None,
) -> float:
    """Make an AdamW step on the party's tensors for each batch; returns the mean loss in nats."""
    stored = stored_parameters(party.loaded.model)
    parameters = [stored[entry.name].parameter for entry in party.loaded.manifest]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=first_order.learning_rate,
        weight_decay=first_order.weight_decay,
        foreach=False,  # as fast on a CPU, without temporaries of the model's size
    )
    losses = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for batch in batches:
            with nullcontext(batch) if row_states is None else row_states.known(batch) as computed:
                loss = differentiable_loss(party, computed)
            if not torch.isfinite(loss):
                raise MeasurementError(f"The loss is {loss.item()} on the batch of {batch.name}.")
            torch.autograd.backward([loss])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    finally:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
    return sum(losses) / len(losses)


def differentiable_loss(party: Party, batch: Batch) -> torch.Tensor:
    """Compute the loss of `Task.loss` as a scalar tensor that can be back-propagated."""
    task, model = party.task, party.loaded.model
    if task.config.kind == "classification":
        logits = logits_of(model, batch, 1)[:, -1, list(task.verbalizer_ids)]
        return functional.cross_entropy(logits.float(), batch.labels)
    losses = [
        functional.cross_entropy(logits.float(), batch.targets[places], reduction="sum")
        for places, logits in target_logits(model, batch)
    ]
    return torch.stack(losses).sum() / (batch.targets >= 0).sum()
