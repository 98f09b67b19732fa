"""The embedded journal store: one SQLite file, one connection that writes, one process.

apsw brings its own SQLite, because 3.7.0 to 3.51.2 can corrupt a WAL that two connections reset at
once, and distributions still ship those. `locking_mode=EXCLUSIVE` keeps every other process out for
as long as the file is open. `synchronous=FULL` makes a returned append survive power loss (with
NORMAL, 46 % of enumerated power-loss states had lost an acknowledged row).

SQLite ignores some errors: those of a folder's sync, and those of its automatic checkpoints. So
this module syncs the folder and makes the checkpoints.

The lock keeps out a second connection of this process, too. So that a second thread can read while
the first appends, it reads the file as it was left by the last checkpoint, and takes the rows since
then from memory. Between two checkpoints nothing writes to the file itself (only to its log), so a
connection that takes it for immutable reads it soundly. A checkpoint and such a read exclude each
other; a checkpoint that finds a read under way is left to the next write.

Whoever only reads opens the file in SQLite's normal locking mode, and holds a shared lock for as
long as the file is open. Any number of processes read at a time, and none while one can write.
Where the file or its folder cannot be written (an archive, another user's journal) there can be no
lock: SQLite would leave files beside it that its owner could not write to. Then a journal that was
closed, so that it has no log beside it, is read as a file that does not change.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, starmap
from pathlib import Path

import apsw

from fedmezo_core.errors import (
    JournalBehindError,
    JournalCorruptError,
    JournalError,
    JournalFullError,
    JournalLockedError,
)
from fedmezo_core.folders import sync
from fedmezo_core.journal.journal import (
    Row,
    check_origin,
    check_seqnos,
    count_within,
    until_full,
)
from fedmezo_core.journal.sealed import StoredState

APPLICATION_ID = 0x464D5A4F  # "FMZO"
SQLITE_VERSION_MIN = (3, 51, 3)
CHECKPOINT_PAGES = 1000
"""Once the write-ahead log has this many pages of 4 KiB, a write also folds it into the file."""
LATE_CHECKPOINTS = 4
"""With so many times that length, the write waits for the read that keeps it from doing so."""

READ_WAIT_MS = 2000
"""Longest wait of a reader for a lock: another one may recover the log, or close."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE journal (
      seqno INTEGER PRIMARY KEY,
      body BLOB NOT NULL,
      chain BLOB NOT NULL CHECK (length(chain) = 32)
    ) STRICT
    """,
    """
    CREATE TABLE origin (
      only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
      seqno INTEGER NOT NULL CHECK (seqno > 0),
      sealed BLOB NOT NULL,
      digest BLOB NOT NULL CHECK (length(digest) = 32)
    ) STRICT
    """,
    """
    CREATE TABLE seal (
      seqno INTEGER PRIMARY KEY CHECK (seqno > 0),
      sealed BLOB NOT NULL,
      digest BLOB NOT NULL CHECK (length(digest) = 32)
    ) STRICT
    """,
)
"""Each step takes a journal's schema from the version before to its own; there is no way back."""
SCHEMA_VERSION = len(MIGRATIONS)


_OF_THESE = "FROM journal WHERE seqno IN (SELECT value FROM json_each(?)) ORDER BY seqno LIMIT ?"
"""Rows with the seqnos in a JSON list. A statement for each of thousands takes three times as long,
and other threads wait for Python's lock meanwhile."""


