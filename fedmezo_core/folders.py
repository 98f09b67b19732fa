"""Folders of output that appear whole or not at all, and files that leave nothing behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
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


def make_private(folder: Path, error: type[FedMezoError]) -> None:
    """Make `folder`, for its owner only, if it is not there; refuse one that others can read.

    Raises `error`, which names the command that mends it, for a folder or a file in it that is
    open to others or belongs to somebody else, and for one that cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [folder, *folder.rglob("*")]
        for path in found:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # Another process has just put a file into its place.
            if status.st_uid != os.geteuid():
                raise error(
                    f"{path} belongs to another user, who could read or change the keys in it; "
                    f"run as that user, or: chown -R {os.geteuid()} {folder}"
                )
            if stat.S_IMODE(status.st_mode) & 0o077 and not stat.S_ISLNK(status.st_mode):
                raise error(
                    f"Others than its owner can read or change {path}, and keys are kept there; "
                    f"run: chmod -R go= {folder}"
                )
    except OSError as problem:
        raise error(
            f"The folder {folder} cannot be made or read ({problem.strerror}); make it "
            "writable, or name another."
        ) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, in place of any before it, whole and durably."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def state_home() -> Path:
    """The folder for what programs keep about this user: $XDG_STATE_HOME, else ~/.local/state."""
    given = os.environ.get("XDG_STATE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    return base / "fedmezo"


def cache_home() -> Path:
    """The folder for what programs can get again: $XDG_CACHE_HOME, else ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "fedmezo"


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of that name; False also for a name that none can have."""
    try:
        return path.exists()
    except OSError:
        return False
