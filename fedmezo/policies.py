"""What a contract chooses between for seeds and aggregation, as functions and their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedmezo_core.config import RunConfig
from fedmezo_core.machines.aggregate import Share
from fedmezo_core.machines.seeds import Pool


class SeedPolicy(Protocol):
    """Gives the seeds of an assignment; `seeds_of` is the one that follows the contract."""

    def __call__(
        self, config: RunConfig, round_: int, slot: int, pool: Pool | None, /
    ) -> tuple[int, ...]:
        """One 64-bit seed for each probe of each local step, step by step.

        It is a function of its arguments alone, so that every party and every restart agree.
        """


class Aggregator(Protocol):
    """Turns a round's answers into the commit; `coefficients_of` does so by the contract."""

    def __call__(self, shares: Sequence[Share], config: RunConfig, /) -> list[tuple[float, ...]]:
        """One binary32 coefficient for each seed of each answer.

        It is a function of its arguments alone, and of IEEE 754 operations that round alike on
        every machine.
        """
