"""A folder of output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

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


def sync(path: Path) -> None:
    """Return as soon as a file, or the list of names in a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
