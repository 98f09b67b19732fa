"""A late worker that joins by the journal and by a snapshot: seconds and bytes, over real gRPC.

    python -m benchmarks.serving.late_join

A random GPT-2 of 22 M parameters, a journal of 4,000 pairs, a snapshot 20 rounds before its end.
Both ways must end in the same weights.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import (
    Answered,
    Committed,
    Opened,
    Record,
    Scalars,
    SeedRange,
    Snapshotted,
    first_seed_of,
)
from fedmezo_core.trust.authorisation import Caller
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.snapshots import file_name
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.model.loading import quiet
from fedmezo_core.zo.party import open_party
from fedmezo_core.zo.plain.snapshot_header import sha256_of
from fedmezo_core.zo.snapshot_files import install_snapshot, write_snapshot
from fedmezo_worker.agent import Agent
from fedmezo_worker.engine import Engine
from fedmezo_worker.worker_settings import WorkerSettings
from tests.core.zo.conftest import make_tokenizer
from tests.integration.support.harness import Served, config_of, served
from tests.integration.support.parties import write_rows

ROUNDS: Final = 200
WORKERS: Final = 4
STEPS: Final = 5
SNAPSHOT_ROUND: Final = ROUNDS - 20
THREADS: Final = 1


def save_model(folder: Path) -> None:
    """Layers of 256 x 1024 and an embedding of 50,257 tokens."""
    torch.manual_seed(7)
    config = GPT2Config(n_embd=256, n_layer=12, n_head=4, bos_token_id=0, eos_token_id=0)
    with quiet():
        GPT2LMHeadModel(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)


def records_of(seed: int, round_: int) -> list[Record]:
    """A round in which all have answered."""
    grads = tuple(0.1 * (step + 1) for step in range(STEPS))
    digest = 99 if round_ == 1 else None
    runs = [
        SeedRange(first_seed_of(seed, round_, slot), (1e-4,) * STEPS) for slot in range(WORKERS)
    ]
    return [
        Opened(round_, 0, tuple(f"w{k}" for k in range(WORKERS))),
        *(Answered(round_, slot, Scalars(grads, None, digest)) for slot in range(WORKERS)),
        Committed(round_, tuple(runs), round_),
    ]


@dataclass
class Traffic:
    """Bytes of responses sent to a worker."""

    journal: int = 0
    snapshot: int = 0


@contextmanager
def counted(coordinator: Served) -> Iterator[Traffic]:
    """Count what a daemon sends."""
    traffic, daemon = Traffic(), coordinator.daemon
    read_journal, read_snapshot = daemon.read_journal, daemon.read_snapshot

    async def journal(request: Any, enter: Any, caller: Any = Caller.ANYONE) -> Any:
        answer = await read_journal(request, enter, caller)
        traffic.journal += len(answer)
        return answer

    async def snapshot(request: Any) -> Any:
        async for message in read_snapshot(request):
            traffic.snapshot += message.ByteSize()
            yield message

    daemon.read_journal = journal  # type: ignore[method-assign]
    daemon.read_snapshot = snapshot  # type: ignore[method-assign]
    yield traffic
    daemon.read_journal = read_journal  # type: ignore[method-assign]
    daemon.read_snapshot = read_snapshot  # type: ignore[method-assign]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print wall and CPU seconds; on a busy machine only the latter mean something."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    print(f"{what}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU time")


async def join(coordinator: Served, settings: dict[str, Any], way: str) -> bytes:
    """Catch up one way, after loading, and print what it took; the digest at the end."""
    rate = 0 if way == "journal" else 10**12
    engine = Engine()
    own = WorkerSettings(**settings, coordinator=coordinator.address, download_rate=rate)
    async with CoordinatorClient(coordinator.address) as client:
        member = await Agent(own, engine, client).join()
        with counted(coordinator) as traffic, timed(f"late join by {way}"):
            await member.catch_up(client)
        print(f"  {traffic.journal:,} bytes of the journal, {traffic.snapshot:,} of the snapshot")
        digest = await engine.digest()
    await engine.close()
    return digest


async def main() -> None:
    """Print both ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        config = config_of(
            rounds=ROUNDS + 1, local_steps=STEPS, digest_every_rounds=1_000_000, workers_min=WORKERS
        )
        party = open_party(config, str(folder / "model"), threads=THREADS)
        journal = Journal(SqliteStore(folder / "journal.db"))
        head = journal.append(encode_records([party.genesis()]))[0].head
        for round_ in range(1, ROUNDS + 1):
            records = records_of(config.seed, round_)
            entries, commit = journal.append(encode_records(records)), records[-1]
            assert isinstance(commit, Committed)
            if round_ <= SNAPSHOT_ROUND:
                party.weights.apply(round_, commits_of([commit]))
                head = entries[-1].head
        digest = party.weights.digest()
        with timed("writing the snapshot"):
            written = write_snapshot(
                folder, party.weights, run_id=config.run_id, head=head, weights_digest=digest
            )
        path = folder / file_name(config.run_id, SNAPSHOT_ROUND)
        with timed(f"hashing, installing and digesting its {written.file_bytes:,} bytes"):
            assert sha256_of(path) == written.file_sha256
            install_snapshot(path, party.weights, written)
        recorded = Snapshotted(SNAPSHOT_ROUND, digest, written.file_sha256, written.file_bytes)
        journal.append(encode_records([recorded]))
        journal.close()
        pairs = ROUNDS * WORKERS * STEPS
        print(
            f"{party.loaded.manifest.element_count:,} elements, {pairs:,} pairs, "
            f"{party.weights.replay_rate() / 1e9:.2f} G pair-elements/s on {THREADS} thread"
        )
        settings = {
            "name": "late",
            "data": write_rows(folder / "rows.jsonl"),
            "model": str(folder / "model"),
            "threads": THREADS,
        }
        del party
        async with served(folder / "journal.db", snapshots=folder) as coordinator:
            digests = {
                await join(coordinator, settings, way) for way in ("journal", "snapshot") * 2
            }
        assert len(digests) == 1, "both ways end in the same weights"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
