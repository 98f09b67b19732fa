"""Where the daemon finds the model's records in the journal: genesis and commits, and their heads."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

from fedmezo_core.journal.journal import Entry
from fedmezo_core.machines.sealed_state import Origin
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Suffix


class CommitIndex:
    """Folds entries, live and at a restart alike.

    Invariant: item k of `seqnos` is the place of the commit of round `begins` + k; item 0 is genesis, or
    the last record that was dropped. A round takes 56 bytes, so a million rounds take 56 MB, unless
    records are dropped.
    """

    def __init__(self) -> None:
        self.begins = 0
        """First round whose head is known; the commits after it are in the journal."""
        self.seqnos = array("Q")
        self._heads = bytearray()
        # Sums over the commits up to each round, from some round on.
        self._pairs = array("Q")
        self._bytes = array("Q")
        self._from_base: deque[int] = deque(maxlen=2)

    @property
    def round(self) -> int:
        """Last committed round."""
        return self.begins + len(self.seqnos) - 1

    @property
    def newest_base_round(self) -> int:
        """Round of the newest commit from the base; 0 if the journal holds none."""
        return self._from_base[-1] if self._from_base else 0

    @property
    def last_base_round(self) -> int:
        """The same of the one before; 0 if the journal does not hold two."""
        return self._from_base[0] if len(self._from_base) == 2 else 0

    def begin(self, origin: Origin) -> None:
        """Begin where the journal does."""
        self.begins = origin.round
        self.seqnos.append(origin.seqno - 1)
        self._heads += origin.head
        self._pairs.append(0)
        self._bytes.append(0)

    def drop_before(self, round_: int, seqno: int) -> None:
        """Forget the commits up to that of `round_`, which were before record `seqno`."""
        count = round_ - self.begins
        self.seqnos = self.seqnos[count:]
        self.seqnos[0] = seqno - 1
        self._heads = self._heads[32 * count :]
        self._pairs, self._bytes = self._pairs[count:], self._bytes[count:]
        self.begins = round_
        while self._from_base and self._from_base[0] <= round_:
            self._from_base.popleft()

    def fold(self, entry: Entry) -> None:
        """Take one more entry."""
        record = entry.record
        if not isinstance(record, (Genesis, Committed)):
            return
        self.seqnos.append(entry.row.seqno)
        self._heads += entry.head
        self._add_up(entry)
        if isinstance(record, Committed) and record.from_base:
            self._from_base.append(record.round)

    def can_follow(self, round_: int) -> bool:
        """Whether the journal has all commits that a party at this round lacks."""
        return self._first_after(round_) >= self.begins

    def suffix(self, round_: int) -> Suffix:
        """What a party that holds the weights after `round_`, a committed one, would have to apply.

        Nothing, if the journal does not have it.
        """
        first = self._first_after(round_) - self.begins
        if first < 0:
            return Suffix(0, 0)
        return Suffix(
            pairs=self._pairs[-1] - self._pairs[first], bytes=self._bytes[-1] - self._bytes[first]
        )

    def _first_after(self, round_: int) -> int:
        """The round after whose commit such a party begins to read."""
        return max(round_, self.newest_base_round - 1)

    def _add_up(self, entry: Entry) -> None:
        if isinstance(entry.record, Committed):
            self._pairs.append(self._pairs[-1] + entry.record.pairs)
            self._bytes.append(self._bytes[-1] + len(entry.row.body))
        else:
            self._pairs.append(0)
            self._bytes.append(0)

    def head_at(self, round_: int) -> bytes:
        """Head after `round_`; empty for a round that is not committed, or was dropped."""
        place = 32 * (round_ - self.begins)
        return bytes(self._heads[place : place + 32]) if place >= 0 else b""

    def seqno_of(self, round_: int, default: int) -> int:
        """Place of a round's commit; `default` for one that is not committed, or was dropped."""
        place = round_ - self.begins
        is_here = place < len(self.seqnos) and (place > 0 or self.begins == place == 0)
        return self.seqnos[place] if is_here else default

    def after(self, round_: int) -> Sequence[int]:
        """Places of all commits after a round that is not before `begins`."""
        return self.seqnos[round_ - self.begins + 1 :]

    def seqnos_from(self, seqno: int, count_max: int) -> Sequence[int]:
        """Places of genesis and commits at or after `seqno`."""
        start = bisect_left(self.seqnos, seqno)
        return self.seqnos[start : start + count_max]