class SqliteStore:
    """A `JournalStore` in one SQLite file. Use it from one thread at a time.

    A second thread may call `read_beside` and `origin`.

    After any error while writing it refuses every further call: what reached the disk is known only
    after opening and verifying anew.
    """

    def __init__(
        self,
        path: Path,
        *,
        create: bool = True,
        read_only: bool = False,
        checkpoint_pages: int = CHECKPOINT_PAGES,
    ) -> None:
        """Open, lock and check the file; `JournalError` and its kinds say what is wrong with it.

        With `read_only` others may read it at the same time, and nothing can be appended.
        """
        if _version() < SQLITE_VERSION_MIN:
            raise JournalError(
                f"SQLite {apsw.sqlite_lib_version()} has the WAL-reset bug; install apsw 3.51.3 or "
                "later."
            )
        self._path = path
        self._read_only = read_only
        self._is_archive = read_only and not (_is_writable(path) and _is_writable(path.parent))
        self._broken = False
        self._checkpoint_pages = checkpoint_pages
        self._log = _LogSize()
        # Held by a read of the second thread, and by a checkpoint.
        self._file_is_used = threading.Lock()
        self._beside: apsw.Connection | None = None
        # The rows since the last checkpoint, and the seqno that the first of them has or will have.
        self._in_log: list[Row] = []
        self._log_begins = 0
        _check_log_is_no_orphan(path)
        if not path.is_file():
            if not create or read_only:
                raise JournalError(f"There is no journal at {path}; check the path.")
            _create(path)
        _forget_cache(Path(f"{path}-wal"))
        self._connect()
        try:
            with self._errors_named("opened"):
                if read_only:
                    self._prepare_reading()
                else:
                    self._prepare()
                self._begins = self._db.execute("SELECT coalesce(max(seqno), 0) FROM origin").get
                self._length = self._db.execute(
                    "SELECT coalesce(max(seqno) + 1, ?) FROM journal", (self._begins,)
                ).get
            self._log_begins = self._length
            self._check_names()
        except BaseException:
            self._db.close(True)
            raise

    def _connect(self) -> None:
        with self._errors_named("opened"):
            if self._is_archive:
                self._stamp = _stamp(self._path)
                _check_has_no_log(self._path)
                self._db = _unchanging(self._path)
            else:
                self._db = apsw.Connection(str(self._path))
        # Not before: a layered file system may copy the file when it is opened.
        self._identity = _identity(self._path)

    def _prepare_reading(self) -> None:
        """Take the shared lock; a file of an older schema is brought up to date before."""
        self._db.set_busy_timeout(READ_WAIT_MS)
        version = self._version_checked()
        if self._is_archive:
            if version < SCHEMA_VERSION:
                raise JournalError(
                    f"{self._path} was written by an older FedMeZO, and it or its folder cannot be "
                    "written to bring it up to date; copy it into a folder that you can write."
                )
        elif version < SCHEMA_VERSION or self._db.pragma("journal_mode") != "wal":
            self._db.close(True)
            SqliteStore(self._path).close()
            self._connect()
            self._db.set_busy_timeout(READ_WAIT_MS)
            self._version_checked()
        # In WAL mode a connection that has read keeps its shared lock until it is closed.
        self._db.pragma("query_only", True)
        self._check_pages()

    def _version_checked(self) -> int:
        """The file's schema version; raises `JournalError` for a file that is no such journal."""
        application = self._db.pragma("application_id")
        version = self._db.pragma("user_version")
        is_new = application == 0 and not self._db.execute("SELECT count(*) FROM sqlite_schema").get
        if not is_new and application != APPLICATION_ID:
            raise JournalError(
                f"{self._path} is a database, but not a FedMeZO journal; choose another path."
            )
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"{self._path} was written by a newer FedMeZO (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade FedMeZO to open it."
            )
        return int(version)

    def _prepare(self) -> None:
        """Take the exclusive lock, bring the schema up to date and fold the log into the file."""
        self._db.set_busy_timeout(0)
        # Exclusive before WAL: the WAL index then lives in this process's memory only.
        self._db.pragma("locking_mode", "EXCLUSIVE")
        self._db.execute("BEGIN EXCLUSIVE; COMMIT")
        version = self._version_checked()
        self._db.pragma("journal_mode", "wal")
        self._db.pragma("synchronous", "FULL")
        self._db.set_wal_hook(self._log)  # In place of SQLite's own, which checkpoints.
        if version < SCHEMA_VERSION:
            with self._db:
                for step in MIGRATIONS[version:]:
                    self._db.execute(step)
                self._db.pragma("application_id", APPLICATION_ID)
                self._db.pragma("user_version", SCHEMA_VERSION)
        self._check_pages()
        _sync_folder(self._path)
        self._db.wal_checkpoint()

    def _check_pages(self) -> None:
        findings = self._db.pragma("quick_check")
        if findings != "ok":
            raise JournalCorruptError(
                f"The journal {self._path} is damaged ({str(findings).splitlines()[0]}); "
                "restore it from a copy."
            )

    def append(self, rows: Sequence[Row]) -> None:
        """Write all rows in one transaction; returns once they are on the disk."""
        check_seqnos(rows, self._length)
        with self._written("appended to"):
            self._db.executemany(
                "INSERT INTO journal (seqno, body, chain) VALUES (?, ?, ?)", list(rows)
            )
        self._in_log.extend(rows)
        self._length += len(rows)
        self._fold_log("appended to")

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on."""
        with self._errors_named("read"):
            found = self._db.execute(
                "SELECT seqno, body, chain FROM journal WHERE seqno >= ? ORDER BY seqno LIMIT ?",
                (from_seqno, rows_max),
            )
            rows = tuple(until_full(map(Row._make, found)))
            found.close()  # One that is not at its end would keep the log from being folded.
        self._check_names()
        return rows

    def read_beside(self, seqnos: Sequence[int], bytes_max: int) -> Sequence[Row]:
        """The rows of the first of these seqnos; another thread may append meanwhile."""
        with self._reading_beside() as file:
            in_log, log_begins = self._in_log, self._log_begins
            log_ends = log_begins + len(in_log)
            wanted = json.dumps([seqno for seqno in seqnos if seqno < log_begins])
            newer = [
                in_log[seqno - log_begins] for seqno in seqnos if log_begins <= seqno < log_ends
            ]
            # The length of a column is known without its bytes.
            sizes = file.execute(f"SELECT length(body) + length(chain) {_OF_THESE}", (wanted, -1))
            size_of_each = chain((size for (size,) in sizes), (row.size for row in newer))
            count = count_within(size_of_each, bytes_max)
            sizes.close()
            found = file.execute(f"SELECT seqno, body, chain {_OF_THESE}", (wanted, count))
            rows = tuple(map(Row._make, found))
            return (*rows, *newer[: count - len(rows)])

    def origin(self) -> StoredState | None:
        """What the dropped rows come to; another thread may append meanwhile."""
        with self._reading_beside() as file:
            found = file.execute("SELECT seqno, sealed, digest FROM origin").fetchone()
            return None if found is None else StoredState(*found)

    def drop_before(self, origin: StoredState) -> None:
        """Write the origin and drop rows in one transaction; later rows reuse their space."""
        check_origin(origin, self._begins, self._length)
        with self._written("compacted"):
            self._db.execute(
                "INSERT OR REPLACE INTO origin (only_row, seqno, sealed, digest) "
                "VALUES (1, ?, ?, ?)",
                (origin.seqno, origin.sealed, origin.digest),
            )
            self._db.execute("DELETE FROM journal WHERE seqno < ?", (origin.seqno,))
        self._begins, self._length = origin.seqno, max(self._length, origin.seqno)
        # The second thread sees the new origin as soon as this returns.
        self._fold_log("compacted", waits=True)

    def seals(self) -> Sequence[StoredState]:
        """The sealed states that were kept last."""
        with self._errors_named("read"):
            found = self._db.execute("SELECT seqno, sealed, digest FROM seal ORDER BY seqno")
            return tuple(starmap(StoredState, found))

    def keep_seals(self, seals: Sequence[StoredState]) -> None:
        """Write these sealed states in place of those before, in one transaction."""
        with self._written("sealed"):
            self._db.execute("DELETE FROM seal")
            self._db.executemany(
                "INSERT INTO seal (seqno, sealed, digest) VALUES (?, ?, ?)",
                [(seal.seqno, seal.sealed, seal.digest) for seal in seals],
            )
        self._fold_log("sealed")

    def __len__(self) -> int:
        return int(self._length)

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of the lock."""
        with self._file_is_used:
            self._close_beside()
            self._db.close(True)

    def _fold_log(self, doing: str, *, waits: bool = False) -> None:
        """Fold the log into the file, if it is long or the caller waits for that."""
        pages = self._log.pages
        if pages < self._checkpoint_pages and not waits:
            return
        waits = waits or pages >= LATE_CHECKPOINTS * self._checkpoint_pages
        if not self._file_is_used.acquire(blocking=waits):
            return
        try:
            self._close_beside()
            with self._errors_named(doing):
                self._db.wal_checkpoint()
            self._in_log, self._log_begins = [], self._length
        finally:
            self._file_is_used.release()

    @contextmanager
    def _reading_beside(self) -> Iterator[apsw.Connection]:
        """A connection that reads the file, which no checkpoint writes to meanwhile."""
        with self._file_is_used, self._errors_named("read"):
            if self._read_only:
                yield self._db  # Nothing is appended, and the file may lack what is in the log.
                self._check_names()
                return
            if self._beside is None:
                self._beside = _unchanging(self._path)
                self._check_names()
            yield self._beside

    def _close_beside(self) -> None:
        """Close the second thread's connection: it may remember pages that are written now."""
        if self._beside is not None:
            self._beside.close(True)
            self._beside = None

    @contextmanager
    def _written(self, doing: str) -> Iterator[None]:
        """One transaction, on the disk when it ends."""
        with self._errors_named(doing):
            # Plain BEGIN and COMMIT: when the disk is full SQLite rolls back by itself, and a
            # savepoint's own rollback would then hide the error that matters.
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        self._check_names()

    def _check_names(self) -> None:
        """Refuse to go on if the names of the files no longer mean the files that are open.

        Linux lets anybody delete, move or replace an open file. SQLite then writes on, and syncs
        what nobody will ever find.
        """
        if self._is_archive:
            self._check_unchanged()
            return
        # Not `stat` for the log: each write after it would have to update the log's times, which
        # makes an append a third slower (Linux 6.13 and later).
        log = Path(f"{self._path}-wal")
        has_log = os.access(log, os.F_OK)
        if has_log and self._identity is not None and _identity(self._path) == self._identity:
            return
        self._broken = True
        lost = self._path if has_log else log
        raise JournalError(
            f"{lost} was deleted, moved or replaced while it was in use; nothing more is "
            "acknowledged. Put that file or the newest copy of the journal back, and start again."
        )

    def _check_unchanged(self) -> None:
        """Refuse what was read of an archive if somebody has opened it to write meanwhile."""
        if _stamp(self._path) == self._stamp and not Path(f"{self._path}-wal").exists():
            return
        self._broken = True
        raise JournalError(
            f"{self._path} was written to while it was read, and it or its folder cannot be "
            "written to keep others out; wait until nobody has it open, and begin again."
        )

    @contextmanager
    def _errors_named(self, doing: str) -> Iterator[None]:
        """Turn SQLite's errors into ours, and make the first one final."""
        if self._broken:
            raise JournalError(
                f"The journal {self._path} failed before; restart the coordinator so that it is "
                "verified."
            )
        try:
            yield
        except apsw.Error as error:
            self._broken = True
            if self._is_archive:
                self._check_unchanged()  # If it was, nothing is wrong with the file.
            raise _named(error, self._path, doing) from None


