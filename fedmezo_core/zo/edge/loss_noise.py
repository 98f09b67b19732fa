"""Whether a runtime's losses are fine enough for a run's eps, from few losses before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedmezo_core.config import RunConfig
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.plain.measurements import points_of

_SEEDS: Final = (1, 2)
"""Directions; one alone may hardly change the loss."""
_CORRELATION_MIN: Final = 0.99


def noise_points(config: RunConfig) -> list[Commit]:
    """Where to compute the losses: at eps and at half of it, on both sides along few directions."""
    return [
        point
        for seed in _SEEDS
        for eps in (config.eps, config.eps / 2)
        for point in points_of([], [seed], eps, one_sided=False)
    ]


def noise_sentence(losses: Sequence[float], config: RunConfig) -> str:
    """What to say of the losses at `noise_points`, in nats; empty if they are fine enough.

    Twice the difference at half of eps is the difference at eps, but for the noise of the four
    losses and for a curvature that would spoil a measurement too. Losses that are no numbers say
    nothing here, because a measurement says it.
    """
    ends = np.array(losses, dtype=np.float64).reshape(len(_SEEDS), 2, 2)
    changes, halves = (ends[..., 0] - ends[..., 1]).T
    # The noise of a loss, squared: of 1 + 1 + 4 + 4 parts that the remainder has.
    noise = float(np.mean((changes - 2 * halves) ** 2)) / 10
    change = float(np.mean(changes**2))
    if config.estimator == "one_sided":
        change /= 4
    if not math.isfinite(noise) or 2 * noise < (1 - _CORRELATION_MIN**2) * change:
        return ""
    correlation = math.sqrt(max(0.0, 1 - 2 * noise / change)) if change else 0.0
    return (
        f"The losses here are too coarse for the run's eps of {config.eps:g}: one is off by about "
        f"{math.sqrt(noise):.1e} nats, and a probe changes them by {math.sqrt(change):.1e}, so "
        f"projected gradients correlate about {correlation:.2f} with what they should be; begin a "
        "run with another eps (fedmezo probe finds one), or measure with another runtime."
    )
