r"""A coordinator's memory and journal over a long run, with and without compaction (decision 0021).

The daemon's own loop, machine and SQLite store, without gRPC; one worker answers at once, and what
is played of the replica writes a small file as a snapshot. The journal should lie where a sync is
cheap.

    python -m benchmarks.serving.long_run --rounds 100000 --compact-after-records 50000 \
        --folder /dev/shm
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.measured_coordinator import contract
from benchmarks.serving.swarm import answer_to, hello_of
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.serving import loop as serving
from fedmezo_coordinator.serving.worker_session import WorkerSession
from fedmezo_core.journal.codec import encode_record, encode_records
from fedmezo_core.journal.journal import ZERO_HASH, Journal, head_after
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from fedmezo_core.wire.snapshots import file_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import genesis_of

GRADS = (0.5,) * 10
LOOKS = 8
"""Lines that are printed of a run."""


async def next_assignment(session: WorkerSession) -> wire.Assign:
    """What the worker is to do next; everything before it is read and forgotten."""
    while True:
        message = await session.outbox.get()
        if isinstance(message, wire.SessionResponse) and message.HasField("assign"):
            return message.assign
        if isinstance(message, Exception):
            raise message


async def play_replica(daemon: Daemon, folder: Path, run_id: str, round_: int) -> None:
    """Write a snapshot and report it."""
    data = b"weights after %d" % round_
    (folder / file_name(run_id, round_)).write_bytes(data)
    digest = (99).to_bytes(8, "little") + bytes(24)
    report = wire.SnapshotReport(file_sha256=hashlib.sha256(data).digest(), file_bytes=len(data))
    request = wire.ReportReplicaRequest(
        run_id=run_id,
        secret=daemon.replica_secret,
        round=round_,
        weights_digest=digest,
        snapshot=report,
    )
    await daemon.report_replica(request)


def bytes_of_journal(folder: Path) -> int:
    """The file and its log."""
    return sum(file.stat().st_size for file in folder.glob("journal.db*"))


def without_thread(daemon: Daemon) -> None:
    """Use the journal on the loop: a sync is cheap here, a million changes of threads are not."""

    async def here(work: Callable[[], Any]) -> Any:
        return work()

    daemon._on_disk = here  # type: ignore[method-assign]
    serving.SIBLINGS_S = 0.0  # Nobody else answers.


async def drive(folder: Path, genesis: Genesis, rounds: int, every: int, compact: int) -> None:
    """Run `rounds` rounds, and print what they took."""
    path, snapshots, run_id = folder / "journal.db", folder / "snapshots", genesis.config.run_id
    snapshots.mkdir()
    journal = Journal(SqliteStore(path))
    journal.append(encode_records([genesis]))
    daemon = Daemon(journal, snapshots=snapshots, compact_after_records=compact)
    await daemon.load()
    without_thread(daemon)
    serving = asyncio.create_task(daemon.serve())
    head = head_after(ZERO_HASH, encode_record(genesis))
    session = await daemon.join(hello_of(genesis, "w1", 0, head))
    process, began_s = psutil.Process(), time.perf_counter()
    for round_ in range(1, rounds + 1):
        assign = await next_assignment(session)
        answer = answer_to(assign, GRADS)
        await daemon.receive(session, answer)
        if round_ % every == 1 and round_ > 1:
            await play_replica(daemon, snapshots, run_id, round_ - 1)
        if round_ % (rounds // LOOKS) == 0:
            size = bytes_of_journal(folder)
            resident = process.memory_info().rss
            print(
                f"{round_:>9,} rounds  {len(journal):>9,} records, from {journal.begins:>9,}  "
                f"{resident / 1e6:7.1f} MB resident  {size / 1e6:7.1f} MB on the disk  "
                f"{time.perf_counter() - began_s:6.1f} s",
                flush=True,
            )
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await daemon.close()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    again = Daemon(Journal(SqliteStore(path)), snapshots=snapshots)
    await again.load()
    print(
        f"loaded again in {time.perf_counter() - began_s:.2f} s "
        f"({time.process_time() - cpu_s:.2f} s of CPU)"
    )
    await again.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.long_run")
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--snapshot-every-rounds", type=int, default=1000)
    parser.add_argument("--compact-after-records", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where; default: the temporary folder")
    options = parser.parse_args()
    logging.disable()
    config = contract(
        workers_min=1,
        quorum=1,
        cohort_size_max=1,
        local_steps=len(GRADS),
        digest_every_rounds=1,
        rounds=10_000_000,
    )
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fedmezo-long-run-") as folder:
        asyncio.run(
            drive(
                Path(folder),
                genesis_of(config),
                options.rounds,
                options.snapshot_every_rounds,
                options.compact_after_records,
            )
        )


if __name__ == "__main__":
    main()
