"""A disk that remembers what was asked of it, and what a power cut could leave of that.

`recording` puts a VFS under SQLite that notes every write, truncation, sync, creation and deletion,
and notes what Python's `os` does to files whose names end in `WATCHED`.
`Disk` replays such a trace up to any point and knows what was synced by then; everything else is at
the mercy of a `Mode`. Two things are assumed, as SQLite itself assumes them: a write changes no
bytes outside its range, and a folder's changes reach the disk in the order in which they were made.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import apsw

SECTOR_BYTES: Final = 512
WATCHED: Final = (".mark", ".mark.partial")
"""Endings of the names of files that Python writes by itself, without SQLite."""
_BELOW: Final = "unix"
"""The VFS that does the work; named, because the default is the recorder itself."""
_SYNCS_ITS_FOLDER: Final = (
    apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL
)
"""Kinds of files with whose first sync SQLite's own VFS also syncs the folder."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes at a place of a file."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file gets this size."""

    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """What was written to a file is on the disk."""

    inode: int


@dataclass(frozen=True, slots=True)
class FailedSync:
    """A sync that failed. On Linux its data is then never written, yet can still be read."""

    inode: int


@dataclass(frozen=True, slots=True)
class Link:
    """A name now means this file."""

    name: str
    inode: int
    instead_of: str = ""
    """The name that it had until now: a rename is one operation. Empty: it had none."""


@dataclass(frozen=True, slots=True)
class Unlink:
    """A name is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class SyncFolder:
    """The names as they are now are on the disk."""


@dataclass(frozen=True, slots=True)
class Promise:
    """Not an operation: how many rows had been begun, and acknowledged, at this point."""

    begun: int
    acknowledged: int
    history: int = 0
    """Which rows those are: a start that found fewer rows than were begun may write others."""


Op = Write | Truncate | Sync | FailedSync | Link | Unlink | SyncFolder | Promise
Image = Mapping[str, bytes]
"""The files of a folder, by name."""


class Mode(StrEnum):
    """What becomes of writes that were not synced."""

    LOST = "lost"
    KEPT = "kept"
    SUBSET = "subset"
    """Some reached the disk, in order."""
    TORN = "torn"
    """Of each, some sectors reached the disk."""
    SCRAMBLED = "scrambled"
    """The same, and sectors that were being written hold noise."""
    REORDERED = "reordered"
    """The first few of them in another order."""


RANDOM_MODES: Final = (Mode.SUBSET, Mode.TORN, Mode.SCRAMBLED, Mode.REORDERED)


@dataclass
class Disk:
    """What a trace so far has left: what is synced, and what is not."""

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    pending: list[Write | Truncate] = field(default_factory=list)
    pending_names: list[Link | Unlink] = field(default_factory=list)
    promise: Promise = Promise(0, 0)

    def apply(self, op: Op) -> None:
        """One more operation has returned."""
        match op:
            case Write() | Truncate():
                self.pending.append(op)
            case Link() | Unlink():
                self.pending_names.append(op)
            case Sync(inode):
                for one in self.pending:
                    if one.inode == inode:
                        _change(self.files, one)
                self._settle(inode)
            case FailedSync(inode):
                self._settle(inode)
            case SyncFolder():
                _rename(self.names, self.pending_names)
                self.pending_names = []
            case Promise():
                self.promise = op

    def _settle(self, inode: int) -> None:
        self.pending = [one for one in self.pending if one.inode != inode]

    def crashed(self, mode: Mode, rng: random.Random) -> Image:
        """The folder as it is found after a power cut now."""
        names = dict(self.names)
        _rename(names, self.pending_names[: self._names_kept(mode, rng)])
        survivors = list(_survivors(self.pending, mode, rng))
        touched = {op.inode for op in survivors}
        files = {
            inode: bytearray(data) if inode in touched else data
            for inode, data in self.files.items()
            if inode in touched or inode in names.values()
        }
        for op in survivors:
            _change(files, op)
        return {name: bytes(files.get(inode, b"")) for name, inode in names.items()}

    def live(self) -> dict[str, int]:
        """Names as a process sees them, which knows nothing of syncs."""
        names = dict(self.names)
        _rename(names, self.pending_names)
        return names

    def _names_kept(self, mode: Mode, rng: random.Random) -> int:
        if mode is Mode.LOST:
            return 0
        return (
            len(self.pending_names)
            if mode is Mode.KEPT
            else rng.randint(0, len(self.pending_names))
        )


def _change(files: dict[int, bytearray], op: Write | Truncate) -> None:
    data = files.setdefault(op.inode, bytearray())
    if isinstance(op, Truncate):
        del data[op.size :]
        data.extend(bytes(op.size - len(data)))
        return
    data.extend(bytes(max(0, op.offset - len(data))))
    data[op.offset : op.offset + len(op.data)] = op.data


def _rename(names: dict[str, int], ops: Sequence[Link | Unlink]) -> None:
    for op in ops:
        if isinstance(op, Link):
            names[op.name] = op.inode
            names.pop(op.instead_of, None)
        else:
            names.pop(op.name, None)


def _survivors(
    pending: Sequence[Write | Truncate], mode: Mode, rng: random.Random
) -> Iterator[Write | Truncate]:
    match mode:
        case Mode.LOST:
            return
        case Mode.KEPT:
            yield from pending
        case Mode.REORDERED:
            order = list(pending)
            rng.shuffle(order)
            yield from order[: rng.randint(0, len(order))]
        case _:
            share = rng.choice((0.1, 0.5, 0.9))
            for op in pending:
                if mode is not Mode.SUBSET and isinstance(op, Write) and rng.random() < 0.7:
                    yield from _sectors(op, share, mode is Mode.SCRAMBLED, rng)
                elif rng.random() < share:
                    yield op


def _sectors(op: Write, share: float, noisy: bool, rng: random.Random) -> Iterator[Write]:
    """Pieces of a write that a sector's border ends; the others are lost, or hold noise."""
    start, end = op.offset, op.offset + len(op.data)
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if rng.random() < share:
            yield Write(op.inode, start, op.data[start - op.offset : stop - op.offset])
        elif noisy and rng.random() < 0.5:
            yield Write(op.inode, start, rng.randbytes(stop - start))
        start = stop


