"""The PostgreSQL store, against a real server: conformance, fencing, crashes and bad input."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from fedmezo_coordinator.programs import coordinator_command as cli
from fedmezo_coordinator.runs import hosted_run
from fedmezo_coordinator.stores import postgres
from fedmezo_coordinator.stores.location import parse_url
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_coordinator.stores.postgres import PostgresStore, lock_key
from fedmezo_core.errors import (
    FencedError,
    JournalCorruptError,
    JournalError,
    JournalLockedError,
)
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal, JournalStore, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.records import Started
from tests.coordinator.serving.tcp_proxy import Proxy
from tests.coordinator.stores.postgres_server import PASSWORD, Server, running, skip_without_server
from tests.core.journal.store_conformance import StoreConformance, row
from tests.integration.support.harness import config_of, genesis_of

skip_without_server()

PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def name() -> str:
    """A journal of the test's own."""
    return f"t{uuid.uuid4().hex}"


@contextmanager
def store_at(url: str, *, patience_s: float = PATIENCE_S) -> Iterator[PostgresStore]:
    store = PostgresStore(parse_url(url), patience_s=patience_s)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def store_through_proxy(server: Server, name: str) -> Iterator[tuple[PostgresStore, Proxy]]:
    with Proxy(server.port) as proxy:
        url = server.url(name).replace(f":{server.port}/", f":{proxy.port}/")
        with store_at(url) as store:
            yield store, proxy


def until(holds: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, f"waited in vain for {what}"
        time.sleep(0.02)


def count(server: Server, name: str) -> int:
    return int(server.query(f"SELECT count(*) FROM fedmezo_{name}.journal"))


def holder_of(server: Server, name: str) -> str:
    """PostgreSQL's process of the session that holds a journal."""
    return server.query(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted "
        f"AND (classid::bigint << 32 | objid::bigint) = {lock_key(name)}"
    )


class TestPostgresStore(StoreConformance):
    """The PostgreSQL store conforms."""

    @pytest.fixture(autouse=True)
    def _place(self, server: Server, name: str) -> None:
        self.url = server.url(name)

    def open(self) -> JournalStore:
        return open_store(self.url)


# ---------------------------------------------------------------- who may write


def test_one_database_holds_several_runs(server: Server, name: str) -> None:
    with store_at(server.url(name)) as one, store_at(server.url(f"{name}-b")) as other:
        one.append([row(0), row(1)])
        other.append([row(0)])
        assert (len(one.read(0, 9)), len(other.read(0, 9))) == (2, 1)


def test_a_second_coordinator_is_refused_and_told_who_has_the_journal(
    server: Server, name: str
) -> None:
    with store_at(server.url(name)) as store:
        with pytest.raises(JournalLockedError, match="start this one with --standby") as caught:
            open_store(server.url(name))
        assert f"PostgreSQL process {holder_of(server, name)})" in str(caught.value)
        store.append([row(0)])


def test_a_reader_looks_beside_the_coordinator_and_does_not_fence_it(
    server: Server, name: str
) -> None:
    with store_at(server.url(name)) as store:
        store.append([row(0)])
        reader = open_store(server.url(name), read_only=True)
        assert reader.read(0, 9) == (row(0),)
        store.append([row(1)])
        assert reader.read(0, 9) == (row(0), row(1))
        reader.close()


@contextmanager
def standby(url: str, *, give_up: threading.Event | None = None) -> Iterator[Future[JournalStore]]:
    """A standby that waits in a thread; its store, once it has taken over."""
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_store, url, standby=True, give_up=give_up)
        try:
            yield opening
        finally:
            if opening.exception() is None:
                opening.result().close()


def test_a_standby_takes_over_when_the_holder_closes(server: Server, name: str) -> None:
    first = open_store(server.url(name))
    with standby(server.url(name)) as opening:
        first.append([row(0)])
        time.sleep(2 * postgres.STANDBY_LOOK_S)
        assert not opening.done()
        first.close()
        second = opening.result(PATIENCE_S)
        second.append([row(1)])
        assert second.read(0, 9) == (row(0), row(1))


def test_after_its_session_was_ended_and_a_standby_took_over_the_old_one_writes_nothing(
    server: Server, name: str
) -> None:
    with store_at(server.url(name)) as old:
        old.append([row(0)])
        with standby(server.url(name)) as opening:
            server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
            second = opening.result(PATIENCE_S)
            with pytest.raises(FencedError, match="Another coordinator has taken over"):
                old.append([row(1)])
            with pytest.raises(JournalError, match="failed before"):
                old.append([row(1)])
            assert second.read(0, 9) == (row(0),)
            second.append([row(1)])
            assert count(server, name) == 2


