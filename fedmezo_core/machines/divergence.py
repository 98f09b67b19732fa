"""Who holds which weights: full digests that parties report, and who stands alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedmezo_core.machines.cohort import REPLICA_PARTY, agreed_digest
from fedmezo_core.records import Diverged, digest64_of


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
        self._named: dict[str, int] = {}
        """Party -> the round that it was named for last."""

    def newest(self) -> list[PartyDigest]:
        """One a party, by name."""
        return [self._newest[party] for party in sorted(self._newest)]

    def forget(self, party: str) -> None:
        """Drop what a party reported."""
        self._newest.pop(party, None)
        self._named.pop(party, None)

    def report(self, digest: PartyDigest) -> list[Diverged]:
        """Take a digest; returns the parties that it shows to have diverged, each once a round.

        Which digest is the run's is decided as for answers, by `agreed_digest`.
        """
        self._newest[digest.party] = digest
        found_by = {
            d.party: digest64_of(d.weights_digest)
            for d in self._newest.values()
            if d.round == digest.round
        }
        votes = [found for party, found in found_by.items() if party != REPLICA_PARTY]
        expected = agreed_digest(votes, found_by.get(REPLICA_PARTY))
        if expected is None:
            return []
        diverged = [
            Diverged(digest.round, party, found, expected)
            for party, found in sorted(found_by.items())
            if found != expected and self._named.get(party) != digest.round
        ]
        self._named.update((d.party, d.round) for d in diverged)
        return diverged
