"""Splitting rows among workers: nothing is lost, the same again, and as even as was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_coordinator.programs.splits import (
    ALPHA_MAX,
    ALPHA_MIN,
    Shares,
    check_names,
    held_out,
    held_out_count,
    names_of_categories,
    numbered_names,
    split_category,
    split_dirichlet,
    split_iid,
)
from fedmezo_core.errors import ConfigError

CLASSES = st.lists(st.sampled_from("abcde"), min_size=1, max_size=120)
SEEDS = st.integers(0, 2**64)


def assert_each_once(shares: Shares, rows: list[int], workers: int) -> None:
    assert len(shares.rows) == workers
    assert sorted(row for share in shares.rows for row in share) == rows
    assert all(list(share) == sorted(share) for share in shares.rows)


@given(count=st.integers(1, 200), workers=st.integers(1, 20), seed=SEEDS)
def test_iid_shares_are_equal_and_hold_every_row_once(count: int, workers: int, seed: int) -> None:
    rows = list(range(5, 5 + max(count, workers)))
    shares = split_iid(rows, workers, seed)
    assert_each_once(shares, rows, workers)
    sizes = [len(share) for share in shares.rows]
    assert max(sizes) - min(sizes) <= 1
    assert shares == split_iid(rows, workers, seed)


@given(
    classes=CLASSES,
    workers=st.integers(1, 8),
    rows_min=st.integers(1, 5),
    alpha=st.floats(ALPHA_MIN, ALPHA_MAX),
    seed=SEEDS,
)
def test_dirichlet_shares_hold_every_row_once_and_everyone_has_enough(
    classes: list[str], workers: int, rows_min: int, alpha: float, seed: int
) -> None:
    rows = list(range(len(classes)))
    workers = max(1, min(workers, len(rows) // rows_min))
    rows_min = min(rows_min, len(rows))
    shares = split_dirichlet(rows, classes, workers, alpha=alpha, seed=seed, rows_min=rows_min)
    assert_each_once(shares, rows, workers)
    assert min(len(share) for share in shares.rows) >= rows_min
    assert shares == split_dirichlet(
        rows, classes, workers, alpha=alpha, seed=seed, rows_min=rows_min
    )


@given(classes=CLASSES, workers=st.integers(1, 5))
def test_categories_stay_whole_and_are_balanced(classes: list[str], workers: int) -> None:
    sizes = Counter(classes)
    workers = min(workers, len(sizes))
    rows = list(range(len(classes)))
    shares = split_category(rows, classes, workers)
    assert_each_once(shares, rows, workers)
    held = [{classes[row] for row in share} for share in shares.rows]
    assert sum(map(len, held)) == len(sizes)
    loads = [len(share) for share in shares.rows]
    assert max(loads) - min(loads) <= max(sizes.values())


@given(classes=CLASSES, share=st.floats(0, 0.9), seed=SEEDS, stratified=st.booleans())
def test_what_is_held_out_has_each_class_in_its_proportion(
    classes: list[str], share: float, seed: int, stratified: bool
) -> None:
    sizes = Counter(classes)
    count = min(int(share * len(classes)), len(classes) - len(sizes))
    held = held_out(len(classes), count, classes if stratified else None, seed)
    assert held == sorted(set(held))
    assert len(held) == count
    assert held == held_out(len(classes), count, classes if stratified else None, seed)
    if stratified:
        taken = Counter(classes[row] for row in held)
        for name, size in sizes.items():
            assert taken[name] < size
            # Exactly the quota, or one beside it, but for what a class of few rows could not give.
            assert taken[name] >= count * size // len(classes)


@pytest.mark.parametrize("seed", range(20))
def test_a_tiny_alpha_gives_each_class_to_one_worker(seed: int) -> None:
    classes = [name for name in "abcdefgh" for _ in range(100)]
    shares = split_dirichlet(range(800), classes, 4, alpha=ALPHA_MIN, seed=seed)
    for name in "abcdefgh":
        parts = [sum(classes[row] == name for row in share) for share in shares.rows]
        # Whole, but for the single rows of workers that were given no class.
        assert max(parts) >= 97
    # Fewer classes than workers: every worker then has one class alone.
    shares = split_dirichlet(range(200), classes, 6, alpha=ALPHA_MIN, seed=seed, rows_min=10)
    assert shares.moved_count >= 40
    held = [{classes[row] for row in share} for share in shares.rows]
    assert sum(len(names) == 1 for names in held) >= 5


def test_a_large_alpha_gives_equal_shares_of_every_class() -> None:
    classes = ["rare" if row % 10 == 0 else "common" for row in range(1000)]
    shares = split_dirichlet(list(range(1000)), classes, 4, alpha=ALPHA_MAX, seed=3)
    for share in shares.rows:
        counts = Counter(classes[row] for row in share)
        assert counts["common"] == pytest.approx(225, abs=2)
        assert counts["rare"] == pytest.approx(25, abs=2)
    assert shares.moved_count == 0


def test_a_moderate_alpha_is_a_dirichlet_draw() -> None:
    """Mean and variance of one worker's part of a class over many seeds."""
    workers, alpha, size, seeds = 4, 0.5, 1000, 400
    parts = []
    for seed in range(seeds):
        shares = split_dirichlet(range(size), ["a"] * size, workers, alpha=alpha, seed=seed)
        parts.append(len(shares.rows[1]) / size)
    mean = sum(parts) / seeds
    variance = sum((part - mean) ** 2 for part in parts) / seeds
    assert mean == pytest.approx(1 / workers, abs=0.05)
    expected = (1 / workers) * (1 - 1 / workers) / (workers * alpha + 1)
    assert variance == pytest.approx(expected, rel=0.2)


