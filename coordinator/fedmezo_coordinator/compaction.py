"""Which sealed states of a run are kept, and when the journal's oldest records may be dropped.

The newest sealed state is what a restart begins from. The older ones are where the journal itself
may begin one day: a worker that comes late must still find weights to begin from, and the commits
after them, so records are dropped only if they are older than the second newest thing to begin from
(a snapshot, or in a `pool` run a commit from the base). What they come to must be sealed as the run
passes by, because only a replay could tell it later.

Everything here decides; nothing writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmezo_core.journal.sealed import StoredState

SEAL_RECORDS = 20_000
"""A restart folds at most about this many records; 1,000 take some 6 ms."""
SEAL_BYTES_PER_RECORD = 16
"""A state that is larger than this many bytes for each record since the last one waits for more."""
SEALS_MAX = 5
"""Sealed states that are kept: the newest, and older ones that the journal may begin at one day."""
SEALS_PER_COMPACTION = 8
"""Where records are dropped in smaller numbers, states are sealed this many times as often."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A sealed state and its round."""

    round: int
    stored: StoredState

    @property
    def seqno(self) -> int:
        """Seqno of the first record after it."""
        return self.stored.seqno


class Compaction:
    """Keeps a few sealed states, and says which one the journal may begin at.

    Invariant: `seals` are in the journal's order, and none is older than where the journal begins.
    """

    def __init__(self, records: int) -> None:
        """Records are dropped when at least `records` of them can be; 0: never."""
        self.seals: list[Seal] = []
        self._records = records
        self.begins = 0
        """Seqno of the journal's first record."""

    def begin(self, seqno: int) -> None:
        """Record that the journal now begins at `seqno`."""
        self.begins = seqno
        self.seals = [seal for seal in self.seals if seal.seqno > seqno]

    def is_due(self, seqno: int) -> bool:
        """Whether what the records before `seqno` come to should be sealed."""
        newest = self.seals[-1] if self.seals else None
        last = self.begins if newest is None else newest.seqno
        size = 0 if newest is None else len(newest.stored.sealed)
        wanted = max(SEAL_RECORDS, size // SEAL_BYTES_PER_RECORD)
        if self._records:
            wanted = min(wanted, max(self._records // SEALS_PER_COMPACTION, 1))
        return seqno - last >= wanted

    def add(self, seal: Seal, round_max: int) -> None:
        """Keep a new sealed state, if need be instead of the newest; `round_max` as in `chosen`."""
        self._prune(round_max)
        if len(self.seals) == SEALS_MAX:
            self.seals.pop()
        self.seals.append(seal)

    def chosen(self, round_max: int) -> Seal | None:
        """Where the journal should begin from now on; None: where it does.

        `round_max`: the last round after which everyone can begin.
        """
        self._prune(round_max)
        first = self.seals[0] if self.seals else None
        if not self._records or first is None or first.round > round_max:
            return None
        return first if first.seqno - self.begins >= self._records else None

    def _prune(self, round_max: int) -> None:
        """Of the states that the journal could begin at now, keep only the newest."""
        while len(self.seals) > 1 and self.seals[1].round <= round_max:
            del self.seals[0]
