"""Download a snapshot's file from the coordinator: the whole file, checked, or an error."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from fedmezo_core.errors import (
    NotReadyError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.program import LongStep, long_step
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Snapshot

log = logging.getLogger("fedmezo.download")

HEADER_BYTES_MAX = 100_000_000
"""Most bytes of a snapshot beyond its weights: the bound of safetensors on a header."""


@contextlib.asynccontextmanager
async def downloaded(
    client: CoordinatorClient,
    run_id: str,
    snapshot: Snapshot,
    *,
    folder: Path,
    weights_bytes: int,
    give_up_after_s: float,
) -> AsyncIterator[Path]:
    """Download a snapshot of `weights_bytes` of weights into `folder`; yields the file's path.

    A broken stream is resumed where it broke. The file has no name, so that nothing is left of it
    when the process ends. Raises `SnapshotError` where it is no longer kept or the disk has no
    room, `SnapshotDamagedError` if it is not what the journal says, and `UnavailableError` after
    `give_up_after_s` seconds without a byte.
    """
    if snapshot.file_bytes > weights_bytes + HEADER_BYTES_MAX:
        raise SnapshotDamagedError(
            f"The snapshot of round {snapshot.round} is said to have {snapshot.file_bytes} bytes, "
            f"but the weights have {weights_bytes}; check the coordinator."
        )
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            # Now, so that a full disk is found before anything is sent.
            await asyncio.to_thread(os.posix_fallocate, file.fileno(), 0, snapshot.file_bytes)
        except OSError as error:
            raise _no_room(snapshot, folder, error) from None
        download = _Download(client, run_id, snapshot, file, folder)
        await download.run(give_up_after_s)
        yield Path(f"/proc/self/fd/{file.fileno()}")


class _Download:
    """Invariant: the file holds the first `offset` bytes, and `hashed` has seen them."""

    def __init__(
        self,
        client: CoordinatorClient,
        run_id: str,
        snapshot: Snapshot,
        file: IO[bytes],
        folder: Path,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._snapshot = snapshot
        self._file = file
        self._folder = folder
        self._hashed = hashlib.sha256()
        self._offset = 0

    async def run(self, give_up_after_s: float) -> None:
        what = f"downloading the snapshot of round {self._snapshot.round}"
        with long_step(what, self._snapshot.file_bytes, "bytes") as step:
            await self._receive(step, give_up_after_s)
        self._check_hash()
        self._file.flush()

    async def _receive(self, step: LongStep, give_up_after_s: float) -> None:
        reconnecting = Reconnecting(log, give_up_after_s=give_up_after_s)
        while self._offset < self._snapshot.file_bytes:
            before = self._offset
            try:
                await self._stream(step)
            except (UnavailableError, NotReadyError) as error:
                if self._offset > before:
                    reconnecting.reached()
                await reconnecting.wait_after(
                    error,
                    f"the snapshot broke off after {self._offset} of {self._snapshot.file_bytes} "
                    f"bytes; going on from there ({error})",
                )

    async def _stream(self, step: LongStep) -> None:
        pieces = self._client.read_snapshot(self._run_id, self._snapshot.round, self._offset)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Snapshot):
                    self._check_same(piece)
                else:
                    await self._take(piece)
                    step.advance(len(piece))
        if self._offset < self._snapshot.file_bytes:
            raise UnavailableError("The coordinator ended the stream early.")

    async def _take(self, piece: bytes) -> None:
        snapshot = self._snapshot
        if self._offset + len(piece) > snapshot.file_bytes:
            raise SnapshotDamagedError(
                f"More than the {snapshot.file_bytes} bytes of the snapshot of round "
                f"{snapshot.round} came; check the coordinator."
            )
        try:
            await asyncio.to_thread(self._write, piece)
        except OSError as error:
            raise _no_room(snapshot, self._folder, error) from None
        self._offset += len(piece)

    def _write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._hashed.update(piece)

    def _check_same(self, found: Snapshot) -> None:
        if found != self._snapshot:
            raise SnapshotError(
                f"The snapshot of round {self._snapshot.round} is another one than the coordinator "
                "offered; check which coordinator this worker is connected to."
            )

    def _check_hash(self) -> None:
        found, snapshot = self._hashed.digest(), self._snapshot
        if found != snapshot.file_sha256:
            raise SnapshotDamagedError(
                f"The snapshot of round {snapshot.round} is damaged: its SHA-256 begins "
                f"{found.hex()[:16]} instead of {snapshot.file_sha256.hex()[:16]}; check the "
                "coordinator's disk."
            )


def _no_room(snapshot: Snapshot, folder: Path, error: OSError) -> SnapshotError:
    return SnapshotError(
        f"The snapshot of round {snapshot.round} needs {snapshot.file_bytes} bytes in {folder} "
        f"({error.strerror}); make room there, or name another folder in TMPDIR."
    )
