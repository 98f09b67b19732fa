"""Folders of output that appear whole or not at all, and files that leave nothing behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fedmezo_core.errors import FedMezoError


@contextlib.contextmanager
def whole_folder(folder: Path, error: type[FedMezoError]) -> Iterator[Path]:
    """Give an empty folder to write to; at the end of the block it becomes `folder`, durably.

    If the block raises, nothing is left of the folder. Raises `error` if `folder` exists and is not
    empty, and `OSError` if the disk refuses.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise error(f"{folder} exists and is not empty; name another folder or remove it.")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        # Replaces an empty folder; fails if somebody has filled it in the meantime.
        partial.rename(folder)
        sync(folder.parent)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def is_git_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of a large file that was not fetched."""
    begin = b"version https://git-lfs.github.com/spec/"
    with path.open("rb") as file:
        return file.read(len(begin)) == begin


def sync(path: Path) -> None:
    """Return as soon as a file, or the list of names in a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nameless_mapping(
    folder: Path, size_bytes: int, fill: Callable[[IO[bytes]], None] | None = None
) -> mmap.mmap:
    """Memory backed by a file in `folder` that has no name: it is gone when the process ends.

    With `fill`, which writes the contents to the file, the memory is read-only; without it, zeros
    that can be written to. Raises `OSError` where the system does, for a full disk among others.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        # Without this, a full disk would be a signal at some later write.
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        if fill is None:
            return mmap.mmap(file.fileno(), size_bytes)
        fill(file)
        file.flush()
        return mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ)


def folder_on_a_disk() -> Path:
    """The folder $TMPDIR, else /var/tmp, which unlike /tmp is never in memory."""
    for name in (os.environ.get("TMPDIR"), "/var/tmp"):
        if name and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return Path(tempfile.gettempdir())