# ---------------------------------------------------------------- the recorder


class Recorder(apsw.VFS):
    """SQLite's own VFS, with a trace of everything that changes the files of one folder."""

    def __init__(self, trace: list[Op], seed: int) -> None:
        self.trace = trace
        self.names: dict[str, int] = {}
        """Files that lie in the folder now."""
        self.syncs_until_failure: int | None = None
        """The sync after so many fails, once."""
        self._rng = random.Random(seed)
        self._inodes = 0
        super().__init__("recorder", _BELOW, makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _RecordedFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        name = Path(filename).name
        if name in self.names:
            del self.names[name]
            self.trace.append(Unlink(name))
        if syncdir:
            self.trace.append(SyncFolder())

    def xRandomness(self, numbytes: int) -> bytes:
        """The same salts in every recording of a seed, so that its traces are the same."""
        return self._rng.randbytes(numbytes)

    def opened(self, filename: str) -> int:
        """The inode of a file that is open now, which may be new."""
        name = Path(filename).name
        if name not in self.names:
            self.names[name] = self._inodes
            self.trace.append(Link(name, self._inodes))
            self._inodes += 1
        return self.names[name]

    def fails_now(self) -> bool:
        """Whether the sync that is asked for fails."""
        if self.syncs_until_failure is None:
            return False
        self.syncs_until_failure -= 1
        if self.syncs_until_failure >= 0:
            return False
        self.syncs_until_failure = None
        return True

    def restart(self, trace: Sequence[Op]) -> None:
        """Go on from what another trace has left."""
        self.trace[:] = trace
        inodes = [op.inode for op in trace if isinstance(op, Link)]
        self._inodes = max([self._inodes, *(inode + 1 for inode in inodes)])
        self.names = replayed(trace).live()


class _RecordedFile(apsw.VFSFile):
    """One file of SQLite's."""

    def __init__(self, recorder: Recorder, name: Any, flags: list[int]) -> None:
        asked = flags[0]
        super().__init__(_BELOW, name, flags)
        filename = name.filename() if isinstance(name, apsw.URIFilename) else name
        assert filename, "the store makes no temporary files"
        self._recorder = recorder
        self._trace = recorder.trace
        self._inode = recorder.opened(filename)
        self._syncs_folder = bool(asked & apsw.SQLITE_OPEN_CREATE and asked & _SYNCS_ITS_FOLDER)

    def xWrite(self, data: Any, offset: int) -> None:
        super().xWrite(data, offset)
        self._trace.append(Write(self._inode, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._trace.append(Truncate(self._inode, newsize))

    def xSync(self, flags: int) -> None:
        if self._recorder.fails_now():
            self._trace.append(FailedSync(self._inode))
            raise apsw.IOError("injected: fsync")
        super().xSync(flags)
        self._trace.append(Sync(self._inode))
        if self._syncs_folder:
            self._syncs_folder = False
            self._trace.append(SyncFolder())


class _WatchedFiles:
    """Notes what `os` does to the watched files; each of its functions stands in for one."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._trace = recorder.trace
        self._pwrite, self._fsync, self._replace = os.pwrite, os.fsync, os.replace
        self._was_renamed = False

    def pwrite(self, file: int, data: bytes, offset: int) -> int:
        """Write; the first write creates the file."""
        name = _name_of(file)
        if name.endswith(WATCHED):
            is_new = name not in self._recorder.names
            inode = self._recorder.opened(name)
            if not is_new and offset == 0:
                self._trace.append(Truncate(inode, 0))
            self._trace.append(Write(inode, offset, data))
        return self._pwrite(file, data, offset)

    def fsync(self, file: int) -> None:
        """Sync a watched file, or the folder after one was renamed."""
        self._fsync(file)
        name = _name_of(file)
        if name.endswith(WATCHED):
            self._trace.append(Sync(self._recorder.opened(name)))
        elif self._was_renamed:
            self._trace.append(SyncFolder())
            self._was_renamed = False

    def replace(self, before: Path, after: Path) -> None:
        """Give a watched file another name."""
        self._replace(before, after)
        names = self._recorder.names
        if before.name in names:
            inode = names[after.name] = names.pop(before.name)
            self._trace.append(Link(after.name, inode, before.name))
            self._was_renamed = True


def _name_of(file: int) -> str:
    return Path(f"/proc/self/fd/{file}").readlink().name


@contextmanager
def recording(trace: list[Op], seed: int = 0) -> Iterator[Recorder]:
    """Note in `trace` what connections that are opened meanwhile do; they all work in one folder.

    They must be closed before the end.
    """
    recorder = Recorder(trace, seed)
    apsw.randomness(0)  # Drawn anew, and now from the recorder's.
    watched = _WatchedFiles(recorder)
    try:
        with patch.multiple(
            "os", pwrite=watched.pwrite, fsync=watched.fsync, replace=watched.replace
        ):
            yield recorder
    finally:
        recorder.unregister()
        apsw.randomness(0)


def replayed(trace: Sequence[Op]) -> Disk:
    """The disk after all of a trace."""
    disk = Disk()
    for op in trace:
        disk.apply(op)
    return disk


def page_cache(trace: Sequence[Op]) -> Image:
    """What a process that starts after another was killed finds: everything, synced or not."""
    disk = replayed([op for op in trace if not isinstance(op, FailedSync)])
    return disk.crashed(Mode.KEPT, random.Random(0))


def written(image: Image, folder: Path) -> None:
    """Make `folder` hold these files and no others."""
    for path in folder.iterdir():
        if path.name not in image:
            path.unlink()
    for name, data in image.items():
        (folder / name).write_bytes(data)


def as_trace(image: Image) -> list[Op]:
    """A trace that leaves these files, all synced."""
    trace: list[Op] = []
    for inode, (name, data) in enumerate(image.items()):
        trace += [Link(name, inode), Write(inode, 0, data), Sync(inode)]
    return [*trace, SyncFolder()]
