"""The base weights of a run, for commits that start from them again.

They are in a file of this process's own, mapped read-only: the system reads a page when it is needed and
drops it when memory is short, so that a party's resident memory stays that of one copy of its model. The
file has no name, so that whatever ends the process, nothing is left of it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from fedmezo_core.errors import ConfigError

_CHUNK_BYTES: Final = 1 << 26
"""What is copied from a device at a time."""


class KeptBase:
    """Copies of tensors as they were when this was made."""

    def __init__(self, tensors: Sequence[torch.Tensor], folder: Path | None = None) -> None:
        """Write them, wherever they are, to a disk.

        `folder`: by default $TMPDIR, else /var/tmp, which unlike /tmp is never in memory. Raises
        `ConfigError` where there is no room for them.
        """
        self._places: list[tuple[int, int, torch.dtype, torch.Size]] = []
        size = 0
        for tensor in tensors:
            self._places.append((size, tensor.nbytes, tensor.dtype, tensor.shape))
            size += tensor.nbytes + -tensor.nbytes % mmap.PAGESIZE
        folder = folder or folder_on_a_disk()
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Now, so that a full disk is an error here and not a signal at some later write.
                os.posix_fallocate(file.fileno(), 0, size)
                for tensor, (first, *_) in zip(tensors, self._places, strict=True):
                    file.seek(first)
                    octets = tensor.detach().reshape(-1).view(torch.uint8)
                    for begin in range(0, len(octets), _CHUNK_BYTES):
                        chunk = octets[begin : begin + _CHUNK_BYTES]
                        file.write(chunk.cpu().numpy().data)
                file.flush()
                self._memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise ConfigError(
                f"This run starts from its base weights again and again, and a copy of them needs {size} "
                f"bytes in {folder} ({error.strerror}); make room there, or name another folder in TMPDIR."
            ) from error
        with warnings.catch_warnings():
            # torch says that it cannot keep anyone from writing to them; the system does.
            warnings.simplefilter("ignore", UserWarning)
            self._octets = torch.frombuffer(self._memory, dtype=torch.uint8)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tensor `index` on the CPU, not to be written to: that would end the process."""
        first, size, dtype, shape = self._places[index]
        return self._octets[first : first + size].view(dtype).view(shape)

    def release(self, index: int) -> None:
        """Let tensor `index` be no part of this process's resident memory until it is read again."""
        first, size, _, _ = self._places[index]
        self._memory.madvise(mmap.MADV_DONTNEED, first, size)


def folder_on_a_disk() -> Path:
    """$TMPDIR, else /var/tmp, which unlike /tmp is never in memory."""
    for name in (os.environ.get("TMPDIR"), "/var/tmp"):
        if name and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return Path(tempfile.gettempdir())
