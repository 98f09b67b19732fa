"""Old records are dropped once they are sealed; only who asks for them can tell."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator.compaction import SEAL_RECORDS, SEALS_MAX, Compaction, Seal
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, check_compaction
from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_core.errors import ConfigError, JournalCompactedError, JournalCorruptError
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import Journal, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import file_name
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    ScriptedWorker,
    Served,
    config_of,
    genesis_of,
    scripted_workers,
    served,
    until,
)

RUN = {"rounds": 1000, "workers_min": 1, "quorum": 1, "local_steps": 1}
GENESIS = genesis_of(config_of(**RUN))
POOL = genesis_of(config_of(**RUN, seed_policy="pool", pool_size=7, rebase_every_rounds=4))
DIGEST = (99).to_bytes(8, "little") + bytes(24)
"""What `scripted_workers` answer that their weights have."""
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(b"k" * 32))


# ---------------------------------------------------------------- the decision


def passed(
    compaction: Compaction, seqno: int, round_: int, round_max: int = 0, size: int = 100
) -> None:
    """A run passes by, and is sealed if that is due."""
    if compaction.is_due(seqno):
        compaction.add(Seal(round_, StoredState.of(seqno, bytes(size))), round_max)


@pytest.mark.parametrize(("can_go", "goes"), [(99, False), (100, True), (101, True)])
def test_records_go_when_so_many_can(can_go: int, goes: bool) -> None:
    compaction = Compaction(100)
    compaction.begin(50)
    passed(compaction, 50 + can_go, 8)
    assert compaction.chosen(7) is None, "not before everyone can begin later"
    chosen = compaction.chosen(8)
    assert (chosen is not None) is goes
    assert chosen is None or (chosen.round, chosen.seqno) == (8, 50 + can_go)


def test_nothing_goes_by_default() -> None:
    compaction = Compaction(0)
    passed(compaction, 10_000_000, 8)
    assert compaction.chosen(100) is None


@pytest.mark.parametrize(
    ("records", "wanted"),
    [(0, SEAL_RECORDS), (10**9, SEAL_RECORDS), (8 * 125, 125), (7, 1)],
)
def test_a_state_is_sealed_after_so_many_records(records: int, wanted: int) -> None:
    compaction = Compaction(records)
    compaction.begin(50)
    for _ in range(3):
        last = compaction.seals[-1].seqno if compaction.seals else 50
        assert not compaction.is_due(last + wanted - 1)
        passed(compaction, last + wanted, 8)
        assert compaction.seals[-1].seqno == last + wanted


def test_a_large_state_is_sealed_less_often() -> None:
    compaction = Compaction(0)
    passed(compaction, SEAL_RECORDS, 8, size=16 * 100_000)
    assert not compaction.is_due(SEAL_RECORDS + 99_999)
    assert compaction.is_due(SEAL_RECORDS + 100_000)


@pytest.mark.parametrize("most", [SEALS_MAX - 1, SEALS_MAX, SEALS_MAX + 1])
def test_so_many_states_are_kept_and_the_newest_that_can_be_used_is(most: int) -> None:
    compaction = Compaction(8)
    for number in range(1, most + 1):
        passed(compaction, 10 * number, number)
    assert compaction.seals[-1].round == most, "a restart begins from the newest"
    chosen = compaction.chosen(SEALS_MAX - 1)
    assert chosen is not None
    assert chosen.round == SEALS_MAX - 1
    compaction.begin(chosen.seqno)
    assert [seal.round for seal in compaction.seals] == ([most] if most >= SEALS_MAX else [])
    # And it goes on: what could not be kept has made room.
    passed(compaction, 1000, 90)
    after = compaction.chosen(90)
    assert after is not None
    assert after.round == 90


def test_a_journal_that_grows_for_ever_finds_its_way_however_much_must_go() -> None:
    """States that are too early for so many records make room for later ones."""
    compaction, begins, begun = Compaction(1000), 0, 0
    for round_ in range(1, 5000):
        passed(compaction, 10 * round_, round_, round_ - 20)
        chosen = compaction.chosen(round_ - 20)
        if chosen is not None:
            assert 1000 <= chosen.seqno - begins <= 1300
            begins, begun = chosen.seqno, begun + 1
            compaction.begin(begins)
    assert begun > 30


# ---------------------------------------------------------------- a run


async def run_to(
    at: Served, hand: ScriptedWorker, folder: Path | None, last: int, every: int = 2
) -> None:
    """Answer up to a round; the replica, played here, writes a snapshot every so many."""
    while (round_ := (await hand.client.get_status()).round) < last:
        await hand.answer(hand.received[-1].assign)
        await hand.assigned()
        if folder is not None and (round_ + 1) % every == 0:
            data = b"weights after %d" % (round_ + 1)
            (folder / file_name("tiny-run", round_ + 1)).write_bytes(data)
            report = wire.SnapshotReport(
                file_sha256=hashlib.sha256(data).digest(), file_bytes=len(data)
            )
            secret = at.daemon.replica_secret
            await hand.client.report_replica(
                "tiny-run", secret, round_ + 1, DIGEST, None, snapshot=report
            )


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Every row that was ever appended."""
    rows: list[Row] = []
    append = SqliteStore.append

    def kept(store: SqliteStore, more: list[Row]) -> None:
        append(store, more)
        rows.extend(more)

    monkeypatch.setattr(SqliteStore, "append", kept)
    return rows


