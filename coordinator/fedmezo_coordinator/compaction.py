"""When the journal's oldest records may go, and what takes their place. Decides; writes nothing.

A worker that comes late must still find weights to begin from, and the commits after them. So records go
only if they are older than the second newest thing to begin from: a snapshot, or in a `pool` run a commit
from the base. What they came to is taken down while the run passes by, because nothing but a replay could
say it later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from fedmezo_core.journal.journal import StoredOrigin
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.machines.sealed_state import Origin, seal

CANDIDATES_MAX = 4
"""Origins in memory that are still too new to be used."""
MARKS = 8
"""A new candidate is taken down after this part of the records that go together, not for fewer."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Where the journal may begin one day."""

    round: int
    stored: StoredOrigin

    @property
    def seqno(self) -> int:
        """Place of the first record that would be left."""
        return self.stored.seqno


class Compaction:
    """Keeps a few origins, and says which one the journal may begin at.

    Invariant: candidates are in the journal's order, and none is older than where it begins.
    """

    def __init__(self, records: int, signer: Signer | None) -> None:
        """Records are dropped when at least so many can go; 0: never."""
        self._records = records
        self._signer = signer
        self._begins = 0
        self._candidates: deque[Candidate] = deque()

    @property
    def is_on(self) -> bool:
        """Whether anything is ever dropped."""
        return self._records > 0

    def begin(self, seqno: int) -> None:
        """Say where the journal begins, now."""
        self._begins = seqno
        while self._candidates and self._candidates[0].seqno <= seqno:
            self._candidates.popleft()

    def pass_by(self, origin: Origin, round_max: int) -> None:
        """Take down what the journal came to, if that may be of use; `round_max` as in `chosen`."""
        last = self._candidates[-1].seqno if self._candidates else self._begins
        if not self.is_on or origin.seqno - last < max(self._records // MARKS, 1):
            return
        self._prune(round_max)
        if len(self._candidates) < CANDIDATES_MAX:
            unsigned = replace(origin, key=b"")
            stored = StoredOrigin.of(origin.seqno, seal(unsigned, self._signer))
            self._candidates.append(Candidate(origin.round, stored))

    def chosen(self, round_max: int) -> Candidate | None:
        """Where the journal should begin from now on; None: where it does.

        `round_max`: everyone can begin after this round, and after none before it.
        """
        self._prune(round_max)
        first = self._candidates[0] if self._candidates else None
        if first is None or first.round > round_max:
            return None
        return first if first.seqno - self._begins >= self._records else None

    def _prune(self, round_max: int) -> None:
        """Of those that could be used now, only the newest is of use."""
        while len(self._candidates) > 1 and self._candidates[1].round <= round_max:
            self._candidates.popleft()
