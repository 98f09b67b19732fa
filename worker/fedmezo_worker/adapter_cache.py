"""The adapters that this user's workers have downloaded, bounded as a whole.

Several runs of a process and several processes use it at a time. A lock on an adapter's folder
keeps it there while somebody uses it, and one on a file that is being written tells it from what a
process has left that ended early. The system frees both with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from fedmezo_core.errors import ModelError, NotReadyError
from fedmezo_core.folders import make_private

log = logging.getLogger("fedmezo.download")

KEPT_S: Final = 30 * 24 * 3600.0
"""An adapter that no run has begun from for so long leaves the cache."""
_BEGUN: Final = ".begun.partial"
"""How the name of a file ends that a later attempt goes on with."""
LOOK_EVERY_S: Final = 0.05
"""How often to look whether a folder that is being removed is gone."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A file that is being written, under a name of its own."""

    path: Path
    out: BinaryIO
    """Open for writing after `begun_bytes`, and locked until it is closed."""
    begun_bytes: int
    """Count of the bytes that an earlier attempt has left in it."""

    def leave(self, whole_bytes: int) -> None:
        """Close the file, and let the next attempt go on after its first `whole_bytes`."""
        try:
            if whole_bytes:
                self.out.truncate(whole_bytes)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            self.out.close()


class AdapterCache:
    """A folder with a folder for each adapter."""

    def __init__(self, root: Path, bytes_max: int) -> None:
        """All adapters in `root` together take at most `bytes_max` bytes."""
        self._root = root
        self._bytes_max = bytes_max

    @contextlib.asynccontextmanager
    async def kept(self, name: str) -> AsyncIterator[Path]:
        """The folder `name`, for its owner only; nothing removes it during the block.

        Raises `ModelError` if it cannot be made.
        """
        folder = self._root / name
        with contextlib.ExitStack() as held:
            while True:
                await asyncio.to_thread(make_private, folder, ModelError)
                try:
                    held.enter_context(_locked(folder, fcntl.LOCK_SH))
                    break
                except (FileNotFoundError, BlockingIOError):
                    await asyncio.sleep(LOOK_EVERY_S)  # Somebody is just removing it.
            os.utime(folder)
            yield folder

    def begin(self, path: Path, file_bytes: int) -> Partial:
        """Reserve the space for the file that will be at `path`; removes adapters if need be.

        It goes on with what an earlier attempt has left, if nobody else does just now. Those
        adapters go that were not used for longest. Raises `NotReadyError` while too much is in
        use, and `OSError` if the disk refuses. Takes as long as the disk.
        """
        replaced = path.stat().st_size if path.exists() else 0
        with _locked(self._root, fcntl.LOCK_EX, wait=True):
            partial = _opened(path.with_name(f".{path.name}{_BEGUN}"), file_bytes) or _opened(
                path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial"), file_bytes
            )
            assert partial is not None, "nobody else has a name that was just made up"
            try:
                self._make_room(file_bytes - replaced - partial.begun_bytes)
                os.posix_fallocate(partial.out.fileno(), 0, max(file_bytes, 1))
            except (OSError, NotReadyError):
                partial.leave(partial.begun_bytes)
                raise
        return partial

    def _make_room(self, needed_bytes: int) -> None:
        for left in self._root.glob("*/.*.partial"):
            whole = left.with_name(left.name[1:].removesuffix(_BEGUN))
            if left.name.endswith(_BEGUN) and not whole.exists():
                continue  # Another attempt may go on with it.
            with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_EX):
                left.unlink()
        folders = sorted(self._root.iterdir(), key=lambda folder: folder.stat().st_mtime)
        sizes = {folder: _bytes_in(folder) for folder in folders}
        used = sum(sizes.values())
        for folder in folders:
            is_old = time.time() - folder.stat().st_mtime > KEPT_S
            if not is_old and used + needed_bytes <= self._bytes_max:
                continue
            with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_EX):
                shutil.rmtree(folder)
                used -= sizes[folder]
                log.info("the adapter in %s left the cache", folder)
        if used + needed_bytes > self._bytes_max:
            raise NotReadyError(
                f"Adapters that runs are just loading take {used} of the {self._bytes_max} bytes "
                f"that this worker allows them in {self._root}, and {needed_bytes} more are "
                "needed; raise policy.disk_max if this stays so."
            )


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Another run has just renamed it.
            total += path.lstat().st_size
    return total


def _opened(path: Path, file_bytes: int) -> Partial | None:
    """The partial file at `path`, made if need be; None if somebody else is writing to it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    out = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)  # Whoever wrote it has just put it in its place.
    except (BlockingIOError, FileNotFoundError):
        out.close()
        return None
    # A process that was killed leaves the whole size, and nobody knows how much of it is there.
    size = os.fstat(descriptor).st_size
    begun_bytes = size if size < file_bytes else 0
    out.truncate(begun_bytes)
    out.seek(begun_bytes)
    return Partial(path, out, begun_bytes)


@contextlib.contextmanager
def _locked(path: Path, how: int, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock on what is at `path`; raises `BlockingIOError` unless `wait`, if others do.

    Raises `FileNotFoundError` if it was removed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
        yield
    finally:
        os.close(descriptor)
