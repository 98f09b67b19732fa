"""The snapshots: what is recorded, what is kept, what is served."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from fedmezo_coordinator import snapshot_store as store_module
from fedmezo_coordinator.snapshot_store import AGREED_KEPT_MAX, SnapshotStore
from fedmezo_core.errors import (
    NotReadyError,
    ProtocolError,
    SnapshotDamagedError,
    SnapshotError,
    UnknownWorkerError,
)
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import Entry, Row, head_after
from fedmezo_core.records import Committed, Record, SeedRange, Snapshotted, digest64_of
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.snapshots import SNAPSHOT_CHUNK_BYTES, file_name, round_in
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    Served,
    config_of,
    genesis_of,
    records_of,
    scripted_workers,
    served,
    until,
)

SNAPSHOT = wire.SnapshotReport(file_sha256=b"f" * 32, file_bytes=10)


def digest_of(round_: int) -> bytes:
    return round_.to_bytes(32, "little")


def record_of(round_: int, file_bytes: int = 10) -> Snapshotted:
    return Snapshotted(round_, digest_of(round_), b"f" * 32, file_bytes)


def shelf_of(folder: Path | None) -> SnapshotStore:
    snapshots = SnapshotStore(folder)
    snapshots.open("run")
    return snapshots


def commit(snapshots: SnapshotStore, round_: int, *, agreed: bytes | None = None) -> None:
    """A round closes whose answers were measured on the weights after the round before."""
    digest = digest_of(round_ - 1) if agreed is None else agreed
    commit = Committed(round_, (SeedRange(0, (1.0,)),), 0)
    fold(snapshots, commit, {round_ - 1: digest64_of(digest)})


def fold(
    snapshots: SnapshotStore, record: Record, agreed: Mapping[int, int] = MappingProxyType({})
) -> None:
    """Let the store take one more record, wherever it stands in the journal."""
    entry = Entry(Row(9, encode_record(record), bytes(32)), bytes(32))
    snapshots.fold(entry)
    snapshots.note_agreed(entry, agreed)


def write(folder: Path, *names: str, data: bytes = b"0123456789") -> None:
    for name in names:
        (folder / name).write_bytes(data)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("agreed_first", [True, False])
def test_a_snapshot_is_recorded_once_the_run_has_agreed_to_its_weights(
    tmp_path: Path, agreed_first: bool
) -> None:
    snapshots = shelf_of(tmp_path)
    if agreed_first:
        commit(snapshots, 5)
    snapshots.offer(record_of(4))
    if not agreed_first:
        assert snapshots.take_agreed() is None
        commit(snapshots, 4)
        assert snapshots.take_agreed() is None, "round 4 says what round 3 was"
        commit(snapshots, 5)
    assert snapshots.take_agreed() == record_of(4)
    assert snapshots.take_agreed() is None
    assert snapshots.newest is None, "not before it is in the journal"
    fold(snapshots, record_of(4))
    assert snapshots.newest == record_of(4)


def test_a_snapshot_that_the_run_does_not_agree_to_is_dropped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = shelf_of(tmp_path)
    snapshots.offer(record_of(4))
    commit(snapshots, 5, agreed=b"other" + bytes(27))
    with caplog.at_level(logging.ERROR):
        assert snapshots.take_agreed() is None
    assert "the snapshot of round 4 is dropped" in caplog.text
    commit(snapshots, 5)
    assert snapshots.take_agreed() is None


def test_only_a_newer_snapshot_counts(tmp_path: Path) -> None:
    snapshots = shelf_of(tmp_path)
    fold(snapshots, record_of(4))
    for round_ in (3, 4):
        commit(snapshots, round_ + 1)
        snapshots.offer(record_of(round_))
        assert snapshots.take_agreed() is None


def test_agreements_are_remembered_for_a_while_and_not_for_ever(tmp_path: Path) -> None:
    snapshots = shelf_of(tmp_path)
    for round_ in range(1, AGREED_KEPT_MAX + 3):
        commit(snapshots, round_)
    snapshots.offer(record_of(1))
    assert snapshots.take_agreed() is None
    snapshots.offer(record_of(2))
    assert snapshots.take_agreed() == record_of(2)


def test_without_a_folder_nothing_is_offered() -> None:
    snapshots = shelf_of(None)
    snapshots.offer(record_of(4))
    commit(snapshots, 5)
    assert snapshots.take_agreed() is None
    fold(snapshots, record_of(4))
    assert snapshots.newest is None
    with pytest.raises(SnapshotError):
        snapshots.find(4)
    snapshots.sweep(at_start=True)


def test_the_newest_two_files_are_kept_and_other_files_are_nobodys_business(tmp_path: Path) -> None:
    snapshots = shelf_of(tmp_path)
    others = {"run-2-3.safetensors", "other-3.safetensors", "run-x.safetensors", "notes.txt"}
    write(tmp_path, *others, *(file_name("run", n) for n in (1, 2, 3, 4)))
    write(tmp_path, "run-5.safetensors.partial")
    for round_ in (1, 2, 3):
        fold(snapshots, record_of(round_))
    snapshots.sweep()
    kept = {file_name("run", n) for n in (2, 3, 4)} | {"run-5.safetensors.partial"}
    assert names_in(tmp_path) == kept | others, "4 and 5 may be on their way"
    snapshots.sweep(at_start=True)
    assert names_in(tmp_path) == {file_name("run", n) for n in (2, 3)} | others


def test_rounds_are_read_from_the_names_of_this_run_alone() -> None:
    assert round_in("run-12.safetensors", "run") == 12
    assert round_in("run-12.safetensors.partial", "run") == 12
    for name in ("run-1-2.safetensors", "run-12.safetensors.old", "xrun-12.safetensors", "run-"):
        assert round_in(name, "run") is None


@pytest.mark.parametrize("offset", [0, 1, SNAPSHOT_CHUNK_BYTES, 2 * SNAPSHOT_CHUNK_BYTES + 5])
async def test_a_file_is_read_in_chunks_from_any_offset(tmp_path: Path, offset: int) -> None:
    data = bytes(range(256)) * (SNAPSHOT_CHUNK_BYTES // 128) + b"12345"
    write(tmp_path, file_name("run", 7), data=data)
    snapshots = shelf_of(tmp_path)
    fold(snapshots, record_of(7, len(data)))
    chunks = [chunk async for chunk in snapshots.read(7, offset)]
    assert b"".join(chunks) == data[offset:]
    assert all(len(chunk) <= SNAPSHOT_CHUNK_BYTES for chunk in chunks)
    with pytest.raises(ProtocolError, match=f"there is no byte {len(data) + 1}"):
        await anext(snapshots.read(7, len(data) + 1))


async def test_a_file_that_is_gone_or_cut_short_is_named(tmp_path: Path) -> None:
    snapshots = shelf_of(tmp_path)
    fold(snapshots, record_of(7, 10))
    with pytest.raises(SnapshotError, match="No such file"):
        await anext(snapshots.read(7, 0))
    write(tmp_path, file_name("run", 7), data=b"short")
    with pytest.raises(SnapshotDamagedError, match="has 5 bytes at the coordinator instead of 10"):
        await anext(snapshots.read(7, 0))
    with pytest.raises(SnapshotError, match="No snapshot of round 6 is kept here"):
        await anext(snapshots.read(6, 0))


async def test_one_reader_too_many_is_refused_until_another_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "STREAMS_MAX", 1)
    write(tmp_path, file_name("run", 7))
    snapshots = shelf_of(tmp_path)
    fold(snapshots, record_of(7))
    first = snapshots.read(7, 0)
    await anext(first)
    with pytest.raises(NotReadyError, match="the most that one coordinator serves"):
        await anext(snapshots.read(7, 0))
    await first.aclose()
    assert await anext(snapshots.read(7, 0)) == b"0123456789"


# ---------------------------------------------------------------- what the replica reports

GENESIS = genesis_of(config_of(rounds=9, workers_min=1, quorum=1, local_steps=1))
DIGEST = (99).to_bytes(8, "little") + bytes(24)
"""What `scripted_workers` answer that their weights have."""


async def report(at: Served, snapshot: wire.SnapshotReport, **changes: Any) -> None:
    values: dict[str, Any] = {"secret": at.daemon.replica_secret, "round_": 1}
    values |= {"weights_digest": DIGEST} | changes
    async with CoordinatorClient(at.address) as client:
        await client.report_replica("tiny-run", evaluation=None, snapshot=snapshot, **values)


async def test_a_report_is_recorded_with_the_next_rounds_answers_and_then_offered(
    tmp_path: Path,
) -> None:
    path, folder = tmp_path / "journal.db", tmp_path / "snapshots"
    folder.mkdir()
    write(folder, file_name("tiny-run", 1))
    # A leftover: of a start that ended before the run had agreed to it.
    write(folder, file_name("tiny-run", 7))
    async with (
        served(path, GENESIS, snapshots=folder) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.answer(await hand.assigned())
        await hand.assigned()
        write(folder, file_name("tiny-run", 1))
        await report(at, SNAPSHOT)
        assert (await hand.client.get_run()).snapshot is None
        await hand.answer(hand.received[-1].assign)
        await hand.assigned()

        async def is_offered() -> bool:
            return (await hand.client.get_run()).snapshot is not None

        # It is written down after what the round's commit sends.
        await until(is_offered, "the snapshot")
        description = await hand.client.get_run()
        offer = description.snapshot
        assert offer is not None
        assert (offer.snapshot.round, offer.snapshot.file_bytes) == (1, 10)
        assert offer.snapshot.weights_digest == DIGEST
        assert (description.missing.pairs, offer.missing.pairs) == (2, 1)
        assert (await hand.client.get_run(round_=1)).snapshot is None, "it holds that round"
        page = await hand.client.read_journal(
            commits_only=True, from_round=offer.snapshot.round + 1
        )
        assert len(page.entries) == 1
        assert head_after(offer.snapshot.head, page.entries[0].record) == at.daemon.status("").head
    assert names_in(folder) == {file_name("tiny-run", 1)}
    expected = Snapshotted(1, DIGEST, b"f" * 32, 10)
    assert [r for r in records_of(path) if isinstance(r, Snapshotted)] == [expected]
    async with (
        served(path, snapshots=folder) as at,
        CoordinatorClient(at.address) as client,
    ):
        again = (await client.get_run()).snapshot
        assert again is not None
        assert again.snapshot == offer.snapshot


async def test_a_report_of_other_weights_is_never_recorded(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=tmp_path / "snapshots") as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.answer(await hand.assigned())
        await hand.answer(await hand.assigned())
        await hand.assigned()
        await report(at, SNAPSHOT, weights_digest=b"x" * 32)
        await hand.answer(hand.received[-1].assign)
        await hand.assigned()
    assert not [r for r in records_of(path) if isinstance(r, Snapshotted)]


async def test_reports_that_make_no_sense_are_refused_and_complaints_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=tmp_path / "snapshots") as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.answer(await hand.assigned())
        await hand.assigned()
        for bad in (
            wire.SnapshotReport(),
            wire.SnapshotReport(file_sha256=b"f" * 31, file_bytes=1),
            wire.SnapshotReport(file_sha256=b"f" * 32),
        ):
            with pytest.raises(ProtocolError, match="snapshot has no digest, no bytes or no round"):
                await report(at, bad)
        with pytest.raises(ProtocolError, match="snapshot has no digest, no bytes or no round"):
            await report(at, SNAPSHOT, round_=0)
        with pytest.raises(UnknownWorkerError):
            await report(at, SNAPSHOT, secret=b"guess")
        with caplog.at_level(logging.WARNING):
            await report(at, wire.SnapshotReport(complaint="The disk is full."))
            await hand.answer(hand.received[-1].assign)
            await hand.assigned()
        assert "no snapshot of round 1: The disk is full." in caplog.text
    assert not [r for r in records_of(path) if isinstance(r, Snapshotted)]
