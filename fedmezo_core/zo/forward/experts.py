"""Mixtures of experts whose matrices are slices of one tensor, built one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn


class NotSlicedError(Exception):
    """A module used a parameter other than slice by slice; the message says how."""


class Slices:
    """Acts as a parameter [experts, rows, columns], of which slices exist only while in use."""

    def __init__(self, parameter: torch.Tensor, build: Callable[[int], torch.Tensor]) -> None:
        """`build(index)` gives the tensor that replaces `parameter[index]`."""
        self._parameter = parameter
        self._build = build

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, torch.Tensor) and index.dim() == 0:
            index = int(index)
        if not isinstance(index, int):
            raise NotSlicedError("indexes its experts with several numbers at once")
        return self._build(index)

    def __getattr__(self, name: str) -> Any:
        if name not in {"shape", "dtype", "device"}:
            raise NotSlicedError(f"reads its experts' {name}")
        return getattr(self._parameter, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to be an argument of any function of torch."""
        raise NotSlicedError(f"computes with all experts at once, in {func.__name__}")


def one_by_one(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward of `module` that visits, one by one, the experts that tokens go to.

    Each such class of transformers keeps it as the reference for faster ways through all experts at
    once (`use_experts_implementation`). None if `module` is not a mixture of experts, or `original`
    is not its class's forward.
    """
    kind: Any = type(module)
    if getattr(original, "__func__", None) is not kind.forward or not hasattr(kind, "_apply_gate"):
        return None
    reference = getattr(kind.forward, "__wrapped__", None)
    return None if reference is None else reference.__get__(module)
