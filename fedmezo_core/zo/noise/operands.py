"""Which elements a kernel makes, and of which noise: the same for every backend."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy.typing as npt
import torch

from fedmezo_core.errors import MismatchError, NumericError
from fedmezo_core.zo.noise.spec import ELEMENTS_MAX, TENSOR_ID_MAX, Distribution

STORAGE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What weights may be stored as."""


class Rounding(StrEnum):
    """How bfloat16 and float16 weights are rounded at a commit's end; float32 weights need none."""

    STOCHASTIC = "stochastic"
    NEAREST = "nearest"


class Operands(NamedTuple):
    """Which elements of which tensor are made, of which noise, and how they are rounded.

    A tuple, because one is made for every block of rows: a frozen dataclass takes 0.4 us longer.
    """

    tensor_id: int
    """The tensor's number in the manifest, 0 .. 2**32 - 1; each tensor has noise of its own."""
    distribution: Distribution
    rounding: Rounding
    start: int = 0
    """Index in the whole tensor of the first element, so that a slice can be made alone."""
    columns: int | None = None
    """Length of the whole tensor's last dimension; None: the last dimension of what is given.

    Only the low-rank families need it.
    """
    name: str | None = None
    """What error messages call the tensor, beside its number."""

    @property
    def stochastic(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding is Rounding.STOCHASTIC

    def columns_of(self, tensor: torch.Tensor) -> int:
        """Length of the last dimension of the whole tensor, of which `tensor` is a part.

        Raises `NumericError` if `columns` is outside 1 .. 2**48.
        """
        if self.columns is None:
            return tensor.shape[-1] if tensor.ndim > 0 else 1
        if not 0 < self.columns <= ELEMENTS_MAX:
            raise NumericError(
                f"Tensor {self.tensor_id}: {self.columns} columns are outside 1 .. 2**48; "
                "give the length of the tensor's last dimension."
            )
        return self.columns

    def check(self, out: torch.Tensor, base: torch.Tensor) -> int:
        """The number of elements of `out`, if it can be made of `base`.

        Raises `MismatchError` if the two do not fit each other, and `NumericError` if the elements
        are outside the noise standard's range.
        """
        size = out.numel()
        if out.dtype != base.dtype or base.numel() != size:
            raise MismatchError(
                f"Tensor {self.tensor_id}: cannot make {size} {out.dtype} weights out of a base of "
                f"{base.numel()} {base.dtype} weights; give both one size and one dtype."
            )
        if out.dtype not in STORAGE_DTYPES:
            raise MismatchError(
                f"Tensor {self.tensor_id} is {out.dtype}; "
                "load the model in float32, bfloat16 or float16."
            )
        for tensor in (out, base):
            if tensor.device != out.device or tensor.is_meta or not tensor.is_contiguous():
                raise MismatchError(
                    f"Tensor {self.tensor_id} is on {tensor.device} with strides "
                    f"{tensor.stride()}; give contiguous tensors on one device, the CPU or another."
                )
        distance_bytes = abs(out.data_ptr() - base.data_ptr())
        if 0 < distance_bytes < size * out.element_size():
            raise MismatchError(
                f"Tensor {self.tensor_id}: out and base overlap without being the same memory; "
                "give one tensor twice, or two that are apart."
            )
        if not 0 <= self.tensor_id <= TENSOR_ID_MAX:
            raise NumericError(
                f"The tensor id {self.tensor_id} is outside 0 .. 2**32 - 1; use the manifest's."
            )
        if not 0 <= self.start <= ELEMENTS_MAX - size:
            raise NumericError(
                f"Tensor {self.tensor_id}: elements {self.start} .. {self.start + size} are "
                "outside 0 .. 2**48; give the slice's first index in its tensor."
            )
        return size

    def not_finite(self, element: int, value: object) -> NumericError:
        """The error that says that element `element` of the whole tensor is NaN or infinite."""
        return NumericError(
            f"{self.called}: element {element} is {value}; check the base weights, "
            "or lower the learning rate or eps."
        )

    @property
    def called(self) -> str:
        """How an error message begins: the tensor's number, and its name if it has one."""
        return f"Tensor {self.tensor_id}" + ("" if self.name is None else f" ({self.name})")


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
