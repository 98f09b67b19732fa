"""The base weights of a run, for commits that start from them again.

They are in a file of this process's own, mapped read-only: the system reads a page when it is
needed and drops it when memory is short. So a party's resident memory stays that of one copy of its
model. The file has no name, so that nothing is left of it, whatever ends the process.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import torch

from fedmezo_core.errors import ConfigError
from fedmezo_core.folders import folder_on_a_disk, nameless_mapping

_CHUNK_BYTES: Final = 1 << 26
"""Bytes copied from a device at a time."""


class KeptBase:
    """Copies on a disk of tensors as they were when this was made."""

    def __init__(self, tensors: Sequence[torch.Tensor], folder: Path | None = None) -> None:
        """Write `tensors`, whatever devices they are on, to a disk.

        folder: by default $TMPDIR, else /var/tmp, which unlike /tmp is never in memory. Raises
        `ConfigError` where there is no room for them.
        """
        self._extents: list[tuple[int, int, torch.dtype, torch.Size]] = []
        size = 0
        for tensor in tensors:
            self._extents.append((size, tensor.nbytes, tensor.dtype, tensor.shape))
            size += tensor.nbytes + -tensor.nbytes % mmap.PAGESIZE
        folder = folder or folder_on_a_disk()

        def fill(file: IO[bytes]) -> None:
            for tensor, (first, *_) in zip(tensors, self._extents, strict=True):
                file.seek(first)
                octets = tensor.detach().reshape(-1).view(torch.uint8)
                for begin in range(0, len(octets), _CHUNK_BYTES):
                    file.write(octets[begin : begin + _CHUNK_BYTES].cpu().numpy().data)

        try:
            self._memory = nameless_mapping(folder, size, fill)
        except OSError as error:
            raise ConfigError(
                "This run starts from its base weights again and again, and a copy of them needs "
                f"{size} bytes in {folder} ({error.strerror}); make room there, or name another "
                "folder in TMPDIR."
            ) from error
        with warnings.catch_warnings():
            # torch warns that it cannot protect them from being written to; the system can.
            warnings.simplefilter("ignore", UserWarning)
            self._octets = torch.frombuffer(self._memory, dtype=torch.uint8)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tensor `index`, on the CPU. Writing to it would end the process."""
        first, size, dtype, shape = self._extents[index]
        return self._octets[first : first + size].view(dtype).view(shape)

    def release(self, index: int) -> None:
        """Take tensor `index` out of this process's resident memory until it is read again."""
        first, size, _, _ = self._extents[index]
        self._memory.madvise(mmap.MADV_DONTNEED, first, size)
