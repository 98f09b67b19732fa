"""Which elements a kernel makes, and of which noise: the same for every backend."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt

from fedmezo_core.errors import NumericError
from fedmezo_core.zo.noise.spec import ELEMENTS_MAX, Distribution

if TYPE_CHECKING:
    import torch


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

    def columns_of(self, tensor: torch.Tensor | npt.NDArray[Any]) -> int:
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
