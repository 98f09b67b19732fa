"""Where the daemon finds the model's records in the journal: genesis and commits, and their heads."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from fedmezo_core.journal import Entry
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.snapshots import Suffix


class ModelIndex:
    """Folds entries, live and at a restart alike.

    Invariant: item k of `seqnos` is the place of round k's commit; item 0 is genesis. A round takes 56
    bytes, so a million rounds take 56 MB.
    """

    def __init__(self) -> None:
        self.seqnos = array("Q")
        self._heads = bytearray()
        # Sums over the commits up to each round.
        self._pairs = array("Q")
        self._bytes = array("Q")
        self.newest_base_round = 0
        """Round of the newest commit from the base; 0 before there is one."""

    @property
    def round(self) -> int:
        """Last committed round."""
        return len(self.seqnos) - 1

    def fold(self, entry: Entry) -> None:
        """Take one more entry."""
        record = entry.record
        if not isinstance(record, (Genesis, Committed)):
            return
        self.seqnos.append(entry.row.seqno)
        self._heads += entry.head
        self._add_up(entry)
        if isinstance(record, Committed) and record.from_base:
            self.newest_base_round = record.round

    def suffix(self, round_: int) -> Suffix:
        """What a party that holds the weights after `round_`, a committed one, would have to apply."""
        first = max(round_, self.newest_base_round - 1)
        return Suffix(
            pairs=self._pairs[-1] - self._pairs[first], bytes=self._bytes[-1] - self._bytes[first]
        )

    def _add_up(self, entry: Entry) -> None:
        if isinstance(entry.record, Committed):
            self._pairs.append(self._pairs[-1] + entry.record.pairs)
            self._bytes.append(self._bytes[-1] + len(entry.row.body))
        else:
            self._pairs.append(0)
            self._bytes.append(0)

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
