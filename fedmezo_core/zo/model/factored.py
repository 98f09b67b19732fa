"""An adapter's B as a product of two matrices, of which one is trained (`lora.output_rank`).

LoRA-XS (Balazy et al. 2024) puts a small trained matrix between two frozen ones. Random directions
need it more than gradients do: the noise of a step along them grows with the trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedmezo_core.errors import ConfigError


class FactoredB(nn.Module):
    """B = P C: `core` holds C [output_rank, rank], `outputs` holds P [outputs, output_rank]."""

    def __init__(self, plain: nn.Linear, output_rank: int) -> None:
        """Take the place of peft's B, `plain`; the weights are still to be set."""
        super().__init__()
        device, dtype = plain.weight.device, plain.weight.dtype
        ranks = plain.in_features, output_rank
        self.core = nn.Linear(*ranks, bias=False, device=device, dtype=dtype)
        ends = output_rank, plain.out_features
        self.outputs = nn.Linear(*ends, bias=False, device=device, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """P C x: [..., rank] -> [..., outputs]."""
        result: torch.Tensor = self.outputs(self.core(inputs))
        return result

    @property
    def weight(self) -> torch.Tensor:
        """B itself, [outputs, rank], as peft reads it."""
        return self.outputs.weight @ self.core.weight


def factor_b(model: nn.Module, output_rank: int, adapter: str) -> None:
    """Give each layer of peft's `adapter` in `model` a `FactoredB` for its B.

    Raises `ConfigError` for a layer with fewer outputs than `output_rank`.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_B")]
    for name, layer in layers:
        if adapter not in layer.lora_B:
            continue
        plain = layer.lora_B[adapter]
        if output_rank > plain.out_features:
            raise ConfigError(
                f"lora.output_rank = {output_rank} is more than the {plain.out_features} outputs "
                f"of {name.removeprefix('base_model.model.')}; make it smaller."
            )
        layer.lora_B[adapter] = FactoredB(plain, output_rank).eval()


@contextmanager
def plain_b(model: nn.Module) -> Iterator[None]:
    """Give each layer of peft's adapters in `model` a plain B in this block."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_B")]
    factored = [
        (layer.lora_B, name, module)
        for layer in layers
        for name, module in layer.lora_B.items()
        if isinstance(module, FactoredB)
    ]
    try:
        with torch.inference_mode():
            for matrices, name, module in factored:
                matrices[name] = _plain(module)
        yield
    finally:
        for matrices, name, module in factored:
            matrices[name] = module


def _plain(module: FactoredB) -> nn.Linear:
    weight = module.weight
    outputs, rank = weight.shape
    plain = nn.Linear(rank, outputs, bias=False, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain
