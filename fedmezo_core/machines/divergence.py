"""Whose weights are the run's. No digests of weights are compared anywhere else.

Parties name the digest of their weights in the answers of digest rounds and in `WeightsReported`.
The machines ask `agreed_digest` which digest is the run's, and `differing` who has another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fedmezo_core.events import WeightsReported
from fedmezo_core.machines.roster import WORKERS_SEEN_MAX
from fedmezo_core.records import Diverged, digest64_of

REPLICA_PARTY = "replica"
"""Name of the coordinator's own replica of the weights as a party; no worker may have it."""


def agreed_digest(
    votes: Sequence[int], replica: int | None, *, replica_comes: bool = False
) -> int | None:
    """The weights digest that the run goes by, or None while nobody can tell.

    It is the replica's, rebuilt from the journal alone, if that is known: workers cannot outvote
    it. Otherwise it is the value that more than half of the workers' `votes` name; but votes that
    differ decide nothing if the replica's digest is still to come. Nothing is committed from
    weights that are known to disagree.
    """
    if replica is not None or not votes:
        return replica
    counts = Counter(votes)
    if replica_comes and len(counts) > 1:
        return None
    value, count = counts.most_common(1)[0]
    return value if 2 * count > counts.total() else None


def differing(found: Iterable[tuple[str, int]], expected: int | None) -> list[tuple[str, int]]:
    """The pairs (party, digest) of `found` whose digest is not `expected`, each once, in order."""
    return [(party, digest64) for party, digest64 in dict.fromkeys(found) if digest64 != expected]


class DigestBoard:
    """The newest full digest that each party has reported."""

    def __init__(self) -> None:
        # Party -> its newest report; the party that reported last comes last.
        self._newest: dict[str, WeightsReported] = {}
        # Party -> the round in which it was last found to differ.
        self._named: dict[str, int] = {}

    def newest(self) -> list[WeightsReported]:
        """The newest report of each party, sorted by the party's name."""
        return [self._newest[party] for party in sorted(self._newest)]

    def reports_of(self, round_: int) -> dict[str, bytes]:
        """Party -> 32-byte digest of its weights after `round_`, if that is its newest report."""
        return {
            party: report.weights_digest
            for party, report in self._newest.items()
            if report.round == round_
        }

    def confirmed_round(self, party: str, *, replica_comes: bool = False) -> int:
        """Round of the party's newest report, if the run goes by its digest; -1 if not.

        Somebody else must have reported that round. For `replica_comes` see `agreed_digest`.
        """
        newest = self._newest.get(party)
        if newest is None:
            return -1
        found, expected = self._compared(newest.round, replica_comes)
        return newest.round if len(found) > 1 and found[party] == expected else -1

    def report(self, report: WeightsReported, *, replica_comes: bool = False) -> list[Diverged]:
        """Take a report; returns the parties that it shows to differ, each once a round.

        For `replica_comes` see `agreed_digest`.
        """
        self._newest.pop(report.party, None)
        self._newest[report.party] = report
        if len(self._newest) > WORKERS_SEEN_MAX:
            gone = next(iter(self._newest))
            del self._newest[gone]
            self._named.pop(gone, None)
        found, expected = self._compared(report.round, replica_comes)
        if expected is None:
            return []
        diverged = [
            Diverged(report.round, party, digest64, expected)
            for party, digest64 in differing(sorted(found.items()), expected)
            if self._named.get(party) != report.round
        ]
        self._named.update((d.party, d.round) for d in diverged)
        return diverged

    def _compared(self, round_: int, replica_comes: bool) -> tuple[dict[str, int], int | None]:
        """Party -> digest of the round's reports, and the one of them that the run goes by."""
        found = {party: digest64_of(digest) for party, digest in self.reports_of(round_).items()}
        votes = [digest64 for party, digest64 in found.items() if party != REPLICA_PARTY]
        replica = found.get(REPLICA_PARTY)
        return found, agreed_digest(votes, replica, replica_comes=replica_comes)
