"""The high-water mark tells a journal that lost its newest records, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_core.errors import JournalCorruptError, JournalError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.high_water import (
    NOTE_BYTES,
    SECOND_OFFSET,
    HighWaterMark,
    Mark,
    read_mark,
)
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Paused

SIGNER = Signer(Ed25519PrivateKey.generate())
RECORDS = 40


@dataclass
class Killed:
    """What a coordinator that was killed has left, in `folder`."""

    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / "journal.db"

    @property
    def log(self) -> Path:
        return self.folder / "journal.db-wal"

    @property
    def mark(self) -> Path:
        return self.folder / "journal.db.mark"


def append(journal: Journal, *rounds: int) -> None:
    journal.append(encode_records(Paused(round_, "x" * 150) for round_ in rounds))


@pytest.fixture
def killed(tmp_path: Path) -> Killed:
    served, left = tmp_path / "served", tmp_path / "left"
    served.mkdir()
    journal = Journal(SqliteStore(served / "journal.db"))
    append(journal, 0)
    journal.keep_mark(HighWaterMark(served / "journal.db.mark", SIGNER))
    for round_ in range(1, RECORDS):
        append(journal, round_)
    shutil.copytree(served, left)
    journal.close()
    return Killed(left)


def records_and_whole(at: Killed) -> tuple[int, bool]:
    """How many records SQLite finds, and whether the mark says that these are all."""
    mark = read_mark(at.mark)
    assert mark is not None
    journal = Journal(SqliteStore(at.journal))
    try:
        is_whole = journal.reaches(mark.records, mark.chain)
        return len(list(journal.load())), is_whole
    finally:
        journal.close()


def test_the_mark_names_the_last_record_and_who_signed(killed: Killed) -> None:
    mark = read_mark(killed.mark)
    assert mark is not None
    assert (mark.records, mark.key) == (RECORDS, SIGNER.public_key)
    assert records_and_whole(killed) == (RECORDS, True)


def damaged_logs(log: bytes) -> Iterator[bytes]:
    """Cut everywhere, and flipped everywhere, in steps that no page is a multiple of."""
    for place in range(0, len(log), 3001):
        yield log[:place]
        yield bytes([*log[:place], log[place] ^ 1, *log[place + 1 :]])


def test_a_log_that_was_cut_or_changed_is_told_wherever_that_is(killed: Killed) -> None:
    """SQLite itself takes what comes before the damage for a sound journal."""
    content, log, mark = killed.journal.read_bytes(), killed.log.read_bytes(), killed.mark
    kept_mark = mark.read_bytes()
    shorter = 0
    for damaged in damaged_logs(log):
        killed.journal.write_bytes(content)
        killed.log.write_bytes(damaged)
        mark.write_bytes(kept_mark)
        try:
            found, is_whole = records_and_whole(killed)
        except JournalError:
            continue  # SQLite or the hashes tell.
        assert is_whole == (found == RECORDS)
        shorter += found < RECORDS
    assert shorter > 50


def test_a_deleted_log_and_an_older_copy_are_told(killed: Killed) -> None:
    killed.log.unlink()
    found, is_whole = records_and_whole(killed)
    assert found < RECORDS
    assert not is_whole


def test_other_records_of_the_same_number_are_told(killed: Killed) -> None:
    killed.journal.unlink()
    killed.log.unlink()
    other = Journal(SqliteStore(killed.journal))
    append(other, *range(100, 100 + RECORDS + 5))
    other.close()
    assert records_and_whole(killed) == (RECORDS + 5, False)


def test_a_journal_that_went_on_without_its_mark_is_whole(killed: Killed) -> None:
    journal = Journal(SqliteStore(killed.journal))
    list(journal.load())
    append(journal, RECORDS, RECORDS + 1)
    journal.close()
    assert records_and_whole(killed) == (RECORDS + 2, True)


def test_a_note_that_was_being_written_leaves_the_one_from_the_start(killed: Killed) -> None:
    content = bytearray(killed.mark.read_bytes())
    for place in range(SECOND_OFFSET + 24, SECOND_OFFSET + 135, 7):
        torn = content.copy()
        torn[place] ^= 1
        killed.mark.write_bytes(torn)
        assert read_mark(killed.mark) == Mark(1, read_chain(killed, 0), SIGNER.public_key)
    killed.mark.write_bytes(content[:NOTE_BYTES])
    assert records_and_whole(killed) == (RECORDS, True)


def read_chain(at: Killed, seqno: int) -> bytes:
    store = SqliteStore(at.journal)
    try:
        return store.read(seqno, 1)[0].chain
    finally:
        store.close()


def test_a_mark_that_is_damaged_altogether_is_refused_with_a_way_out(killed: Killed) -> None:
    sound = killed.mark.read_bytes()
    for content in (b"", b"\n" * 5000, sound[SECOND_OFFSET:], sound.replace(b"=\n", b"\n", 1)):
        killed.mark.write_bytes(content)
        with pytest.raises(JournalCorruptError, match=r"journal.db.mark is damaged.*move the mark"):
            read_mark(killed.mark)
    killed.mark.unlink()
    assert read_mark(killed.mark) is None


def test_a_mark_that_cannot_be_written_is_told_and_nothing_is_acknowledged(tmp_path: Path) -> None:
    journal = Journal(SqliteStore(tmp_path / "journal.db"))
    append(journal, 0)
    with pytest.raises(JournalError, match=r"mark .*nowhere/m could not be written \(No such file"):
        journal.keep_mark(HighWaterMark(tmp_path / "nowhere" / "m", SIGNER))
    mark = HighWaterMark(tmp_path / "m", SIGNER)
    journal.keep_mark(mark)
    with Path("/dev/full").open("wb") as full:
        kept, mark._file = mark._file, full.fileno()
        with pytest.raises(JournalError, match="could not be written"):
            append(journal, 1)
        mark._file = kept
    journal.close()
