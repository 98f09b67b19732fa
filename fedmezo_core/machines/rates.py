"""Learning rates: the schedule over the rounds, and each worker's own rate around it.

A worker's rate in a round is `factor * (learning_rate + amplitude * phi)`, where `factor` comes
from the schedule and `phi` in [-1, 1] from the worker's signal (FedMeZO, Ling et al. 2024,
proposition 3.7 and section 5.4):

    phi_i = (s_i - mean(s)) / max_j |s_j - mean(s)|        over the workers whose signal is known

So a worker takes larger steps if its loss, or its update's distance from the mean, is above the
others'. The paper's clients read each other's updates for the distance; here it comes from scalars.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from fedmezo_core.config import RunConfig

SIGNAL_ROUNDS = 5
"""How many of a worker's newest answers the signal `mean_loss` averages over."""


def schedule_factor(config: RunConfig, round_: int) -> float:
    """Factor of the schedule for the learning rate of `round_` (from 1): above 0, at most 1.

    It rises in a straight line over `warmup_rounds`, then falls to `final_rate_fraction`, which it
    would reach in the round after the last one.
    """
    if round_ <= config.warmup_rounds:
        return round_ / (config.warmup_rounds + 1)
    progress = (round_ - config.warmup_rounds - 1) / (config.rounds - config.warmup_rounds)
    final = config.final_rate_fraction
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * progress
        case "cosine":
            return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def own_rates(
    config: RunConfig, round_: int, workers: Sequence[str], signals: Mapping[str, float]
) -> tuple[float, ...]:
    """The learning rate of each of `workers` in `round_`, before the schedule's factor.

    `signals` holds what is known of any worker of the run; one without a signal gets
    `config.learning_rate`.
    """
    if config.personal_rate == "random":
        phis = [_chance(config.seed, round_, worker) for worker in workers]
    else:
        known = {worker: value for worker, value in signals.items() if math.isfinite(value)}
        mean = math.fsum(known.values()) / len(known) if known else 0.0
        widest = max((abs(value - mean) for value in known.values()), default=0.0)
        phis = [
            (known[worker] - mean) / widest if worker in known and widest > 0 else 0.0
            for worker in workers
        ]
    return tuple(config.learning_rate + config.rate_amplitude * phi for phi in phis)


def update_distances(
    updates: Sequence[Mapping[int, float]], weights: Sequence[float], elements: int
) -> list[float]:
    """Distance of each answer's update from the mean update, || D_i - sum_j w_j D_j ||.

    `updates`: for each answer, seed -> the coefficient that its direction has in D_i. `weights` sum
    to 1. `elements`: count of trained elements d.

    Directions of different seeds are nearly orthogonal and have || z || = sqrt(d) (Rademacher:
    exactly; the others: nearly), so the squared norm of sum_s a_s z_s is d * sum_s a_s^2 within a
    relative error of the order of sqrt(seeds / d).
    """
    mean: dict[int, float] = {}
    for update, weight in zip(updates, weights, strict=True):
        for seed, coefficient in update.items():
            mean[seed] = mean.get(seed, 0.0) + weight * coefficient
    squares = {seed: value * value for seed, value in mean.items()}
    total = math.fsum(squares.values())
    distances = []
    for update in updates:
        # Seeds that only others have contribute the mean's own square.
        others = max(total - math.fsum(squares[seed] for seed in update), 0.0)
        own = math.fsum((value - mean[seed]) ** 2 for seed, value in update.items())
        distances.append(math.sqrt(elements * (own + others)))
    return distances


def _chance(run_seed: int, round_: int, worker: str) -> float:
    """Uniform in [-1, 1) and a pure function of its arguments: the paper's control."""
    prefix = b"fedmezo rate v1\0" + run_seed.to_bytes(8, "little") + round_.to_bytes(8, "little")
    bits = hashlib.sha256(prefix + worker.encode()).digest()[:8]
    return int.from_bytes(bits, "little") / 2**63 - 1.0
