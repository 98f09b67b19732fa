"""What every journal store must do. A store's test module subclasses `StoreConformance`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedmezo_core.errors import JournalError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import READ_BYTES_MAX, Journal, JournalStore, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.records import Committed, SeedRange, Started


def row(seqno: int, size: int = 10) -> Row:
    body = hashlib.sha256(seqno.to_bytes(8, "little")).digest() * (size // 32 + 1)
    return Row(seqno, body[:size], hashlib.sha256(body).digest())


class StoreConformance(ABC):
    """Subclass it, and say how a store is opened and opened again."""

    @abstractmethod
    def open(self) -> JournalStore:
        """The same store each time within one test."""

    durable = True

    def test_new_store_is_empty(self) -> None:
        store = self.open()
        assert len(store) == 0
        assert store.read(0, 10) == ()
        store.close()

    def test_rows_come_back_in_order_and_byte_for_byte(self) -> None:
        store = self.open()
        rows = [row(n, size) for n, size in enumerate((0, 1, 31, 4096, 300_000))]
        store.append(rows[:2])
        store.append(rows[2:])
        assert store.read(0, 100) == tuple(rows)
        assert len(store) == 5
        store.close()

    def test_pages(self) -> None:
        store = self.open()
        rows = [row(n) for n in range(10)]
        store.append(rows)
        assert store.read(3, 4) == tuple(rows[3:7])
        assert store.read(8, 4) == tuple(rows[8:])
        assert store.read(10, 4) == ()
        assert store.read(99, 4) == ()
        store.close()

    def test_a_read_of_many_rows_ends_when_it_is_full(self) -> None:
        store = self.open()
        rows = [row(n, READ_BYTES_MAX // 2 - 1) for n in range(5)]
        for one in rows:
            store.append([one])
        assert tuple(store.read(0, 10)) == tuple(rows[:3])
        assert tuple(store.read(1, 2)) == tuple(rows[1:3])
        assert tuple(store.read(3, 10)) == tuple(rows[3:])
        store.append([row(5)])
        store.close()

    @pytest.mark.parametrize(
        ("bytes_max", "fit"), [(1, 1), (299, 2), (300, 3), (301, 3), (400, 4), (10**9, 4)]
    )
    def test_a_read_ends_where_the_next_row_would_not_fit(self, bytes_max: int, fit: int) -> None:
        store = self.open()
        rows = [row(n, 68) for n in range(8)]
        store.append(rows)
        found = store.read_beside([1, 2, 5, 7], bytes_max)
        assert tuple(found) == (rows[1], rows[2], rows[5], rows[7])[:fit]
        store.close()

    def test_a_read_passes_over_rows_that_are_dropped_or_not_there_yet(self) -> None:
        store = self.open()
        assert tuple(store.read_beside([0, 1], 1000)) == ()
        store.append([row(n) for n in range(6)])
        store.drop_before(StoredState.of(4, b"what they came to"))
        assert tuple(store.read_beside(range(9), 1000)) == (row(4), row(5))
        assert tuple(store.read_beside(range(4), 1000)) == ()
        store.append([row(6)])
        assert tuple(store.read_beside([3, 5, 6, 7], 1000)) == (row(5), row(6))
        store.close()

    def test_a_second_thread_reads_what_the_first_appends(self) -> None:
        store = self.open()
        rows = [row(n, 40_000 if n % 7 == 0 else 50) for n in range(300)]
        read: list[Row] = []

        def follow() -> None:
            while len(read) < len(rows):
                read.extend(store.read_beside(range(len(read), len(rows)), 100_000))

        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(follow)
            for n in range(0, len(rows), 3):
                store.append(rows[n : n + 3])
            reading.result(60)
        assert read == rows
        store.close()

    def test_appending_nothing_changes_nothing(self) -> None:
        store = self.open()
        store.append([])
        assert len(store) == 0
        store.close()

    @pytest.mark.parametrize("seqnos", [(1,), (0, 2), (0, 0), (0, 1, 1)])
    def test_a_gap_or_a_repeat_is_refused_whole(self, seqnos: tuple[int, ...]) -> None:
        store = self.open()
        with pytest.raises(JournalError):
            store.append([row(n) for n in seqnos])
        if self.durable:
            store.close()
            store = self.open()
        assert store.read(0, 10) == ()
        store.close()

    def test_rows_survive_closing(self) -> None:
        if not self.durable:
            pytest.skip("the reference keeps its rows in memory")
        store = self.open()
        store.append([row(0), row(1)])
        store.close()
        store = self.open()
        assert store.read(0, 10) == (row(0), row(1))
        store.append([row(2)])
        assert len(store) == 3
        store.close()

    def test_a_journal_over_it_chains_and_verifies(self) -> None:
        store = self.open()
        journal = Journal(store)
        assert list(journal.load()) == []
        commit = Committed(1, (SeedRange(5 << 16, (0.5, -0.25)),), 7)
        first = journal.append(encode_records([Started(1)]))
        more = journal.append(encode_records([commit, Started(2)]))
        again = Journal(store)
        assert list(again.load()) == [*first, *more]
        assert (again.head, again.chain, len(again)) == (journal.head, journal.chain, 3)
        assert first[0].head == bytes(32)
        assert more[0].head == more[1].head != bytes(32)
        store.close()

    def test_an_origin_takes_the_place_of_the_rows_before_it(self) -> None:
        store = self.open()
        rows = [row(n) for n in range(6)]
        store.append(rows)
        assert store.origin() is None
        for seqno in (2, 2, 4):
            origin = StoredState.of(seqno, b"what they came to, up to %d" % seqno)
            store.drop_before(origin)
            assert store.origin() == origin
            assert store.read(0, 10) == tuple(rows[seqno:])
            assert store.read(3, 1) == (rows[max(seqno, 3)],)
            assert len(store) == 6
        store.append([row(6)])
        if self.durable:
            store.close()
            store = self.open()
        assert store.origin() == origin
        assert store.read(0, 10) == (rows[4], rows[5], row(6))
        store.append([row(7)])
        assert len(store) == 8
        store.close()

    @pytest.mark.parametrize("seqno", [1, 6, 7])
    def test_an_origin_before_the_last_one_or_after_all_rows_is_refused(self, seqno: int) -> None:
        store = self.open()
        store.append([row(n) for n in range(6)])
        kept = StoredState.of(2, b"kept")
        store.drop_before(kept)
        with pytest.raises(JournalError):
            store.drop_before(StoredState.of(seqno, b"refused"))
        if self.durable:
            store.close()
            store = self.open()
        assert store.origin() == kept
        assert len(store.read(0, 10)) == 4
        store.close()

    def test_sealed_states_are_kept_beside_the_rows(self) -> None:
        store = self.open()
        rows = [row(n) for n in range(6)]
        store.append(rows)
        assert tuple(store.seals()) == ()
        states = [StoredState.of(n, b"what they come to, up to %d" % n) for n in (2, 4, 5, 6)]
        changed = StoredState.of(4, b"another, of the same records")
        for kept in (states[:1], states[:3], states[1:], [changed, states[3]], [changed]):
            store.keep_seals(kept)
            assert tuple(store.seals()) == tuple(kept)
        assert store.origin() is None
        assert store.read(0, 10) == tuple(rows)
        store.append([row(6)])
        store.drop_before(StoredState.of(5, b"what five come to"))
        if self.durable:
            store.close()
            store = self.open()
        assert tuple(store.seals()) == (changed,)
        assert store.read(0, 10) == (rows[5], row(6))
        store.append([row(7)])
        store.close()

    def test_an_empty_store_may_begin_at_an_origin(self) -> None:
        store = self.open()
        store.drop_before(StoredState.of(7, b"of another store"))
        assert (len(store), store.read(0, 10)) == (7, ())
        if self.durable:
            store.close()
            store = self.open()
            assert len(store) == 7
        with pytest.raises(JournalError):
            store.append([row(0)])
        if self.durable:
            store.close()
            store = self.open()
        store.append([row(7)])
        assert store.read(0, 10) == (row(7),)
        store.close()
