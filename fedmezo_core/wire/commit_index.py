"""Where the model's records are in the journal: genesis and commits, with the heads after them."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

from fedmezo_core.journal.codec import pairs_in_commit
from fedmezo_core.journal.journal import COMMITTED, MOVES_HEAD, Entry
from fedmezo_core.journal.sealed import SealedState
from fedmezo_core.wire.snapshots import Suffix


class CommitIndex:
    """Folds the journal's entries, live and at a restart alike.

    Invariant: item k of `seqnos` is the seqno of the commit of round `begins` + k; item 0 is that
    of genesis, or of the last record that was dropped. A round takes 56 bytes, so a million rounds
    take 56 MB, unless records are dropped.
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
        """Round of the second newest commit from the base; 0 if the journal does not hold two."""
        return self._from_base[0] if len(self._from_base) == 2 else 0

    def begin(self, origin: SealedState) -> None:
        """Begin where a journal begins whose first records were dropped."""
        self.begins = origin.round
        self._add(origin.seqno - 1, origin.head, 0, 0)

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
        """Take one more entry; only genesis and commits change anything."""
        row = entry.row
        if row.kind == COMMITTED:
            pairs, from_base = pairs_in_commit(row.body)
            self._add(
                row.seqno, entry.head, self._pairs[-1] + pairs, self._bytes[-1] + len(row.body)
            )
            if from_base:
                self._from_base.append(self.round)
        elif row.kind in MOVES_HEAD:
            self._add(row.seqno, entry.head, 0, 0)

    def _add(self, seqno: int, head: bytes, pairs: int, size: int) -> None:
        self.seqnos.append(seqno)
        self._heads += head
        self._pairs.append(pairs)
        self._bytes.append(size)

    def can_follow(self, round_: int) -> bool:
        """Whether the journal has all commits that a party at this round lacks."""
        return self._first_after(round_) >= self.begins

    def suffix(self, round_: int) -> Suffix:
        """What a party that holds the weights after a committed round would have to apply.

        It is empty if the journal does not have these commits any more.
        """
        first = self._first_after(round_) - self.begins
        if first < 0:
            return Suffix(0, 0)
        return Suffix(
            pairs=self._pairs[-1] - self._pairs[first], bytes=self._bytes[-1] - self._bytes[first]
        )

    def _first_after(self, round_: int) -> int:
        """The round after whose commit a party that holds `round_` begins to read."""
        return max(round_, self.newest_base_round - 1)

    def head_at(self, round_: int) -> bytes:
        """Head after `round_`; empty for a round that is not committed, or was dropped."""
        start = 32 * (round_ - self.begins)
        return bytes(self._heads[start : start + 32]) if start >= 0 else b""

    def seqno_of(self, round_: int, default: int) -> int:
        """Seqno of a round's commit; `default` for one that is not committed, or was dropped."""
        index = round_ - self.begins
        is_here = index < len(self.seqnos) and (index > 0 or self.begins == index == 0)
        return self.seqnos[index] if is_here else default

    def seqnos_from(self, seqno: int, count_max: int) -> Sequence[int]:
        """At most `count_max` seqnos of genesis and commits, from `seqno` on."""
        start = bisect_left(self.seqnos, seqno)
        return self.seqnos[start : start + count_max]
