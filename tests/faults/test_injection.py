"""The real store in a real process, killed or failed at each of its writes and syncs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Paused
from tests.faults.appender import CHECKPOINT_PAGES, ENDS, NAME, records_of, rows_to_write
from tests.faults.injection import (
    CALLS,
    KINDS,
    OTHERS,
    Children,
    Fault,
    Outcome,
    children,
    why_not,
)

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it can be injected")
ALL_ROWS = rows_to_write()


@pytest.fixture(scope="module")
def forked() -> Iterator[Children]:
    with children() as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    # In memory where possible: what is tried is what calls return, not how long a disk takes.
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        yield Path(folder)


def _nothing(folder: Path) -> None:
    """The first start."""


def _killed_before(folder: Path) -> None:
    """A journal whose coordinator was killed between two appends: the log is still there."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as elsewhere:
        path = Path(elsewhere) / NAME
        journal = Journal(SqliteStore(path, checkpoint_pages=CHECKPOINT_PAGES))
        for batch in range(4):
            journal.append(encode_records(records_of(batch)))
        for name in (NAME, f"{NAME}-wal"):
            (folder / name).write_bytes(path.with_name(name).read_bytes())
        journal.close()


STARTS: dict[str, Callable[[Path], None]] = {"new": _nothing, "after a kill": _killed_before}


def start(name: str, folder: Path) -> None:
    """Make `folder` what a start finds."""
    for path in folder.iterdir():
        path.unlink()
    STARTS[name](folder)


def check_remains(folder: Path, outcome: Outcome, fault: Fault) -> None:
    """What is left holds everything acknowledged, and can be appended to."""
    store = SqliteStore(folder / NAME)
    journal = Journal(store)
    found = [entry.row for entry in journal.load()]
    assert len(found) >= outcome.acknowledged, f"{fault} cost an acknowledged row"
    assert len(found) in ENDS, f"{fault} left part of an append"
    assert found == ALL_ROWS[: len(found)], f"{fault} changed a row"
    journal.append(encode_records([Paused(1, "afterwards")]))
    journal.close()


def check_failed_for_good(outcome: Outcome, fault: Fault) -> None:
    """Nothing is acknowledged after an error, and if there was anything left to do, it was told."""
    failed, *later = outcome.after_failure
    if failed == "failed:folder:fdatasync":
        return  # SQLite's own attempt, of which it says nothing; the store's own sync follows.
    assert "said:acknowledged" not in later, f"something was acknowledged after {fault}"
    was_closing = outcome.acknowledged == len(ALL_ROWS)
    assert was_closing or "said:failed" in later, f"nobody was told of {fault}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("begin", STARTS)
def test_whichever_call_fails_nothing_acknowledged_is_lost_and_nothing_more_is_acknowledged(
    begin: str, call: str, kind: str, forked: Children, folder: Path
) -> None:
    start(begin, folder)
    calls = forked.append_under(Fault(call, 0, kind), folder).count(call)
    assert calls > 0
    for number in range(1, calls + 1):
        start(begin, folder)
        fault = Fault(call, number, kind)
        outcome = forked.append_under(fault, folder)
        if kind == "SIGKILL":
            assert outcome.status == -9, f"{fault} did not happen"
        else:
            assert outcome.after_failure, f"{fault} did not happen"
            check_failed_for_good(outcome, fault)
        check_remains(folder, outcome, fault)


@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails_once_and_for_all_is_told_at_the_latest_by_the_next_append(
    call: str, forked: Children, folder: Path
) -> None:
    outcome = forked.append_under(Fault(call, 0, "EIO+"), folder)
    for number in range(1, outcome.count(call) + 1, 3):
        start("new", folder)
        fault = Fault(call, number, "EIO+")
        outcome = forked.append_under(fault, folder)
        check_failed_for_good(outcome, fault)
        check_remains(folder, outcome, fault)


@pytest.mark.parametrize("begin", STARTS)
def test_undisturbed_it_uses_no_other_calls_and_everything_is_there(
    begin: str, forked: Children, folder: Path
) -> None:
    start(begin, folder)
    outcome = forked.append_under(Fault("pwrite64", 0, "EIO"), folder)
    assert outcome.acknowledged == len(ALL_ROWS)
    used = {call.rpartition(":")[2] for call in outcome.calls if not call.startswith("said:")}
    assert used <= {*CALLS, *OTHERS}
    assert outcome.calls[-1] == "said:closed"
    # The log was folded into the file at least twice, once of which was the closing.
    assert outcome.count("ftruncate") >= 2
    check_remains(folder, outcome, Fault("none", 0, "EIO"))