class _LogSize:
    """SQLite calls it after each commit. It holds no store, so that stores can be freed."""

    pages = 0

    def __call__(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        """Keep the count of pages in the write-ahead log."""
        self.pages = pages
        return apsw.SQLITE_OK


def _check_log_is_no_orphan(path: Path) -> None:
    """Refuse an empty journal beside a log that is not: SQLite would delete the log."""
    log = Path(f"{path}-wal")
    if not _size(path) and _size(log):
        raise JournalBehindError(
            f"The journal {path} is empty or not there, but its log {log} is, with the newest "
            "records. Put the newest copy of the journal back beside it, or move the log away to "
            "go on without it."
        )


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK)


def _check_has_no_log(path: Path) -> None:
    """Refuse to read a journal as an archive while its newest records may be in its log."""
    log = Path(f"{path}-wal")
    if log.exists():
        raise JournalError(
            f"The newest records of {path} may be in {log}, and the journal or its folder cannot "
            "be written to read them; once nobody has the journal open, copy both files into a "
            "folder that you can write."
        )


def _unchanging(path: Path) -> apsw.Connection:
    """A connection that reads the file alone, takes no lock and writes nothing beside it."""
    return apsw.Connection(
        f"{path.absolute().as_uri()}?immutable=1",
        flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _create(path: Path) -> None:
    """Create an empty file that only its owner can read: answers come from the workers' data."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise JournalError(
            f"The journal {path} cannot be created ({error.strerror}); "
            "check that its folder exists and is writable."
        ) from None


def _forget_cache(path: Path) -> None:
    """Let the file be read from the disk, and not from what the kernel remembers of it.

    After a failed sync the kernel shows pages that are not on the disk and that it will not write
    again. Appending after such pages would acknowledge rows behind a hole.
    """
    if not path.is_file() or not hasattr(os, "posix_fadvise"):
        return
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # Only what is on the disk can be forgotten.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    except OSError as error:
        raise JournalError(
            f"The journal's log {path} could not be synced ({error.strerror}); "
            "check the disk and start the coordinator again."
        ) from None


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that a name means now; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes if somebody writes to a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _sync_folder(path: Path) -> None:
    """Make the names of the journal's files durable; SQLite would not report a failure."""
    try:
        sync(path.parent)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot sync a folder.
            raise JournalError(
                f"The folder of the journal {path} could not be synced ({error.strerror}); "
                "check the disk and start the coordinator again."
            ) from None


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in apsw.sqlite_lib_version().split(".")[:3])


