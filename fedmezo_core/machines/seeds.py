"""Which directions an assignment measures along: three policies, one list of seeds.

`per_worker`: each slot has its own seeds, as in FedMeZO. `shared`: all slots of a round have the
same, so that their scalars can be compared and averaged seed by seed. `pool`: the seeds are drawn
from one pool for the whole run (FedKSeed, Qin et al. 2024), so that all commits together come to
one coefficient for each seed of the pool.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedmezo_core.config import RunConfig
from fedmezo_core.machines.aggregate import to_binary32
from fedmezo_core.records import Committed, SeedRange, first_seed_of

SHARED_SLOT = 0
POOL_ROUND = 0
"""The pool's seeds are derived as those of this round, a number that no round has."""


@dataclass(slots=True)
class Pool:
    """The run's seed pool after the commits so far. Equal journals give equal pools."""

    first_seed: int
    coefficients: list[float]
    """For each seed, the sum (binary64) of what it was committed with since the base."""
    decay: float = 1.0
    """What the base is multiplied by before these are added (binary64)."""
    sizes: list[float] = field(default_factory=list)
    """For each seed, the sum of |projected gradient| over all committed answers."""
    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig) -> Pool:
        """The pool before the first round."""
        size = config.pool_size
        return cls(
            first_seed_of(config.seed, POOL_ROUND, SHARED_SLOT),
            [0.0] * size,
            sizes=[0.0] * size,
            counts=[0] * size,
        )

    def commit(self, record: Committed) -> None:
        """Fold a commit's pairs; one from the base replaces all before it."""
        if record.from_base:
            self.decay = record.decay
            self.coefficients = [0.0] * len(self.coefficients)
        elif record.decay != 1.0:
            self.decay *= record.decay
            self.coefficients = [record.decay * value for value in self.coefficients]
        for seed_range in record.seed_ranges:
            first = seed_range.first_seed - self.first_seed
            for number, coefficient in enumerate(seed_range.coefficients, start=first):
                self.coefficients[number] += coefficient

    def holds(self, seed_range: SeedRange) -> bool:
        """Whether all seeds of the range are the pool's."""
        first = seed_range.first_seed - self.first_seed
        return first >= 0 and first + len(seed_range.coefficients) <= len(self.coefficients)

    def from_base(self, record: Committed) -> Committed:
        """`record` together with all commits before it, as one commit on top of the base."""
        after = dataclasses.replace(self, coefficients=list(self.coefficients))
        after.commit(record)
        seed_ranges = (SeedRange(self.first_seed, tuple(map(to_binary32, after.coefficients))),)
        decay = to_binary32(after.decay)
        return dataclasses.replace(record, seed_ranges=seed_ranges, decay=decay, from_base=True)

    def measured(self, seeds: Sequence[int], projected_grads: Sequence[float]) -> None:
        """Fold the projected gradients of a committed answer."""
        for seed, grad in zip(seeds, projected_grads, strict=True):
            self.sizes[seed - self.first_seed] += abs(grad)
            self.counts[seed - self.first_seed] += 1

    def chances(self) -> list[float]:
        """Cumulative weights to draw seeds by: FedKSeed-Pro's softmax of min-max scaled mean sizes.

        A seed that was never measured counts as the mean of those that were. Only operations that
        IEEE 754 rounds alike everywhere, so that a restart on another machine draws the same seeds.
        """
        known = [s / n for s, n in zip(self.sizes, self.counts, strict=True) if n]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        middle = sum(known) / len(known) if known else 0.0
        width = high - low
        total = 0.0
        cumulative = []
        for size, count in zip(self.sizes, self.counts, strict=True):
            mean = size / count if count else middle
            total += _exp((mean - low) / width if width > 0 else 0.0)
            cumulative.append(total)
        return cumulative


def seeds_of(config: RunConfig, round_: int, slot: int, pool: Pool | None) -> tuple[int, ...]:
    """Seeds of one assignment: probe p of local step h measures along number h * probes + p."""
    count = config.pairs_per_answer
    if pool is None:
        owner = SHARED_SLOT if config.seed_policy == "shared" else slot
        first = first_seed_of(config.seed, round_, owner)
        return tuple(range(first, first + count))
    draws = _draws(config.seed, round_, slot)
    if config.pool_sampling == "uniform":
        # 64 bits modulo at most 2**16 seeds: the bias is too small to be seen.
        return tuple(pool.first_seed + next(draws) % config.pool_size for _ in range(count))
    cumulative = pool.chances()
    return tuple(
        pool.first_seed
        + min(
            bisect.bisect_right(cumulative, next(draws) / 2**64 * cumulative[-1]),
            config.pool_size - 1,
        )
        for _ in range(count)
    )


def seed_ranges_of(coefficients: Sequence[tuple[int, float]]) -> tuple[SeedRange, ...]:
    """Pairs (seed, coefficient), ascending by seed, as ranges of consecutive seeds."""
    ranges: list[tuple[int, list[float]]] = []
    for seed, coefficient in coefficients:
        if ranges and seed == ranges[-1][0] + len(ranges[-1][1]):
            ranges[-1][1].append(coefficient)
        else:
            ranges.append((seed, [coefficient]))
    return tuple(SeedRange(first, tuple(values)) for first, values in ranges)


def _draws(run_seed: int, round_: int, slot: int) -> Iterator[int]:
    """64-bit numbers: SHA-256 over run, round, slot and a counter, four at a time."""
    prefix = b"fedmezo pool v1\0" + b"".join(
        number.to_bytes(8, "little") for number in (run_seed, round_, slot)
    )
    block = 0
    while True:
        digest = hashlib.sha256(prefix + block.to_bytes(8, "little")).digest()
        for start in range(0, 32, 8):
            yield int.from_bytes(digest[start : start + 8], "little")
        block += 1


def _exp(x: float) -> float:
    """exp(x) for 0 <= x <= 1 within 1e-12, by Horner's rule on its series."""
    result = 1.0
    for divisor in range(16, 0, -1):
        result = 1.0 + x / divisor * result
    return result
