"""A party's own copy of a run: genesis, commits, and what the coordinator signed of them.

It is a journal like the coordinator's, in the same kind of file, and a coordinator can go on from it. What
it lacks is how commits came about: cohorts, answers, evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedmezo_core.errors import DivergedError, JournalCorruptError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, Entry, Journal, head_after
from fedmezo_core.journal.signed_heads import Witness
from fedmezo_core.records import Committed, Genesis, SignedHead


class JournalCopy:
    """Follows a run into a journal of its own. Use it from one thread at a time."""

    def __init__(self, journal: Journal) -> None:
        """`journal` is opened and not yet loaded."""
        self._journal = journal
        self.round = 0
        """Last commit that is in it."""
        self.newest: SignedHead | None = None
        """Newest checkpoint that is in it."""

    def begin(self, genesis_body: bytes, epoch: int, key: bytes) -> Iterator[Entry]:
        """Begin the copy of a run, or give the commits that an earlier copy of it holds.

        `genesis_body` is record 0 as the coordinator gave it, `key` its public key or empty. Raises
        `JournalCorruptError` for a damaged copy, `DivergedError` if it is another run's or signed by
        another key.
        """
        entries = verified(self._journal)
        first = next(entries, None)
        if first is None:
            self.newest = SignedHead(epoch, 0, head_after(ZERO_HASH, genesis_body), key)
            self._journal.append_bodies([genesis_body, encode_record(self.newest)])
            return
        if first.row.body != genesis_body:
            raise DivergedError(
                "The journal copy is of another run than the coordinator's, or of another run by this "
                "name; give this run another journal_copy."
            )
        for entry in entries:
            if isinstance(entry.record, SignedHead):
                self.newest = entry.record
            elif isinstance(entry.record, Committed):
                self.round = entry.record.round
                yield entry
        known = b"" if self.newest is None else self.newest.key
        if known != key:
            raise DivergedError(
                f"The coordinator signs with key {key.hex() or '(none)'}, but signed what the journal copy "
                f"holds with {known.hex() or '(none)'}; if the run was restored with a new key, move "
                "the copy away so that a new one is begun."
            )

    def add(self, bodies: Sequence[bytes], checkpoint: SignedHead | None = None) -> Sequence[Entry]:
        """Append commits as the coordinator gave them, then what it signed of the last one; all or none.

        Returns the commits in their places.
        """
        added = self._journal.append_bodies(bodies) if bodies else ()
        for entry in added:
            assert isinstance(entry.record, Committed)
            self.round = entry.record.round
        if checkpoint is not None and checkpoint != self.newest:
            self._journal.append([checkpoint])
            self.newest = checkpoint
        return added

    def close(self) -> None:
        """Close the file."""
        self._journal.close()


def verified(journal: Journal) -> Iterator[Entry]:
    """Every entry, with chain and checkpoints checked.

    A checkpoint names the head that the commits before it make, and its signature is of its key. Raises `JournalCorruptError` at the first entry that is wrong.
    """
    origin = journal.origin()
    run_id = "" if origin is None else origin.genesis.config.run_id
    for entry in journal.load():
        if isinstance(entry.record, Genesis):
            run_id = entry.record.config.run_id
        if isinstance(entry.record, SignedHead):
            _check(entry.record, entry.head, run_id)
        yield entry


def _check(record: SignedHead, head: bytes, run_id: str) -> None:
    if record.head != head:
        raise JournalCorruptError(
            f"The checkpoint of round {record.round} names head {record.head.hex()[:16]}, but the commits "
            f"make {head.hex()[:16]}; take another party's copy."
        )
    if record.signature:
        try:
            Witness(run_id, record.key).check(record.round, record.head, record.signature)
        except DivergedError as error:
            raise JournalCorruptError(str(error)) from None
