"""What workers of ill will send in place of what they measured."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

from fedmezo_core.config import RunConfig

Attack = Literal[
    "none", "a million times", "the clip's bound", "sign turned", "ten times, sign turned", "zeros",
    "random", "copies", "ALIE",
]  # fmt: skip
ATTACKS: tuple[Attack, ...] = get_args(Attack)

Grads = tuple[float, ...]


def attacked(
    attack: Attack, own: Grads, others: Sequence[Grads], config: RunConfig, rng: random.Random
) -> Grads:
    """What an attacker sends who measured `own` and sees the answers of this round before it.

    others: what honest workers have answered; along the same directions only with `seed_policy`
    shared. "ALIE" (a little is enough, Baruch et al. 2019) shifts each value by one standard
    deviation: of the others' along its direction, away from their mean's sign, or else of its own.
    """
    clip = config.projected_grad_abs_max
    match attack:
        case "none":
            return own
        case "a million times":
            return tuple(max(-clip, min(clip, 1e6 * grad)) for grad in own)
        case "the clip's bound":
            return tuple(math.copysign(clip, -grad) for grad in own)
        case "sign turned":
            return tuple(-grad for grad in own)
        case "ten times, sign turned":
            return tuple(max(-clip, min(clip, -10 * grad)) for grad in own)
        case "zeros":
            return (0.0,) * len(own)
        case "random":
            size = math.sqrt(math.fsum(grad * grad for grad in own) / len(own))
            return tuple(rng.gauss(0, size) for _ in own)
        case "copies":
            return others[-1] if others else own
        case "ALIE":
            if config.seed_policy != "shared" or len(others) < 2:
                size = math.sqrt(math.fsum(grad * grad for grad in own) / len(own))
                return tuple(grad - size for grad in own)
            return tuple(map(_a_little_off, zip(*others, strict=True)))


def _a_little_off(column: Sequence[float]) -> float:
    mean = statistics.fmean(column)
    return mean - math.copysign(statistics.stdev(column), mean)
