"""Schedules and personal learning rates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.errors import ConfigError
from fedmezo_core.machines.rates import own_rates, schedule_factor, update_distances
from fedmezo_core.records import Committed
from tests.core.machines.rounds_driver import RoundsDriver, config_of, parse

SIGNALS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), max_size=6)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(2, 300),
    st.data(),
    st.floats(0, 1),
)
def test_a_schedule_goes_up_then_down_and_never_to_zero(
    schedule: str, rounds: int, data: st.DataObject, final: float
) -> None:
    warmup = data.draw(st.integers(0, rounds - 1))
    config = config_of(
        schedule=schedule, rounds=rounds, warmup_rounds=warmup, final_rate_fraction=final
    )
    factors = [schedule_factor(config, round_) for round_ in range(1, rounds + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup] == 1, "the first round after the warm-up has the whole rate"
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if schedule == "constant":
        assert set(factors[warmup:]) == {1.0}
    else:
        assert factors[-1] >= final * (1 - 1e-12)


def test_a_linear_schedule_loses_the_same_in_every_round() -> None:
    config = config_of(schedule="linear", rounds=4)
    assert [schedule_factor(config, r) for r in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


@given(SIGNALS)
def test_a_workers_own_rate_is_the_papers_formula(signals: dict[str, float]) -> None:
    config = config_of(personal_rate="update_distance", personal_rate_amplitude=0.2)
    rates = own_rates(config, 1, "abcxyz", signals)
    assert all(0.3 - 1e-12 <= rate <= 0.7 + 1e-12 for rate in rates)
    mean = math.fsum(signals.values()) / len(signals) if signals else 0.0
    widest = max((abs(value - mean) for value in signals.values()), default=0.0)
    for worker, rate in zip("abcxyz", rates, strict=True):
        if worker in signals and widest > 0:
            assert rate == pytest.approx(0.5 + 0.2 * (signals[worker] - mean) / widest)
        else:
            assert rate == 0.5, "nothing is known of it"


def test_one_end_of_the_signals_gets_the_whole_amplitude() -> None:
    config = config_of(personal_rate="last_loss", report_losses=True)
    rates = own_rates(config, 9, "abc", {"a": 1.0, "b": 2.0, "c": 6.0})
    assert rates == pytest.approx((0.5 - 0.25 * 2 / 3, 0.5 - 0.25 / 3, 0.75))


def test_random_rates_differ_and_repeat() -> None:
    config = config_of(personal_rate="random")
    rates = own_rates(config, 3, ("a", "b", "c"), {})
    assert len(set(rates)) == 3
    assert rates == own_rates(config, 3, ("a", "b", "c"), {})
    assert rates != own_rates(config, 4, ("a", "b", "c"), {})
    assert all(0.25 <= rate <= 0.75 for rate in rates)


def test_distances_of_independent_and_of_shared_directions() -> None:
    # Orthogonal unit vectors: (1, 0) and (0, 1) are each sqrt(1/2) from their mean (1/2, 1/2).
    apart = update_distances([{1: 1.0}, {2: 1.0}], [0.5, 0.5], 1)
    assert apart == pytest.approx([math.sqrt(0.5)] * 2)
    # Along one direction: 1 and 3 are 1 from 2, over sqrt(d) elements.
    assert update_distances([{7: 1.0}, {7: 3.0}], [0.5, 0.5], 4) == pytest.approx([2.0, 2.0])
    assert update_distances([{7: 2.0}, {7: 2.0}], [0.5, 0.5], 9) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"personal_rate": "last_loss"}, "set report_losses"),
        ({"personal_rate": "random", "personal_rate_amplitude": 0.5}, "below learning_rate"),
        ({"weight_decay": 2.0}, "leaves nothing of the weights"),
        ({"warmup_rounds": 3}, "must be below rounds"),
        (
            {"train": ["a"], "lora": {"rank": 1, "alpha": 1, "target_modules": ["a"]}},
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(**values)


def _rates(run: RoundsDriver) -> list[float]:
    assert run.machine.state.open is not None
    return run.machine.state.open.rates


def test_each_worker_is_told_its_own_rate_and_committed_with_it() -> None:
    run = RoundsDriver(workers_min=3, personal_rate="update_distance", rounds=4, local_steps=1)
    run.ready("a", "b", "c")
    assert _rates(run) == [0.5, 0.5, 0.5]
    for worker, grad in (("a", 1.0), ("b", 1.0), ("c", 4.0)):
        run.answer(worker, grads=(grad,))
    assert run.machine.round == 1
    own = _rates(run)
    assert own[0] == own[1] < 0.5 < own[2] == pytest.approx(0.75)
    run.restart()
    run.ready("a", "b", "c")
    assert _rates(run) == own, "journaled when the round was opened"
    for worker in "abc":
        ready = run.answer(worker, grads=(1.0,))
    commit = next(r for r in ready.records if isinstance(r, Committed))
    assert [r.coefficients[0] for r in commit.seed_ranges] == pytest.approx(
        [-rate / 3 for rate in own]
    )


def test_the_schedule_reaches_rates_and_eps() -> None:
    run = RoundsDriver(schedule="linear", rounds=2, eps=1e-3, eps_follows_rate=True)
    first = run.ready("a").messages[0].work  # type: ignore[union-attr]
    assert (first.learning_rate, first.eps) == (0.5, 1e-3)
    second = run.answer("a").messages[-1].work  # type: ignore[union-attr]
    assert (second.learning_rate, second.eps) == (0.25, 5e-4)


def test_losses_of_five_rounds_are_remembered() -> None:
    run = RoundsDriver(
        workers_min=2, personal_rate="mean_loss", report_losses=True, rounds=9, pause_rounds=0
    )
    run.ready("a", "b")
    for number in range(6):
        run.answer("a", loss=float(number))
        run.answer("b", loss=1.0)
    assert run.machine.state.signals() == {"a": 3.0, "b": 1.0}
