"""The journal: an append-only, hash-chained list of records. The model is a base plus this list.

`Journal` gives the bodies of records their seqnos and hashes, and checks these on reading; what a
body says is for its users to decode. A `JournalStore` holds the rows durably and decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.journal.high_water import HighWaterMark
from fedmezo_core.journal.sealed import SealedState, StoredState, unseal
from fedmezo_core.program import long_step

ZERO_HASH = bytes(32)

GENESIS, ANSWERED, COMMITTED, SNAPSHOTTED = b"\x0a", b"\x22", b"\x2a", b"\x5a"
"""Kinds of records: the first byte of a body, which is the tag of its field in `Record`."""
MOVES_HEAD = frozenset({GENESIS, COMMITTED})
"""Kinds of records that the model is made of: the head changes with them."""


READ_BYTES_MAX = 8 * 1024 * 1024
"""Bytes of bodies with which a read of many rows is full."""


class Row(NamedTuple):
    """What a store keeps of one record."""

    seqno: int
    """0, 1, 2, ... Invariant: the seqnos in a store have no gap, from 0 or from its origin on."""

    body: bytes
    """The serialized record, exactly as it was first written."""

    chain: bytes
    """SHA-256 over the previous row's chain, this seqno and this body."""

    @property
    def kind(self) -> bytes:
        """First byte of the body, which says what kind of record it is; empty for an empty body."""
        return self.body[:1]

    @property
    def size(self) -> int:
        """Bytes of its body and its chain."""
        return len(self.body) + len(self.chain)


class Entry(NamedTuple):
    """A row, with the head after it."""

    row: Row

    head: bytes
    """Names the model after this record; changes with genesis and commits only."""


