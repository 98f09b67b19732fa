"""The SQLite store: conformance, and everything that can be wrong with the file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import psutil
import pytest

from fedmezo_core.errors import (
    JournalBehindError,
    JournalCorruptError,
    JournalError,
    JournalLockedError,
)
from fedmezo_core.journal import sqlite
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal, JournalStore
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Opened, Started
from tests.core.journal.store_conformance import StoreConformance, row


class TestSqliteStore(StoreConformance):
    """The embedded store conforms."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.path = tmp_path / "journal.db"

    def open(self) -> JournalStore:
        return SqliteStore(self.path)


def written(path: Path, rows: int = 200) -> None:
    store = SqliteStore(path)
    Journal(store).append(
        encode_records(Opened(n + 1, 0, ("worker-" * 5,) * 20) for n in range(rows))
    )
    store.close()


def test_settings_are_the_durable_ones(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "journal.db")
    assert store._db.pragma("journal_mode") == "wal"
    assert store._db.pragma("synchronous") == 2  # FULL
    assert store._db.pragma("locking_mode") == "exclusive"
    assert (tmp_path / "journal.db").stat().st_mode & 0o077 == 0
    store.close()


def _replaced(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


LOSSES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("elsewhere.db")),
    "replaced by its copy": _replaced,
    "the log is deleted": lambda path: Path(f"{path}-wal").unlink(),
    "the folder is moved": lambda path: path.parent.rename(path.parent.with_name("elsewhere")),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("use", ["append", "read"])
def test_a_file_that_is_deleted_moved_or_replaced_while_open_ends_the_store(
    loss: str, use: str, tmp_path: Path
) -> None:
    """What is written then is in no file that anybody finds, so it must not be acknowledged."""
    path = tmp_path / "folder" / "journal.db"
    path.parent.mkdir()
    store = SqliteStore(path)
    store.append([row(0, 20)])
    LOSSES[loss](path)
    with pytest.raises(JournalError, match=r"was deleted, moved or replaced.*copy of the journal"):
        store.append([row(1, 20)]) if use == "append" else store.read(0, 1)
    with pytest.raises(JournalError, match="failed before"):
        store.append([row(1, 20)])
    store.close()


