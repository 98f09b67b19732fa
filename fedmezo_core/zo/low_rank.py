"""The factors of low-rank directions: z = scale * sum over k of u_k v_k^T (noise standard, section 6).

A forward pass near the weights needs the factors alone: `x (W + c z)^T = x W^T + c scale (x V) U^T`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import torch

from fedmezo_core.zo import devices
from fedmezo_core.zo.noise import spec


class Side(Enum):
    """Which factor of a direction; the value is the noise standard's domain."""

    ROWS = spec.DOMAIN_ROW_SIGNS
    COLUMNS = spec.DOMAIN_COLUMN_SIGNS


def factors(
    seeds: Sequence[int],
    tensor_id: int,
    side: Side,
    length: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The signs u_k (or v_k) of each seed's direction: `dtype` [seeds, rank, length], each 1 or -1.

    `length`: rows (or columns) of the tensor as a matrix.
    """
    if device.type != "cpu":
        return devices.factor_signs(
            seeds, tensor_id, side.value, length, rank, dtype=dtype, device=device
        )
    indices = np.arange(length, dtype=np.int64)
    signs = [spec.factor_signs(indices, seed, tensor_id, side.value)[:rank] for seed in seeds]
    return torch.from_numpy(np.stack(signs)).to(device, dtype)
