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
    """Give an empty folder to write to, which becomes `folder`, durably, at the end of the block.

    Nothing is left of it if the block raises. Raises `error` if `folder` exists and isn't empty, and
    `OSError` where the system does.
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
        # Replaces an empty folder; fails if somebody has filled it meanwhile.
        partial.rename(folder)
        sync(folder.parent)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