def folded(rows: list[Row]) -> RunState:
    state = RunState()
    for row in rows:
        state.apply(decode_record(row.body))
    return state


async def begun_after(at: Served, round_: int) -> None:
    async def there() -> bool:
        return at.daemon._index.begins >= round_

    await until(there, f"the journal to begin after round {round_}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db.snapshots"
    path.mkdir()
    return path


@pytest.mark.parametrize("signer", [None, SIGNER])
async def test_a_compacted_run_goes_on_from_every_start_as_if_all_records_were_there(
    tmp_path: Path, folder: Path, written: list[Row], signer: Signer | None
) -> None:
    path = tmp_path / "journal.db"
    begins = []
    for last in (10, 20, 21, 40):
        async with (
            served(path, GENESIS, snapshots=folder, signer=signer, compact_after_records=12) as at,
            scripted_workers(at.address, GENESIS, "w1") as [hand],
        ):
            machine = at.daemon._machine
            assert machine.state == folded(written)
            head = at.daemon._index.head_at(machine.round)
            await hand.open(round=machine.round, head=head)
            await hand.assigned()
            await run_to(at, hand, folder, last)
            if last != 21:
                await begun_after(at, last - 7)
            assert machine.state == folded(written)
            begins.append(at.daemon._journal.begins)
            assert at.daemon._index.begins <= last - 4, "two snapshots can be begun from"
    assert begins == sorted(begins)
    journal = Journal(SqliteStore(path))
    left = [entry.row for entry in journal.load()]
    assert left == written[begins[-1] :]
    assert len(left) < 40 < len(written)
    origin = journal.origin()
    assert origin is not None
    assert origin.key == (b"" if signer is None else signer.public_key)
    journal.close()


async def test_who_is_behind_the_beginning_is_told_what_to_do(
    tmp_path: Path, folder: Path, written: list[Row]
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=folder, compact_after_records=12) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as [hand, late],
    ):
        await hand.open()
        await hand.assigned()
        assert not (await late.client.get_run()).needs_snapshot
        await run_to(at, hand, folder, 20)
        await begun_after(at, 13)
        begins, first = at.daemon._index.begins, at.daemon._journal.begins
        for round_, needs in ((0, True), (begins - 1, True), (begins, False), (20, False)):
            description = await late.client.get_run(round_=round_)
            assert description.needs_snapshot is needs
        offer = (await late.client.get_run()).snapshot
        assert offer is not None
        assert offer.snapshot.round == 18
        for how in (
            {"from_seqno": 0},
            {"from_seqno": first - 1},
            {"from_seqno": 0, "commits_only": True},
            {"from_round": 1, "commits_only": True},
            {"from_round": begins, "commits_only": True},
            {"from_round": 1, "commits_only": True, "from_newest_base": True},
        ):
            with pytest.raises(JournalCompactedError, match="take the snapshot of round 18, then"):
                await late.client.read_journal(**how)  # type: ignore[arg-type]
        page = await late.client.read_journal(commits_only=True, from_round=begins + 1)
        record = decode_record(page.entries[0].record)
        assert isinstance(record, Committed)
        assert record.round == begins + 1
        page = await late.client.read_journal(first)
        assert page.entries[0].seqno == first
        with pytest.raises(
            JournalCompactedError, match="take the newest snapshot first, then join"
        ):
            await late.open()
        # From the snapshot on it is one of them.
        await late.open(round=18, head=offer.snapshot.head)


async def test_a_damaged_snapshot_keeps_the_records_until_newer_ones_take_its_place(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=folder, compact_after_records=12) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.assigned()
        await run_to(at, hand, folder, 6)
        (folder / file_name("tiny-run", 6)).write_bytes(b"weights AFTER 6")
        with caplog.at_level(logging.ERROR):
            await run_to(at, hand, folder, 7)
            await until(lambda: _said(caplog, "no records are dropped"), "a word about it")
        assert "snapshot of round 6 has SHA-256" in caplog.text
        assert caplog.text.count("no records are dropped") == 1
        assert at.daemon._journal.begins == 0
        await run_to(at, hand, folder, 14)
        await begun_after(at, 7)


async def _said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


