"""A party's own copy of a run: genesis, commits, and what the coordinator signed of them.

The copy is a journal like the coordinator's, in the same kind of file, and a coordinator can go on
from it. It lacks how commits came about: cohorts, answers, evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedmezo_core.errors import DivergedError, JournalCorruptError
from fedmezo_core.journal.codec import decode_commit, decode_record, encode_record
from fedmezo_core.journal.journal import ZERO_HASH, Entry, Journal, head_after
from fedmezo_core.journal.signed_heads import Witness
from fedmezo_core.records import Committed, Genesis, Record, SignedHead


class JournalCopy:
    """Follows a run into a journal of its own. Use it from one thread at a time."""

    def __init__(self, journal: Journal) -> None:
        """`journal` is opened and not yet loaded."""
        self._journal = journal
        self.round = 0
        """Round of the last commit in the copy."""
        self.newest: SignedHead | None = None
        """The newest signed head in the copy."""

    def begin(self, genesis_body: bytes, epoch: int, key: bytes) -> Iterator[Entry]:
        """Begin the copy of a run, or yield the commits that an earlier copy of it holds.

        `genesis_body` is record 0 as the coordinator gave it, `key` its public key or empty. Raises
        `JournalCorruptError` for a damaged copy, and `DivergedError` for a copy of another run or
        one that another key signed.
        """
        entries = verified(self._journal)
        first, _ = next(entries, (None, None))
        if first is None:
            self.newest = SignedHead(epoch, 0, head_after(ZERO_HASH, genesis_body), key)
            self._journal.append([genesis_body, encode_record(self.newest)])
            return
        if first.row.body != genesis_body:
            raise DivergedError(
                "The journal copy is of another run than the coordinator's, or of another run by "
                "this name; give this run another journal_copy."
            )
        for entry, record in entries:
            if isinstance(record, SignedHead):
                self.newest = record
            elif isinstance(record, Committed):
                self.round = record.round
                yield entry
        known = b"" if self.newest is None else self.newest.key
        if known != key:
            raise DivergedError(
                f"The coordinator signs with key {key.hex() or '(none)'}, but signed what the "
                f"journal copy holds with {known.hex() or '(none)'}; if the run was restored with "
                "a new key, move the copy away so that a new one is begun."
            )

    def add(self, bodies: Sequence[bytes], signed: SignedHead | None = None) -> Sequence[Entry]:
        """Append commits as the coordinator gave them, then the signed head after the last one.

        Returns the entries of the commits. Raises `JournalCorruptError` for what is no commit;
        nothing is then appended.
        """
        rounds = [decode_commit(body).round for body in bodies]
        added = self._journal.append(bodies) if bodies else ()
        self.round = rounds[-1] if rounds else self.round
        if signed is not None and signed != self.newest:
            self._journal.append([encode_record(signed)])
            self.newest = signed
        return added

    def close(self) -> None:
        """Close the file."""
        self._journal.close()


def verified(journal: Journal) -> Iterator[tuple[Entry, Record]]:
    """Every entry of a journal and its record, with the chain and all signed heads checked.

    A signed head must name the head that the commits before it make, and carry a signature of its
    key. Raises `JournalCorruptError` at the first entry that is wrong.
    """
    origin = journal.origin()
    run_id = "" if origin is None else origin.genesis.config.run_id
    for entry in journal.load():
        record = decode_record(entry.row.body)
        if isinstance(record, Genesis):
            run_id = record.config.run_id
        if isinstance(record, SignedHead):
            _check(record, entry.head, run_id)
        yield entry, record


def _check(record: SignedHead, head: bytes, run_id: str) -> None:
    if record.head != head:
        raise JournalCorruptError(
            f"The checkpoint of round {record.round} names head {record.head.hex()[:16]}, but the "
            f"commits make {head.hex()[:16]}; take another party's copy."
        )
    if record.signature:
        try:
            Witness(run_id, record.key).check(record.round, record.head, record.signature)
        except DivergedError as error:
            raise JournalCorruptError(str(error)) from None
