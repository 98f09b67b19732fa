"""Fit a LoRA adapter to rows before it is trained: A, and P if B is P C; what is trained is zero.

The rows of A are the principal components of a module's inputs, whitened: each is scaled so that
the inputs have unit size along it (as EVA initialises LoRA, Paischer et al. 2024). If A stays as it
is (`freeze_a`, LoRA-FA, Zhang et al. 2023), the inputs of the trained B are equal in size and
nearly uncorrelated. A step along random directions needs that, because it cannot adapt to the
curvature of each parameter as AdamW does.

The columns of P (`lora.output_rank`) are those directions of a module's outputs in which the rows'
gradients with respect to B are largest: the main eigenvectors of the sum of G G^T, with G that
gradient for one row. LoRA-SB (Ponkshe et al. 2024) begins alike, from one batch's gradient. Here
each row counts for itself, because the mean over rows has almost only one direction.

The fitting trains nothing. Of a classification it uses no labels: gradients are those of the
verbalizers' logits. Any rows that resemble the workers' are suitable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.party import Party

BATCH_ROWS = 32
GRADIENT_BATCH_ROWS = 8
"""Rows that go through the model together if gradients are needed, which take memory."""


def fit_adapter(party: Party, rows: Sequence[Example]) -> None:
    """Replace what is frozen of a LoRA run's adapter by fitted matrices, in place.

    For A the fitting uses the positions of each row that a loss depends on directly: the last one
    of the prompt (classification), or those of the response (instruction). Raises `ConfigError` for
    a run without an adapter, `DataError` if there are fewer positions than the adapter's rank, or
    gradients in fewer directions than its output rank.
    """
    _fit_inputs(party, rows)
    assert party.config.lora is not None
    if party.config.lora.output_rank is not None:
        _fit_outputs(party, rows, party.config.lora.output_rank)


@torch.inference_mode()
def _fit_inputs(party: Party, rows: Sequence[Example]) -> None:
    lora = party.config.lora
    if lora is None:
        raise ConfigError("The run has no adapter to fit; give it a [run.lora].")
    model: Any = party.loaded.model
    layers = _layers(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    dataset = party.task.encode(rows)
    with long_step("fitting the adapter", len(dataset), "rows") as step:
        for first in range(0, len(dataset), BATCH_ROWS):
            examples = dataset.examples[first : first + BATCH_ROWS]
            batch = party.task.collate(examples, "fitting", execution_device(model))
            ends = max(1, batch.targets.shape[1])
            counts = (
                batch.targets != -100
                if batch.targets.shape[1]
                else torch.ones_like(batch.input_ids[:, :1], dtype=torch.bool)
            )
            handles = [
                layer.register_forward_pre_hook(_collector(seen[name], ends, counts))
                for name, layer in layers.items()
            ]
            try:
                party.task.loss(model, batch)
            finally:
                for handle in handles:
                    handle.remove()
            step.advance(len(examples))
    with long_step("whitening the adapter's inputs", len(layers), "modules") as step:
        for name, layer in layers.items():
            [matrix] = layer.lora_A.values()
            matrix.weight.copy_(_whitening(torch.cat(seen[name]), lora.rank, name))
            step.advance()


def _fit_outputs(party: Party, rows: Sequence[Example], output_rank: int) -> None:
    """Replace P of each `FactoredB`."""
    model = party.loaded.model
    layers = _layers(model)
    moments: dict[str, Any] = dict.fromkeys(layers, 0.0)
    dataset = party.task.encode(rows)
    with long_step("taking gradients for the adapter's outputs", len(dataset), "rows") as step:
        for first in range(0, len(dataset), GRADIENT_BATCH_ROWS):
            examples = dataset.examples[first : first + GRADIENT_BATCH_ROWS]
            batch = party.task.collate(examples, "fitting", execution_device(model))
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            handles = []
            for name, layer in layers.items():
                [factored] = layer.lora_B.values()
                handles.append(factored.register_forward_hook(_watcher(seen, name)))
            try:
                with torch.enable_grad():
                    scores = party.task.scores(model, batch)
            finally:
                for handle in handles:
                    handle.remove()
            outputs = [output for _, output in seen.values()]
            for score in scores.sum(dim=0):
                grads = torch.autograd.grad(score, outputs, retain_graph=True)
                for (name, (inputs, _)), grad in zip(seen.items(), grads, strict=True):
                    by_row = torch.einsum("rto,rti->roi", grad.double(), inputs.double())
                    moments[name] = moments[name] + torch.einsum("roi,rpi->op", by_row, by_row)
            step.advance(len(examples))
    with torch.inference_mode():
        for name, layer in layers.items():
            [factored] = layer.lora_B.values()
            factored.outputs.weight.copy_(_main_directions(moments[name], output_rank, name))


def _layers(model: Any) -> dict[str, Any]:
    """The modules that have an adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and layer.lora_A
    }


def _watcher(into: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str) -> Any:
    def watch(
        _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        watched = output.detach().clone().requires_grad_()
        into[name] = inputs[0].detach(), watched
        return watched

    return watch


def _main_directions(moments: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """The `rank` main eigenvectors of `moments`: [outputs, rank], orthonormal columns."""
    sizes, directions = torch.linalg.eigh(moments.double())
    if len(sizes) < rank or not bool(sizes[-rank] > 1e-12 * sizes[-1]):
        raise DataError(
            f"The rows' gradients at {name} lie in fewer than {rank} directions; give more "
            "different rows, or a smaller lora.output_rank."
        )
    main: torch.Tensor = directions[:, -rank:].flip(1).float()
    return main


def _collector(into: list[torch.Tensor], ends: int, counts: torch.Tensor) -> Any:
    def collect(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        into.append(inputs[0][:, -ends:][counts].float())

    return collect


def _whitening(inputs: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """The main right singular vectors over the root mean square along them: [rank, inputs]."""
    count, width = inputs.shape
    if count < rank or width < rank:
        raise DataError(
            f"{count} positions of {width} inputs at {name} can't fit an adapter of rank {rank}; "
            "give more rows, or a smaller rank."
        )
    _, sizes, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    sizes = sizes[:rank, None] / count**0.5
    if not bool((sizes > 1e-6 * sizes[0]).all()):
        raise DataError(
            f"What {name} sees varies in fewer than {rank} directions; give more different rows, "
            "or a smaller rank."
        )
    fitted: torch.Tensor = (directions[:rank] / sizes).float()
    return fitted