async def test_a_pool_run_needs_no_snapshots(tmp_path: Path, written: list[Row]) -> None:
    path = tmp_path / "journal.db"
    for last in (20, 41):
        async with (
            served(path, POOL, compact_after_records=12) as at,
            scripted_workers(at.address, POOL, "w1", "w2") as [hand, late],
        ):
            machine = at.daemon._machine
            await hand.open(round=machine.round, head=at.daemon._index.head_at(machine.round))
            await hand.assigned()
            await run_to(at, hand, None, last)
            await begun_after(at, last - 12)
            assert machine.state == folded(written)
            description = await late.client.get_run()
            assert not description.needs_snapshot
            page = await late.client.read_journal(
                commits_only=True, from_round=1, from_newest_base=True
            )
            record = decode_record(page.entries[0].record)
            assert isinstance(record, Committed)
            assert record.from_base
            assert record.round == last // 4 * 4
            with pytest.raises(JournalCompactedError, match="read from_newest_base"):
                await late.client.read_journal(commits_only=True)
            if last == 41:  # Earlier, the next start would wait for its answer.
                head = at.daemon._index.head_at(machine.round)
                await late.open(round=machine.round, head=head)


async def test_a_start_without_the_snapshots_says_who_cannot_join(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=folder, compact_after_records=12) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.assigned()
        await run_to(at, hand, folder, 20)
        await begun_after(at, 13)
    async with served(path, snapshots=tmp_path / "elsewhere"):
        assert "no worker can join anew: the journal begins after round" in caplog.text


@pytest.mark.parametrize(
    ("settings", "genesis", "is_allowed"),
    [
        ({"compact_after_records": 1}, GENESIS, False),
        ({"compact_after_records": 1, "snapshot_every_rounds": 5}, GENESIS, False),
        ({"compact_after_records": 1, "snapshot_every_rounds": 5, "model": "m"}, GENESIS, True),
        (
            {
                "compact_after_records": 1,
                "snapshot_every_rounds": 5,
                "model": "m",
                "replica": False,
            },
            GENESIS,
            False,
        ),
        ({"compact_after_records": 1}, POOL, True),
        ({"snapshot_every_rounds": 0}, GENESIS, True),
    ],
)
def test_nothing_is_dropped_where_nothing_takes_its_place(
    settings: dict[str, Any], genesis: Genesis, is_allowed: bool
) -> None:
    with (
        contextlib.nullcontext()
        if is_allowed
        else pytest.raises(ConfigError, match="compact_after_records = 1 needs snapshots")
    ):
        check_compaction(CoordinatorSettings(**settings), genesis.config)


# ---------------------------------------------------------------- the commands


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


async def test_commands_begin_at_the_origin(
    tmp_path: Path,
    folder: Path,
    written: list[Row],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=folder, signer=SIGNER, compact_after_records=12) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.assigned()
        await run_to(at, hand, folder, 20)
        await begun_after(at, 13)
        begins, round_ = at.daemon._journal.begins, at.daemon._index.begins
        remote = await asyncio.to_thread(
            printed, capsys, "journal", "verify", "--coordinator", at.address
        )
        head = at.daemon._journal.head.hex()
    what = (
        f"sound: {len(written) - begins} records after {begins} that were dropped, up to round "
        f"{round_} "
        f"(signed by {SIGNER.public_key.hex()}), run tiny-run, 1 coordinator start, 20 rounds "
        f"committed, head {head}\n"
    )
    assert remote == what
    assert await asyncio.to_thread(printed, capsys, "journal", "verify", str(path)) == what
    lines = (await asyncio.to_thread(printed, capsys, "journal", "inspect", str(path))).splitlines()
    assert f"origin     records 0 to {begins - 1}, up to round {round_}, were dropped" in lines[0]
    assert len(lines) == 1 + len(written) - begins
    lines = (
        await asyncio.to_thread(printed, capsys, "journal", "inspect", str(path), "--json")
    ).splitlines()
    assert '"kind": "origin"' in lines[0]
    other = tmp_path / "other.db"
    said = await asyncio.to_thread(printed, capsys, "journal", "restore", str(path), str(other))
    assert said.startswith(what)
    assert f"put the run's snapshots into {other}.snapshots" in said
    assert await asyncio.to_thread(printed, capsys, "journal", "verify", str(other)) == what
    # One flipped bit of what the dropped records came to.
    store = SqliteStore(other)
    stored = store.origin()
    assert stored is not None
    sealed = bytearray(stored.sealed)
    sealed[-1] ^= 1
    store._db.execute("UPDATE origin SET sealed = ?", (bytes(sealed),))
    store.close()
    with pytest.raises(JournalCorruptError, match="origin"):
        await asyncio.to_thread(printed, capsys, "journal", "verify", str(other))


async def test_another_coordinators_key_is_named(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    async with (
        served(path, GENESIS, snapshots=folder, signer=SIGNER, compact_after_records=12) as at,
        scripted_workers(at.address, GENESIS, "w1") as [hand],
    ):
        await hand.open()
        await hand.assigned()
        await run_to(at, hand, folder, 20)
        await begun_after(at, 13)
    async with served(path, snapshots=folder):
        assert f"is signed by {SIGNER.public_key.hex()}, not by this" in caplog.text
