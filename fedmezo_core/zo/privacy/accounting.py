"""What a number of noisy steps costs in privacy, by `dp-accounting`.

The accountant composes privacy loss distributions (Doroshenko et al. 2022) of the Gaussian
mechanism on Poisson samples. Neighbouring data sets differ by one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmezo_core.errors import ConfigError

NOISE_MULTIPLIER_MAX = 1e4
"""Largest noise that is looked for; it leaves nothing to learn from."""
PRECISION = 0.005
"""To which a noise multiplier is looked for, as a part of it."""
LOSS_INTERVAL = 1e-3
"""Privacy losses are rounded up to multiples of this. A tenth of it takes ten times as long, and
makes epsilon 0.03 % smaller after 10,000 steps."""


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """What a worker's rows may give away, over all runs that share a ledger."""

    epsilon: float
    """Bound of the privacy loss, except with a chance of `delta`."""
    delta: float
    """Above 0, below 1 / the number of rows."""
    clip: float
    """Bound of the norm of what one row says in one step, in the unit of a projected gradient."""
    ledger: Path
    """File of the account."""


@dataclass(frozen=True, slots=True)
class NoisyStep:
    """How one local step was made noisy."""

    noise_multiplier: float
    """Standard deviation of the noise over the clip."""
    sampling_probability: float
    """With which each row takes part, 0 to 1."""


def epsilon_of(steps: Mapping[NoisyStep, int], delta: float) -> float:
    """The epsilon that so many steps of each kind cost together at `delta`.

    Raises `ConfigError` if `dp-accounting` is not installed.
    """
    if not any(steps.values()):
        return 0.0
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    except ImportError:
        raise ConfigError(
            "Differential privacy needs the package dp-accounting; install fedmezo[privacy]."
        ) from None
    accountant = PLDAccountant(value_discretization_interval=LOSS_INTERVAL)
    for step, count in steps.items():
        noise = dp_event.GaussianDpEvent(step.noise_multiplier)
        event = dp_event.PoissonSampledDpEvent(step.sampling_probability, noise)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sampling_probability: float,
    step_count: int,
    spent: Mapping[NoisyStep, int],
) -> float:
    """The least noise multiplier, to `PRECISION`, with which `step_count` more steps fit.

    Raises `ConfigError` if no noise is enough.
    """

    def fits(noise_multiplier: float) -> bool:
        step = NoisyStep(noise_multiplier, sampling_probability)
        total = {**spent, step: spent.get(step, 0) + step_count}
        return epsilon_of(total, delta) <= epsilon

    already = epsilon_of(spent, delta)
    low, high = 0.0, 1.0
    while already < epsilon and high <= NOISE_MULTIPLIER_MAX and not fits(high):
        low, high = high, 2 * high
    if already >= epsilon or high > NOISE_MULTIPLIER_MAX:
        raise ConfigError(
            f"No noise lets {step_count} more steps fit into privacy_epsilon = {epsilon:g} at "
            f"privacy_delta = {delta:g}, because epsilon {already:.2f} is spent; raise "
            "privacy_epsilon, or take part in no more runs with this data."
        )
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
