"""Where the daemon finds the model's records in the journal: genesis and commits, and their heads."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from fedmezo_core.journal import Entry
from fedmezo_core.records import Committed, Genesis


class ModelIndex:
    """Folds entries, live and at a restart alike.

    Invariant: item k of `seqnos` is the place of round k's commit; item 0 is genesis.
    """

    def __init__(self) -> None:
        self.seqnos = array("Q")
        self._heads = bytearray()
        self.newest_base_round = 0
        """Round of the newest commit from the base; 0 before there is one."""

    def fold(self, entry: Entry) -> None:
        """Take one more entry."""
        record = entry.record
        if not isinstance(record, (Genesis, Committed)):
            return
        self.seqnos.append(entry.row.seqno)
        self._heads += entry.head
        if isinstance(record, Committed) and record.from_base:
            self.newest_base_round = record.round

    def head_at(self, round_: int) -> bytes:
        """Head after `round_`; empty for a round that is not committed."""
        return bytes(self._heads[32 * round_ : 32 * round_ + 32])

    def seqno_of(self, round_: int, default: int) -> int:
        """Place of a round's commit; `default` for a round that is not committed."""
        return self.seqnos[round_] if round_ < len(self.seqnos) else default

    def seqnos_from(self, seqno: int, count_max: int) -> Sequence[int]:
        """Places of genesis and commits at or after `seqno`."""
        start = bisect_left(self.seqnos, seqno)
        return self.seqnos[start : start + count_max]
