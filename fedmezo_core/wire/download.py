"""Download a snapshot's file from the coordinator: the whole file, checked, or an error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from fedmezo_core.errors import NotReadyError, UnavailableError
from fedmezo_core.program import LongStep, long_step
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshot_pieces import GatheredSnapshot
from fedmezo_core.wire.snapshots import Snapshot

log = logging.getLogger("fedmezo.download")


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
    gathered = await asyncio.to_thread(GatheredSnapshot, snapshot, folder, weights_bytes)
    with contextlib.closing(gathered):
        what = f"downloading the snapshot of round {snapshot.round}"
        with long_step(what, snapshot.file_bytes, "bytes") as step:
            await _receive(client, run_id, gathered, step, give_up_after_s)
        yield gathered.path()


async def _receive(
    client: CoordinatorClient,
    run_id: str,
    gathered: GatheredSnapshot,
    step: LongStep,
    give_up_after_s: float,
) -> None:
    reconnecting = Reconnecting(log, give_up_after_s=give_up_after_s)
    while not gathered.is_whole:
        before = gathered.offset
        try:
            await _stream(client, run_id, gathered, step)
        except (UnavailableError, NotReadyError) as error:
            if gathered.offset > before:
                reconnecting.reached()
            await reconnecting.wait_after(
                error,
                f"the snapshot broke off after {gathered.offset} of "
                f"{gathered.snapshot.file_bytes} bytes; going on from there ({error})",
            )


async def _stream(
    client: CoordinatorClient, run_id: str, gathered: GatheredSnapshot, step: LongStep
) -> None:
    pieces = client.read_snapshot(run_id, gathered.snapshot.round, gathered.offset)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Snapshot):
                gathered.check_same(piece)
            else:
                await asyncio.to_thread(gathered.add, piece)
                step.advance(len(piece))
    if not gathered.is_whole:
        raise UnavailableError("The coordinator ended the stream early.")