class JournalStore(Protocol):
    """Keeps the rows durably. `store_conformance` states what every implementation must do."""

    def append(self, rows: Sequence[Row]) -> None:
        """Write all rows or none, and return only once they are durable.

        Any error means that the store must not be used again: what is on disk is known only after
        it has been opened and verified anew.
        """

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on, in order; dropped ones are passed over.

        The row with which they reach `READ_BYTES_MAX` is the last one.
        """

    def read_beside(self, seqnos: Sequence[int], bytes_max: int) -> Sequence[Row]:
        """The rows of the first of these ascending seqnos: at least one, all within `bytes_max`.

        Reads no other bodies. Rows that were dropped, or are not there yet, are passed over. A
        second thread may call this while the first one appends, which does not wait for it.
        """

    def origin(self) -> StoredState | None:
        """What the dropped rows come to; None if no row was dropped.

        A second thread may call this, as `read_beside`.
        """

    def drop_before(self, origin: StoredState) -> None:
        """Replace the origin and drop all rows before the new one: all of that or nothing.

        At least one row must be left, or the store must be empty, and it then begins there. Durable
        when it returns; for errors see `append`.
        """

    def seals(self) -> Sequence[StoredState]:
        """The sealed states that were kept last, in the order of their seqnos."""

    def keep_seals(self, seals: Sequence[StoredState]) -> None:
        """Keep exactly these sealed states beside the rows, at least one: all of that or nothing.

        No row is dropped. Durable when it returns; for errors see `append`.
        """

    def __len__(self) -> int:
        """Seqno of the next row: the count of rows, dropped ones included."""

    def close(self) -> None:
        """Release the file or connection."""


class MemoryStore:
    """The reference store: how every durable one must behave."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._origin: StoredState | None = None
        self._begins = 0
        self._seals: Sequence[StoredState] = ()

    def append(self, rows: Sequence[Row]) -> None:
        """Keep all rows."""
        check_seqnos(rows, len(self))
        self._rows.extend(rows)

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on."""
        first = max(from_seqno - self._begins, 0)
        return tuple(until_full(self._rows[first : first + rows_max]))

    def read_beside(self, seqnos: Sequence[int], bytes_max: int) -> Sequence[Row]:
        """The rows of the first of these seqnos."""
        length = len(self)
        rows = [
            row
            for seqno in seqnos
            if seqno < length
            for row in self.read(seqno, 1)
            if row.seqno == seqno
        ]
        return rows[: count_within([row.size for row in rows], bytes_max)]

    def origin(self) -> StoredState | None:
        """What the dropped rows come to."""
        return self._origin

    def drop_before(self, origin: StoredState) -> None:
        """Forget the rows before `origin`."""
        check_origin(origin, self._begins, len(self))
        del self._rows[: origin.seqno - self._begins]
        self._origin, self._begins = origin, origin.seqno

    def seals(self) -> Sequence[StoredState]:
        """The sealed states that were kept last."""
        return self._seals

    def keep_seals(self, seals: Sequence[StoredState]) -> None:
        """Keep these sealed states instead of those before."""
        self._seals = tuple(seals)

    def __len__(self) -> int:
        return self._begins + len(self._rows)

    def close(self) -> None:
        """Nothing to release."""


def check_seqnos(rows: Sequence[Row], length: int) -> None:
    """Raise `JournalCorruptError` unless the rows follow the first `length` without a gap."""
    for seqno, row in enumerate(rows, start=length):
        if row.seqno != seqno:
            raise JournalCorruptError(f"row {row.seqno} was appended where row {seqno} must stand")


def until_full(rows: Iterable[Row]) -> Iterator[Row]:
    """The first rows, up to the one with which they reach `READ_BYTES_MAX`."""
    size = 0
    for row in rows:
        yield row
        size += len(row.body)
        if size >= READ_BYTES_MAX:
            return


def count_within(sizes: Iterable[int], bytes_max: int) -> int:
    """How many of these rows come to at most `bytes_max` together; at least one, if there are any.

    Looks at no size behind the first one that is too much.
    """
    total = count = 0
    for size in sizes:
        total += size
        if total > bytes_max and count:
            break
        count += 1
    return count


def check_origin(origin: StoredState, begins: int, length: int) -> None:
    """Raise `JournalCorruptError` unless rows `begins` to `length` - 1 may begin at `origin`."""
    if not begins <= origin.seqno < length and length:
        raise JournalCorruptError(
            f"an origin before record {origin.seqno} was given to a journal of records "
            f"{begins} to {length - 1}"
        )


def chain_after(chain: bytes, seqno: int, body: bytes) -> bytes:
    """chain(n) = SHA-256(chain(n-1) || uint64le(n) || bytes(n))."""
    return hashlib.sha256(chain + seqno.to_bytes(8, "little") + body).digest()


def head_after(head: bytes, body: bytes) -> bytes:
    """head(n) = SHA-256(head(n-1) || bytes(n)), for genesis and commits."""
    return hashlib.sha256(head + body).digest()


class Journal:
    """Appends bodies of records to a store and reads them back verified.

    Invariant: `len(self)`, `chain` and `head` describe the store's last row.
    """

    PAGE_ROWS = 4096

    def __init__(self, store: JournalStore) -> None:
        """Over a store that is new, or that `load` is to read."""
        self._store = store
        self._length = 0
        self.begins = 0
        """Seqno of the first record that is left."""
        self.chain = ZERO_HASH
        self.head = ZERO_HASH
        self._mark: HighWaterMark | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def is_empty(self) -> bool:
        """Whether the store holds nothing yet, not even a genesis."""
        return len(self._store) == 0

    def reaches(self, records: int, chain: bytes) -> bool:
        """Whether it had so many records or more, and this chain after them; needs no `load`.

        Of records that were dropped the chain is not known, and is taken to be right.
        """
        rows = self._store.read(records - 1, 1)
        is_there = bool(rows) and rows[0].seqno == records - 1
        return rows[0].chain == chain if is_there else records <= len(self._store)

    def keep_mark(self, mark: HighWaterMark) -> None:
        """Let a mark name the last record from now on; after `load`. Closing closes it too."""
        mark.begin(self._length, self.chain)
        self._mark = mark

    @property
    def stored_origin(self) -> StoredState | None:
        """What the dropped records come to, as it is stored; the reader verifies it.

        A second thread may ask for it, as for `read_beside`.
        """
        return self._store.origin()

    def origin(self) -> SealedState | None:
        """What the dropped records come to, verified; None if all records are there.

        Raises `JournalCorruptError` if it is not what was written.
        """
        stored = self._store.origin()
        if stored is None:
            return None
        try:
            return unseal(stored)
        except ProtocolError as error:
            raise JournalCorruptError(
                f"The journal's origin, in place of records 0 to {stored.seqno - 1}, is not what "
                f"was written ({error}). Restore the journal from a copy."
            ) from None

    def drop_before(self, origin: StoredState) -> None:
        """Replace all records before an origin by that origin, durably."""
        self._store.drop_before(origin)
        self.begins = origin.seqno

    def stored_seals(self) -> Sequence[StoredState]:
        """The sealed states beside the records, as they are stored; `unsealed` verifies them."""
        return self._store.seals()

    def keep_seals(self, seals: Sequence[StoredState]) -> None:
        """Keep exactly these sealed states beside the records, durably; at least one."""
        self._store.keep_seals(seals)

    def unsealed(self, stored: StoredState) -> SealedState:
        """A sealed state that was stored, verified to be of the records before it.

        Raises `ProtocolError`, with what is wrong, if it is not. Needs no `load`.
        """
        sealed = unseal(stored)
        rows = self._store.read(sealed.seqno - 1, 1)
        if not rows or (rows[0].seqno, rows[0].chain) != (sealed.seqno - 1, sealed.chain):
            raise ProtocolError("it is of other records")
        return sealed

    def load(self, from_seqno: int = 0, kinds_before: Collection[bytes] = ()) -> Iterator[Entry]:
        """Read and verify everything that is there; afterwards the journal can be appended to.

        Yields the entries from `from_seqno` on, and of the earlier ones those of `kinds_before`. If
        records were dropped, the first entry is the one behind the `origin`. Raises
        `JournalCorruptError` at the first row that is not what was written. The iterator must be
        exhausted before anything is appended.
        """
        origin = self.origin()
        if origin is None:
            self._length, self.chain, self.head = 0, ZERO_HASH, ZERO_HASH
        else:
            self._length, self.chain, self.head = origin.seqno, origin.chain, origin.head
        self.begins = self._length
        return self._entries(from_seqno, frozenset(kinds_before))

    def _entries(self, from_seqno: int, kinds_before: frozenset[bytes]) -> Iterator[Entry]:
        # Every start goes through here a million times, hence the local names and no calls.
        sha256 = hashlib.sha256
        expected, chain, head = self._length, self.chain, self.head
        for rows in self._pages(expected):
            for row in rows:
                seqno, body, stored = row
                if seqno != expected:
                    raise JournalCorruptError(
                        f"The journal jumps from record {expected - 1} to {seqno}; records are "
                        "missing. Restore the journal from a copy."
                    )
                chain = sha256(chain + seqno.to_bytes(8, "little") + body).digest()
                if chain != stored:
                    raise JournalCorruptError(
                        f"Journal record {seqno} is not what was written (its hash does not "
                        f"match); records {self.begins} to {seqno - 1} are sound. Restore the "
                        "journal from a copy."
                    )
                expected = seqno + 1
                kind = body[:1]
                if kind in MOVES_HEAD:
                    head = head_after(head, body)
                if seqno >= from_seqno or kind in kinds_before:
                    yield Entry(row, head)
            self._length, self.chain, self.head = expected, chain, head

    def _pages(self, seqno: int) -> Iterator[Sequence[Row]]:
        with long_step("reading the journal", len(self._store), "records") as step:
            while rows := self._store.read(seqno, self.PAGE_ROWS):
                yield rows
                seqno = step.done = rows[-1].seqno + 1

    def append(self, bodies: Sequence[bytes]) -> list[Entry]:
        """Append records by their bodies, durably, all or none."""
        entries: list[Entry] = []
        length, chain, head = self._length, self.chain, self.head
        for body in bodies:
            row = Row(length, body, chain_after(chain, length, body))
            if row.kind in MOVES_HEAD:
                head = head_after(head, body)
            entries.append(Entry(row, head))
            length, chain = length + 1, row.chain
        self._store.append([entry.row for entry in entries])
        self._length, self.chain, self.head = length, chain, head
        if self._mark is not None:
            self._mark.move(length, chain)
        return entries

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on, as stored; the reader verifies them.

        The row with which they reach `READ_BYTES_MAX` is the last one.
        """
        return self._store.read(from_seqno, rows_max)

    def read_beside(self, seqnos: Sequence[int], bytes_max: int) -> Sequence[Row]:
        """The rows of the first of these ascending seqnos: at least one, all within `bytes_max`.

        A second thread may call this, while the first appends; see `JournalStore.read_beside`.
        """
        return self._store.read_beside(seqnos, bytes_max)

    def close(self) -> None:
        """Close the store, and its mark."""
        if self._mark is not None:
            self._mark.close()
        self._store.close()
