"""Who takes part in a round."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def choose_cohort(
    run_seed: int, round_: int, workers: Iterable[str], size_max: int
) -> tuple[str, ...]:
    """At most `size_max` of `workers`, sorted by name; a worker's index is its slot.

    If there are more workers, those with the smallest SHA-256 of (run seed, round, name) are taken:
    every worker is as likely as any other, and anyone can check the choice afterwards.
    """
    names = sorted(workers)
    if len(names) > size_max:
        prefix = (
            b"fedmezo cohort v1\0" + run_seed.to_bytes(8, "little") + round_.to_bytes(8, "little")
        )
        names.sort(key=lambda name: hashlib.sha256(prefix + name.encode()).digest())
        names = sorted(names[:size_max])
    return tuple(names)
