"""Who takes part in a round."""

from __future__ import annotations

import hashlib
import hmac
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


def shuffled(
    workers: Iterable[str], secret: bytes, round_: int, first_slot: int
) -> tuple[str, ...]:
    """`workers` in an order that nobody can tell who does not know `secret` (32 random bytes).

    It is another one in each round. The journal holds it, so a restart needs no secret of before.
    """
    place = round_.to_bytes(8, "little") + first_slot.to_bytes(4, "little")

    def key(worker: str) -> bytes:
        return hmac.digest(secret, b"fedmezo slots v1\0" + place + worker.encode(), "sha256")

    return tuple(sorted(workers, key=key))
