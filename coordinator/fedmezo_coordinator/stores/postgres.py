"""A journal store in PostgreSQL, for when one machine is not enough.

Two things keep a journal to one coordinator. A session-level advisory lock says who may start:
PostgreSQL releases it when that session ends, so a waiting standby takes over. The
*fence* says who may write: a row with a number that every takeover raises, and that every append
names. A coordinator whose connection was lost, or which slept through a takeover, names an old
number and can write nothing more.

**An append is one statement**, so one transaction and one round trip: it takes a share lock on the
fence row if the row still has the writer's number, and inserts only then. A takeover updates that
row. The two locks exclude each other, so an append is either before the takeover, which then reads
its rows, or after it, and then it finds another number and inserts nothing, whenever it was sent.

**An append whose outcome is unknown** (the connection broke before the answer came) is settled the
same way. The store connects again, takes the lock and raises the fence *if it is still the holder*.
Once that update is durable, the lost statement has either committed or never will: had it locked
the fence row first, the update would have waited for its end; otherwise it finds the new number. So
one look at the rows is exact: either they are all there (equal seqnos and chains are equal bytes),
or none is, and the same rows are appended again. Anything else means that another hand wrote, and
the store stops.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import ssl
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import starmap
from typing import Any, TypeAlias, TypeVar

import asyncpg

from fedmezo_coordinator.stores.location import DatabaseLocation
from fedmezo_core.errors import (
    ConfigError,
    FencedError,
    JournalCorruptError,
    JournalError,
    JournalFullError,
    JournalLockedError,
)
from fedmezo_core.journal.journal import (
    READ_BYTES_MAX,
    Row,
    check_origin,
    check_seqnos,
    count_within,
)
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.wire.backoff import delay_s

log = logging.getLogger("fedmezo.coordinator")

RECONNECT_S = 30.0
"""How long the store waits for a PostgreSQL that does not answer, at the start and during a run."""
RETRY_CAP_S = 1.0
"""Longest wait between two attempts; few coordinators share a database."""
CONNECT_S = 5.0
"""Longest wait for one connection."""
ANSWER_S = 20.0
"""Longest wait for the answer to one statement; then its connection counts as lost."""
DROPPED_ROWS_PER_S = 10_000
"""The least speed at which a server is expected to drop rows."""
STANDBY_LOOK_S = 0.5
"""How often a standby tries the lock. It does not wait inside PostgreSQL: that would be one long
transaction, which keeps the server from cleaning up, and could not be ended by a signal."""
CLOSE_S = 2.0

SERVER_SETTINGS = {
    "application_name": "fedmezo-coordinator",
    "synchronous_commit": "on",
    # Nobody's default may cut an append short.
    "statement_timeout": "0",
    "lock_timeout": "0",
    # A coordinator's machine that vanished without a word loses its session, and with it the lock,
    # in about 11 s; by default PostgreSQL takes hours.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE SCHEMA {schema};
    CREATE TABLE {schema}.schema_version (version integer NOT NULL);
    INSERT INTO {schema}.schema_version VALUES (0);
    CREATE TABLE {schema}.journal (
      seqno bigint PRIMARY KEY CHECK (seqno >= 0),
      body bytea NOT NULL,
      chain bytea NOT NULL CHECK (octet_length(chain) = 32)
    );
    -- Records are floating-point numbers: compressing them costs time and gains nothing.
    ALTER TABLE {schema}.journal ALTER COLUMN body SET STORAGE EXTERNAL;
    CREATE TABLE {schema}.fence (
      only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
      fence bigint NOT NULL,
      holder uuid NOT NULL
    );
    INSERT INTO {schema}.fence (fence, holder) VALUES (0, '00000000-0000-0000-0000-000000000000');
    """,
    """
    CREATE TABLE {schema}.origin (
      only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
      seqno bigint NOT NULL CHECK (seqno > 0),
      sealed bytea NOT NULL,
      digest bytea NOT NULL CHECK (octet_length(digest) = 32)
    );
    """,
    """
    CREATE TABLE {schema}.seal (
      seqno bigint PRIMARY KEY CHECK (seqno > 0),
      sealed bytea NOT NULL,
      digest bytea NOT NULL CHECK (octet_length(digest) = 32)
    );
    """,
)
"""Each step takes a journal's schema from the version before to its own; there is no way back."""

