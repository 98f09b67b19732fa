"""From losses to a rate: on losses that a formula gives, so that the right answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import MeasurementError
from fedmezo_core.machines.aggregate import step_factor
from fedmezo_core.machines.rates import schedule_factor
from fedmezo_core.zo.probing.proposal import (
    BLIND_COST_SHARE_MAX,
    COST_SHARE_MAX,
    Proposal,
    Reading,
    directions_of,
    forwards_of,
    limited_values,
    propose,
    with_enough_probes,
)
from fedmezo_core.zo.probing.readings import Probe

LENGTHS = tuple(1e-3 * 4.0**power for power in range(-2, 6))
SLOPES = (0.9, -1.1, 1.0, -1.0)
"""Projected gradients of four directions; their root mean square is about 1."""


def config_of(**changes: Any) -> RunConfig:
    values = {
        "run_id": "probe",
        "model": "m",
        "rounds": 60,
        "local_steps": 1,
        "probes": 25,
        "estimator": "one_sided",
        "normalized_step": True,
        "learning_rate": 1e-6,
        "rate_directions": 0,
        "task": {"verbalizers": {"a": " a", "b": " b"}},
    }
    return parse_run(values | changes, "the test")


def readings_of(
    loss_at: Callable[[float, float], float],
    *,
    batches: Sequence[float] = (1.0, 1.0),
    lengths: Sequence[float] = LENGTHS,
) -> list[Reading]:
    """Readings of `loss_at(signed length, slope)`; `batches` are factors on the slopes."""
    return [
        Reading(
            number,
            length,
            tuple(loss_at(length, slope * factor) for slope in SLOPES),
            tuple(loss_at(-length, slope * factor) for slope in SLOPES),
        )
        for number, factor in enumerate(batches)
        for length in lengths
    ]


def curved(curvature: float, loss: float = 1.0) -> Callable[[float, float], float]:
    """A loss with a slope and a constant curvature."""
    return lambda length, slope: loss + slope * length + curvature * length * length


def rate_of(found: Proposal, rounds: int, directions: int) -> float:
    """The rate of a constant schedule whose walk is as long as the proposed one."""
    return found.walk_length * math.sqrt(directions / rounds)


def test_the_walk_may_cost_a_part_of_the_loss_if_there_is_much_to_gain() -> None:
    found = propose(readings_of(curved(0.5)), config_of(), workers=4)
    assert found.walk_cost == pytest.approx(COST_SHARE_MAX, rel=0.01)
    assert found.walk_length == pytest.approx(math.sqrt(COST_SHARE_MAX / 0.5), rel=0.01)
    assert found.normalized_rate == pytest.approx(rate_of(found, 60, 100))
    assert found.plain_rate == pytest.approx(1.4 * found.normalized_rate / found.grad)
    assert found.signal_share == pytest.approx((1 + 0.25) / 2), (
        "4 directions, and as many usual ones"
    )


def test_four_times_the_curvature_needs_half_the_rate_and_so_do_four_times_the_rounds() -> None:
    readings = readings_of(curved(2.0))
    once = propose(readings, config_of(), 4).normalized_rate
    assert propose(readings_of(curved(8.0)), config_of(), 4).normalized_rate == pytest.approx(
        once / 2, rel=0.02
    )
    assert propose(readings, config_of(rounds=240), 4).normalized_rate == pytest.approx(once / 2)
    more_workers = propose(readings, config_of(), 8).normalized_rate
    assert more_workers == pytest.approx(math.sqrt(2) * once)
    linear = propose(readings, config_of(schedule="linear"), 4).normalized_rate
    assert linear == pytest.approx(once * math.sqrt(3), rel=0.05)
    shared = propose(readings, config_of(seed_policy="shared"), 4).normalized_rate
    assert shared == pytest.approx(once / 2)


def test_batches_that_have_little_in_common_allow_a_shorter_walk_and_ask_for_more_rounds() -> None:
    agree = propose(readings_of(curved(8.0)), config_of(), 4)
    differ = propose(readings_of(curved(8.0), batches=(1.0, -0.9, 1.0, -0.8)), config_of(), 4)
    assert differ.signal_share == pytest.approx(0.25 / 2)
    assert differ.walk_length < 0.8 * agree.walk_length
    assert differ.rounds_enough > 5 * agree.rounds_enough


@pytest.mark.parametrize(
    "changes", [{}, {"seed_policy": "shared"}, {"probes": 2}, {"report_losses": True}]
)
@pytest.mark.parametrize("workers", [1, 4, 40])
def test_a_proposed_rate_makes_the_step_that_was_found_whatever_its_directions(
    workers: int, changes: dict[str, Any]
) -> None:
    readings = readings_of(curved(2.0, loss=3.0))
    plain = propose(readings, config_of(**changes), workers)
    config = config_of(rate_directions=64, **changes)
    found = propose(readings, config, workers)
    directions = directions_of(config, workers)
    loss = 3.0 if config.report_losses else math.log(2)
    for ours, wanted, gain_per_rate in (
        (found.normalized_rate, plain.normalized_rate, found.grad),
        (found.plain_rate, plain.plain_rate, found.grad**2),
    ):
        factor = step_factor(config, directions, ours * gain_per_rate, loss)
        assert ours * factor == pytest.approx(wanted)
        assert (ours < wanted) is (directions > 64)
    assert (found.walk_length, found.rounds_enough) == (plain.walk_length, plain.rounds_enough)


def test_no_step_gains_more_than_a_part_of_the_loss_by_its_slope() -> None:
    one = config_of(rounds=1, learning_rate=1e-6)
    found = propose(readings_of(curved(1e-3)), one, workers=40)
    assert found.normalized_rate * found.grad * found.signal_share == pytest.approx(0.4, rel=0.01)


def test_eps_stays_where_neighbouring_lengths_agree() -> None:
    def rounded(length: float, slope: float) -> float:
        return 1.0 + slope * length + 0.5 * length**2 + (3e-5 if length > 0 else 0.0)

    exact = propose(readings_of(curved(0.5)), config_of(), 4)
    assert exact.eps == pytest.approx(1e-3)
    # An error of the losses is a large part of a short difference, so eps moves out of it.
    noisy = propose(readings_of(rounded), config_of(estimator="two_sided", eps=2.5e-4), 4)
    assert noisy.eps >= 1e-3
    # Curvature biases one-sided differences only, so eps moves below it.
    config = config_of(eps=0.25)
    assert propose(readings_of(curved(2.0)), config, 4).eps < 0.13
    two_sided = config_of(eps=0.25, estimator="two_sided")
    assert propose(readings_of(curved(2.0)), two_sided, 4).eps > 0.2


def test_a_length_at_which_losses_diverge_ends_what_is_allowed() -> None:
    def diverging(length: float, slope: float) -> float:
        return math.inf if abs(length) > 0.1 else 1.0 + slope * length + 1e-1 * length**2

    found = propose(readings_of(diverging), config_of(), 4)
    assert 0.05 < found.walk_length <= 0.1
    assert math.isinf(found.lengths[-1].cost)


@pytest.mark.parametrize("end", [3e-4, 3e-3, 2e-2, 0.1, 1.0])
def test_a_probe_measures_no_length_twice_and_finds_one_below_those_that_diverge(
    end: float,
) -> None:
    def measure(_batch: Any, _pairs: Any, seeds: Sequence[int], length: float) -> list[Any]:
        if length > end:
            raise MeasurementError("NaN or infinity")
        loss_at, slopes = curved(0.5), SLOPES[: len(seeds)]
        return [
            SimpleNamespace(loss_plus=loss_at(length, slope), loss_other=loss_at(-length, slope))
            for slope in slopes
        ]

    estimator: Any = SimpleNamespace(measure=measure)
    number_alone: Any = int
    probe = Probe(estimator, number_alone, config_of(), 4, passes_max=160)
    readings = probe.readings()
    assert len({(one.batch, one.length) for one in readings}) == len(readings)
    found = propose(readings, config_of(), 4)
    assert found.eps <= end
    assert end / 8 <= found.walk_length <= end
    assert probe.passes <= 160


def test_a_loss_that_falls_along_random_directions_is_far_from_its_base_too() -> None:
    rising, falling = (propose(readings_of(curved(c)), config_of(), 4) for c in (0.5, -0.5))
    assert falling.walk_length == pytest.approx(rising.walk_length)


@pytest.mark.parametrize(
    ("loss_at", "sentence"),
    [
        (lambda _length, _slope: 1.0, "No direction changes the loss"),
        (lambda _length, _slope: math.nan, "NaN or infinite .* away from the base weights"),
        (
            lambda length, slope: 1.0 + 1e-2 * math.sin(slope * 1e9 * length),
            "rounding drowns the differences",
        ),
    ],
)
def test_losses_that_say_nothing_are_refused(
    loss_at: Callable[[float, float], float], sentence: str
) -> None:
    with pytest.raises(MeasurementError, match=sentence):
        propose(readings_of(loss_at), config_of(), 4)


def test_a_rate_is_shortened_where_readings_show_that_it_is_too_long() -> None:
    readings = readings_of(curved(0.5))
    found = propose(readings, config_of(), 4).values(normalized=True)
    assert limited_values(readings, config_of(learning_rate=100.0), 4) == found
    short = limited_values(readings, config_of(learning_rate=1e-6), 4)
    assert short == found | {"learning_rate": 1e-6}


def test_a_rate_is_shortened_by_its_cost_alone_where_rounding_drowns_the_slopes() -> None:
    def drowned(length: float, slope: float) -> float:
        return curved(0.5)(length, 0.0) + 1e-2 * math.sin(slope * 1e9 * length)

    readings, config = readings_of(drowned), config_of(learning_rate=100.0)
    found = limited_values(readings, config, 4)
    own = rf"rounding drowns .* at most {found['learning_rate']:.2g}: "
    with pytest.raises(MeasurementError, match=own):
        propose(readings, config, 4)
    assert found.keys() == {"learning_rate"}
    steps = sum(schedule_factor(config, t) ** 2 for t in range(1, 61))
    walk = found["learning_rate"] * math.sqrt(steps / 100)
    assert curved(0.5)(walk, 0.0) == pytest.approx(1 + BLIND_COST_SHARE_MAX, abs=0.002)
    plain = config_of(learning_rate=100.0, normalized_step=False)
    with pytest.raises(MeasurementError, match="rounding drowns"):
        limited_values(readings, plain, 4)
    with pytest.raises(MeasurementError, match="No direction changes the loss"):
        limited_values(readings_of(lambda _length, _slope: 1.0), config, 4)


def test_one_sided_runs_with_few_probes_get_more_of_them_for_the_same_passes() -> None:
    config = config_of(probes=1, rounds=340)
    better = with_enough_probes(config)
    assert (better.probes, better.rounds) == (16, 40)
    assert forwards_of(better, 4) == forwards_of(config, 4)
    for kept in (config_of(probes=1, estimator="two_sided"), config_of(probes=8)):
        assert with_enough_probes(kept) is kept
