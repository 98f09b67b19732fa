"""Schedules and personal learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.errors import ConfigError
from fedmezo_core.machines.aggregate import Share, bits_of, coefficients_of
from fedmezo_core.machines.rates import own_rates, schedule_factor, update_distances
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Committed, RoundSlot
from tests.core.machines.rounds_driver import RoundsDriver, config_of, kinds, parse, refusal

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


# ---------------------------------------------------------------- steps that grow with directions


def step_of(
    grads: Sequence[Sequence[float]], rate: float = 0.5, losses: float | None = None, **values: Any
) -> list[tuple[float, ...]]:
    """Coefficients of a commit of answers with these projected gradients, seeds all different."""
    shares = [
        Share(tuple(range(100 * slot, 100 * slot + len(own))), tuple(own), rate, 1, losses)
        for slot, own in enumerate(grads)
    ]
    return coefficients_of(shares, config_of(**values))


def factor_of(found: list[tuple[float, ...]], alike: list[tuple[float, ...]]) -> float:
    """What all coefficients are multiplied by, within the roundings of binary32."""
    ratios = [a / b for a, b in zip(chain(*found), chain(*alike), strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-6)
    return ratios[0]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("answers", "probes"), [(1, 1), (4, 16), (5, 2), (40, 16), (4, 64)])
def test_a_step_grows_with_its_directions_until_it_promises_what_there_is_to_gain(
    answers: int, probes: int, normalized: bool
) -> None:
    random = Random(answers)
    same: dict[str, Any] = {"probes": probes, "local_steps": 1, "normalized_step": normalized}
    for size in (1e-4, 0.3, 50.0):
        grads = [[random.gauss(0, size) for _ in range(probes)] for _ in range(answers)]
        alike = step_of(grads, **same)
        pairs = zip(chain(*alike), chain(*grads), strict=True)
        gain = -sum(coefficient * grad for coefficient, grad in pairs)
        directions = answers * probes
        limit = 2 * math.log(2)
        exact = directions * (gain + limit) / (directions * gain + 64 * limit)
        factor = factor_of(step_of(grads, rate_directions=64, **same), alike)
        assert factor == pytest.approx(exact, rel=1e-5)
        assert min(1, directions / 64) <= factor * 1.00001
        assert factor <= max(1, min(directions / 64, (gain + limit) / gain)) * 1.00001
    quiet = [[0.0] * probes] * answers
    assert step_of(quiet, rate_directions=64, **same) == step_of(quiet, **same)


def test_a_round_whose_losses_are_known_may_gain_more_where_there_is_more_to_gain() -> None:
    grads = [[3.0, -4.0]] * 100
    same: dict[str, Any] = {"probes": 2, "local_steps": 1, "report_losses": True}
    alike = step_of(grads, **same)

    def factor(loss: float | None, **values: Any) -> float:
        longer = step_of(grads, losses=loss, rate_directions=64, **same, **values)
        return factor_of(longer, alike)

    assert factor(0.1) < factor(1.0) < factor(4.0)
    assert factor(None) == factor(math.log(2)) == factor(0.0) == factor(-3.0)
    score = {"verbalizers": {"a": "a", "b": "b"}, "objective": "m:f"}
    assert factor(4.0, task=score) == factor(1.0), "the zero of a score means nothing"
    text = {"kind": "instruction", "template": "{q}"}
    assert factor(None, task=text) == factor(1.0), "nobody knows what a guess at a text loses"
    classes = {"verbalizers": {name: name for name in "abcde"}}
    assert factor(None, task=classes) == factor(math.log(5))


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-30, 1.0, 1e4]),
    st.sampled_from([1, 2, 40, 200]),
)
def test_a_false_loss_moves_the_factor_at_most_between_1_and_that_of_directions_alone(
    loss: float, size: float, answers: int
) -> None:
    grads = [[size]] * answers
    same: dict[str, Any] = {"probes": 1, "local_steps": 1, "report_losses": True}
    alike = step_of(grads, **same)
    factor = factor_of(step_of(grads, losses=loss, rate_directions=64, **same), alike)
    assert min(1, answers / 64) <= factor * 1.00001
    assert factor <= max(1, answers / 64) * 1.00001


@pytest.mark.parametrize(
    ("policy", "directions"), [("per_worker", 6), ("shared", 2), ("pool", 4 / 2)]
)
def test_a_direction_counts_once_however_many_workers_measure_it(
    policy: str, directions: float
) -> None:
    """Three workers, two local steps of two probes; in the pool they drew four seeds."""
    drawn = {
        "per_worker": [(1, 2, 3, 4), (11, 12, 13, 14), (21, 22, 23, 24)],
        "shared": [(1, 2, 3, 4)] * 3,
        "pool": [(1, 1, 2, 3), (3, 2, 1, 1), (4, 4, 4, 4)],
    }[policy]
    shares = [Share(seeds, (1e-9, -1e-9, 1e-9, 1e-9), 0.5) for seeds in drawn]
    same: dict[str, Any] = {"seed_policy": policy, "probes": 2}
    alike = coefficients_of(shares, config_of(**same))
    factor = factor_of(coefficients_of(shares, config_of(rate_directions=64, **same)), alike)
    assert factor == pytest.approx(directions / 64, rel=1e-5)


@pytest.mark.parametrize(("directions", "rate"), [(64, 0.5 / 32), (2, 0.5), (1, 0.5), (0, 0.5)])
def test_weight_decay_goes_with_a_shorter_step_and_not_with_a_longer_one(
    directions: int, rate: float
) -> None:
    run = RoundsDriver(rate_directions=directions, weight_decay=0.1, local_steps=1, probes=2)
    run.ready("a")
    run.answer("a", grads=(1e-9, -1e-9))
    [commit] = [record for record in run.records if isinstance(record, Committed)]
    assert commit.decay == pytest.approx(1 - rate * 0.1, rel=1e-6)


@pytest.mark.parametrize("buffered", [{}, {"buffer_answers": 2, "cohort_size_max": 4}])
def test_an_auditor_with_the_answers_gets_the_bits_of_the_commits(buffered: dict[str, int]) -> None:
    run = RoundsDriver(
        rate_directions=8, workers_min=3, schedule="linear", report_losses=True, **buffered
    )
    run.ready("a", "b", "c")
    for worker in "abcabcabc":
        if assigned := run.machine.roster.assignments.get(worker):
            grads = (1.0 + ord(worker) % 3, -2.0)
            run.answer(worker, assigned.slot, round_=assigned.round, grads=grads, loss=0.5)
    commits = [record for record in run.records if isinstance(record, Committed)]
    state, count = RunState(), 0
    for record in run.records:
        if isinstance(record, Committed):
            answers = state.counted()
            if buffered:
                answers = [a for a in answers if RoundSlot(a.round, a.slot) in record.answers]
            found = coefficients_of(state.shares(answers), run.config)
            assert [bits_of(one) for one in found] == [
                bits_of(seed_range.coefficients) for seed_range in record.seed_ranges
            ]
            count += 1
        state.apply(record)
    assert count == len(commits) == 3


@pytest.mark.parametrize(
    ("normalized", "loss", "bits"),
    [
        (True, None, ("ac4e33be9113ef3cfe3a8dbea94e3cbc", "91136f3e91136fbdfe3a8dbda94ebcbd")),
        (True, 0.25, ("a2e726be2d8ade3c317683be41482fbc", "2d8a5e3e2d8a5ebd317683bd4148afbd")),
        (False, None, ("7f855fbeaa03153d7f85dfbeaa0395bc", "aa03953eaa0395bd7f85dfbdaa0315be")),
        (False, 0.25, ("1d9850be13100b3d1d98d0be13108bbc", "13108b3e13108bbd1d98d0bd13100bbe")),
    ],
)
def test_the_bits_of_steps_that_grow(
    normalized: bool, loss: float | None, bits: tuple[str, str]
) -> None:
    """From a calculation apart from the product's; journals hold such bits, so they never change.

    Two answers of two local steps of two probes.
    """
    found = step_of(
        [(1.5, -0.25, 3.0, 0.125), (-2.0, 0.5, 0.75, 1.0)],
        losses=loss,
        probes=2,
        rate_directions=3,
        normalized_step=normalized,
        report_losses=True,
    )
    assert tuple(bits_of(one).hex() for one in found) == bits


def test_an_answer_whose_longer_step_would_overflow_is_refused() -> None:
    values = {"learning_rate": 1e9, "projected_grad_abs_max": 1e300, "cohort_size_max": 64}
    run = RoundsDriver(rate_directions=2, **values)
    run.ready("a")
    assert refusal(run.answer("a", grads=(1.0, 1e29))) == "ScalarError"
    assert "Committed" in kinds(run.answer("a", grads=(1.0, 1e27)))
