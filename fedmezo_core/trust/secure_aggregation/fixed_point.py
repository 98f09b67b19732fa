"""Projected gradients as integers, so that masks can hide them and their sum is exact.

With `levels` = (2^31 - 1) // cohort_size_max, a projected gradient g is sent as the integer nearest
to g * levels / projected_grad_abs_max, ties to even, after g was clamped to that clip. So no sum of
a cohort leaves the range of a signed 32-bit integer, and one gradient is off by at most half a step
of projected_grad_abs_max / levels. Every operation is rounded to binary64 from the left.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmezo_core.config import RunConfig


def levels_of(config: RunConfig) -> int:
    """The largest integer that stands for a projected gradient."""
    return (2**31 - 1) // config.cohort_size_max


def quantised(projected_grads: Sequence[float], config: RunConfig) -> tuple[int, ...]:
    """The integer that stands for each finite projected gradient."""
    levels, limit = levels_of(config), config.projected_grad_abs_max
    return tuple(round(max(-limit, min(limit, grad)) * levels / limit) for grad in projected_grads)


def mean_of_sums(sums: Sequence[int], count: int, config: RunConfig) -> tuple[float, ...]:
    """The mean projected gradients whose integers add up to `sums` over `count` answers."""
    divisor, limit = levels_of(config) * count, config.projected_grad_abs_max
    return tuple(total * limit / divisor for total in sums)
