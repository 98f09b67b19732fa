"""A restart from a sealed state equals one that folds every record, and never needs the seal."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator import compaction
from fedmezo_coordinator.daemon import Daemon
from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sealed import StoredState, seal, unseal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.state_codec import STATE_VERSION
from fedmezo_core.records import Started
from tests.coordinator.test_compaction import GENESIS, POOL, SIGNER, run_to
from tests.integration.support.harness import scripted_workers, served

INTERVAL = 9


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SEAL_RECORDS", INTERVAL)
    monkeypatch.setattr(compaction, "SEAL_BYTES_PER_RECORD", 10**9)


async def written(path: Path, folder: Path | None = None, genesis: Any = GENESIS) -> None:
    """A run of 13 rounds, in a journal with sealed states."""
    async with (
        served(path, genesis, snapshots=folder, signer=SIGNER) as at,
        scripted_workers(at.address, genesis, "w1") as [hand],
    ):
        await hand.open()
        await hand.assigned()
        await run_to(at, hand, folder, 13)


async def started(path: Path, folder: Path | None = None) -> Any:
    """Everything that a coordinator knows after a start, of a journal that is left as it is."""
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    at = Daemon(Journal(SqliteStore(copy)), signer=SIGNER, snapshots=folder)
    await at.load()
    found = (
        at._machine.state,
        vars(at._index),
        at._pages._recent,
        (at._snapshots.recorded, at._snapshots.agreed),
        (at.genesis, at._genesis_body),
        (len(at._journal), at._journal.chain, at._journal.head),
    )
    await at.close()
    return found


def seals_of(path: Path) -> list[StoredState]:
    store = SqliteStore(path)
    found = list(store.seals())
    store.close()
    return found


def keep(path: Path, seals: list[StoredState]) -> None:
    store = SqliteStore(path)
    store._db.execute("DELETE FROM seal")
    if seals:
        store.keep_seals(seals)
    store.close()


def folded(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """How many records the last start verified, and how many it folded."""
    found = re.findall(r"is sound \(records: (\d+), of them folded: (\d+)\)", caplog.text)
    return int(found[-1][0]), int(found[-1][1])


@pytest.mark.parametrize("genesis", [GENESIS, POOL], ids=["snapshots", "pool"])
async def test_a_restart_folds_the_tail_and_comes_to_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, genesis: Any
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "journal.db"
    folder = tmp_path / "snapshots" if genesis is GENESIS else None
    (tmp_path / "snapshots").mkdir()
    await written(path, folder, genesis)
    seals = seals_of(path)
    assert len(seals) > 1
    quick = await started(path, folder=folder)
    records, tail = folded(caplog)
    assert tail == records - seals[-1].seqno < 3 * INTERVAL < records
    for left in (seals[:1], []):
        keep(path, left)
        assert await started(path, folder=folder) == quick
        assert folded(caplog) == (records, records - (left[0].seqno if left else 0))
    assert "cannot be used" not in caplog.text


def flipped(stored: StoredState) -> StoredState:
    sealed = bytearray(stored.sealed)
    sealed[len(sealed) // 2] ^= 1
    return StoredState(stored.seqno, bytes(sealed), stored.digest)


def of_another_version(stored: StoredState) -> StoredState:
    return seal(replace(unseal(stored), state_version=STATE_VERSION + 1), SIGNER)


def of_other_records(stored: StoredState) -> StoredState:
    return seal(replace(unseal(stored), chain=bytes(32)), SIGNER)


def unsigned(stored: StoredState) -> StoredState:
    return seal(unseal(stored))


@pytest.mark.parametrize("damage", [flipped, of_another_version, of_other_records, unsigned])
async def test_a_seal_that_cannot_be_used_costs_only_time(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[StoredState], StoredState],
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "journal.db"
    await written(path)
    seals = seals_of(path)
    quick = await started(path)
    # An older one that is sound is the next best.
    keep(path, [seals[0], damage(seals[-1])])
    assert await started(path) == quick
    assert folded(caplog)[1] == folded(caplog)[0] - seals[0].seqno
    assert caplog.text.count("cannot be used") == 1
    keep(path, [damage(seals[-1])])
    assert await started(path) == quick
    assert folded(caplog)[1] == folded(caplog)[0]
    assert caplog.text.count("cannot be used") == 2


async def test_a_journal_without_a_seal_is_sealed_at_its_first_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "journal.db"
    await written(path)
    keep(path, [])
    for tail_max in (1000, INTERVAL):
        async with served(path, signer=SIGNER):
            records, tail = folded(caplog)
            assert (tail == records) is (tail_max == 1000)
            assert tail <= tail_max
        assert seals_of(path)[-1].seqno > records - INTERVAL


async def test_a_seal_hides_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    await written(path)
    store = SqliteStore(path)
    store._db.execute("UPDATE journal SET body = CAST(body || x'00' AS BLOB) WHERE seqno = 4")
    store.close()
    with pytest.raises(JournalCorruptError, match="Journal record 4 is not what was written"):
        await started(path)


async def test_a_seal_of_records_that_are_gone_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal was put back from an older copy, row by row."""
    path = tmp_path / "journal.db"
    await written(path)
    store = SqliteStore(path)
    store._db.execute("DELETE FROM journal WHERE seqno >= 4")
    store.close()
    journal = Journal(SqliteStore(path))
    list(journal.load())
    journal.append(encode_records([Started(2)]))
    journal.close()
    state, *_ = await started(path)
    assert (state.epoch, state.round) == (3, 0)
    assert "of other records" in caplog.text