def test_single_rows_of_many_classes_are_spread() -> None:
    """Rounding must not favour a worker: with equal proportions each class's one row is a draw."""
    classes = [f"{row:04}" for row in range(1000)]
    shares = split_dirichlet(range(1000), classes, 4, alpha=ALPHA_MAX, seed=1)
    assert all(200 < len(share) < 300 for share in shares.rows)


def test_the_splits_of_a_seed_never_change() -> None:
    """An experiment that names its seed can be repeated with a later version."""
    classes = ["a", "b", "c", "a"] * 6
    assert held_out(24, 4, classes, seed=7) == [1, 11, 14, 20]
    assert split_iid(range(10), 3, seed=7).rows == ((2, 6, 7, 9), (0, 4, 5), (1, 3, 8))
    assert split_dirichlet(range(24), classes, 3, alpha=0.5, seed=7).rows == (
        (0, 2, 3, 8, 11, 12, 14, 16, 19, 20, 23),
        (6, 10, 18, 21, 22),
        (1, 4, 5, 7, 9, 13, 15, 17),
    )
    assert split_category(range(24), classes, 2).rows[0] == tuple(
        row for row in range(24) if classes[row] == "a"
    )


def test_what_is_held_out_does_not_depend_on_how_the_rest_is_split() -> None:
    assert held_out(100, 10, None, 1) != held_out(100, 10, None, 2)
    assert split_iid(range(100), 4, 1) != split_iid(range(100), 4, 2)


@pytest.mark.parametrize(
    ("amount", "count"),
    [("0", 0), ("0.1", 2), ("0.01", 1), ("0.25", 5), ("1", 1), ("19", 19), (".5", 10)],
)
def test_how_much_is_held_out(amount: str, count: int) -> None:
    assert held_out_count(amount, 20) == count


@pytest.mark.parametrize("amount", ["", "x", "-1", "-0.1", "1.5", "nan", "inf", "10%"])
def test_an_amount_that_is_none(amount: str) -> None:
    with pytest.raises(
        ConfigError, match=r"use a share below 1, such as 0\.1, or a number of rows"
    ):
        held_out_count(amount, 20)


@pytest.mark.parametrize("amount", ["20", "0.99"])
def test_nothing_left_to_the_workers(amount: str) -> None:
    with pytest.raises(ConfigError, match=f"--heldout {amount} leaves none of the 20 rows"):
        held_out_count(amount, 20)


def test_classes_of_one_row_each_cannot_be_held_out_in_proportion() -> None:
    with pytest.raises(
        ConfigError, match="2 rows held out of 4 leave not one row to each of the 3"
    ):
        held_out(4, 2, ["a", "b", "c", "c"], 1)
    assert held_out(4, 1, ["a", "b", "c", "c"], 1) in ([2], [3])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e-300])
def test_an_alpha_that_is_no_dirichlet(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"--alpha = .* is not allowed: use a number above 0"):
        split_dirichlet(range(4), "abab", 2, alpha=alpha, seed=1)


def test_more_workers_than_there_are_rows_or_categories() -> None:
    with pytest.raises(ConfigError, match="5 workers are too many for 4 rows"):
        split_iid(range(4), 5, 1)
    with pytest.raises(ConfigError, match="2 workers of 3 rows each are too many for 4 rows"):
        split_dirichlet(range(4), "abab", 2, alpha=1, seed=1, rows_min=3)
    with pytest.raises(ConfigError, match="3 workers are more than the 2 categories"):
        split_category(range(4), "abab", 3)
    with pytest.raises(ConfigError, match="--workers = 0 is not allowed"):
        split_iid(range(4), 0, 1)
    with pytest.raises(ConfigError, match="--rows-min = 0 is not allowed"):
        split_dirichlet(range(4), "abab", 2, alpha=1, seed=1, rows_min=0)


def test_names() -> None:
    assert numbered_names(3) == ["worker-1", "worker-2", "worker-3"]
    assert numbered_names(10)[:2] == ["worker-01", "worker-02"]
    classes = ["Open QA", "Closed QA", "Open QA", "Summary!"]
    shares = split_category(range(4), classes, 3)
    assert names_of_categories(shares, classes) == ["closed-qa", "open-qa", "summary"]
    assert names_of_categories(split_category(range(4), classes, 2), classes) is None
    # No name, or the same one twice: the workers are numbered instead.
    for odd in (["a b", "a-b"], ["a", "日本"]):
        assert names_of_categories(split_category(range(2), odd, 2), odd) is None
    assert names_of_categories(Shares(((0,),)), ["x" * 99]) == ["x" * 64]
    for names in (["a", "B"], [""], ["a", "a"]):
        with pytest.raises(ConfigError, match="--names: "):
            check_names(names)
