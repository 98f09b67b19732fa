"""The fold of a journal into curves: what it keeps, and that it has a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fedmezo_coordinator.web.run_series import EVENTS_MAX, POINTS_MAX, Curve, RunSeries
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Excluded,
    Opened,
    Paused,
    Record,
    Resumed,
    RoundSlot,
    Scalars,
    SeedRange,
    Started,
)


def series_of(records: Sequence[Record]) -> RunSeries:
    series = RunSeries()
    for body in encode_records(records):
        series.take(body)
    return series


def answered(round_: int, slot: int, loss: float | None) -> Answered:
    return Answered(round_, slot, Scalars((0.5,), loss, None))


def committed(round_: int, *slots: RoundSlot) -> Committed:
    ranges = (SeedRange(1 << 16, (0.5, 0.25)), SeedRange(2 << 16, (0.5,)))
    return Committed(round_, ranges, 7, answers=slots)


def test_a_round_has_the_mean_loss_of_its_answers() -> None:
    series = series_of(
        [
            Started(1),
            Opened(1, 0, ("a", "b", "c")),
            answered(1, 0, 0.5),
            answered(1, 2, 1.0),
            committed(1),
            Evaluated(1, 0.75, 0.5, 10, bytes(32)),
        ]
    )
    [loss] = series.losses.points
    assert (loss.last_round, loss.mean) == (1, 0.75)
    assert [point.mean for point in series.answers.points] == [2]
    assert (series.round, series.pairs_total, series.answers_total) == (1, 3, 2)
    assert (series.heldout_losses.newest, series.heldout_accuracies.newest) == (0.75, 0.5)


def test_answers_without_a_loss_count_and_draw_no_loss() -> None:
    series = series_of([Opened(1, 0, ("a",)), answered(1, 0, None), committed(1)])
    assert not series.losses.points
    assert [point.mean for point in series.answers.points] == [1]


def test_an_excluded_workers_answers_in_the_open_round_do_not_count() -> None:
    series = series_of(
        [
            Opened(1, 0, ("a", "b")),
            answered(1, 0, 100.0),
            answered(1, 1, 1.0),
            Excluded(0, "a", "a defect"),
            committed(1),
        ]
    )
    assert series.losses.newest == 1.0
    assert [event.kind for event in series.events] == ["excluded"]


def test_a_buffered_commit_has_the_answers_that_it_names() -> None:
    series = series_of(
        [
            Opened(1, 0, ("a", "b", "c")),
            answered(1, 0, 1.0),
            committed(1, RoundSlot(1, 0)),
            Opened(2, 0, ("a",)),
            answered(1, 1, 3.0),
            answered(2, 0, 5.0),
            committed(2, RoundSlot(1, 1), RoundSlot(2, 0)),
        ]
    )
    assert [point.mean for point in series.losses.points] == [1.0, 4.0]


def test_what_happens_to_the_run_is_told_in_order_and_the_oldest_is_forgotten() -> None:
    happened: list[Record] = [
        Diverged(0, "w1", 1, 2),
        Paused(0, "the loss is high"),
        Resumed(0.5),
    ]
    starts: list[Record] = [Started(number) for number in range(1, 2 * EVENTS_MAX)]
    series = series_of([*starts, *happened])
    assert len(series.events) == EVENTS_MAX
    assert [event.kind for event in series.events][-3:] == ["diverged", "paused", "resumed"]
    assert "the loss is high" in series.events[-2].sentence


def test_a_long_curve_keeps_its_shape_in_few_points() -> None:
    curve = Curve()
    for round_ in range(1, 100_001):
        curve.add(round_, float(round_))
    assert POINTS_MAX // 2 <= len(curve.points) <= POINTS_MAX
    assert curve.points[0].low == 1
    assert curve.points[-1].high == curve.points[-1].last_round == 100_000
    assert sum(point.count for point in curve.points) == 100_000
    for before, after in zip(curve.points, curve.points[1:], strict=False):
        assert before.count == curve.stride
        assert before.low <= before.mean <= before.high < after.low


def test_a_value_that_is_no_number_is_left_out() -> None:
    curve = Curve()
    for value in (math.nan, math.inf, 1.0):
        curve.add(1, value)
    assert [point.mean for point in curve.points] == [1.0]


def test_nothing_grows_with_the_rounds() -> None:
    series = RunSeries()
    for round_ in range(1, 3_001):
        records: list[Record] = [Opened(round_, 0, ("a", "b")), answered(round_, 0, 0.5)]
        for body in encode_records([*records, committed(round_)]):
            series.take(body)
    assert len(series.losses.points) <= POINTS_MAX
    assert not series._open


@pytest.mark.parametrize("slots", [4, 300])
def test_rounds_that_never_commit_are_forgotten(slots: int) -> None:
    series = RunSeries()
    for round_ in range(1, slots + 1):
        for body in encode_records([Opened(round_, 0, ("a",)), answered(round_, 0, 0.5)]):
            series.take(body)
    assert len(series._open) <= 258
