"""The accountant says what is published, and the noise that it chooses keeps the budget."""

from __future__ import annotations

import pytest

from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.privacy.accounting import NoisyStep, epsilon_of, noise_multiplier_for


def test_nothing_costs_nothing() -> None:
    assert epsilon_of({}, 1e-5) == 0.0
    assert epsilon_of({NoisyStep(1.0, 0.1): 0}, 1e-5) == 0.0


@pytest.mark.parametrize(
    ("noise", "rows", "batch", "steps", "low", "high"),
    [
        # Abadi et al. 2016, section 5 (figure 2): q = 0.01, sigma = 4, 10,000 steps, delta = 1e-5:
        # the moments accountant gives 1.26. A tighter account gives less, and not half of it.
        (4.0, 100, 1, 10_000, 0.63, 1.26),
        # Values of TensorFlow Privacy's RDP accountant, which bound a tight account from above.
        (1.0, 10_000, 64, 10_000, 3.2, 4.04),
        (0.7, 10_000, 64, 10_000, 7.5, 9.48),
        (20.0, 1_000, 1_000, 200, 2.7, 3.19),
    ],
)
def test_published_values(
    noise: float, rows: int, batch: int, steps: int, low: float, high: float
) -> None:
    assert low < epsilon_of({NoisyStep(noise, batch / rows): steps}, 1e-5) < high


def test_the_chosen_noise_is_enough_and_little_more() -> None:
    spent = {NoisyStep(1.5, 0.02): 40}
    noise = noise_multiplier_for(4.0, 1e-5, 0.05, 100, spent)
    assert epsilon_of({**spent, NoisyStep(noise, 0.05): 100}, 1e-5) <= 4.0
    assert epsilon_of({**spent, NoisyStep(noise * 0.98, 0.05): 100}, 1e-5) > 4.0


def test_a_spent_budget_has_no_noise_that_is_enough() -> None:
    with pytest.raises(ConfigError, match="is spent; raise privacy_epsilon"):
        noise_multiplier_for(0.5, 1e-5, 0.05, 10, {NoisyStep(1.0, 0.05): 200})