def test_a_coordinator_that_comes_back_after_its_successor_has_ended_writes_nothing(
    server: Server, name: str
) -> None:
    """The lock is free by then, and the rows are as it left them; yet it no longer owns them."""
    with store_at(server.url(name)) as old:
        old.append([row(0)])
        with standby(server.url(name)) as opening:
            server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
            opening.result(PATIENCE_S).close()
            with pytest.raises(FencedError):
                old.append([row(1)])
        assert count(server, name) == 1


def test_a_coordinator_whose_session_lives_is_fenced_all_the_same(
    server: Server, name: str
) -> None:
    """An operator or a pooler may take the lock while the session lives: the fence is enough."""
    with store_at(server.url(name)) as store:
        store.append([row(0)])
        server.query(f"UPDATE fedmezo_{name}.fence SET fence = fence + 1")
        with pytest.raises(FencedError):
            store.append([row(1)])
        assert count(server, name) == 1


def test_an_append_that_was_sent_before_a_takeover_commits_inserts_nothing(
    server: Server, name: str
) -> None:
    with store_at(server.url(name)) as store, ThreadPoolExecutor(2) as pool:
        store.append([row(0)])
        takeover = pool.submit(
            server.query,
            f"BEGIN; UPDATE fedmezo_{name}.fence SET fence = fence + 1; SELECT pg_sleep(1); COMMIT",
        )
        until(lambda: sleeping(server), "the takeover")
        sent = pool.submit(store.append, [row(1)])
        assert isinstance(sent.exception(PATIENCE_S), FencedError)
        takeover.result()
        assert count(server, name) == 1


def sleeping(server: Server) -> bool:
    return "PgSleep" in server.query("SELECT wait_event FROM pg_stat_activity")


def test_a_standby_can_be_told_to_stop_waiting(server: Server, name: str) -> None:
    give_up = threading.Event()
    with store_at(server.url(name)), standby(server.url(name), give_up=give_up) as opening:
        time.sleep(0.3)
        give_up.set()
        assert isinstance(opening.exception(PATIENCE_S), JournalLockedError)


# ---------------------------------------------------------------- a server that goes away


def test_an_idle_connection_that_was_lost_is_made_anew(server: Server, name: str) -> None:
    with store_at(server.url(name)) as store:
        store.append([row(0)])
        server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
        assert store.read(0, 9) == (row(0),)
        server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
        store.append([row(1)])
        assert store.read(0, 9) == (row(0), row(1))


def test_an_append_that_was_committed_but_not_answered_is_not_made_twice(
    server: Server, name: str
) -> None:
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(1) as pool:
        store.append([row(0)])
        proxy.mute = True
        sent = pool.submit(store.append, [row(1), row(2)])
        until(lambda: count(server, name) == 3, "the commit")
        proxy.mute = False
        proxy.cut()
        sent.result(PATIENCE_S)
        store.append([row(3)])
        assert store.read(0, 9) == tuple(row(n) for n in range(4))


def test_rows_that_were_dropped_without_an_answer_are_dropped_once(
    server: Server, name: str
) -> None:
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(1) as pool:
        store.append([row(n) for n in range(5)])
        store.drop_before(StoredState.of(1, b"what one came to"))  # So that it is prepared.
        origin = StoredState.of(3, b"what they came to")
        proxy.mute = True
        sent = pool.submit(store.drop_before, origin)
        until(lambda: count(server, name) == 2, "the commit")
        proxy.mute = False
        proxy.cut()
        sent.result(PATIENCE_S)
        assert store.origin() == origin
        later = StoredState.of(4, b"what more came to")
        proxy.deaf = True
        sent = pool.submit(store.drop_before, later)
        until(lambda: proxy.swallowed > 0, "the statement")
        proxy.deaf = False
        proxy.cut()
        sent.result(PATIENCE_S)
        assert store.origin() == later
        store.append([row(5)])
        assert store.read(0, 9) == (row(4), row(5))


def test_a_connection_that_is_lost_before_the_first_row_behind_an_origin(
    server: Server, name: str
) -> None:
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(1) as pool:
        store.drop_before(StoredState.of(7, b"of another store"))
        proxy.deaf = True
        sent = pool.submit(store.append, [row(7)])
        until(lambda: proxy.swallowed > 0, "the statement")
        proxy.deaf = False
        proxy.cut()
        sent.result(PATIENCE_S)
        assert store.read(0, 9) == (row(7),)


