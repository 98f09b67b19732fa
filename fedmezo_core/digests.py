"""Who holds which weights: full digests that parties report, and who stands alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fedmezo_core.records import Diverged, digest64_of

REPLICA = "replica"
"""Name of the coordinator's own copy among the parties; no worker may take it."""


@dataclass(frozen=True, slots=True)
class PartyDigest:
    """A party's digest of the weights after `round`."""

    party: str
    round: int
    weights_digest: bytes


class DigestBoard:
    """Newest full digest of each party."""

    def __init__(self) -> None:
        self._newest: dict[str, PartyDigest] = {}
        self._named: set[tuple[str, int]] = set()

    def newest(self) -> list[PartyDigest]:
        """One a party, by name."""
        return [self._newest[party] for party in sorted(self._newest)]

    def report(self, digest: PartyDigest) -> list[Diverged]:
        """Take a digest; returns the parties that it shows to have diverged, each once a round.

        Of the digests for one round the most frequent is the run's; between equals the replica's is.
        With neither, nobody can be named.
        """
        self._newest[digest.party] = digest
        same_round = [d for d in self._newest.values() if d.round == digest.round]
        expected = _expected(same_round)
        if expected is None:
            return []
        found = [
            Diverged(d.round, d.party, digest64_of(d.weights_digest), digest64_of(expected))
            for d in same_round
            if d.weights_digest != expected and (d.party, d.round) not in self._named
        ]
        self._named |= {(d.party, d.round) for d in found}
        return sorted(found, key=lambda d: d.party)


def _expected(digests: list[PartyDigest]) -> bytes | None:
    counted = Counter(d.weights_digest for d in digests).most_common()
    if len(counted) == 1 or counted[0][1] > counted[1][1]:
        return counted[0][0]
    tied = {digest for digest, count in counted if count == counted[0][1]}
    return next(
        (d.weights_digest for d in digests if d.party == REPLICA and d.weights_digest in tied), None
    )
