"""A late worker begins from a snapshot: real replica, real gRPC, the same weights as everyone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize
from safetensors import safe_open

from fedmezo.run_policy import RunPolicy
from fedmezo_coordinator import snapshot_store as store_module
from fedmezo_core.errors import UnavailableError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Genesis, Snapshotted
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.snapshots import file_name
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.snapshot_files import write_snapshot
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from tests.coordinator.snapshot_runs import CHUNK_BYTES, Kept, count_and_break
from tests.integration.support.harness import (
    Programs,
    at_round,
    joined,
    records_of,
    replica_digested,
    run_values,
    served,
    until,
)
from tests.integration.support.parties import GatedEngine, Workers

ROUNDS = 8
RUN = {"rounds": ROUNDS, "workers_min": 2, "quorum": 2}
RUN_ID = str(run_values()["run_id"])


@pytest.fixture
def slow_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose replay is so slow that any snapshot is cheaper."""

    async def replay_rate(_: Engine) -> float:
        return 1.0

    monkeypatch.setattr(Engine, "replay_rate", replay_rate)


async def snapshot_of(client: CoordinatorClient, round_: int) -> None:
    async def there() -> bool:
        offer = (await client.get_run()).snapshot
        return offer is not None and offer.snapshot.round >= round_

    await until(there, f"the snapshot of round {round_}")


class Held:
    """Lets a worker measure up to a round; a run that needs it holds there."""

    def __init__(self, engine: GatedEngine, round_: int) -> None:
        self._engine, self._measure = engine, engine.measure
        self._round = round_
        self._let = asyncio.Event()
        engine.measure = self._held  # type: ignore[method-assign]

    async def _held(self, order: Measure) -> Measured:
        while order.ticket.round > self._round:
            await self._let.wait()
        return await self._measure(order)

    def let(self, round_: int) -> None:
        """Let it measure up to a later round."""
        self._round = round_
        self._let.set()
        self._let = asyncio.Event()


def assert_all_agree(status: wire.GetStatusResponse, *parties: str) -> None:
    assert {d.party for d in status.digests if d.round == ROUNDS} == set(parties)
    digests = {d.party: d.weights_digest for d in status.digests if d.round == ROUNDS}
    assert len(set(digests.values())) == 1
    assert not status.divergences


