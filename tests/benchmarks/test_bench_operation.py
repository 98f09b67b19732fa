"""Many runs, the page, and what watching costs a worker are measured."""

from __future__ import annotations

import pytest

from benchmarks.operation import page_costs, runs_at_once, watching_costs


@pytest.mark.slow
def test_runs_are_started_and_killed() -> None:
    sizes = runs_at_once.Sizes(runs=2, workers=4, seconds=4.0)
    *of_starts, after_kill, same, sound = runs_at_once.starting(sizes)
    assert [figure.goal for figure in of_starts] == ["at most 1", ""] * 2
    assert all(figure.value > 0 for figure in of_starts)
    assert after_kill.value > 0
    assert (same.value, sound.value) == (2, 2)


@pytest.mark.slow
def test_a_page_is_measured() -> None:
    figures = list(page_costs.figures(small=True))
    assert len(figures) >= 11
    assert {figure.unit for figure in figures} >= {"ms", "s", "kB"}
    assert not [figure for figure in figures if figure.unit == "kB" and figure.missed]


@pytest.mark.slow
def test_what_watching_costs_a_worker_is_measured() -> None:
    figures = list(watching_costs.figures(small=True))
    assert sum(figure.goal == "at most 1" for figure in figures) == 5
    of_a_round, *_, rate = figures
    assert of_a_round.value > 0
    assert rate.value > 0
