"""Seed policies: whose directions an assignment measures along, and what a pool adds up to."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.events import Assign, Assigned, Ready
from fedmezo_core.machines import seeds as seeds_module
from fedmezo_core.machines.aggregate import to_binary32
from fedmezo_core.machines.seeds import Pool, seed_ranges_of, seeds_of
from fedmezo_core.records import Committed, SeedRange, first_seed_of
from fedmezo_core.wire.messages import assign_to_pb, assigned_from_pb
from tests.core.machines.rounds_driver import RoundsDriver, config_of


def _assigned(ready: Ready) -> list[Assign]:
    return [message for message in ready.messages if isinstance(message, Assign)]


def _commit(ready: Ready) -> Committed:
    [commit] = [record for record in ready.records if isinstance(record, Committed)]
    return commit


def test_each_worker_has_its_own_directions_or_all_share_them() -> None:
    own, shared = config_of(), config_of(seed_policy="shared")
    first = first_seed_of(1, 5, 0)
    assert seeds_of(own, 5, 0, None) == (first, first + 1)
    assert not set(seeds_of(own, 5, 0, None)) & set(seeds_of(own, 5, 1, None))
    assert seeds_of(shared, 5, 0, None) == seeds_of(shared, 5, 1, None)
    assert not set(seeds_of(shared, 5, 0, None)) & set(seeds_of(shared, 6, 0, None))


def test_shared_directions_are_committed_once_with_their_mean() -> None:
    run = RoundsDriver(workers_min=2, seed_policy="shared")
    first, second = _assigned(run.ready("a", "b"))
    assert first.work.seeds == second.work.seeds
    run.answer("a", grads=(1.0, -2.0))
    commit = _commit(run.answer("b", grads=(3.0, 2.0)))
    assert commit.seed_ranges == (SeedRange(first.work.seeds[0], (-1.0, 0.0)),)


@given(st.integers(1, 400), st.sampled_from(["uniform", "weighted"]), st.integers(1, 2**32))
def test_a_pool_is_drawn_from_alike_by_everyone(size: int, sampling: str, seed: int) -> None:
    config = config_of(
        seed_policy="pool", pool_size=size, pool_sampling=sampling, local_steps=50, seed=seed
    )
    pool = Pool.of(config)
    drawn = seeds_of(config, 3, 1, pool)
    assert drawn == seeds_of(config, 3, 1, Pool.of(config))
    assert len(drawn) == 50
    assert all(pool.holds(SeedRange(s, (0.0,))) for s in drawn)
    assert size == 1 or drawn != seeds_of(config, 4, 1, pool)


def test_a_weighted_pool_prefers_seeds_with_large_projected_gradients() -> None:
    config = config_of(seed_policy="pool", pool_size=2, pool_sampling="weighted", local_steps=4096)
    pool = Pool.of(config)
    first = pool.first_seed
    pool.measured((first, first + 1), (0.5, -3.0))
    counts = Counter(seeds_of(config, 1, 0, pool))
    # softmax of (0, 1).
    share = counts[first + 1] / 4096
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.03)


@given(st.floats(0, 1))
def test_the_portable_exponential(x: float) -> None:
    assert seeds_module._exp(x) == pytest.approx(math.exp(x), rel=1e-12)


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-1, 1, width=32)), max_size=30))
def test_runs_hold_each_pair_in_order(pairs: list[tuple[int, float]]) -> None:
    ascending = sorted(dict(pairs).items())
    runs = seed_ranges_of(ascending)
    back = [(r.first_seed + k, c) for r in runs for k, c in enumerate(r.coefficients)]
    assert back == ascending
    assert len(runs) == sum(
        1
        for place, (seed, _) in enumerate(ascending)
        if not place or seed != ascending[place - 1][0] + 1
    )


def test_a_pools_commit_from_the_base_holds_everything_before_it() -> None:
    run = RoundsDriver(
        seed_policy="pool",
        pool_size=5,
        rebase_every_rounds=3,
        rounds=7,
        local_steps=4,
        weight_decay=0.01,
    )
    run.ready("a")
    commits = [_commit(run.answer("a", grads=(1.0, -2.0, 3.0, 0.5))) for _ in range(7)]
    assert [commit.round for commit in commits if commit.from_base] == [3, 6]
    sums, decay = [0.0] * 5, 1.0
    pool = Pool.of(run.config)
    for commit in commits[:2]:
        sums = [commit.decay * value for value in sums]
        decay *= commit.decay
        for pair_run in commit.seed_ranges:
            for number, value in enumerate(pair_run.coefficients):
                sums[pair_run.first_seed - pool.first_seed + number] += value
    [whole] = commits[2].seed_ranges
    assert whole.first_seed == pool.first_seed
    assert len(whole.coefficients) == 5
    assert commits[2].decay == pytest.approx(decay * commits[0].decay, rel=1e-6)
    # Round 3's own part is what the sums lack.
    own = sum(whole.coefficients) - sum(sums) * commits[0].decay
    assert own == pytest.approx(-run.config.learning_rate * 2.5, rel=1e-3)
    assert run.machine.state.pool is not None
    # A party that begins there knows all that the others know.
    late = Pool.of(run.config)
    for commit in commits[5:]:
        late.commit(commit)
    assert late.coefficients == run.machine.state.pool.coefficients
    assert late.decay == run.machine.state.pool.decay


@pytest.mark.parametrize("policy", ["per_worker", "shared", "pool"])
def test_an_assignment_travels_whole(policy: str) -> None:
    run = RoundsDriver(seed_policy=policy, pool_size=9, schedule="linear", local_steps=30)
    run.ready("a")
    [assign] = _assigned(run.answer("a", grads=tuple([1.0] * 30)))
    message = assign_to_pb(assign, run.config)
    arrived = Assigned(assign.ticket, assign.work, assign.deadline_ms)
    assert assigned_from_pb(message.assign, run.config) == arrived
    assert message.ByteSize() <= (90 if policy == "pool" else 50)


def test_a_pools_coefficients_are_binary32() -> None:
    run = RoundsDriver(seed_policy="pool", pool_size=2, rebase_every_rounds=2)
    run.ready("a")
    run.answer("a", grads=(0.1, 0.7))
    commit = _commit(run.answer("a", grads=(0.3, 0.9)))
    assert commit.from_base
    assert all(to_binary32(value) == value for value in commit.seed_ranges[0].coefficients)
