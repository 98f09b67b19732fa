"""The journal: an append-only, hash-chained list of records. The model is a base plus this list.

`Journal` gives records their bytes, places and hashes and checks them on reading; a `JournalStore`
holds the rows durably and decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.machines.sealed_state import Origin, unseal
from fedmezo_core.records import Answered, Committed, Genesis, Record

ZERO_HASH = bytes(32)


class Row(NamedTuple):
    """What a store keeps for one record."""

    seqno: int
    """0-based place. Invariant: a store's rows have places without gaps, from 0 or from its origin on."""

    body: bytes
    """The serialized record, exactly as it was first written."""

    chain: bytes
    """SHA-256 over the previous row's chain, this seqno and this body."""


@dataclass(frozen=True, slots=True)
class StoredOrigin:
    """What a store keeps in the place of rows that were dropped."""

    seqno: int
    """Place of the first row that is left."""

    sealed: bytes
    """The sealed origin, exactly as it was first written."""

    digest: bytes
    """SHA-256 over seqno and these bytes."""

    @classmethod
    def of(cls, seqno: int, sealed: bytes) -> StoredOrigin:
        """With its digest."""
        return cls(seqno, sealed, hashlib.sha256(seqno.to_bytes(8, "little") + sealed).digest())


class Entry(NamedTuple):
    """A record in its place, with both hashes after it."""

    row: Row
    record: Record

    head: bytes
    """Names the model after this record; changes with genesis and commits only."""


_entry_of: Callable[[tuple[Row, Record, bytes]], Entry] = partial(tuple.__new__, Entry)


