"""Who takes part in a round, and whose weights are the run's: two pure decisions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

REPLICA_PARTY = "replica"
"""The coordinator's own copy of the weights, as a party in `Diverged`; no worker may be named so."""


def choose_cohort(
    run_seed: int, round_: int, workers: Iterable[str], size_max: int
) -> tuple[str, ...]:
    """At most `size_max` of `workers`, sorted by name; a worker's index is its place in the cohort.

    With more workers than places, those with the smallest SHA-256 of (run seed, round, name) are
    taken: every worker is as likely as any other, and anyone can check the choice afterwards.
    """
    names = sorted(workers)
    if len(names) > size_max:
        prefix = (
            b"fedmezo cohort v1\0" + run_seed.to_bytes(8, "little") + round_.to_bytes(8, "little")
        )
        names.sort(key=lambda name: hashlib.sha256(prefix + name.encode()).digest())
        names = sorted(names[:size_max])
    return tuple(names)


def agreed_digest(votes: Sequence[int], replica: int | None) -> int | None:
    """The weights digest that the run goes by, or None while nobody can tell.

    The value that more than half of the answers' `votes` and the replica's vote (if it has one)
    name; without such a majority the replica's, because the coordinator rebuilds it from the journal
    alone; without either, None: weights that are known to disagree are never committed from.
    """
    counts = Counter(votes)
    if replica is not None:
        counts[replica] += 1
    if not counts:
        return None
    value, count = counts.most_common(1)[0]
    return value if 2 * count > counts.total() else replica
