"""What the kernels ask of torch's tensors, and how they reach their memory."""

from __future__ import annotations

from typing import Any, Final

import numpy.typing as npt
import torch

from fedmezo_core.errors import MismatchError, NumericError
from fedmezo_core.zo.noise.operands import Operands
from fedmezo_core.zo.noise.spec import ELEMENTS_MAX, TENSOR_ID_MAX

STORAGE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What weights may be stored as."""


def check_tensors(operands: Operands, out: torch.Tensor, base: torch.Tensor) -> int:
    """The number of elements of `out`, if it can be made of `base`.

    Raises `MismatchError` if the two do not fit each other, and `NumericError` if the elements
    are outside the noise standard's range.
    """
    size = out.numel()
    if out.dtype != base.dtype or base.numel() != size:
        raise MismatchError(
            f"Tensor {operands.tensor_id}: cannot make {size} {out.dtype} weights out of a base of "
            f"{base.numel()} {base.dtype} weights; give both one size and one dtype."
        )
    if out.dtype not in STORAGE_DTYPES:
        raise MismatchError(
            f"Tensor {operands.tensor_id} is {out.dtype}; "
            "load the model in float32, bfloat16 or float16."
        )
    for tensor in (out, base):
        if tensor.device != out.device or tensor.is_meta or not tensor.is_contiguous():
            raise MismatchError(
                f"Tensor {operands.tensor_id} is on {tensor.device} with strides "
                f"{tensor.stride()}; give contiguous tensors on one device, the CPU or another."
            )
    distance_bytes = abs(out.data_ptr() - base.data_ptr())
    if 0 < distance_bytes < size * out.element_size():
        raise MismatchError(
            f"Tensor {operands.tensor_id}: out and base overlap without being the same memory; "
            "give one tensor twice, or two that are apart."
        )
    if not 0 <= operands.tensor_id <= TENSOR_ID_MAX:
        raise NumericError(
            f"The tensor id {operands.tensor_id} is outside 0 .. 2**32 - 1; use the manifest's."
        )
    if not 0 <= operands.start <= ELEMENTS_MAX - size:
        raise NumericError(
            f"Tensor {operands.tensor_id}: elements {operands.start} .. {operands.start + size} "
            "are outside 0 .. 2**48; give the slice's first index in its tensor."
        )
    return size


def values_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a CPU tensor as a 1-D array: float32, or uint16 for bfloat16 and float16."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    wide = plain.dtype == torch.float32
    array: npt.NDArray[Any] = (plain if wide else plain.view(torch.uint16)).numpy()
    return array.reshape(-1)


def require_finite(tensor: torch.Tensor, operands: Operands) -> None:
    """Raise `NumericError`, naming the element, if a value of `tensor` is NaN or infinite.

    tensor: on any device; its first value is element `operands.start` of the whole tensor.
    """
    flat = tensor.detach().reshape(-1)
    piece = 1 << 22  # a mask of the whole could be gigabytes
    for begin in range(0, flat.numel(), piece):
        finite = torch.isfinite(flat[begin : begin + piece])
        if not finite.all():
            offset = begin + int(torch.argmin(finite.to(torch.uint8)))
            raise operands.not_finite(operands.start + offset, float(flat[offset]))
