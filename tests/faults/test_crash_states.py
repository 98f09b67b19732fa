"""No power cut may cost an acknowledged row, and the enumerator would notice if one did."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmezo_core.errors import JournalError
from fedmezo_core.journal.journal import Row
from fedmezo_core.journal.sqlite import SqliteStore
from tests.core.journal.store_conformance import row
from tests.faults.crash_states import (
    BIG_ROW_BYTES,
    SCENARIOS,
    State,
    recorded,
    replay_command,
    scratch,
    states,
    tried,
    tried_again,
)
from tests.faults.disk import (
    Disk,
    Link,
    Mode,
    Op,
    Sync,
    SyncFolder,
    Truncate,
    Unlink,
    Write,
    recording,
    replayed,
)

STATES_MIN = 10_000
SEED = 0
SEED_OF_A_LOST_LOG = 8
"""One with which reading the log from memory does harm."""
DICE = random.Random(5)


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_acknowledged_row_survives_every_power_cut(scenario: str, folder: Path) -> None:
    tally = tried(scenario, SEED, folder)
    shown = [f"{text}; see {replay_command(state)}" for state, text in tally.failures[:5]]
    assert not tally.failures, "\n".join(shown)


def test_that_is_at_least_ten_thousand_states_of_all_modes() -> None:
    modes = [state.mode for scenario in SCENARIOS for state, _ in states(scenario, SEED)]
    assert len(modes) >= STATES_MIN
    assert set(modes) == set(Mode)


@pytest.mark.parametrize(
    ("kind", "scenario", "found"),
    [
        ("normal", "small", {"lost", "behind"}),
        ("off", "checkpoints", {"lost", "refused", "corrupt", "behind"}),
        ("early-ack", "small", {"lost"}),
        ("drops-first", "compacted-cut", {"corrupt"}),
        ("marks-first", "small", {"behind"}),
    ],
)
def test_a_store_that_promises_too_much_is_caught(
    kind: str, scenario: str, found: set[str], folder: Path
) -> None:
    tally = tried(scenario, SEED, folder, kind)
    assert set(tally.kinds()) == found
    seldom = kind in ("drops-first", "marks-first")
    assert len(tally.failures) > (0.05 if seldom else 0.2) * tally.states
    state, text = tally.failures[0]
    assert tried_again(State.of(str(state)), folder, kind) == text


def test_reading_a_dead_process_s_log_from_memory_is_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed sync, what is read may not be on the disk: appending after it is unsafe.

    Opening folds the log into the file, so only a power cut while it does that shows it.
    """
    monkeypatch.setattr("fedmezo_core.journal.sqlite._forget_cache", lambda path: None)
    recorded.cache_clear()
    tally = tried("sync-fails-killed", SEED_OF_A_LOST_LOG, folder)
    recorded.cache_clear()
    assert set(tally.kinds()) == {"refused"}


def test_every_failed_sync_is_told_and_ends_the_store(tmp_path: Path) -> None:
    syncs = 0
    while True:
        path = tmp_path / f"{syncs}.db"
        with recording([]) as recorder:
            store = SqliteStore(path, checkpoint_pages=2)
            recorder.syncs_until_failure = syncs
            told = [_told(store, row(n, 5000)) for n in range(4)]
            was_failed = recorder.syncs_until_failure is None
            store.close()
        if not was_failed:
            break
        assert told == sorted(told), "something was taken after an error"
        assert told[-1], f"nobody was told that sync {syncs} failed"
        syncs += 1
    assert syncs >= 8


def _told(store: SqliteStore, row: Row) -> bool:
    try:
        store.append([row])
    except JournalError:
        return True
    return False


def test_a_recording_and_its_states_are_the_same_each_time() -> None:
    first = recorded("killed", 3)
    images = [state.image(disk) for state, disk in states("killed", 3)]
    recorded.cache_clear()
    assert recorded("killed", 3).trace == first.trace
    assert [state.image(disk) for state, disk in states("killed", 3)] == images


def test_scenarios_do_what_they_are_named_after() -> None:
    rows = recorded("big", SEED).histories[-1].rows
    assert any(len(row.body) >= 0.9 * BIG_ROW_BYTES for row in rows)
    checkpoints = recorded("checkpoints", SEED).trace
    # The database file (inode 0) is written to between appends, and the log begins anew.
    assert sum(isinstance(op, Write) and op.inode == 0 for op in checkpoints) > 40
    assert sum(isinstance(op, Write) and op.inode > 1 and op.offset == 0 for op in checkpoints) > 3
    deletions = [op for op in recorded("reopened", SEED).trace if isinstance(op, Unlink)]
    assert [op.name for op in deletions].count("journal.db-wal") >= 3
    for scenario in ("killed", "cut-again"):
        assert recorded(scenario, SEED).first_cut > 0


# ---------------------------------------------------------------- the disk itself


def disk_with(*pending: Write | Truncate) -> Disk:
    disk = Disk()
    for op in (Link("a", 0), Write(0, 0, b"x" * 1024), Sync(0), SyncFolder(), *pending):
        disk.apply(op)
    return disk


def test_what_is_synced_stays_and_the_rest_is_at_the_mercy_of_the_mode() -> None:
    disk = disk_with(Write(0, 1020, b"new-end!"), Truncate(0, 1026))
    assert disk.crashed(Mode.LOST, DICE)["a"] == b"x" * 1024
    assert disk.crashed(Mode.KEPT, DICE)["a"] == b"x" * 1020 + b"new-en"
    found = {disk.crashed(Mode.REORDERED, random.Random(seed))["a"] for seed in range(50)}
    # Cut short first, then written to: a result that no order-keeping disk shows.
    assert b"x" * 1020 + b"new-end!" in found
    disk.apply(Sync(0))
    assert all(len(disk.crashed(mode, DICE)["a"]) == 1026 for mode in Mode)


def test_a_torn_write_keeps_or_loses_whole_sectors_and_nothing_beside_it_changes() -> None:
    disk = disk_with(Write(0, 100, b"y" * 900))
    pieces = [(100, 512), (512, 1000)]
    for seed in range(50):
        data = disk.crashed(Mode.TORN, random.Random(seed))["a"]
        assert data[:100] == b"x" * 100
        assert data[1000:] == b"x" * 24
        assert all(set(data[start:end]) in ({ord("x")}, {ord("y")}) for start, end in pieces)
    noisy = {disk.crashed(Mode.SCRAMBLED, random.Random(seed))["a"][100:512] for seed in range(50)}
    assert any(len(set(piece)) > 2 for piece in noisy)


def test_a_file_is_found_under_its_name_only_once_its_folder_is_synced() -> None:
    trace: list[Op] = [Link("a", 0), Write(0, 0, b"1"), Sync(0)]
    assert replayed(trace).crashed(Mode.LOST, DICE) == {}
    assert replayed([*trace, SyncFolder()]).crashed(Mode.LOST, DICE) == {"a": b"1"}
    deleted = replayed([*trace, SyncFolder(), Unlink("a"), Link("b", 1)])
    assert deleted.crashed(Mode.LOST, DICE) == {"a": b"1"}
    assert deleted.crashed(Mode.KEPT, DICE) == {"b": b""}
