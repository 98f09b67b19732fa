"""What a start does if the journal, its key or its mark is not what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedmezo_coordinator.stores.companions import Companions
from fedmezo_core.errors import ConfigError, FedMezoError, JournalBehindError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Paused


def started(path: Path, *, new_records: int = 1, signing_key: Path | None = None) -> None:
    """What a coordinator does: check, begin if there is nothing, load, append, stop."""
    journal = Journal(SqliteStore(path))
    try:
        companions = Companions(str(path), signing_key)
        companions.check(journal)
        if journal.is_empty:
            journal.append(encode_records([Paused(0, str(path))]))
        signer = companions.signer()
        list(journal.load())
        companions.keep_mark(journal, signer)
        for number in range(new_records):
            journal.append(encode_records([Paused(number, "later")]))
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of eight records, after two starts, and an older copy of it."""
    path = tmp_path / "journal.db"
    started(path, new_records=3)
    shutil.copy(path, tmp_path / "older.db")
    started(path, new_records=4)
    return path


def said(path: Path, kind: type[FedMezoError]) -> str:
    with pytest.raises(kind) as caught:
        started(path)
    return str(caught.value)


def test_undisturbed_it_starts_again_and_again(path: Path) -> None:
    for _ in range(3):
        started(path)


def test_a_journal_from_before_there_were_marks_gets_one(path: Path) -> None:
    mark = path.with_name("journal.db.mark")
    mark.unlink()
    started(path)
    assert mark.exists()


def test_an_older_copy_is_refused_until_the_mark_is_moved_away(path: Path) -> None:
    path.with_name("older.db").rename(path)
    sentence = said(path, JournalBehindError)
    assert f"The journal {path} lacks record 7, which {path}.mark says was on the disk" in sentence
    assert "Put the newest journal back" in sentence
    assert f"or move {path}.mark away" in sentence
    path.with_name("journal.db.mark").unlink()
    started(path)


@pytest.mark.parametrize("left", ["no file", "0 bytes"])
def test_an_empty_journal_beside_its_mark_is_refused(path: Path, left: str) -> None:
    path.unlink() if left == "no file" else path.write_bytes(b"")
    sentence = said(path, JournalBehindError)
    assert f"{path} is empty or new, but {path}.mark says that it had 8 records" in sentence
    assert f"move {path}.mark and {path}.key away to begin a new run" in sentence
    for companion in ("journal.db.mark", "journal.db.key"):
        path.with_name(companion).unlink()
    started(path)


def test_an_empty_journal_beside_its_key_alone_is_refused(path: Path) -> None:
    path.unlink()
    path.with_name("journal.db.mark").unlink()
    sentence = said(path, JournalBehindError)
    assert f"it had the key {path}.key, so there was a run" in sentence
    assert "move the key away, or name it as signing_key" in sentence
    started(path, signing_key=path.with_name("journal.db.key"))


def test_a_key_that_was_removed_or_replaced_is_refused_and_no_key_is_made(path: Path) -> None:
    key = path.with_name("journal.db.key")
    first = key.rename(key.with_name("first.key"))
    sentence = said(path, ConfigError)
    assert f"The key {key} of the journal {path} is gone: {path}.mark is signed by" in sentence
    assert "Put that key back" in sentence
    assert not key.exists()
    started(path.with_name("other.db"))
    shutil.copy(path.with_name("other.db.key"), key)
    assert "was replaced by another" in said(path, ConfigError)
    shutil.copy(first, key)
    started(path)
    key.unlink()
    path.with_name("journal.db.mark").unlink()
    started(path)  # As the sentence says: with a new key.
