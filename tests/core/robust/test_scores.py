"""Scores of workers: who sends nothing, repeats, or does not agree with the others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from fedmezo_core.machines.scores import EMPTY_ROUNDS, Score, see_commit
from tests.core.machines.rounds_driver import RoundsDriver

COUNT = 16
ROUNDS = 50
Grads = tuple[float, ...]


def noise(rng: random.Random, size: float = 1.0) -> Grads:
    return tuple(rng.gauss(0, size) for _ in range(COUNT))


def honest(rng: random.Random, common: Grads) -> Grads:
    """About a fifth of the square is common to all batches, as in the demo's first rounds."""
    return tuple(0.5 * c + g for c, g in zip(common, noise(rng), strict=True))


ATTACKS: dict[str, tuple[Callable[[random.Random, Grads], Grads], str]] = {
    "random": (lambda rng, _: noise(rng), "does not agree with the others"),
    "flipped": (lambda rng, c: tuple(-g for g in honest(rng, c)), "does not agree with the others"),
    "zeros": (lambda _rng, _c: (0.0,) * COUNT, "sent answers next to zero, 8 rounds in a row"),
    "tiny": (lambda rng, _: noise(rng, 1e-6), "sent answers next to zero"),
    "the same": (lambda _rng, _c: (1.0,) * COUNT, "repeated answers, its own or another's"),
}


def told(attack: str | None, *, is_shared: bool, seed: int = 1) -> dict[int, tuple[int, str]]:
    """Position -> the round in which it was told, and what, of nine honest workers and one more."""
    rng, scores = random.Random(seed), [Score() for _ in range(10)]
    found: dict[int, tuple[int, str]] = {}
    for round_ in range(1, ROUNDS + 1):
        common = noise(rng)
        answers = [honest(rng, common) for _ in range(10)]
        if attack is not None:
            answers[9] = ATTACKS[attack][0](rng, common)
        for position, wrong in see_commit(scores, answers, is_shared=is_shared):
            found.setdefault(position, (round_, wrong))
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_along_shared_directions_every_free_rider_is_told_within_50_rounds(attack: str) -> None:
    found = told(attack, is_shared=True)
    assert list(found) == [9]
    assert ATTACKS[attack][1] in found[9][1]


class Compared(tuple[float, ...]):
    """An answer that counts how often answers are compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Compared.comparisons += 1
        return tuple.__eq__(self, other)

    __hash__ = tuple.__hash__


def test_one_copied_answer_costs_no_comparison_of_all_with_all() -> None:
    rng = random.Random(0)
    answers = [Compared(rng.gauss(0, 1) for _ in range(8)) for _ in range(4095)]
    answers.append(Compared(answers[7]))
    scores = [Score() for _ in answers]
    Compared.comparisons = 0
    see_commit(scores, answers, is_shared=True)
    assert Compared.comparisons < 10 * len(answers)
    assert [score.repeated_rounds for score in scores].count(1) == 2
    assert scores[7].repeated_rounds == scores[-1].repeated_rounds == 1


@pytest.mark.parametrize("attack", ["zeros", "tiny", "the same"])
def test_along_own_directions_those_that_need_no_comparison_are_told(attack: str) -> None:
    assert told(attack, is_shared=False)[9][0] == EMPTY_ROUNDS + (attack == "the same")


def test_honest_workers_are_hardly_ever_told() -> None:
    found = [len(told(None, is_shared=True, seed=seed)) for seed in range(20)]
    assert sum(found) <= 2, "1 % of 200 workers"


def test_a_copy_of_another_answer_is_told_with_its_source() -> None:
    rng, scores = random.Random(1), [Score() for _ in range(4)]
    found = []
    for _ in range(EMPTY_ROUNDS):
        answers = [noise(rng) for _ in range(3)]
        found = see_commit(scores, [*answers, answers[0]], is_shared=True)
    assert [position for position, _ in found] == [0, 3]


def test_what_is_told_once_is_not_told_again_until_it_was_mended() -> None:
    rng, scores = random.Random(1), [Score(), Score()]

    def rounds(grads: Grads) -> list[int]:
        found = []
        for _ in range(2 * EMPTY_ROUNDS):
            seen = see_commit(scores, [noise(rng), grads], is_shared=False)
            found += [position for position, _ in seen]
        return found

    assert rounds((0.0,) * COUNT) == [1]
    assert scores[1].told
    see_commit(scores, [noise(rng), noise(rng)], is_shared=False)
    assert not scores[1].told
    assert rounds((0.0,) * COUNT) == [1]


def test_rounds_in_which_nobody_measures_anything_tell_nothing() -> None:
    scores = [Score() for _ in range(3)]
    for _ in range(2 * EMPTY_ROUNDS):
        assert see_commit(scores, [(0.0,) * COUNT] * 3, is_shared=True) == []


def test_few_numbers_and_counts_may_repeat_by_chance() -> None:
    scores = [Score(), Score()]
    for _ in range(2 * EMPTY_ROUNDS):
        assert see_commit(scores, [(1.0, -1.0), (1.0, -1.0)], is_shared=False) == []


def test_the_operator_is_warned_with_the_worker_s_name() -> None:
    run = RoundsDriver(workers_min=3, quorum=3, rounds=30)
    run.ready("a", "b", "c")
    warnings: list[str] = []
    for _ in range(EMPTY_ROUNDS):
        run.answer("a")
        run.answer("b")
        warnings += run.answer("c", grads=(0.0, 0.0)).warnings
    assert warnings == ["round 8: c sent answers next to zero, 8 rounds in a row"]
    assert run.machine.roster.workers["c"].score.told
    assert run.machine.roster.workers["a"].score.size == 1.0