def test_a_journal_that_was_moved_can_be_put_back_with_everything(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "journal.db", tmp_path / "elsewhere.db"
    store = SqliteStore(path)
    store.append([row(0, 20)])
    path.rename(elsewhere)
    with pytest.raises(JournalError, match="moved"):
        store.read(0, 1)
    store.close()
    elsewhere.rename(path)
    store = SqliteStore(path)
    assert len(store) == 1
    store.close()


@pytest.mark.parametrize("left", ["no file", "0 bytes"])
def test_a_log_without_its_journal_is_kept_and_finds_its_records_again(
    left: str, tmp_path: Path
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    content = path.read_bytes()
    store = SqliteStore(path)
    store.append([row(3, 20)])
    path.unlink()
    store.close()
    if left == "0 bytes":
        path.touch()
    with pytest.raises(JournalBehindError, match=r"but its log .*journal.db-wal is, with the new"):
        SqliteStore(path)
    path.write_bytes(content)
    store = SqliteStore(path)
    assert len(store) == 4
    store.close()


def test_closing_a_journal_that_was_replaced_leaves_the_new_one_s_log_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.db"
    store = SqliteStore(path)
    store.append([row(0, 20)])
    for name in (path, Path(f"{path}-wal")):
        name.rename(name.with_suffix(".old"))
    new = SqliteStore(path)
    new.append([row(0, 40)])
    with pytest.raises(JournalError, match="replaced"):
        store.read(0, 1)
    store.close()
    new.append([row(1, 40)])
    new.close()


def _try_to_open(path: Path, answer: multiprocessing.SimpleQueue[str]) -> None:
    try:
        SqliteStore(path)
        answer.put("opened")
    except JournalLockedError as error:
        answer.put(str(error))


def test_a_second_process_cannot_open_it(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "journal.db")
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    for n in range(3):  # The connections of a reading thread come and go, the lock stays.
        store.append([row(n)])
        store._fold_log("appended to", waits=True)
        assert len(store.read_beside(range(9), 1000)) == n + 1
    process = context.Process(target=_try_to_open, args=(tmp_path / "journal.db", answer))
    process.start()
    process.join()
    assert "is open in another process" in answer.get()
    store.close()


def _read(path: Path, answer: multiprocessing.SimpleQueue[str]) -> None:
    try:
        store = SqliteStore(path, read_only=True)
        answer.put(f"{len(store)} rows, {len(store.read(0, 100))} read, {store.origin()}")
        store.close()
    except JournalLockedError as error:
        answer.put(str(error))


def _elsewhere(what: Any, path: Path) -> str:
    """What another process says that opens the journal to read or to write it."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    process = context.Process(target=what, args=(path, answer))
    process.start()
    process.join()
    return answer.get()


def test_readers_share_a_journal_and_keep_writers_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    before = path.read_bytes()
    reader = SqliteStore(path, read_only=True)
    for _ in range(2):
        assert _elsewhere(_read, path) == "3 rows, 3 read, None"
        assert "is open in another process" in _elsewhere(_try_to_open, path)
        assert len(reader.read(0, 100)) == 3
    with pytest.raises(JournalError, match="it is read-only"):
        reader.append([row(3)])
    reader.close()
    assert path.read_bytes() == before
    writer = SqliteStore(path)
    assert "is open in another process" in _elsewhere(_read, path)
    writer.append([row(3)])
    writer.close()
    assert _elsewhere(_read, path) == "4 rows, 4 read, None"


def test_an_archive_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    monkeypatch.setattr(sqlite, "_is_writable", lambda _path: False)
    reader = SqliteStore(path, read_only=True)
    assert [len(reader.read(0, 100)), len(reader.read_beside(range(3), 1 << 20))] == [3, 3]
    with pytest.raises(JournalError, match="it is read-only"):
        reader.append([row(3)])
    reader.close()
    assert [found.name for found in tmp_path.iterdir()] == ["journal.db"]


def test_a_journal_of_another_user_in_a_shared_folder_gets_no_files_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    monkeypatch.setattr(sqlite, "_is_writable", lambda found: found != path)
    reader = SqliteStore(path, read_only=True)
    assert len(reader.read(0, 100)) == 3
    # They would be this user's, and the journal's owner could not open it any more.
    assert [found.name for found in tmp_path.iterdir()] == ["journal.db"]
    reader.close()


@pytest.mark.parametrize("is_closed", [False, True])
def test_an_archive_that_changes_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_closed: bool
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "_is_writable", lambda _path: False)
        reader = SqliteStore(path, read_only=True)
        beside = SqliteStore(path, read_only=True)
    writer = SqliteStore(path)
    writer.append([row(3)])
    if is_closed:
        writer.close()
    said = r"was written to while it was read, .* begin again"
    with pytest.raises(JournalError, match=said):
        reader.read(0, 100)
    with pytest.raises(JournalError, match=said):
        beside.read_beside(range(3), 1 << 20)
    writer.close()


def test_an_archive_of_an_older_schema_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    older = apsw.Connection(str(path))
    older.pragma("user_version", 1)
    older.close()
    monkeypatch.setattr(sqlite, "_is_writable", lambda _path: False)
    with pytest.raises(JournalError, match=r"by an older FedMeZO, .* copy it into a folder"):
        SqliteStore(path, read_only=True)


def test_an_archive_that_was_not_closed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.db"
    written(path, 3)
    writer = SqliteStore(path)
    monkeypatch.setattr(sqlite, "_is_writable", lambda _path: False)
    with pytest.raises(JournalError, match=r"newest records .* may be in .*copy both files into"):
        SqliteStore(path, read_only=True)
    writer.close()


def test_a_reader_finds_what_a_killed_writer_left_in_the_log(tmp_path: Path) -> None:
    path, left = tmp_path / "journal.db", tmp_path / "left.db"
    written(path, 3)
    writer = SqliteStore(path)
    writer.append([row(3)])
    for end in ("", "-wal"):
        shutil.copyfile(f"{path}{end}", f"{left}{end}")
    writer.close()
    first, second = (SqliteStore(left, read_only=True) for _ in range(2))
    assert len(first) == len(second.read(0, 100)) == 4
    assert [one.seqno for one in first.read_beside([1, 3], 1000)] == [1, 3]
    first.close()
    assert len(second.read(0, 100)) == 4
    second.close()
    assert len(SqliteStore(left)) == 4


def test_a_reader_brings_an_older_journal_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    db = apsw.Connection(str(path))
    db.execute(sqlite.MIGRATIONS[0])
    db.pragma("application_id", sqlite.APPLICATION_ID)
    db.pragma("user_version", 1)
    db.close()
    reader = SqliteStore(path, read_only=True)
    assert (len(reader), reader.origin(), reader.seals()) == (0, None, ())
    reader.close()


def test_a_flipped_byte_anywhere_is_found_and_never_changes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path, 30)
    sound = path.read_bytes()
    reference = SqliteStore(path).read(0, 100)
    found = 0
    for place in range(0, len(sound), 97):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            store = SqliteStore(path)
        except JournalError:
            found += 1
            continue
        try:
            list(Journal(store).load())
            # A byte that nothing depends on, such as free space in a page.
            assert store.read(0, 100) == reference
        except JournalCorruptError:
            found += 1
        store.close()
    assert found > 0.5 * len(sound) / 97


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_file_is_refused_or_empty(tmp_path: Path, share: float) -> None:
    path = tmp_path / "journal.db"
    written(path)
    sound = path.read_bytes()
    path.write_bytes(sound[: int(share * len(sound))])
    if share == 0.0:
        assert len(SqliteStore(path)) == 0
    else:
        with pytest.raises(JournalCorruptError, match="restore"):
            SqliteStore(path)


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 1000)
    with pytest.raises(JournalCorruptError, match="not a journal"):
        SqliteStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    other.close()
    with pytest.raises(JournalError, match="not a FedMeZO journal"):
        SqliteStore(tmp_path / "other.db")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "journal.db")
    other = sqlite3.connect(tmp_path / "journal.db")
    other.execute("PRAGMA user_version = 99")
    other.commit()
    other.close()
    with pytest.raises(JournalError, match="newer FedMeZO"):
        SqliteStore(tmp_path / "journal.db")


def test_missing_folder_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be created"):
        SqliteStore(tmp_path / "no" / "journal.db")
    with pytest.raises(JournalError, match="no journal at"):
        SqliteStore(tmp_path / "journal.db", create=False)


def test_a_folder_that_cannot_be_synced_is_no_place_for_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name could be gone after a power cut, and everything acknowledged with it."""
    fail_with: list[int] = [errno.EIO]

    def fsync(file: int) -> None:
        raise OSError(fail_with[0], os.strerror(fail_with[0]))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(JournalError, match=r"folder of the journal .* could not be synced \(Input"):
        SqliteStore(tmp_path / "journal.db")
    # Some file systems know no such thing.
    fail_with[0] = errno.EINVAL
    SqliteStore(tmp_path / "journal.db").close()


def test_the_log_is_folded_into_the_file_when_it_is_long(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    store = SqliteStore(path, checkpoint_pages=10)
    for n in range(50):
        store.append([row(n, 3000)])
    assert path.stat().st_size > 40 * 3000
    assert (tmp_path / "journal.db-wal").stat().st_size < 20 * 4096
    store.close()


def test_an_append_does_not_wait_for_a_read_until_the_log_is_far_too_long(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    store = SqliteStore(path, checkpoint_pages=10)
    store.append([row(n, 3000) for n in range(20)])
    assert path.stat().st_size > 20 * 3000
    size = path.stat().st_size
    with ThreadPoolExecutor(1) as thread:
        with store._reading_beside() as file:
            for n in range(20, 30):
                thread.submit(store.append, [row(n, 3000)]).result(10)
            waiting = thread.submit(store.append, [row(30, 100_000)])
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            # The file that is read is still what it was.
            assert path.stat().st_size == size
            assert file.execute("SELECT count(*) FROM journal").get == 20
        waiting.result(10)
    assert path.stat().st_size > size + 100_000
    assert tuple(store.read_beside([19, 29, 30], 10**6)) == (
        *(row(19, 3000), row(29, 3000)),
        row(30, 100_000),
    )
    store.close()


def test_a_read_takes_little_more_from_the_disk_than_it_returns(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "journal.db")
    for n in range(40):
        store.append([row(n, 2**20)])
    before = _bytes_read()
    for n in range(32):
        assert store.read_beside(range(n, 40), 2**20) == (row(n, 2**20),)
    assert _bytes_read() - before < 1.05 * 32 * 2**20
    store.close()


def _bytes_read() -> int:
    return int(psutil.Process().io_counters().read_chars)


def test_after_an_error_nothing_more_is_taken(tmp_path: Path) -> None:
    """A store that failed once may hold less than it said; only a restart can tell."""
    store = SqliteStore(tmp_path / "journal.db")
    Journal(store).append(encode_records([Started(1)]))
    store._db.pragma("max_page_count", store._db.pragma("page_count"))
    with pytest.raises(JournalError, match=r"disk that holds .* is full"):
        store.append([row(1, 1_000_000)])
    with pytest.raises(JournalError, match="failed before"):
        store.append([row(1)])
    store.close()
    assert len(list(Journal(SqliteStore(tmp_path / "journal.db")).load())) == 1
