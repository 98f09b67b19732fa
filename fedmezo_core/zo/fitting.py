"""Fit a LoRA adapter to texts before it is trained: A from the data, B zero.

The rows of A are the principal components of a module's inputs, whitened: each is scaled so that
the inputs have unit size along it (as EVA initialises LoRA, Paischer et al. 2024). If A stays as it
is (`freeze_a`, LoRA-FA, Zhang et al. 2023), the inputs of the trained B are equal in size and
nearly uncorrelated. A step along random directions needs that, because it cannot adapt to the
curvature of each parameter as AdamW does.

The fitting uses no labels and trains nothing. Any texts that resemble the workers' are suitable.
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


@torch.inference_mode()
def fit_adapter(party: Party, rows: Sequence[Example]) -> None:
    """Replace the A matrices of a LoRA run's party by fitted ones, in place.

    The fitting uses the positions of each row that a loss depends on directly: the last one of the
    prompt (classification), or those of the response (instruction). Raises `ConfigError` for a run
    without an adapter, `DataError` if there are fewer positions than the adapter's rank.
    """
    lora = party.config.lora
    if lora is None:
        raise ConfigError("The run has no adapter to fit; give it a [run.lora].")
    model: Any = party.loaded.model
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and layer.lora_A
    }
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
