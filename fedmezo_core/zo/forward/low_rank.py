"""Low-rank directions in a forward pass, which needs only their factors.

A direction of a matrix is z = scale * sum over k of u_k v_k^T (noise standard, section 6). So for a
batch of rows x, x (W + c z)^T = x W^T + c scale (x V) U^T: the product with the base, and two thin
ones. EGGROLL (Sarkar et al. 2025, arXiv 2511.16652) does the same with Gaussian factors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit, common_pairs
from fedmezo_core.zo.noise import cpu, spec
from fedmezo_core.zo.noise.threads import scratch

_ONE: Final = {torch.float32: 0x3F800000, torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""The bits of 1."""


THIN_RANKS_PER_FULL_RANK: Final = 8
"""Local low-rank pairs are thin products while ranks times this are at most the matrix's."""


class Side(Enum):
    """A factor of a direction; the value is its domain in the noise standard."""

    ROWS = spec.DOMAIN_ROW_SIGNS
    COLUMNS = spec.DOMAIN_COLUMN_SIGNS


def factors(
    seeds: Sequence[int] | npt.NDArray[np.uint64],
    tensor_id: int,
    side: Side,
    length: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The signs u_k (or v_k) of each seed's direction, 1 or -1: `dtype` [seeds, rank, length].

    `length` is the number of rows (or columns) of the tensor as a matrix.
    """
    if devices.elsewhere(device):
        return devices.factor_signs(
            [int(seed) for seed in seeds],
            tensor_id,
            side.value,
            length,
            rank,
            dtype=dtype,
            device=device,
        )
    signs = torch.empty(len(seeds), rank, length, dtype=dtype)
    cpu.factor_signs(
        signs.data_ptr(), dtype == torch.float32, _ONE[dtype], np.array(seeds, dtype=np.uint64),
        tensor_id, side.value, length, rank, scratch.words,
    )  # fmt: skip
    return signs


@dataclass(frozen=True, eq=False)
class Split:
    """The points of a measurement: the pairs that they share, and at most one more for each."""

    shared: Commit
    own_seeds: npt.NDArray[np.uint64]
    own_coefficients: npt.NDArray[np.float32]
    """float32 [points]; 0 for a point that has no pair of its own."""
    _on_device: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False
    )

    def coefficients(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The (shared, own) coefficients with the dtype and device of `like`.

        Their shapes are [pairs, 1] and [points, 1, 1]. They are uploaded once for a measurement,
        not for each of its layers.
        """
        key = like.dtype, like.device
        if key not in self._on_device:
            shared, own = (
                torch.from_numpy(values).to(like.device, like.dtype)
                for values in (self.shared.coefficients, self.own_coefficients)
            )
            self._on_device[key] = shared.view(-1, 1), own.view(-1, 1, 1)
        return self._on_device[key]


@functools.lru_cache(maxsize=32)
def split(points: tuple[Commit, ...]) -> Split | None:
    """Split `points` into shared and own pairs; None if one has several of its own, or a decay."""
    count = common_pairs(points)
    if count is None:
        return None
    first = points[0]
    own_seeds = np.zeros(len(points), dtype=np.uint64)
    own_coefficients = np.zeros(len(points), dtype=np.float32)
    for index, point in enumerate(points):
        if len(point.seeds) > count:
            own_seeds[index] = point.seeds[count]
            own_coefficients[index] = point.coefficients[count]
    shared = Commit(first.seeds[:count], first.coefficients[:count], first.rounding_seed)
    return Split(shared, own_seeds, own_coefficients)


@dataclass(frozen=True, slots=True)
class Thin:
    """The directions of one weight matrix, applied as products with their factors."""

    tensor_id: int
    rank: int
    inputs: tuple[Side, int]
    """The factor that is multiplied by the rows of a batch, and its length."""
    outputs: tuple[Side, int]
    """The other factor, and its length."""

    def set_own(
        self, split: Split, x: torch.Tensor, biases: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """out[p] = x[p] @ (the own pair of point p)^T + biases[p].

        x is [points, rows, inputs], out is [points, rows, outputs], and biases is
        [points or 1, 1, outputs].
        """
        thin = torch.bmm(x, self._factors(split.own_seeds, self.inputs, x).transpose(1, 2))
        thin.mul_(split.coefficients(x)[1]).mul_(self._scale)
        factors_out = self._factors(split.own_seeds, self.outputs, x)
        if biases is None:
            torch.bmm(thin, factors_out, out=out)
        else:
            torch.baddbmm(biases, thin, factors_out, out=out)

    def add_shared(self, split: Split, x: torch.Tensor, out: torch.Tensor) -> None:
        """out += x @ (the shared pairs)^T, with x [rows, inputs] and out [rows, outputs]."""
        seeds = split.shared.seeds
        inputs, outputs = (
            self._factors(seeds, side, x).flatten(0, 1) for side in (self.inputs, self.outputs)
        )
        thin = torch.mm(x, inputs.t()).view(len(x), len(seeds), self.rank)
        thin.mul_(split.coefficients(x)[0]).mul_(self._scale)
        out.addmm_(thin.flatten(1), outputs)

    @property
    def _scale(self) -> float:
        return float(spec.LOW_RANK_SCALE[self.rank])

    def _factors(
        self, seeds: npt.NDArray[np.uint64], side: tuple[Side, int], like: torch.Tensor
    ) -> torch.Tensor:
        kind, length = side
        return factors(
            seeds, self.tensor_id, kind, length, self.rank, dtype=like.dtype, device=like.device
        )
