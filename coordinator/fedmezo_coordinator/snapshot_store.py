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

from fedmezo_core.errors import NotReadyError, SnapshotDamagedError
from fedmezo_core.journal.journal import COMMITTED, Entry
from fedmezo_core.records import Snapshotted, digest64_of
from fedmezo_core.wire.snapshot_pieces import RecordedSnapshots
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


class SnapshotStore(RecordedSnapshots):
    """Folds the journal and keeps the folder in step with it."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` holds the files; None: no snapshot is offered."""
        super().__init__(folder)
        self.agreed: dict[int, int] = {}
        """Round -> first 64 bits of the digest that it agreed to, for the newest rounds known."""
        self._offered: Snapshotted | None = None
        self._streams = 0

    def note_agreed(self, entry: Entry, agreed: Mapping[int, int]) -> None:
        """Take what the newest rounds agreed to after one more entry."""
        if entry.row.kind == COMMITTED:
            self.agreed.update(agreed)
            while len(self.agreed) > AGREED_KEPT_MAX:
                del self.agreed[next(iter(self.agreed))]

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

    def check(self, snapshots: Sequence[Snapshotted]) -> None:
        """Read whole files; raises a `SnapshotError` unless all of them are what was recorded."""
        for snapshot in snapshots:
            descriptor = self.opened(snapshot)
            with os.fdopen(descriptor, "rb") as file:
                found = hashlib.file_digest(file, "sha256").digest()
            if found != snapshot.file_sha256:
                raise SnapshotDamagedError(
                    f"The snapshot of round {snapshot.round} has SHA-256 {found.hex()[:16]} "
                    f"instead of {snapshot.file_sha256.hex()[:16]}; check the coordinator's disk."
                )

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
        snapshot = self.find(round_, offset)
        with self._one_more_stream():
            descriptor = await asyncio.to_thread(self.opened, snapshot)
            try:
                while chunk := await asyncio.to_thread(
                    os.pread, descriptor, SNAPSHOT_CHUNK_BYTES, offset
                ):
                    yield chunk
                    offset += len(chunk)
            finally:
                os.close(descriptor)

    @property
    def _newest_round(self) -> int:
        return self.recorded[-1].round if self.recorded else 0

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