def test_an_old_writer_drops_nothing(server: Server, name: str) -> None:
    with store_at(server.url(name)) as store:
        store.append([row(0), row(1)])
        server.query(f"UPDATE fedmezo_{name}.fence SET fence = fence + 1")
        with pytest.raises(FencedError):
            store.drop_before(StoredState.of(1, b"by an old writer"))
        assert count(server, name) == 2
        assert server.query(f"SELECT count(*) FROM fedmezo_{name}.origin") == "0"


def test_a_server_that_falls_silent_counts_as_lost(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a link that drops everything and tells nobody."""
    monkeypatch.setattr(postgres, "ANSWER_S", 1.0)
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(1) as pool:
        store.append([row(0)])
        proxy.mute = True
        sent = pool.submit(store.append, [row(1)])
        until(lambda: count(server, name) == 2, "the commit")
        proxy.mute = False
        sent.result(PATIENCE_S)
        store.append([row(2)])
        assert store.read(0, 9) == tuple(row(n) for n in range(3))


def test_an_append_that_never_arrived_is_made_again(server: Server, name: str) -> None:
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(1) as pool:
        store.append([row(0)])
        proxy.deaf = True
        sent = pool.submit(store.append, [row(1), row(2)])
        until(lambda: proxy.swallowed > 0, "the statement")
        proxy.deaf = False
        proxy.cut()
        sent.result(PATIENCE_S)
        assert store.read(0, 9) == tuple(row(n) for n in range(3))


def test_an_append_that_still_runs_in_the_server_is_waited_for(server: Server, name: str) -> None:
    """Its old session holds lock and statement, and does not know that nobody listens any more."""
    with store_through_proxy(server, name) as (store, proxy), ThreadPoolExecutor(2) as pool:
        store.append([row(0)])
        blocking = pool.submit(
            server.query,
            f"BEGIN; SELECT FROM fedmezo_{name}.fence FOR UPDATE; SELECT pg_sleep(2); COMMIT",
        )
        until(lambda: sleeping(server), "the block")
        sent = pool.submit(store.append, [row(1)])
        until(lambda: "transactionid" in waits(server), "the append to be blocked")
        proxy.cut()
        time.sleep(0.5)
        assert not sent.done()
        sent.result(PATIENCE_S)
        blocking.result()
        assert store.read(0, 9) == (row(0), row(1))


def waits(server: Server) -> str:
    return server.query("SELECT wait_event FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


def test_a_server_that_lost_what_it_had_acknowledged_is_found_out(
    server: Server, name: str
) -> None:
    """As after a failover to a replica that lagged behind."""
    with store_at(server.url(name)) as store:
        store.append([row(0), row(1)])
        server.query(f"DELETE FROM fedmezo_{name}.journal WHERE seqno = 1")
        server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
        with pytest.raises(JournalCorruptError, match="other records than it had acknowledged"):
            store.append([row(2)])


def test_a_warning_that_a_commit_may_not_be_durable_stops_the_store(
    server: Server, name: str
) -> None:
    with store_at(server.url(name)) as store, ThreadPoolExecutor(1) as pool:
        store.append([row(0)])
        server.query("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        server.query("SELECT pg_reload_conf()")
        try:
            # The server takes the new setting a moment after it was asked to.
            appends = (pool.submit(store.append, [row(n)]) for n in itertools.count(1))
            sent = next(appends)

            def waits_for_a_replica() -> bool:
                nonlocal sent
                if sent.done():
                    sent.result()
                    sent = next(appends)
                return "SyncRep" in server.query("SELECT wait_event FROM pg_stat_activity")

            until(waits_for_a_replica, "the wait for a replica")
            assert not sent.done()
            server.query(f"SELECT pg_cancel_backend({holder_of(server, name)})")
            error = sent.exception(PATIENCE_S)
        finally:
            server.query("ALTER SYSTEM RESET synchronous_standby_names")
            server.query("SELECT pg_reload_conf()")
        assert isinstance(error, JournalError)
        assert "may not have made a change" in str(error)


class TestCrashes:
    """Crashes of the whole server. (Power loss is not one: the system keeps its page cache.)"""

    @pytest.fixture
    def own(self) -> Iterator[Server]:
        """A server that a test may crash."""
        with running() as started:
            yield started

    def test_nothing_acknowledged_is_lost_or_doubled_over_four_crashes(self, own: Server) -> None:
        """`pg_ctl stop -m immediate` and SIGKILL to every process, in the middle of appends."""
        draw, acknowledged, done = random.Random(1), [0], threading.Event()

        def append(store: PostgresStore) -> None:
            while not done.is_set():
                rows = [row(acknowledged[0] + n) for n in range(draw.choice((1, 7, 64)))]
                store.append(rows)
                acknowledged[0] += len(rows)

        def went_on(before: int) -> bool:
            return appending.done() or acknowledged[0] > before + 200

        with store_at(own.url("a"), patience_s=60) as store, ThreadPoolExecutor(1) as pool:
            appending = pool.submit(append, store)
            for crash in range(4):
                before = acknowledged[0]
                until(partial(went_on, before), "appends")
                time.sleep(random.Random(crash).random() * 0.05)
                own.kill() if crash % 2 else own.stop("immediate")
                own.start()
            done.set()
            appending.result(60)
            assert store.read(0, 10**9) == tuple(row(n) for n in range(acknowledged[0]))

    def test_a_new_coordinator_finds_everything_that_was_acknowledged(self, own: Server) -> None:
        acknowledged: list[Row] = []

        def append(store: PostgresStore) -> None:
            for first in itertools.count(0, 10):
                rows = [row(first + n) for n in range(10)]
                store.append(rows)
                acknowledged.extend(rows)

        with store_at(own.url("a"), patience_s=0.2) as store, ThreadPoolExecutor(1) as pool:
            appending = pool.submit(append, store)
            until(lambda: len(acknowledged) > 500, "appends")
            own.kill()
            error = appending.exception(PATIENCE_S)
        assert isinstance(error, JournalError)
        assert "did not come back within 0.2 s; the coordinator stops" in str(error)
        own.start()
        with store_at(own.url("a")) as store:
            assert len(store) - len(acknowledged) in (0, 10)
            assert store.read(0, 10**9) == tuple(row(n) for n in range(len(store)))

    def test_a_coordinator_whose_postgresql_stays_away_ends_with_a_sentence(
        self,
        own: Server,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)  # where the key of a journal in a database is kept
        monkeypatch.setattr(postgres, "RECONNECT_S", 0.5)
        monkeypatch.setattr(hosted_run, "CHECK_JOURNAL_EVERY_S", 0.2)
        store = open_store(own.url("a"))
        Journal(store).append(encode_records([genesis_of(config_of())]))
        store.close()

        def crash() -> None:
            until(lambda: count(own, "a") == 2, "the coordinator's start")
            own.stop("immediate")

        with ThreadPoolExecutor(1) as pool:
            crashing = pool.submit(crash)
            flags = ("--journal", own.url("a"), "--listen", "127.0.0.1:0", "--no-replica")
            assert cli.main(flags) == 1
            crashing.result()
        said = capsys.readouterr().err
        assert "fedmezo-coordinator: PostgreSQL does not answer at postgresql://postgres@" in said
        assert "did not come back within 0.5 s; the coordinator stops" in said
        assert "Traceback" not in said


# ---------------------------------------------------------------- bad input


def test_a_wrong_password_is_refused_and_not_repeated(server: Server, name: str) -> None:
    with pytest.raises(JournalError, match="PostgreSQL refuses the user") as caught:
        open_store(server.url(name, password="hunter2"))
    assert "hunter2" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_database_that_is_not_there(server: Server, name: str) -> None:
    with pytest.raises(JournalError, match=r"no such database .* create it with createdb"):
        open_store(server.url(name, database="nowhere"))


def test_a_server_that_is_not_there_is_tried_for_a_while(
    server: Server, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = server.url(name).replace(f":{server.port}/", f":{free.getsockname()[1]}/")
        started_s = time.monotonic()
        with pytest.raises(JournalError, match="see that it runs and that host and port are right"):
            PostgresStore(parse_url(url), patience_s=1.0)
        assert time.monotonic() - started_s < 5
    assert "trying for 1 s" in caplog.text
    assert PASSWORD not in caplog.text


def test_a_journal_that_is_not_there_is_not_made_by_looking(server: Server, name: str) -> None:
    with pytest.raises(JournalError, match="There is no journal at"):
        open_store(server.url(name), read_only=True)
    assert server.query(f"SELECT to_regnamespace('fedmezo_{name}')") == ""


def test_schema_migrations_go_forward_and_keep_the_rows(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_at(server.url(name)) as store:
        store.append([row(0)])
    later = "ALTER TABLE {schema}.journal ADD COLUMN note text"
    with monkeypatch.context() as newer:
        newer.setattr(postgres, "MIGRATIONS", (*postgres.MIGRATIONS, later))
        with pytest.raises(
            JournalError, match=r"older FedMeZO \(schema 3\); start its coordinator"
        ):
            open_store(server.url(name), read_only=True)
        with store_at(server.url(name)) as store:
            store.append([row(1)])
            assert store.read(0, 9) == (row(0), row(1))
    with pytest.raises(JournalError, match=r"newer FedMeZO \(schema 4, this one knows 3\)"):
        open_store(server.url(name))
    assert count(server, name) == 2


def test_a_failed_migration_leaves_the_journal_as_it_was(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_at(server.url(name)) as store:
        store.append([row(0)])
    steps = ("ALTER TABLE {schema}.journal ADD COLUMN note text", "SELECT 1 / 0")
    with monkeypatch.context() as newer:
        newer.setattr(postgres, "MIGRATIONS", (*postgres.MIGRATIONS, *steps))
        with pytest.raises(JournalError, match="division by zero"):
            open_store(server.url(name))
    with store_at(server.url(name)) as store:
        assert store.read(0, 9) == (row(0),)


def test_a_server_with_fsync_off_is_refused(server: Server, name: str) -> None:
    server.query("ALTER SYSTEM SET fsync = off")
    server.query("SELECT pg_reload_conf()")
    try:
        until(lambda: server.query("SHOW fsync") == "off", "the setting")
        with pytest.raises(JournalError, match=r"has fsync = off, .* set fsync = on there"):
            open_store(server.url(name))
    finally:
        server.query("ALTER SYSTEM RESET fsync")
        server.query("SELECT pg_reload_conf()")
        until(lambda: server.query("SHOW fsync") == "on", "the setting")


def test_commits_that_do_not_wait_for_the_disk_are_refused(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a pooler that drops the setting."""
    settings = postgres.SERVER_SETTINGS | {"synchronous_commit": "off"}
    monkeypatch.setattr(postgres, "SERVER_SETTINGS", settings)
    with pytest.raises(JournalError, match="has synchronous_commit = off"):
        open_store(server.url(name))


def test_a_read_only_copy_is_refused(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = postgres.SERVER_SETTINGS | {"default_transaction_read_only": "on"}
    monkeypatch.setattr(postgres, "SERVER_SETTINGS", settings)
    with pytest.raises(JournalError, match="is a read-only copy; name the primary server"):
        open_store(server.url(name))


def test_someone_elses_advisory_lock_is_named_and_left_alone(server: Server, name: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(
            server.query, f"SELECT pg_advisory_lock({lock_key(name)}); SELECT pg_sleep(1.5)"
        )
        until(lambda: holder_of(server, name) != "", "the lock")
        owner = holder_of(server, name)
        with pytest.raises(JournalLockedError, match=rf"\(PostgreSQL process {owner}\)"):
            open_store(server.url(name))
        other.result()
    with store_at(server.url(name)) as store:
        store.append([row(0)])


def test_a_user_without_the_right_to_begin_a_journal(server: Server, name: str) -> None:
    server.query("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    url = f"postgresql://guest:guest@127.0.0.1:{server.port}/postgres?journal={name}"
    with pytest.raises(JournalError, match="GRANT CREATE ON DATABASE"):
        open_store(url)


def test_a_schema_that_is_not_ours_is_left_alone(server: Server, name: str) -> None:
    server.query(f"CREATE SCHEMA fedmezo_{name}")
    with pytest.raises(JournalError, match="that is not a FedMeZO journal; choose another"):
        open_store(server.url(name))


def test_a_record_that_was_changed_in_the_database_is_found(server: Server, name: str) -> None:
    with store_at(server.url(name)) as store:
        Journal(store).append(encode_records(Started(n + 1) for n in range(3)))
        server.query(f"UPDATE fedmezo_{name}.journal SET body = body || '\\x00' WHERE seqno = 1")
        with pytest.raises(JournalCorruptError, match="record 1 is not what was written"):
            list(Journal(store).load())


def test_the_password_is_in_no_message_and_no_log(
    server: Server, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with store_at(server.url(name)) as store:
        with pytest.raises(JournalLockedError) as caught:
            open_store(server.url(name))
        store.append([row(0)])
        server.query(f"UPDATE fedmezo_{name}.fence SET holder = gen_random_uuid()")
        server.query(f"SELECT pg_terminate_backend({holder_of(server, name)})")
        with pytest.raises(FencedError) as fenced:
            store.append([row(1)])
    for text in (str(caught.value), str(fenced.value), caplog.text):
        assert "sesame" not in text
