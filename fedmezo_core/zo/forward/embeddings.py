"""Embeddings of which only the rows that are looked up are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class EmbeddingLookups(TorchFunctionMode):
    """Answers `functional.embedding` on one weight with `look_up`; all else runs as it is.

    Subclasses of `nn.Embedding` shift positions or scale the result around that call, so this works
    for them, too.
    """

    def __init__(
        self, weight: torch.Tensor, look_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """`look_up` gives the rows of `weight` for a tensor of ids: [*ids.shape, columns]."""
        super().__init__()
        self._weight = weight
        self._look_up = look_up

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            ids = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.data_ptr() == self._weight.data_ptr():
                return self._look_up(ids)
        return func(*args, **kwargs)


def consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut ascending `numbers` into runs of consecutive ones: (index, length, first number)."""
    start = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield start, index - start, numbers[start]
            start = index