class JournalStore(Protocol):
    """Durable home of the rows. `store_conformance` states what every implementation must do."""

    def append(self, rows: Sequence[Row]) -> None:
        """Write all rows or none, and return only once they are durable.

        Any error means that the store must not be used again: what is on disk is known only after
        it has been opened and verified anew.
        """

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` rows from `from_seqno` on, in order; dropped ones are passed over."""

    def origin(self) -> StoredOrigin | None:
        """What stands for the rows that were dropped; None if none were."""

    def drop_before(self, origin: StoredOrigin) -> None:
        """Write `origin` in place of the one before and drop all rows before it: all of that or nothing.

        A row must be left after it; or there is none at all, and the store then begins there. Durable
        when it returns; for errors see `append`.
        """

    def __len__(self) -> int:
        """Place of the next row: the count of rows, dropped ones included."""

    def close(self) -> None:
        """Release the file or connection."""


class MemoryStore:
    """The reference store: how every durable one must behave."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._origin: StoredOrigin | None = None
        self._begins = 0

    def append(self, rows: Sequence[Row]) -> None:
        """Keep all rows."""
        check_places(rows, len(self))
        self._rows.extend(rows)

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """A slice of the rows."""
        first = max(from_seqno - self._begins, 0)
        return tuple(self._rows[first : first + rows_max])

    def origin(self) -> StoredOrigin | None:
        """As it was given."""
        return self._origin

    def drop_before(self, origin: StoredOrigin) -> None:
        """Forget rows."""
        check_origin(origin, self._begins, len(self))
        del self._rows[: origin.seqno - self._begins]
        self._origin, self._begins = origin, origin.seqno

    def __len__(self) -> int:
        return self._begins + len(self._rows)

    def close(self) -> None:
        """Nothing to release."""


def check_places(rows: Sequence[Row], length: int) -> None:
    """Raise `JournalCorruptError` unless the rows follow the `length` that a store holds, without a gap."""
    for place, row in enumerate(rows, start=length):
        if row.seqno != place:
            raise JournalCorruptError(f"row {row.seqno} was appended at place {place}")


def check_origin(origin: StoredOrigin, begins: int, length: int) -> None:
    """Raise `JournalCorruptError` unless a store with rows `begins` to `length` - 1 may begin there."""
    if not begins <= origin.seqno < length and length:
        raise JournalCorruptError(
            f"an origin at place {origin.seqno} was given to a journal of places {begins} to {length - 1}"
        )


def chain_after(chain: bytes, seqno: int, body: bytes) -> bytes:
    """chain(n) = SHA-256(chain(n-1) || uint64le(n) || bytes(n))."""
    return hashlib.sha256(chain + seqno.to_bytes(8, "little") + body).digest()


def head_after(head: bytes, body: bytes) -> bytes:
    """head(n) = SHA-256(head(n-1) || bytes(n)), for genesis and commits."""
    return hashlib.sha256(head + body).digest()


class Journal:
    """Appends records to a store and reads them back verified.

    Invariant: `len(self)`, `chain` and `head` describe the store's last row.
    """

    PAGE_ROWS = 4096

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._length = 0
        self.begins = 0
        """Place of the first record that is left."""
        self.chain = ZERO_HASH
        self.head = ZERO_HASH

    def __len__(self) -> int:
        return self._length

    @property
    def is_empty(self) -> bool:
        """Whether the store holds nothing yet, not even a genesis."""
        return len(self._store) == 0

    @property
    def stored_origin(self) -> StoredOrigin | None:
        """What stands for the records that were dropped, as it is stored; the reader verifies."""
        return self._store.origin()

    def origin(self) -> Origin | None:
        """What stands for the records that were dropped, verified and decoded anew; None: all are there.

        Raises `JournalCorruptError` if it is not what was written.
        """
        stored = self._store.origin()
        if stored is None:
            return None
        if stored != StoredOrigin.of(stored.seqno, stored.sealed):
            raise JournalCorruptError(
                f"The journal's origin, in place of records 0 to {stored.seqno - 1}, is not what was "
                "written (its hash does not match). Restore the journal from a copy."
            )
        origin = unseal(stored.sealed)
        if origin.seqno != stored.seqno:
            raise JournalCorruptError(
                f"The journal begins at record {stored.seqno}, its origin says {origin.seqno}. Restore "
                "the journal from a copy."
            )
        return origin

    def drop_before(self, origin: StoredOrigin) -> None:
        """Let an origin take the place of all records before it, durably."""
        self._store.drop_before(origin)
        self.begins = origin.seqno

    def load(self) -> Iterator[Entry]:
        """Read everything that is there, verifying; afterwards the journal can be appended to.

        If records were dropped, it begins behind the `origin`. Raises `JournalCorruptError` at the
        first row that is not what was written.
        """
        origin = self.origin()
        if origin is None:
            self._length, self.chain, self.head = 0, ZERO_HASH, ZERO_HASH
        else:
            self._length, self.chain, self.head = origin.seqno, origin.chain, origin.head
        self.begins = self._length
        return self._entries()

    def _entries(self) -> Iterator[Entry]:
        # Every start goes through here a million times: no calls, and nothing kept, that can be done
        # without.
        sha256, head = hashlib.sha256, self.head
        place, chain = self._length, self.chain
        while rows := self._store.read(place, self.PAGE_ROWS):
            for row in rows:
                seqno, body, stored = row
                if seqno != place:
                    raise JournalCorruptError(
                        f"The journal jumps from record {place - 1} to {seqno}; records are missing. "
                        "Restore the journal from a copy."
                    )
                chain = sha256(chain + seqno.to_bytes(8, "little") + body).digest()
                if chain != stored:
                    raise JournalCorruptError(
                        f"Journal record {seqno} is not what was written (its hash does not match); "
                        f"records {self.begins} to {seqno - 1} are sound. Restore the journal from a copy."
                    )
                record = decode_record(body)
                place = seqno + 1
                kind = type(record)
                if kind is not Answered:  # nearly all are
                    if kind is Committed or kind is Genesis:
                        head = head_after(head, body)
                    self._length, self.chain, self.head = place, chain, head
                yield _entry_of((row, record, head))
            self._length, self.chain, self.head = place, chain, head

    def append(self, records: Sequence[Record]) -> list[Entry]:
        """Append records durably, all or none."""
        return self._append([(encode_record(record), record) for record in records])

    def append_bodies(self, bodies: Sequence[bytes]) -> list[Entry]:
        """Append records of another journal, as they were written there; raises as `decode_record` does."""
        return self._append([(body, decode_record(body)) for body in bodies])

    def _append(self, records: Sequence[tuple[bytes, Record]]) -> list[Entry]:
        entries: list[Entry] = []
        length, chain, head = self._length, self.chain, self.head
        for body, record in records:
            chain = chain_after(chain, length, body)
            if isinstance(record, (Genesis, Committed)):
                head = head_after(head, body)
            entries.append(Entry(Row(length, body, chain), record, head))
            length += 1
        self._store.append([entry.row for entry in entries])
        self._length, self.chain, self.head = length, chain, head
        return entries

    def read(self, from_seqno: int, rows_max: int) -> Sequence[Row]:
        """Rows as they are stored; the reader verifies."""
        return self._store.read(from_seqno, rows_max)

    def close(self) -> None:
        """Close the store."""
        self._store.close()
