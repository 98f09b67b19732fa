"""Answers much larger than is usual are scaled down at the commit; all others keep every bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import config_from_pb, config_to_pb
from fedmezo_core.machines.aggregate import CLIP_ROUNDS, clipped, size_of
from fedmezo_core.records import Committed
from tests.core.machines.rounds_driver import RoundsDriver, config_of, parse
from tests.core.machines.test_buffered import Buffered

CLIP: dict[str, Any] = {"clip_median_factor": 10.0, "projected_grad_abs_max": 1e4, "rounds": 30}
WAYS: dict[str, dict[str, Any]] = {
    "own seeds": {},
    "shared seeds": {"seed_policy": "shared"},
    "pool": {"seed_policy": "pool", "pool_size": 8, "pool_sampling": "weighted"},
    "own rates": {"personal_rate": "update_distance"},
    "normalized": {"normalized_step": True},
}

answers = st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 3), min_size=1, max_size=12)
# No size of a binary32 projected gradient lies between 0 and the smallest of these.
sizes = st.lists(st.just(0.0) | st.floats(2.0**-149, 1e4), max_size=CLIP_ROUNDS)


@given(answers, sizes, st.sampled_from([1.0, 2.0, 10.0]), st.randoms())
def test_no_answer_is_much_larger_than_is_usual(
    given_: list[tuple[float, ...]], earlier: list[float], factor: float, shuffler: Any
) -> None:
    config = config_of(clip_median_factor=factor)
    taken, own = clipped(given_, earlier, config)
    known = sorted(size for size in [*map(size_of, given_), *earlier] if size)
    usual = known[(len(known) - 1) // 2] if known else 0.0
    for before, after in zip(given_, taken, strict=True):
        assert size_of(after) <= factor * usual * (1 + 4 / 3) * (1 + 1e-12)
        if size_of(before) <= factor * usual * (1 + 4 / 3):
            assert after is before
        else:
            shrink = size_of(after) / size_of(before)
            assert after == pytest.approx([shrink * grad for grad in before])
    # The order of the answers and of the rounds changes no bit.
    order = list(range(len(given_)))
    shuffler.shuffle(order)
    again, same = clipped([given_[k] for k in order], earlier[::-1], config)
    assert (again, same) == ([taken[k] for k in order], own)


def test_half_of_the_answers_and_more_decide_what_is_usual() -> None:
    honest, huge, config = (3.0, -4.0), (1e4, 1e4), config_of(clip_median_factor=10.0)
    size = size_of(honest)
    taken, own = clipped([honest, huge], [], config)
    assert taken[0] is honest
    assert size_of(taken[1]) == pytest.approx(30 * size)
    assert own == size
    # One alone decides for itself, unless there were rounds before.
    assert clipped([huge], [], config)[0] == [huge]
    assert size_of(clipped([huge], [size], config)[0][0]) == pytest.approx(30 * size)
    # Zeros say nothing about what is usual.
    zero = (0.0, 0.0)
    assert clipped([zero, zero, zero, honest], [], config) == ([zero, zero, zero, honest], size)
    assert clipped([zero], [], config) == ([zero], 0.0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_one_huge_answer_moves_the_weights_little_and_names_its_worker(way: dict[str, Any]) -> None:
    def largest(huge: float, factor: float) -> tuple[float, RoundsDriver]:
        run = RoundsDriver(workers_min=4, quorum=4, **CLIP | way | {"clip_median_factor": factor})
        run.ready("a", "b", "c", "d")
        for worker in "abc":
            run.answer(worker, grads=(3.0, -4.0))
        ready = run.answer("d", grads=(huge, -huge))
        [commit] = [record for record in ready.records if isinstance(record, Committed)]
        assert bool(ready.warnings) == (huge > 1000 and factor > 0)
        return max(abs(c) for r in commit.seed_ranges for c in r.coefficients), run

    without, _ = largest(1e4, 0.0)
    bound, run = largest(1e4, 10.0)
    usual, _ = largest(4.0, 10.0)
    assert bound <= 31 * usual
    if not way.get("normalized_step"):
        assert without > 2000 * usual / 4
    assert "its answer to round 1 was far larger than usual" in (
        run.machine.roster.workers["d"].complaint
    )
    assert not run.machine.roster.workers["a"].complaint
    # Later rounds know what was usual, also after a restart (which the driver compares).
    run.restart()
    assert list(run.machine.state.usual_sizes) == [size_of((3.0, -4.0))]


def test_a_run_of_one_worker_is_protected_by_its_earlier_rounds() -> None:
    run = RoundsDriver(**CLIP)
    run.ready("a")
    for _ in range(CLIP_ROUNDS + 2):
        run.answer("a", grads=(3.0, -4.0))
    assert len(run.machine.state.usual_sizes) == CLIP_ROUNDS
    ready = run.answer("a", grads=(1e4, 0.0))
    assert ready.warnings == (
        "round 11: answers far larger than usual were scaled down: a from 7071 to 106.1",
    )
    [commit] = [record for record in ready.records if isinstance(record, Committed)]
    assert commit.seed_ranges[0].coefficients[0] == pytest.approx(-0.5 * 150)
    # What has really grown is usual after half as many rounds.
    for _ in range(CLIP_ROUNDS):
        ready = run.answer("a", grads=(3000.0, -4000.0))
    assert ready.warnings == ()


def test_answers_to_earlier_rounds_are_clipped_too() -> None:
    run = Buffered(**CLIP | {"workers_min": 2})
    run.ready("fast", "late")
    late = run.tickets["late"]
    for _ in range(3):
        run.give("fast", grads=(3.0, -4.0))
    ready = run.give("late", late, grads=(1e4, 1e4))
    assert [answer.round for answer in run.commits[-1].answers] == [1, 2]
    assert "late from 1e+04 to 106.1" in ready.warnings[0]


def test_honest_answers_keep_every_bit() -> None:
    """Normal projected gradients, of rounds whose sizes differ by a factor of 3."""
    import random

    rng = random.Random(1)
    for count in (1, 2, 10, 28):
        for _ in range(300):
            given_ = [
                tuple(rng.gauss(0, 20 * 3 ** rng.uniform(-0.5, 0.5)) for _ in range(count))
                for _ in range(4)
            ]
            taken, _ = clipped(given_, [20.0] * CLIP_ROUNDS, config_of(clip_median_factor=10.0))
            assert all(a is b for a, b in zip(given_, taken, strict=True))


def test_a_new_run_clips_and_an_older_contract_does_not() -> None:
    new, old = parse(), config_of()
    clips = [(c.clip_median_factor, c.clip_spread, c.clip_drop_factor) for c in (new, old)]
    assert clips == [(1.0, 1.0, 5.0), (0.0, 4.0, 0.0)]
    as_before = {"clip_median_factor": 0, "clip_spread": 4, "clip_drop_factor": 0}
    assert parse(**as_before, rate_directions=0) == old
    kept = {field.name for field, _ in config_to_pb(old).ListFields()}
    assert not kept & as_before.keys()
    assert config_from_pb(config_to_pb(new)) == new
    assert parse(rate_directions=0).recipe == old.recipe, "only who commits needs to know"
    with pytest.raises(ValueError, match="must be 1 or more, or 0"):
        RunConfig.model_validate(old.model_dump() | {"clip_median_factor": 0.5})
    with pytest.raises(ValueError, match="clip_median_factor"):
        RunConfig.model_validate(old.model_dump() | {"clip_median_factor": math.inf})
    with pytest.raises(ValueError, match=r"clip_drop_factor = 0\.5 would drop answers"):
        RunConfig.model_validate(old.model_dump() | {"clip_drop_factor": 0.5})


def test_a_new_run_leaves_out_answers_that_are_huge_and_tells_of_no_others() -> None:
    run = RoundsDriver(
        workers_min=5,
        quorum=5,
        rounds=9,
        clip_median_factor=1.0,
        clip_spread=0.0,
        clip_drop_factor=5.0,
        projected_grad_abs_max=1e4,
    )
    run.ready(*"abcde")
    for worker, grads in zip(
        "abcd", [(1.0, -1.0), (1.0, 1.0), (2.0, -2.0), (4.0, 4.0)], strict=True
    ):
        run.answer(worker, grads=grads)
    ready = run.answer("e", grads=(-51.0, 51.0))
    [commit] = [record for record in ready.records if isinstance(record, Committed)]
    sizes = [size_of(r.coefficients) for r in commit.seed_ranges]
    # Usual is 2. One of twice that is scaled down to it, one of 25 times that counts as zeros.
    assert sizes == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.0])
    assert ready.warnings == (
        "round 1: answers far larger than usual were scaled down: e from 51 to 0",
    )
    assert not run.machine.roster.workers["d"].complaint