@pytest.mark.timeout(400)
async def test_a_late_worker_takes_the_replicas_snapshot_and_ends_in_the_same_weights(
    programs: Programs,
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    slow_replay: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The coordinator, its replica and everything between them are processes of their own."""
    journal, kept = tmp_path / "journal.db", tmp_path / "journal.db.snapshots"
    coordinator, address = await programs.coordinator(
        *(journal, run_values(**RUN)), *("--model", model_folder, "--snapshot-every-rounds", "2")
    )
    working = workers.start_all(address, data_files[:2])
    held = Held(working[0].engine, 0)
    async with CoordinatorClient(address) as client:
        for stop in (3, 5, 7):
            held.let(stop)
            await at_round(client, stop)
            await snapshot_of(client, stop - 1)
        while len(list(kept.iterdir())) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # The oldest goes after the newest is on offer.
        assert {path.name for path in kept.iterdir()} == {file_name(RUN_ID, n) for n in (4, 6)}
        offer = (await client.get_run()).snapshot
        assert offer is not None
        with caplog.at_level(logging.INFO, logger="fedmezo.worker"):
            working.append(workers.start(address, "late", data_files[2]))
            await joined(client, "late")
        assert f"took the snapshot of round 6: {offer.snapshot.file_bytes} bytes" in caplog.text
        assert "caught up from round 0 to 7" in caplog.text
        held.let(ROUNDS)
        assert [await worker.outcome() for worker in working] == [None] * 3
        await replica_digested(client, ROUNDS)
        assert_all_agree(await client.get_status(), "w1", "w2", "late", "replica")
    with safe_open(kept / file_name(RUN_ID, 6), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["run_id"] == RUN_ID
    assert metadata["round"] == "6"
    assert metadata["head"] == offer.snapshot.head.hex()
    assert metadata["weights_digest"] == offer.snapshot.weights_digest.hex()
    coordinator.process.terminate()
    assert await coordinator.wait() == 0
    rounds = [r.round for r in records_of(journal) if isinstance(r, Snapshotted)]
    assert rounds == [2, 4, 6]


# ---------------------------------------------------------------- what can go wrong on the way


@asynccontextmanager
async def a_run_with_a_snapshot(
    workers: Workers, data_files: list[Path], genesis: Genesis, folder: Path
) -> AsyncIterator[tuple[Kept, CoordinatorClient, Callable[..., Any]]]:
    """A run held in round 3 with a snapshot of round 2; `finish` adds a worker and lets it end."""
    async with (
        served(folder / "journal.db", genesis, snapshots=folder / "snapshots") as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = workers.start_all(coordinator.address, data_files[:2])
        held = Held(working[0].engine, 2)
        await at_round(client, 2)
        await write_by_hand(client, coordinator.daemon.replica_secret, working[0].engine, folder)
        held.let(3)
        await snapshot_of(client, 2)
        offer = (await client.get_run()).snapshot
        assert offer is not None
        kept = Kept(coordinator, folder / "snapshots", offer.snapshot, RUN_ID)
        count_and_break(kept)

        async def finish() -> wire.GetStatusResponse:
            working.append(workers.start(coordinator.address, "late", data_files[2]))
            await joined(client, "late")
            held.let(ROUNDS)
            assert [await worker.outcome() for worker in working] == [None] * 3
            return await client.get_status()

        try:
            yield kept, client, finish
        finally:
            held.let(ROUNDS)  # whoever waits for it could not end


async def write_by_hand(
    client: CoordinatorClient, secret: bytes, engine: GatedEngine, folder: Path
) -> None:
    """What the replica does, from a worker's weights after round 2."""
    weights = engine.party.weights

    async def applied() -> bool:
        return weights.round == 2

    await until(applied, "the weights after round 2")
    status = await client.get_status()
    digest = weights.digest()
    written = write_snapshot(
        folder / "snapshots", weights, run_id=RUN_ID, head=status.head, weights_digest=digest
    )
    report = wire.SnapshotReport(file_sha256=written.file_sha256, file_bytes=written.file_bytes)
    await client.report_replica(RUN_ID, secret, 2, digest, None, report)


async def test_a_stream_cut_in_the_middle_goes_on_at_its_offset(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    slow_replay: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "SNAPSHOT_CHUNK_BYTES", CHUNK_BYTES)
    async with a_run_with_a_snapshot(workers, data_files, tiny_genesis(**RUN), tmp_path) as (
        kept,
        _,
        finish,
    ):
        size = kept.snapshot.file_bytes
        assert size > 4 * CHUNK_BYTES
        kept.breaks = [(3 * CHUNK_BYTES, UnavailableError("cut."))]
        assert_all_agree(await finish(), "w1", "w2", "late")
        offset = 3 * CHUNK_BYTES
        assert kept.reads == [(0, offset), (offset, size - offset)]


async def test_a_flipped_bit_in_the_file_is_named_once_and_the_journal_is_read_instead(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    slow_replay: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_run_with_a_snapshot(workers, data_files, tiny_genesis(**RUN), tmp_path) as (
        kept,
        _,
        finish,
    ):
        path = kept.folder / file_name(RUN_ID, 2)
        octets = bytearray(path.read_bytes())
        octets[-100] ^= 1
        path.write_bytes(octets)
        with caplog.at_level(logging.WARNING, logger="fedmezo.worker"):
            assert_all_agree(await finish(), "w1", "w2", "late")
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        said = [line for line in warnings if "snapshot" in line]
        assert len(said) == 1
        assert "The snapshot of round 2 is damaged: its SHA-256 begins" in said[0]
        assert said[0].endswith("The journal is read instead.")
        assert len(kept.reads) == 1
    assert records_of(tmp_path / "journal.db")


async def test_weights_that_are_not_what_was_recorded_are_thrown_away_with_everything_loaded(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    slow_replay: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The file is whole by its hash, and yet other weights come out: a memory cell, say."""
    async with a_run_with_a_snapshot(workers, data_files, tiny_genesis(**RUN), tmp_path) as (
        kept,
        _,
        finish,
    ):
        sound, faults = trained_tensors, [1]

        def faulty(*arguments: Any) -> Any:
            tensors = sound(*arguments)
            if faults and len(kept.reads) == 1:
                faults.pop()
                tensors[0] = tensors[0].clone()
            return tensors

        monkeypatch.setattr("fedmezo_core.zo.weights.trained_tensors", faulty)
        with caplog.at_level(logging.WARNING, logger="fedmezo.worker"):
            assert_all_agree(await finish(), "w1", "w2", "late")
        assert not faults
        assert "The weights in the snapshot of round 2 have digest" in caplog.text
        assert len(kept.reads) == 1, "it is not tried again"


async def test_a_worker_that_is_told_so_never_takes_a_snapshot(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    slow_replay: None,
) -> None:
    async with a_run_with_a_snapshot(workers, data_files, tiny_genesis(**RUN), tmp_path) as (
        kept,
        client,
        _,
    ):
        late = workers.start(kept.address, "late", data_files[2], download_rate=0)
        await joined(client, "late")
        assert late.engine.party.weights.round >= 3
        assert not kept.reads


async def test_a_snapshot_larger_than_the_policy_is_not_asked_for(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    slow_replay: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_run_with_a_snapshot(workers, data_files, tiny_genesis(**RUN), tmp_path) as (
        kept,
        client,
        _,
    ):
        policy = RunPolicy(disk_max=ByteSize(kept.snapshot.file_bytes - 1))
        with caplog.at_level(logging.WARNING, logger="fedmezo.worker"):
            workers.start(kept.address, "late", data_files[2], policy=policy)
            await joined(client, "late")
        assert not kept.reads
        assert "raise policy.disk_max in its settings. The journal is read instead." in caplog.text
