"""A served run that keeps a snapshot of any bytes, and counts what is read of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Answered, Committed, Opened, Scalars, SeedRange, Snapshotted
from fedmezo_core.wire.snapshots import Snapshot, file_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import Served, config_of, genesis_of, served

CHUNK_BYTES = 4096
"""Instead of 1 MiB, so that a small file has several chunks."""


@dataclass
class Kept:
    """A snapshot on offer; `breaks` says after how many bytes, and how, the next streams end."""

    at: Served
    folder: Path
    snapshot: Snapshot
    run_id: str
    breaks: list[tuple[int, Exception]] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    """(offset, bytes sent) of every stream so far."""

    @property
    def address(self) -> str:
        return self.at.address


def count_and_break(kept: Kept) -> None:
    """Let the daemon's streams be counted, and end as `kept.breaks` says."""
    read = kept.at.daemon.read_snapshot

    async def counted(
        request: wire.ReadSnapshotRequest,
    ) -> AsyncGenerator[wire.ReadSnapshotResponse, None]:
        bytes_max, error = kept.breaks.pop(0) if kept.breaks else (None, None)
        place = len(kept.reads)
        kept.reads.append((request.offset, 0))
        async for message in read(request):
            sent = kept.reads[place][1]
            if error is not None and message.data and sent >= (bytes_max or 0):
                raise error
            kept.reads[place] = (request.offset, sent + len(message.data))
            yield message

    kept.at.daemon.read_snapshot = counted  # type: ignore[method-assign]


@asynccontextmanager
async def kept_snapshot(folder: Path, data: bytes) -> AsyncIterator[Kept]:
    """A run of one round whose snapshot is a file of `data`."""
    genesis = genesis_of(config_of(workers_min=1, quorum=1, local_steps=1))
    run_id, snapshots = genesis.config.run_id, folder / "snapshots"
    snapshots.mkdir()
    (snapshots / file_name(run_id, 1)).write_bytes(data)
    journal = Journal(SqliteStore(folder / "journal.db"))
    recorded = Snapshotted(1, b"w" * 32, sha256(data).digest(), len(data))
    entries = journal.append(
        encode_records(
            [
                genesis,
                Opened(1, 0, ("w1",)),
                Answered(1, 0, Scalars((0.5,), None, 1)),
                Committed(1, (SeedRange(0, (0.5,)),), 0),
                recorded,
            ]
        )
    )
    journal.close()
    snapshot = Snapshot(1, entries[-1].head, b"w" * 32, recorded.file_sha256, len(data))
    async with served(folder / "journal.db", snapshots=snapshots) as at:
        kept = Kept(at, snapshots, snapshot, run_id)
        count_and_break(kept)
        yield kept