def _named(error: apsw.Error, path: Path, doing: str) -> JournalError:
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return JournalLockedError(
                f"The journal {path} is open in another process; if that is a command which reads "
                "it, wait until it ends; if it is a coordinator, stop it first, or give a command "
                "of `fedmezo` no file: it then asks the coordinator."
            )
        case apsw.NotADBError():
            return JournalCorruptError(
                f"{path} is not a journal, or its first page is damaged; check the path, "
                "or restore the journal from a copy."
            )
        case apsw.CorruptError():
            return JournalCorruptError(
                f"The journal {path} is damaged or cut short ({error}); restore it from a copy."
            )
        case apsw.FullError():
            return JournalFullError(
                f"The disk that holds {path} is full; free some space and start the coordinator "
                "again. Every acknowledged answer is in the journal."
            )
        case apsw.CantOpenError():
            return JournalError(
                f"The journal {path} cannot be created or opened; check that its folder exists "
                "and is writable."
            )
        case apsw.ReadOnlyError():
            return JournalError(
                f"The journal {path} cannot be {doing}: it is read-only; make the file and its "
                "folder writable."
            )
        case _:
            return JournalError(
                f"The journal {path} could not be {doing} ({error}); the coordinator stops, so "
                "that nothing is acknowledged that is not on the disk. Check the disk and start it "
                "again."
            )
