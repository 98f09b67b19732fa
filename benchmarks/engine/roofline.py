"""The best that a GPU could do, measured in the same run with torch's copy and matrix product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch

from benchmarks.figures import Figure
from benchmarks.machine import Machine

_LANES = 128
"""Additions that a multiprocessor of the supported generations does in a clock."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The device's limits."""

    bytes_per_s: float
    """Read and written together, by a large copy."""
    products_per_s: float
    """Multiply-and-adds of a large matrix product in bfloat16."""
    additions_per_s: float
    """In float32, if every lane did one in each clock: computed, not measured."""

    @classmethod
    def of(cls, machine: Machine, size: int) -> Self:
        """Measure on buffers of size * size values."""
        source = torch.ones(size, size, dtype=torch.bfloat16, device=machine.device)
        target, result = torch.empty_like(source), torch.empty_like(source)
        seconds = machine.best(
            {
                "copy": lambda: target.copy_(source),
                "product": lambda: torch.mm(source, target, out=result),
            },
            10,
        )
        additions = float("inf")
        if machine.cuda:
            properties = torch.cuda.get_device_properties(machine.device)
            additions = properties.multi_processor_count * _LANES * properties.clock_rate * 1e3
        return cls(2 * source.nbytes / seconds["copy"], size**3 / seconds["product"], additions)

    def replay_seconds(self, weights: torch.Tensor, pairs: int) -> float:
        """Least time: weights read and written once, or an addition for each parameter and pair."""
        moving = 2 * weights.nbytes / self.bytes_per_s
        return max(moving, weights.numel() * pairs / self.additions_per_s)

    def passes_seconds(self, weights_bytes: int, products: float) -> float:
        """Least time of a pass that reads weights once and does `products` multiply-and-adds."""
        return max(weights_bytes / self.bytes_per_s, products / self.products_per_s)

    def figures(self) -> list[Figure]:
        copied, products = self.bytes_per_s / 1e9, 2 * self.products_per_s / 1e12
        figures = [
            Figure("roofline: a large copy, read and written together", copied, "GB/s"),
            Figure("roofline: bfloat16 matrix product", products, "TFLOP/s"),
        ]
        if math.isfinite(self.additions_per_s):
            additions = self.additions_per_s / 1e12
            figures.append(Figure("roofline: float32 additions, computed", additions, "T/s"))
        return figures
