"""Memory for weights that are built, used and forgotten within a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

_ALIGNMENT_BYTES: Final = 64


class Scratch:
    """Reusable memory, given out as a stack: a module with parameters may contain others."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._used_bytes: dict[torch.device, int] = {}

    @contextmanager
    def frame(self) -> Iterator[None]:
        """While open, what is taken is valid; afterwards its memory is used again."""
        used = dict(self._used_bytes)
        try:
            yield
        finally:
            self._used_bytes = used

    def take(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Uninitialised, aligned memory, with the dtype and device of `like`: [count]."""
        first = self._used_bytes.get(like.device, 0)
        size = count * like.element_size()
        last = first + size + -size % _ALIGNMENT_BYTES
        buffer = self._buffers.get(like.device)
        if buffer is None or len(buffer) < last:
            # The tensors of outer frames keep the smaller buffer alive as long as they need it.
            buffer = torch.empty(last, dtype=torch.uint8, device=like.device)
            self._buffers[like.device] = buffer
        self._used_bytes[like.device] = last
        return buffer[first : first + size].view(like.dtype)


def detached_from(result: Any, storages: Sequence[torch.UntypedStorage]) -> Any:
    """A nested `result`, in which tensors that lie in `storages` are replaced by copies."""
    addresses = {storage.data_ptr() for storage in storages}

    def detached(tensor: torch.Tensor) -> torch.Tensor:
        shared = tensor.untyped_storage().data_ptr() in addresses
        return tensor.clone() if shared else tensor

    return pytree.tree_map_only(torch.Tensor, detached, result)
