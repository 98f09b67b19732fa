"""The snapshots of one run: their files, and which of them the run has agreed to.

The replica writes a file and reports it. It counts once the answers of the next round have agreed
to the same digest of the weights. Then it is recorded in the journal and offered to workers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedmezo_core.errors import NotReadyError, ProtocolError, SnapshotDamagedError, SnapshotError
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import COMMITTED, SNAPSHOTTED, Entry
from fedmezo_core.records import Snapshotted, digest64_of
from fedmezo_core.wire.snapshots import (
    SNAPSHOT_CHUNK_BYTES,
    SNAPSHOTS_KEPT,
    file_name,
    round_in,
)

log = logging.getLogger("fedmezo.coordinator")

AGREED_KEPT_MAX = 1024
"""Rounds whose agreed digest is remembered while the replica may still be writing their weights."""
STREAMS_MAX = 64
"""Snapshots that are read at a time; one open file and one chunk in memory each."""


class SnapshotStore:
    """Folds the journal and keeps the folder in step with it.

    Invariant: `recorded` holds the newest snapshots in the journal, oldest first.
    """

    def __init__(self, folder: Path | None) -> None:
        """`folder` holds the files; None: no snapshot is offered."""
        self.recorded: list[Snapshotted] = []
        self._folder = folder
        self._run_id = ""
        self.agreed: dict[int, int] = {}
        """Round -> first 64 bits of the digest that it agreed to, for the newest rounds known."""
        self._offered: Snapshotted | None = None
        self._streams = 0

    def open(self, run_id: str) -> None:
        """Set the run whose snapshots these are; comes first."""
        self._run_id = run_id

    def fold(self, entry: Entry, agreed: Mapping[int, int]) -> None:
        """Take one more entry, and what the newest rounds agreed to after it."""
        if entry.row.kind == SNAPSHOTTED:
            record = decode_record(entry.row.body)
            assert isinstance(record, Snapshotted)
            self.recorded = [*self.recorded, record][-SNAPSHOTS_KEPT:]
        elif entry.row.kind == COMMITTED:
            self.agreed.update(agreed)
            while len(self.agreed) > AGREED_KEPT_MAX:
                del self.agreed[next(iter(self.agreed))]

    @property
    def newest(self) -> Snapshotted | None:
        """The newest snapshot that is offered here; None if there is none."""
        return self.recorded[-1] if self.recorded and self._folder is not None else None

    def offer(self, snapshot: Snapshotted) -> None:
        """Take note of a file that the replica has written; a newer file replaces an older one."""
        if self._folder is None or snapshot.round <= self._newest_round:
            return
        self._offered = snapshot

    def take_agreed(self) -> Snapshotted | None:
        """The offered file, once the run has agreed to its weights, so that it can be recorded."""
        offered = self._offered
        agreed = None if offered is None else self.agreed.get(offered.round)
        if offered is None or agreed is None:
            return None
        self._offered = None
        if agreed == digest64_of(offered.weights_digest):
            return offered
        log.error(
            "the snapshot of round %d is dropped: its weights are not the run's", offered.round
        )
        return None

    @property
    def oldest_round(self) -> int:
        """Round of the oldest kept snapshot; 0 while there are fewer than `SNAPSHOTS_KEPT`."""
        is_full = len(self.recorded) == SNAPSHOTS_KEPT and self._folder is not None
        return self.recorded[0].round if is_full else 0

    def drop_before(self, round_: int) -> None:
        """Forget snapshots of rounds before `round_`, whose later commits were dropped."""
        self.recorded = [snapshot for snapshot in self.recorded if snapshot.round >= round_]

    def check(self, snapshots: Sequence[Snapshotted]) -> None:
        """Read whole files; raises a `SnapshotError` unless all of them are what was recorded."""
        for snapshot in snapshots:
            descriptor = self._opened(snapshot)
            with os.fdopen(descriptor, "rb") as file:
                found = hashlib.file_digest(file, "sha256").digest()
            if found != snapshot.file_sha256:
                raise SnapshotDamagedError(
                    f"The snapshot of round {snapshot.round} has SHA-256 {found.hex()[:16]} "
                    f"instead of {snapshot.file_sha256.hex()[:16]}; check the coordinator's disk."
                )

    def has_newest(self) -> bool:
        """Whether the newest snapshot can be opened; logs what is wrong if not."""
        newest = self.newest
        if newest is None:
            return False
        try:
            os.close(self._opened(newest))
        except SnapshotError:
            return False
        return True

    def sweep(self, *, at_start: bool = False) -> None:
        """Delete files that no longer count, and at a start those that the journal does not know.

        What cannot be deleted is left, with a warning.
        """
        if self._folder is None:
            return
        kept = {file_name(self._run_id, snapshot.round) for snapshot in self.recorded}
        newest = self._newest_round
        try:
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                round_ = round_in(path.name, self._run_id)
                if round_ is None or path.name in kept:
                    continue
                if at_start or round_ < newest:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("old snapshots in %s cannot be deleted (%s)", self._folder, error.strerror)

    async def read(self, round_: int, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a snapshot's file from `offset` on, in chunks, read in other threads.

        Raises `SnapshotError` for one that is not kept, `SnapshotDamagedError` where the file has
        another size than was recorded, `ProtocolError` for an offset beyond it, and `NotReadyError`
        while `STREAMS_MAX` others are read.
        """
        snapshot = self.find(round_)
        if offset > snapshot.file_bytes:
            raise ProtocolError(
                f"The snapshot of round {round_} has {snapshot.file_bytes} bytes, so there is no "
                f"byte {offset}; begin again at 0."
            )
        with self._one_more_stream():
            descriptor = await asyncio.to_thread(self._opened, snapshot)
            try:
                while chunk := await asyncio.to_thread(
                    os.pread, descriptor, SNAPSHOT_CHUNK_BYTES, offset
                ):
                    yield chunk
                    offset += len(chunk)
            finally:
                os.close(descriptor)

    def find(self, round_: int) -> Snapshotted:
        """The snapshot of a round; `SnapshotError` if it is not kept (any more)."""
        for snapshot in self.recorded:
            if snapshot.round == round_ and self._folder is not None:
                return snapshot
        raise SnapshotError(
            f"No snapshot of round {round_} is kept here; ask for the newest one, or read the "
            "journal."
        )

    @property
    def _newest_round(self) -> int:
        return self.recorded[-1].round if self.recorded else 0

    def _opened(self, snapshot: Snapshotted) -> int:
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

    @contextmanager
    def _one_more_stream(self) -> Iterator[None]:
        if self._streams >= STREAMS_MAX:
            raise NotReadyError(
                f"{STREAMS_MAX} snapshots are being read, the most that one coordinator serves at "
                "a time; try later."
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
