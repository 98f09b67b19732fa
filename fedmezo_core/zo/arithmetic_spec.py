"""The arithmetic standard v1 as obvious, slow NumPy. This file *is* the specification.

An element's value is a fold over the journal. Within a commit it accumulates in float32, pair after
pair in order: `acc = fl(acc + fl(c * z))`, starting from the element's value, or from
`fl(value * decay)` where the commit has a weight decay. At the commit's end it is rounded to the
storage type: float32 as it is, bfloat16 and float16 stochastically (by the noise standard's bits
under the commit's `rounding_seed`) or to nearest even. Elements never meet, so tiles, threads,
slices and fused commits cannot change a bit.

docs/arithmetic-standard-v1.md is the same standard in words, and noise/spec.py specifies z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import MismatchError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.noise import Operands, spec
from fedmezo_core.zo.noise.tensors import check_tensors, values_of

ARITHMETIC_VERSION: Final = 1
"""Version of the arithmetic standard: another version means that some result has other bits."""


def materialize_reference(
    out: torch.Tensor, base: torch.Tensor, commits: Sequence[Commit], operands: Operands
) -> None:
    """The specification of `materialize`: same arguments, same results, same errors; slow.

    Works on the CPU only; raises `MismatchError` for tensors on another device.
    """
    size = check_tensors(operands, out, base)
    assert not any(commit.from_base for commit in commits), "Weights.apply knows the run's base"
    if size == 0:
        return
    columns, tensor_id = operands.columns_of(out), operands.tensor_id
    if not out.is_cpu:
        raise MismatchError(
            f"Tensor {tensor_id} is on {out.device}; the specification needs the CPU."
        )
    elements = np.arange(operands.start, operands.start + size, dtype=np.int64)
    acc = _float32(values_of(base), out.dtype)
    for commit in commits:
        with np.errstate(over="ignore", invalid="ignore"):
            if commit.decay != 1.0:
                acc = acc * np.float32(commit.decay)
            for seed, coefficient in zip(commit.seeds, commit.coefficients, strict=True):
                z = spec.noise(elements, int(seed), tensor_id, operands.distribution, columns)
                acc = acc + coefficient * z
        acc = _rounded(acc, out.dtype, operands, elements, commit.rounding_seed)
    values_of(out)[:] = _stored(acc, out.dtype)
    bad = ~np.isfinite(acc)
    if bad.any():
        first = int(np.argmax(bad))
        raise operands.not_finite(operands.start + first, float(acc[first]))


def _float32(stored: npt.NDArray[Any], dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """The numbers that `values_of` a tensor of `dtype` stand for, exactly."""
    if dtype == torch.float32:
        return stored.copy()
    if dtype == torch.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32)


def _stored(values: npt.NDArray[np.float32], dtype: torch.dtype) -> npt.NDArray[Any]:
    """The inverse of `_float32`, for values that `dtype` represents."""
    if dtype == torch.float32:
        return values
    if dtype == torch.bfloat16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def _rounded(
    acc: npt.NDArray[np.float32],
    dtype: torch.dtype,
    operands: Operands,
    elements: npt.NDArray[np.int64],
    rounding_seed: int,
) -> npt.NDArray[np.float32]:
    """A commit's results as `dtype` represents them, in float32."""
    if dtype == torch.float32:
        return acc
    bits = acc.view(np.uint32)
    if dtype == torch.bfloat16:
        addend: Any = np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
        if operands.stochastic:
            addend = spec.rounding_bits(elements, rounding_seed, operands.tensor_id)
        # NaN and infinities keep their upper half.
        rounded = np.where(np.isfinite(acc), bits + addend, bits)
        return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    if not operands.stochastic:
        with np.errstate(over="ignore"):
            return acc.astype(np.float16).astype(np.float32)
    words = spec.rounding_words_float16(elements, rounding_seed, operands.tensor_id)
    return _float16_stochastic(acc, words)


def _float16_stochastic(
    acc: npt.NDArray[np.float32], words: npt.NDArray[np.uint32]
) -> npt.NDArray[np.float32]:
    """`acc` rounded to float16 by a random word for each, as float32."""
    bits = acc.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # From 2**-14 on: 13 bits of the significand go, and the exponent's bias falls from 127 to 15.
    normal = ((magnitude + (words >> 19)) >> 13) - np.uint32(112 << 10)
    # Below, float16 is fixed-point, in units of 2**-24.
    with np.errstate(over="ignore", invalid="ignore"):
        units = magnitude.view(np.float32) * np.float32(2.0**24)
        whole = np.floor(units)
        uniform = (words >> 8).astype(np.float32) * np.float32(2.0**-24)
        up = uniform < units - whole
    small = np.where(magnitude < 0x38800000, whole, np.float32(0)).astype(np.uint32) + up
    half = np.where(magnitude < 0x38800000, small, np.minimum(normal, np.uint32(0x7C00)))
    half = np.where(magnitude > 0x7F800000, np.uint32(0x7E00), half)
    signed = (half | bits >> 16 & np.uint32(0x8000)).astype(np.uint16)
    return _float32(signed, torch.float16)