_APPEND = """
WITH held AS (SELECT FROM {schema}.fence WHERE fence = $1 FOR SHARE)
INSERT INTO {schema}.journal (seqno, body, chain)
SELECT added.seqno, added.body, added.chain
FROM held, unnest($2::bigint[], $3::bytea[], $4::bytea[]) AS added (seqno, body, chain)
"""
_DROP_BEFORE = """
WITH held AS (SELECT FROM {schema}.fence WHERE fence = $1 FOR SHARE),
gone AS (DELETE FROM {schema}.journal USING held WHERE seqno < $2)
INSERT INTO {schema}.origin (seqno, sealed, digest) SELECT $2, $3, $4 FROM held
ON CONFLICT (only_row) DO UPDATE
SET seqno = excluded.seqno, sealed = excluded.sealed, digest = excluded.digest
"""
_KEEP_SEALS = """
WITH held AS (SELECT FROM {schema}.fence WHERE fence = $1 FOR SHARE),
gone AS (DELETE FROM {schema}.seal USING held WHERE seqno <> ALL($2::bigint[]))
INSERT INTO {schema}.seal (seqno, sealed, digest)
SELECT kept.seqno, kept.sealed, kept.digest
FROM held, unnest($2::bigint[], $3::bytea[], $4::bytea[]) AS kept (seqno, sealed, digest)
ON CONFLICT (seqno) DO UPDATE SET sealed = excluded.sealed, digest = excluded.digest
"""
_ORIGIN = "SELECT seqno, sealed, digest FROM {schema}.origin"
_SEALS = "SELECT seqno, sealed, digest FROM {schema}.seal ORDER BY seqno"
_READ = """
WITH first AS (
  SELECT seqno, body, chain FROM {schema}.journal WHERE seqno >= $1 ORDER BY seqno LIMIT $2
), summed AS (
  SELECT *, sum(octet_length(body)) OVER (ORDER BY seqno) - octet_length(body) AS before FROM first
)
SELECT seqno, body, chain FROM summed WHERE before < $3 ORDER BY seqno
"""
_SIZES = """
SELECT seqno, octet_length(body) + octet_length(chain) FROM {schema}.journal
WHERE seqno = ANY($1::bigint[]) ORDER BY seqno
"""
_READ_BESIDE = """
SELECT seqno, body, chain FROM {schema}.journal WHERE seqno = ANY($1::bigint[]) ORDER BY seqno
"""
_ENDS = "SELECT seqno, chain FROM {schema}.journal WHERE seqno >= $1 ORDER BY seqno LIMIT $2"
_LAST = "SELECT seqno, chain FROM {schema}.journal ORDER BY seqno DESC LIMIT 1"
_TAKE = "UPDATE {schema}.fence SET fence = fence + 1, holder = $1 RETURNING fence"
_RETAKE = "UPDATE {schema}.fence SET fence = fence + 1 WHERE holder = $1 RETURNING fence"
_HOLDER = "SELECT holder = $1 FROM {schema}.fence"
_VERSION = "SELECT version FROM {schema}.schema_version"
_SET_VERSION = "UPDATE {schema}.schema_version SET version = $1"
_LOCK_OWNER = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND (classid::bigint << 32 | objid::bigint) = $1
"""

Result = TypeVar("Result")
Connection: TypeAlias = "asyncpg.Connection[Any]"


class PostgresStore:
    """A `JournalStore` in one schema of a PostgreSQL database. Use it from one thread at a time.

    A second thread may call `read_beside` and `origin`, which have a connection of their own.

    Every call waits for at most about `RECONNECT_S` while PostgreSQL is away; after an error while
    appending or reconnecting it refuses every further call.
    """

    def __init__(
        self,
        location: DatabaseLocation,
        *,
        read_only: bool = False,
        standby: bool = False,
        give_up: threading.Event | None = None,
        patience_s: float | None = None,
    ) -> None:
        """Connect, check the server, lock, migrate and raise the fence.

        `read_only` does none of the last three and reads beside a running coordinator. `standby`
        waits for the lock, without limit, until `give_up` is set. `patience_s` replaces
        `RECONNECT_S`. Raises `JournalError` and its kinds, or `ConfigError` for a URL that cannot
        be used.
        """
        self._location = location
        self._read_only = read_only
        self._standby = standby
        self._give_up = give_up or threading.Event()
        self._patience_s = RECONNECT_S if patience_s is None else patience_s
        self._holder = uuid.uuid4()
        self._fence = 0
        self._begins = 0
        self._length = 0
        # Chain of the last row; empty while there is none.
        self._chain = b""
        self._sending: Sequence[Row] = ()
        self._landed = False
        self._db: Connection | None = None
        self._opened = False
        self._broken = False
        self._warned = ""
        self._patience_ends_s = 0.0
        self._standing_by = False
        self._reader: PostgresStore | None = None
        """The store of the second thread, as soon as that reads; it is replaced if it fails."""
        self._loop = _LoopThread()
        try:
            self._run(self._persist(_nothing))
            self._opened = True
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ the store

    def append(self, rows: Sequence[Row]) -> None:
        """Write all rows in one transaction; returns once they are durable.

        Raises `FencedError` once another coordinator has taken over.
        """
        check_seqnos(rows, self._length)
        if not rows:
            return
        self._sending, self._landed = rows, False
        self._run(self._persist(self._append))
        self._sending = ()
        self._length, self._chain = rows[-1].seqno + 1, rows[-1].chain

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on."""

        async def work(db: Connection) -> Sequence[Row]:
            found = await db.fetch(self._sql(_READ), from_seqno, rows_max, READ_BYTES_MAX)
            return tuple(map(Row._make, found))

        return self._run(self._persist(work))

    def read_beside(self, seqnos: Sequence[int], bytes_max: int) -> Sequence[Row]:
        """The rows of the first of these seqnos; another thread may append meanwhile."""

        async def work(db: Connection) -> Sequence[Row]:
            sizes = await db.fetch(self._sql(_SIZES), list(seqnos))
            count = count_within([size for _, size in sizes], bytes_max)
            fit = [seqno for seqno, _ in sizes[:count]]
            return tuple(map(Row._make, await db.fetch(self._sql(_READ_BESIDE), fit)))

        return self._run_beside(work)

    def origin(self) -> StoredState | None:
        """What the dropped rows come to; another thread may append meanwhile."""

        async def work(db: Connection) -> StoredState | None:
            found = await db.fetchrow(self._sql(_ORIGIN))
            return None if found is None else StoredState(*found)

        return self._run_beside(work)

    def drop_before(self, origin: StoredState) -> None:
        """Write the origin and drop rows in one statement, under the fence as an append is.

        One without an answer is sent again: a second time it changes nothing.
        """
        check_origin(origin, self._begins, self._length)

        answer_s = ANSWER_S + (origin.seqno - self._begins) / DROPPED_ROWS_PER_S

        async def work(db: Connection) -> None:
            await self._do_fenced(
                db,
                _DROP_BEFORE,
                "INSERT 0 1",
                *(origin.seqno, origin.sealed, origin.digest),
                answer_s=answer_s,
            )

        self._run(self._persist(work))
        self._begins, self._length = origin.seqno, max(self._length, origin.seqno)

    def seals(self) -> Sequence[StoredState]:
        """The sealed states that were kept last."""

        async def work(db: Connection) -> Sequence[StoredState]:
            return tuple(starmap(StoredState, await db.fetch(self._sql(_SEALS))))

        return self._run(self._persist(work))

    def keep_seals(self, seals: Sequence[StoredState]) -> None:
        """Write these sealed states in place of those before, in one statement, under the fence.

        One without an answer is sent again: a second time it changes nothing.
        """

        async def work(db: Connection) -> None:
            await self._do_fenced(
                db,
                _KEEP_SEALS,
                f"INSERT 0 {len(seals)}",
                [seal.seqno for seal in seals],
                [seal.sealed for seal in seals],
                [seal.digest for seal in seals],
            )

        self._run(self._persist(work))

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """End the session, and with it the lock."""
        if self._reader is not None:
            self._reader.close()
        if self._db is not None and not self._db.is_closed():
            with suppress(Exception):
                self._loop.run(self._db.close(timeout=CLOSE_S))
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._broken:
            work.close()
            raise JournalError(
                f"The journal {self._location.shown} failed before; restart the coordinator so "
                "that it is verified."
            )
        try:
            return self._loop.run(work)
        except BaseException:
            self._broken = True
            raise

    def _run_beside(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Do `work`, which only reads, on the second thread's connection."""
        if self._reader is None:
            self._reader = PostgresStore(
                self._location,
                read_only=True,
                give_up=self._give_up,
                patience_s=self._patience_s,
            )
        reader = self._reader
        try:
            return reader._run(reader._persist(work))
        except BaseException:
            self._reader = None
            reader.close()
            raise

    async def _append(self, db: Connection) -> None:
        if self._landed:
            return
        rows = self._sending
        await self._do_fenced(
            db,
            _APPEND,
            f"INSERT 0 {len(rows)}",
            [row.seqno for row in rows],
            [row.body for row in rows],
            [row.chain for row in rows],
        )

    async def _do_fenced(
        self,
        db: Connection,
        sql: str,
        expected: str,
        *values: object,
        answer_s: float | None = None,
    ) -> None:
        """Change the journal by one statement that does nothing once the fence was raised."""
        self._warned = ""
        done = await db.execute(self._sql(sql), self._fence, *values, timeout=answer_s)
        if done != expected:
            raise self._fenced()
        if self._warned:
            # PostgreSQL warns, and reports success, if its wait for a synchronous replica was cut.
            raise JournalError(
                f"PostgreSQL may not have made a change of {self._location.shown} durable "
                f'("{self._warned}"); the coordinator stops, so that nothing is acknowledged that '
                "can be lost. Start it again."
            )

    # ------------------------------------------------------------ the connection

    async def _persist(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Do `work` on a live connection; while PostgreSQL is away, try for `patience_s`."""
        attempt = 0
        while True:
            try:
                if self._db is None:
                    self._db = await self._connected()
                result = await work(self._db)
                if attempt:
                    log.info("PostgreSQL is back at %s", self._location.shown)
                return result
            except Exception as error:
                if not self._is_lost(error):
                    raise self._named(error) from None
                self._drop()
                if self._standing_by:
                    # That may last for days, with a restart of PostgreSQL every night.
                    attempt, self._standing_by = 0, False
                if attempt == 0:
                    self._patience_ends_s = time.monotonic() + self._patience_s
                    log.warning("%s; trying for %g s", self._away(error), self._patience_s)
                wait_s = delay_s(attempt, random.random(), cap_s=RETRY_CAP_S)
                attempt += 1
                if time.monotonic() + wait_s > self._patience_ends_s:
                    raise self._gone(error) from None
                await self._pause(wait_s)

    async def _connected(self) -> Connection:
        """A checked connection, which holds lock and fence if this store writes."""
        db: Connection = await asyncpg.connect(
            self._location.dsn,
            timeout=CONNECT_S,
            command_timeout=ANSWER_S,
            server_settings=SERVER_SETTINGS,
        )
        try:
            db.add_log_listener(self._on_message)
            if self._read_only:
                await self._look(db)
            elif self._opened:
                await self._take_again(db)
            else:
                await self._take(db)
        except BaseException:
            db.terminate()
            raise
        return db

    async def _look(self, db: Connection) -> None:
        version = await self._version(db)
        if version == 0:
            raise JournalError(
                f"There is no journal at {self._location.shown}; check the URL and its "
                "journal=NAME."
            )
        if version < len(MIGRATIONS):
            raise JournalError(
                f"The journal {self._location.shown} was written by an older FedMeZO (schema "
                f"{version}); start its coordinator with this version once, which migrates it."
            )
        await self._find_end(db)

    async def _take(self, db: Connection) -> None:
        """Become the journal's only writer, at the start."""
        await self._check_durable(db)
        await self._version(db)  # A newer journal is refused before anyone waits for it.
        await self._lock(db)
        async with db.transaction():
            await self._migrate(db)
            self._fence = await db.fetchval(self._sql(_TAKE), self._holder)
        # After the fence: all that an earlier writer committed is seen, and it commits no more.
        await self._find_end(db)

    async def _take_again(self, db: Connection) -> None:
        """Become the writer again after a lost connection, unless another store has taken over."""
        await self._check_durable(db)
        # The old session may not have ended yet, and then still holds the lock.
        while not await self._try_lock(db):
            if not await db.fetchval(self._sql(_HOLDER), self._holder):
                raise self._fenced()
            if time.monotonic() > self._patience_ends_s:
                raise TimeoutError("the lock is still held by the session that was lost")
            await self._pause(STANDBY_LOOK_S)
        fence = await db.fetchval(self._sql(_RETAKE), self._holder)
        if fence is None:
            raise self._fenced()
        self._fence = fence
        await self._settle(db)

    async def _settle(self, db: Connection) -> None:
        """Find out whether the sent rows were written; the module's text says why this is exact."""
        before = [(self._length - 1, self._chain)] if self._chain else []
        sent = [(row.seqno, row.chain) for row in self._sending]
        first = self._length - len(before)
        found = await db.fetch(self._sql(_ENDS), first, len(before) + len(sent) + 1)
        ends = [(seqno, chain) for seqno, chain in found]
        if ends not in (before, before + sent):
            raise JournalCorruptError(
                f"PostgreSQL came back at {self._location.shown} with other records than it had "
                "acknowledged; restore the database, or see that it fails over only to "
                "synchronous replicas."
            )
        self._landed = ends != before

    async def _check_durable(self, db: Connection) -> None:
        for setting, needed in (("fsync", "on"), ("synchronous_commit", "on")):
            found = await db.fetchval(f"SHOW {setting}")
            if found != needed:
                raise JournalError(
                    f"The PostgreSQL of {self._location.shown} has {setting} = {found}, so what "
                    f"it acknowledges can be lost; set {setting} = {needed} there and start again."
                )

    async def _version(self, db: Connection) -> int:
        """The journal's schema version, 0 if there is none yet."""
        if not await db.fetchval(
            "SELECT to_regclass($1)", f"{self._location.schema}.schema_version"
        ):
            return 0
        version = int(await db.fetchval(self._sql(_VERSION)))
        if version > len(MIGRATIONS):
            raise JournalError(
                f"The journal {self._location.shown} was written by a newer FedMeZO (schema "
                f"{version}, this one knows {len(MIGRATIONS)}); upgrade FedMeZO to open it."
            )
        return version

    async def _migrate(self, db: Connection) -> None:
        version = await self._version(db)
        if version == len(MIGRATIONS):
            return
        for step in MIGRATIONS[version:]:
            await db.execute(self._sql(step))
        await db.execute(self._sql(_SET_VERSION), len(MIGRATIONS))

    async def _find_end(self, db: Connection) -> None:
        origin = await db.fetchrow(self._sql(_ORIGIN))
        if origin is not None:
            self._begins = self._length = origin["seqno"]
        last = await db.fetchrow(self._sql(_LAST))
        if last is not None:
            self._length, self._chain = last["seqno"] + 1, last["chain"]

    async def _lock(self, db: Connection) -> None:
        """Take the advisory lock, or say who has it; a standby waits."""
        is_waiting = False
        while not await self._try_lock(db):
            owner = await db.fetchval(_LOCK_OWNER, lock_key(self._location.name))
            if not self._standby:
                raise JournalLockedError(
                    f"The journal {self._location.shown} is held by another session (PostgreSQL "
                    f"process {owner}); stop that coordinator first, or start this one with "
                    "--standby to take over from it."
                )
            if not is_waiting:
                log.info(
                    "standing by: %s is held by PostgreSQL process %s", self._location.shown, owner
                )
                is_waiting = True
            self._standing_by = True
            await self._pause(STANDBY_LOOK_S)
        if is_waiting:
            log.info("taking over %s", self._location.shown)

    async def _try_lock(self, db: Connection) -> bool:
        return bool(
            await db.fetchval("SELECT pg_try_advisory_lock($1)", lock_key(self._location.name))
        )

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless the caller gives up meanwhile."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            if self._give_up.is_set():
                raise JournalLockedError(f"Stopped waiting for the journal {self._location.shown}.")
            await asyncio.sleep(min(left_s, 0.1))

    def _drop(self) -> None:
        """Drop the connection without a goodbye: the server may be gone."""
        if self._db is not None:
            self._db.terminate()
            self._db = None

    def _on_message(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        if getattr(message, "severity_en", "") == "WARNING":
            self._warned = str(getattr(message, "message", message))

    def _sql(self, text: str) -> str:
        return text.format(schema=self._location.schema)

    # ------------------------------------------------------------ what is wrong, in words

    def _is_lost(self, error: Exception) -> bool:
        """Whether the server may come back, as against an answer that stays the same."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return False
        if isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError)):
            return self._db is not None and self._db.is_closed()
        return isinstance(
            error,
            (
                OSError,  # TimeoutError is one.
                asyncpg.PostgresConnectionError,
                asyncpg.AdminShutdownError,
                asyncpg.CrashShutdownError,
                asyncpg.CannotConnectNowError,
                asyncpg.TooManyConnectionsError,
            ),
        )

    def _away(self, error: Exception) -> str:
        return f"PostgreSQL does not answer at {self._location.shown} ({self._reason(error)})"

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) and not str(error):
            return "no answer in time"
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return self._location.clean(first_line)

    def _gone(self, error: Exception) -> JournalError:
        if self._opened:
            return JournalError(
                f"{self._away(error)} and did not come back within {self._patience_s:g} s; the "
                "coordinator stops. Everything acknowledged is in the journal: start it again when "
                "PostgreSQL runs."
            )
        return JournalError(
            f"{self._away(error)}; see that it runs and that host and port are right."
        )

    def _fenced(self) -> FencedError:
        return FencedError(
            f"Another coordinator has taken over the journal {self._location.shown}, so this one "
            "stops and writes nothing more; start it again with --standby to be ready if that one "
            "ends."
        )

    def _named(self, error: Exception) -> Exception:
        """The error as a `FedMezoError` that says what to do; our own errors and defects stay."""
        where, reason = self._location.shown, self._reason(error)
        match error:
            case asyncpg.InvalidAuthorizationSpecificationError():
                return JournalError(
                    f"PostgreSQL refuses the user of {where} ({reason}); check the name, and the "
                    "password in the URL, PGPASSWORD or ~/.pgpass."
                )
            case asyncpg.InvalidCatalogNameError():
                return JournalError(
                    f"There is no such database for {where} ({reason}); create it with createdb, "
                    "or check the URL."
                )
            case asyncpg.InsufficientPrivilegeError():
                return JournalError(
                    f"The user of {where} may not do this ({reason}); as the database's owner, "
                    "GRANT CREATE ON DATABASE to it, or use the user that began the journal."
                )
            case asyncpg.DuplicateSchemaError():
                return JournalError(
                    f"The database has a schema {self._location.schema} that is not a FedMeZO "
                    f"journal; choose another journal=NAME in {where}."
                )
            case asyncpg.ReadOnlySQLTransactionError():
                return JournalError(
                    f"The PostgreSQL of {where} is a read-only copy; name the primary server."
                )
            case asyncpg.DiskFullError():
                return JournalFullError(
                    f"The disk of the PostgreSQL of {where} is full; free some space and start "
                    "the coordinator again. Every acknowledged answer is in the journal."
                )
            case asyncpg.UniqueViolationError():
                return JournalCorruptError(
                    f"The journal {where} has records that no coordinator wrote ({reason}); "
                    "restore it from a copy."
                )
            case asyncpg.ClientConfigurationError():
                return ConfigError(f"The URL {where} cannot be used ({reason}); correct it.")
            case asyncpg.PostgresError() | asyncpg.InterfaceError() | ssl.SSLError():
                return JournalError(
                    f"The journal {where} cannot be used ({type(error).__name__}: {reason}); the "
                    "coordinator stops, so that nothing is acknowledged that is not durable. Check "
                    "PostgreSQL and start it again."
                )
            case _:
                return error


async def _nothing(_: Connection) -> None:
    """Work that only needs to be connected."""


def lock_key(name: str) -> int:
    """The advisory lock's key of a journal: 64 signed bits of a hash, because it needs no table."""
    digest = hashlib.sha256(b"fedmezo journal " + name.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class _LoopThread:
    """An event loop in a thread of its own, where asyncpg lives.

    Callers block: a store is synchronous. They cannot run the loop themselves, because a thread
    that already runs one (the coordinator opens its journal from such a thread) may not run a
    second.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="postgres", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do `work` there, and wait for it here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the thread; a second time does nothing."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
