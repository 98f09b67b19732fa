"""Mixtures of experts whose matrices are slices of one tensor, built one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn


class NotSlicedError(Exception):
    """A module used a parameter in another way than slice by slice; the message says how."""


class Slices:
    """Stands for a parameter [experts, rows, columns] of which only slices exist, each while in use."""

    def __init__(self, parameter: torch.Tensor, build: Callable[[int], torch.Tensor]) -> None:
        """`build(index)` gives what takes the place of `parameter[index]`."""
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
        """Called by any function of torch that meets such an object."""
        raise NotSlicedError(f"computes with all experts at once, in {func.__name__}")


def one_by_one(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward of `module` that visits the experts which tokens go to, one after the other.

    It is the reference that transformers keeps in each class beside faster ways through all experts at
    once (`use_experts_implementation`). None if `module` is no such class, or its forward another.
    """
    kind: Any = type(module)
    if getattr(original, "__func__", None) is not kind.forward or not hasattr(kind, "_apply_gate"):
        return None
    reference = getattr(kind.forward, "__wrapped__", None)
    return None if reference is None else reference.__get__(module)
