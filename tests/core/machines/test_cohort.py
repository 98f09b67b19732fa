"""Who takes part, whose weights count, and what becomes of the scalars."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.errors import NumericError
from fedmezo_core.events import AnswerReceived, Assign, Ready, Ticket, WorkerReady
from fedmezo_core.machines.aggregate import (
    Share,
    bits_of,
    clip_of,
    coefficients_of,
    decay_of,
    normalized,
    to_binary32,
)
from fedmezo_core.machines.cohort import choose_cohort
from fedmezo_core.machines.divergence import agreed_digest
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Opened, Record, Scalars
from tests.core.machines.rounds_driver import config_of
from tests.integration.support.harness import config_of as run_config
from tests.integration.support.harness import genesis_of

names = st.lists(st.text("abcdef0123456789", min_size=1, max_size=6), unique=True, max_size=20)
binary32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(names, st.integers(0, 2**64 - 1), st.integers(1, 1000), st.integers(1, 20), st.randoms())
def test_a_cohort_is_sorted_bounded_and_blind_to_order(
    workers: list[str], seed: int, round_: int, size_max: int, shuffler: object
) -> None:
    cohort = choose_cohort(seed, round_, workers, size_max)
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(workers)
    assert len(cohort) == min(len(workers), size_max)
    assert cohort == choose_cohort(seed, round_, reversed(workers), size_max)


def test_partial_participation_is_even_and_changes_with_the_run() -> None:
    workers = [f"w{n}" for n in range(10)]
    rounds = range(1, 2001)
    counts = Counter(name for r in rounds for name in choose_cohort(7, r, workers, 3))
    # Each of 10 workers is in 3 of 10 cohorts: 600 of 2,000, standard deviation 20.5.
    assert all(abs(counts[name] - 600) < 5 * 20.5 for name in workers)
    assert any(choose_cohort(7, r, workers, 3) != choose_cohort(8, r, workers, 3) for r in rounds)


@pytest.mark.parametrize(
    ("votes", "replica", "agreed"),
    [
        ([], None, None),
        ([], 5, 5),
        ([1], None, 1),
        ([1], 1, 1),
        ([1], 2, 2),  # the replica decides
        ([1, 1], 2, 2),  # so does a majority against it
        ([1, 1, 1, 2, 2], 2, 2),  # three cannot expel two
        ([1, 2], None, None),
        ([1, 2], 2, 2),
        ([1, 2], 3, 3),
        ([1, 1, 2], None, 1),
        ([1, 1, 2, 2], None, None),
        ([1, 1, 2, 3], None, None),  # most, but not more than half
        ([1, 1, 2, 2], 1, 1),
        ([0, 0, 7], None, 0),
    ],
)
def test_the_agreed_digest(votes: list[int], replica: int | None, agreed: int | None) -> None:
    assert agreed_digest(votes, replica) == agreed
    assert agreed_digest(votes[::-1], replica) == agreed


def test_votes_that_differ_wait_for_a_replica_that_comes() -> None:
    assert agreed_digest([1, 1, 1, 2, 2], None, replica_comes=True) is None
    assert agreed_digest([1, 1, 1, 2, 2], 2, replica_comes=True) == 2
    assert agreed_digest([1, 1, 1], None, replica_comes=True) == 1


def alone_of(
    grads: Sequence[float], learning_rate: float, *, answers: int, probes: int
) -> tuple[float, ...]:
    """Coefficients of one of `answers` equal answers, with any number of gradients."""
    share = Share(tuple(range(len(grads))), tuple(grads), learning_rate)
    others = [Share((), (), learning_rate)] * (answers - 1)
    return coefficients_of([share, *others], config_of(probes=probes))[0]


@given(
    st.lists(binary32, min_size=1, max_size=8),
    st.floats(1e-12, 1.0),
    st.integers(1, 4096),
    st.integers(1, 1024),
)
def test_coefficients_are_within_the_three_roundings_of_the_exact_quotient(
    grads: list[float], learning_rate: float, answers: int, probes: int
) -> None:
    found = alone_of(grads, learning_rate, answers=answers, probes=probes)
    for grad, coefficient in zip(grads, found, strict=True):
        exact = -Fraction(learning_rate) * Fraction(grad) / (answers * probes)
        error = abs(Fraction(coefficient) - exact)
        assert error <= abs(exact) * Fraction(1, 2**23) + Fraction(1, 2**149)
        assert coefficient == to_binary32(coefficient)


def test_a_coefficient_is_the_negated_mean_step() -> None:
    assert alone_of((2.0, -4.0, 0.0), 0.5, answers=2, probes=1) == (-0.5, 1.0, -0.0)
    assert alone_of((2.0, -4.0), 0.5, answers=2, probes=2) == (-0.25, 0.5)
    assert math.copysign(1, alone_of((0.0,), 0.5, answers=1, probes=1)[0]) == -1


@given(st.lists(binary32, min_size=1, max_size=8), st.floats(1e-12, 1.0), st.integers(1, 4096))
def test_one_probe_gives_the_bits_of_journals_from_before_there_were_more(
    grads: list[float], learning_rate: float, answers: int
) -> None:
    before = tuple(to_binary32(-(learning_rate * grad) / answers) for grad in grads)
    found = alone_of(grads, learning_rate, answers=answers, probes=1)
    assert bits_of(found) == bits_of(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 3.4028236e38])
def test_what_is_no_binary32_is_refused(value: float) -> None:
    with pytest.raises(NumericError, match="not a finite binary32"):
        to_binary32(value)


def test_the_clip_allows_its_own_binary32_rounding() -> None:
    assert clip_of(0.1) == to_binary32(0.1) > 0.1
    assert clip_of(1e4) == 1e4
    assert clip_of(1e300) == 1e300


def test_bits_tell_zeros_apart() -> None:
    assert bits_of((0.0,)) != bits_of((-0.0,))
    assert bits_of((1.5, -2.0)) == bytes.fromhex("0000c03f000000c0")


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=32), st.floats(1e-3, 1e3))
def test_a_normalized_step_has_the_same_size_whatever_the_losses_scale(
    grads: list[float], scale: float
) -> None:
    found = normalized(grads)
    size = math.sqrt(sum(g * g for g in found))
    assert size == pytest.approx(math.sqrt(len(grads))) or not any(found)
    assert all(abs(g) <= math.sqrt(len(grads)) * (1 + 1e-9) for g in found)
    if any(abs(g) > 1e-3 for g in grads):
        assert normalized([scale * g for g in grads]) == pytest.approx(found, rel=1e-9, abs=1e-12)


def test_a_normalized_step_is_normalized_over_all_workers_together() -> None:
    config = config_of(normalized_step=True, probes=2)
    shares = [
        Share((1, 2, 3, 4), (3.0, 4.0, 0.0, 0.0), 1.0),
        Share((5, 6, 7, 8), (0.0, 0.0, 1.0, 1.0), 1.0),
    ]
    found = coefficients_of(shares, config)
    # Step 0: rms of (3, 4, 0, 0) is 2.5; step 1: of (0, 0, 1, 1) is 0.7071. Both over 4 directions.
    assert found[0] == pytest.approx((-3 / 2.5 / 4, -4 / 2.5 / 4, 0.0, 0.0))
    assert found[1] == pytest.approx((0.0, 0.0, -math.sqrt(2) / 4, -math.sqrt(2) / 4))


def test_nothing_measured_is_no_step() -> None:
    assert normalized([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 7), (0.1, 1), (0.1, 10), (3.0, 4096)])
def test_the_decay_of_a_commit_is_that_of_its_local_steps(decay: float, steps: int) -> None:
    config = config_of(weight_decay=decay, local_steps=steps, learning_rate=1e-3)
    exact = (1 - 0.5 * 1e-3 * decay) ** steps
    assert decay_of(config, 0.5) == pytest.approx(exact, rel=1e-6)
    assert decay_of(config, 0.5) == 1.0 or decay


# ---------------------------------------------------------------- the order of slots

NAMES = ("a", "b", "c", "d")


def records_of_a_run(readers: str, secret: bytes, rounds: int = 12) -> list[Record]:
    genesis = genesis_of(
        run_config(rounds=rounds, workers_min=4, quorum=4, local_steps=1, journal_readers=readers)
    )
    machine = RoundMachine(slot_secret=secret)
    machine.apply(genesis)
    records: list[Record] = [genesis]

    def take(ready: Ready) -> list[Assign]:
        records.extend(ready.records)
        return [message for message in ready.messages if isinstance(message, Assign)]

    waiting = take(machine.start())
    for name in NAMES:
        waiting += take(machine.step(WorkerReady(name)))
    while waiting:
        assign = waiting.pop()
        ticket = Ticket(assign.ticket.epoch, assign.ticket.round, assign.ticket.slot)
        scalars = Scalars((1.0,), None, 7 if assign.work.want_digest else None)
        waiting += take(machine.step(AnswerReceived(assign.worker, ticket, scalars)))
    assert machine.round == rounds
    again = RunState()
    for record in records:
        again.apply(record)
    assert again == machine.state
    return records


def orders(readers: str, secret: bytes, rounds: int = 12) -> list[tuple[str, ...]]:
    found = records_of_a_run(readers, secret, rounds)
    return [record.workers for record in found if isinstance(record, Opened)]


def test_in_a_run_for_everyone_slots_are_in_the_order_of_names_whatever_the_secret() -> None:
    assert set(orders("everyone", b"")) == {NAMES}
    assert set(orders("everyone", b"s" * 32)) == {NAMES}


def test_in_a_run_for_observers_the_order_is_another_one_each_round_and_secret() -> None:
    one, other = orders("observers", b"s" * 32), orders("observers", b"t" * 32)
    assert one == orders("observers", b"s" * 32)
    assert one != other
    assert len(set(one)) > 6
    assert all(sorted(order) == list(NAMES) for order in one)


def test_every_worker_has_every_slot_about_as_often() -> None:
    found = orders("observers", b"s" * 32, rounds=400)
    for slot in range(len(NAMES)):
        counts = Counter(order[slot] for order in found)
        assert all(60 < counts[name] < 140 for name in NAMES), counts


def test_a_run_for_observers_does_not_begin_without_a_secret() -> None:
    with pytest.raises(AssertionError, match="needs a secret"):
        records_of_a_run("observers", b"")
