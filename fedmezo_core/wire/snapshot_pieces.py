"""A snapshot's file in pieces: where it is kept, and where the pieces are put together again."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import weakref
from pathlib import Path

from fedmezo_core.errors import ProtocolError, SnapshotDamagedError, SnapshotError
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import SNAPSHOTTED, Entry
from fedmezo_core.records import Snapshotted
from fedmezo_core.wire.snapshots import SNAPSHOTS_KEPT, Snapshot, file_name

log = logging.getLogger("fedmezo.snapshots")

HEADER_BYTES_MAX = 100_000_000
"""Most bytes of a snapshot beyond its weights: the bound of safetensors on a header."""


class RecordedSnapshots:
    """The newest snapshots that a journal records, and their files.

    Invariant: `recorded` holds them, oldest first.
    """

    def __init__(self, folder: Path | None) -> None:
        """`folder` holds the files; None: no snapshot is offered."""
        self.recorded: list[Snapshotted] = []
        self._folder = folder
        self._run_id = ""

    def open(self, run_id: str) -> None:
        """Set the run whose snapshots these are; comes first."""
        self._run_id = run_id

    def fold(self, entry: Entry) -> None:
        """Take one more entry of the journal."""
        if entry.row.kind == SNAPSHOTTED:
            record = decode_record(entry.row.body)
            assert isinstance(record, Snapshotted)
            self.recorded = [*self.recorded, record][-SNAPSHOTS_KEPT:]

    def drop_before(self, round_: int) -> None:
        """Forget snapshots of rounds before `round_`, whose later commits were dropped."""
        self.recorded = [snapshot for snapshot in self.recorded if snapshot.round >= round_]

    @property
    def newest(self) -> Snapshotted | None:
        """The newest snapshot that is offered here; None if there is none."""
        return self.recorded[-1] if self.recorded and self._folder is not None else None

    def has_newest(self) -> bool:
        """Whether the newest snapshot can be opened; logs what is wrong if not."""
        newest = self.newest
        if newest is None:
            return False
        try:
            os.close(self.opened(newest))
        except SnapshotError:
            return False
        return True

    def find(self, round_: int, offset: int = 0) -> Snapshotted:
        """The snapshot of a round, to be read from `offset` on.

        Raises `SnapshotError` if it is not kept (any more), `ProtocolError` for an offset beyond
        its file.
        """
        for snapshot in self.recorded:
            if snapshot.round == round_ and self._folder is not None:
                if offset > snapshot.file_bytes:
                    raise ProtocolError(
                        f"The snapshot of round {round_} has {snapshot.file_bytes} bytes, so there "
                        f"is no byte {offset}; begin again at 0."
                    )
                return snapshot
        raise SnapshotError(
            f"No snapshot of round {round_} is kept here; ask for the newest one, or read the "
            "journal."
        )

    def opened(self, snapshot: Snapshotted) -> int:
        """A descriptor of a snapshot's file.

        Raises `SnapshotError` if it cannot be read, `SnapshotDamagedError` if it has another size
        than was recorded.
        """
        assert self._folder is not None
        path = self._folder / file_name(self._run_id, snapshot.round)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            log.error("the snapshot %s cannot be read (%s)", path, error.strerror)
            raise SnapshotError(
                f"The snapshot of round {snapshot.round} cannot be read at the coordinator "
                f"({error.strerror}); read the journal."
            ) from None
        size = os.fstat(descriptor).st_size
        if size != snapshot.file_bytes:
            os.close(descriptor)
            log.error("the snapshot %s has %d bytes, not %d", path, size, snapshot.file_bytes)
            raise SnapshotDamagedError(
                f"The snapshot of round {snapshot.round} has {size} bytes at the coordinator "
                f"instead of {snapshot.file_bytes}; read the journal."
            )
        return descriptor


class GatheredSnapshot:
    """The first bytes of a snapshot's file, in a file without a name, which leaves nothing behind.

    Invariant: the file holds the first `offset` bytes, and the hash has seen them.
    """

    def __init__(self, snapshot: Snapshot, folder: Path, weights_bytes: int) -> None:
        """Make room in `folder` for a snapshot of at most `weights_bytes` of weights.

        Raises `SnapshotDamagedError` for one that is larger, `SnapshotError` if there is no room.
        """
        if snapshot.file_bytes > weights_bytes + HEADER_BYTES_MAX:
            raise SnapshotDamagedError(
                f"The snapshot of round {snapshot.round} is said to have {snapshot.file_bytes} "
                f"bytes, but the weights have {weights_bytes}; check the coordinator."
            )
        self.snapshot = snapshot
        self.offset = 0
        self._folder = folder
        self._hashed = hashlib.sha256()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in `close`
        except OSError as error:
            raise self._no_room(error) from None
        weakref.finalize(self, self._file.close)
        try:
            # Now, so that a full disk is found before anything is sent.
            os.posix_fallocate(self._file.fileno(), 0, snapshot.file_bytes)
        except OSError as error:
            self.close()
            raise self._no_room(error) from None

    def check_same(self, found: Snapshot) -> None:
        """Raise `SnapshotError` if the coordinator now says something else of the snapshot."""
        if found != self.snapshot:
            raise SnapshotError(
                f"The snapshot of round {self.snapshot.round} is another one than the coordinator "
                "offered; check which coordinator this worker is connected to."
            )

    def add(self, piece: bytes) -> None:
        """Take the next bytes; raises `SnapshotDamagedError` for too many, `SnapshotError`."""
        snapshot = self.snapshot
        if self.offset + len(piece) > snapshot.file_bytes:
            raise SnapshotDamagedError(
                f"More than the {snapshot.file_bytes} bytes of the snapshot of round "
                f"{snapshot.round} came; check the coordinator."
            )
        try:
            self._file.write(piece)
        except OSError as error:
            raise self._no_room(error) from None
        self._hashed.update(piece)
        self.offset += len(piece)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes came."""
        return self.offset == self.snapshot.file_bytes

    def path(self) -> Path:
        """The path of the whole file, until `close`; raises `SnapshotDamagedError` for others."""
        found, snapshot = self._hashed.digest(), self.snapshot
        if found != snapshot.file_sha256:
            raise SnapshotDamagedError(
                f"The snapshot of round {snapshot.round} is damaged: its SHA-256 begins "
                f"{found.hex()[:16]} instead of {snapshot.file_sha256.hex()[:16]}; check the "
                "coordinator's disk."
            )
        self._file.flush()
        return Path(f"/proc/self/fd/{self._file.fileno()}")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def _no_room(self, error: OSError) -> SnapshotError:
        return SnapshotError(
            f"The snapshot of round {self.snapshot.round} needs {self.snapshot.file_bytes} bytes "
            f"in {self._folder} ({error.strerror}); make room there, or name another folder in "
            "TMPDIR."
        )
