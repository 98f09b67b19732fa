"""Noise standard v1: `z(seed, tensor_id, element)`, the same bits on every machine.

`spec` is the specification in slow NumPy; `cpu` (numba), `triton_kernels` (CUDA) and `portable`
(torch) equal it bit for bit. docs/noise-standard-v1.md is the same standard in words.
"""

from __future__ import annotations

from fedmezo_core.zo.noise.operands import Operands, Rounding
from fedmezo_core.zo.noise.spec import (
    ELEMENTS_MAX,
    NOISE_VERSION,
    SEED_MAX,
    TENSOR_ID_MAX,
    Distribution,
    noise,
)

__all__ = [
    "ELEMENTS_MAX", "NOISE_VERSION", "SEED_MAX", "TENSOR_ID_MAX", "Distribution", "Operands",
    "Rounding", "noise",
]  # fmt: skip
