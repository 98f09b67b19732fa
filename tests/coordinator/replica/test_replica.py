"""Where the replica pauses its replay."""

from __future__ import annotations

import pytest

from fedmezo_coordinator.replica.replica import _Stops


def stops_of(**changes: int) -> _Stops:
    values = {"rounds": 100, "digest_every": 1, "evaluate_every": 1000} | changes
    return _Stops(**values, evaluated=frozenset())


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({"snapshot_every": 0}, []),
        ({"snapshot_every": 7}, [7, 14, 21]),
        ({"snapshot_every": 7, "digest_every": 5}, [10, 15, 25]),
        ({"snapshot_every": 5, "digest_every": 10}, [10, 20]),
        ({"snapshot_every": 10, "digest_every": 5}, [10, 20]),
        ({"snapshot_every": 7, "snapshotted": 14}, [21]),
        ({"snapshot_every": 7, "rounds": 21}, [7, 14]),
    ],
)
def test_snapshots_are_due_at_digest_rounds_from_each_multiple_on_but_not_at_the_end(
    changes: dict[str, int], due: list[int]
) -> None:
    stops = stops_of(**changes)
    assert [round_ for round_ in range(28) if stops.snapshots(round_)] == due


def test_a_replica_that_is_behind_stops_for_the_newest_snapshot_only() -> None:
    stops = stops_of(snapshot_every=5)
    rounds = list(range(1, 24))
    assert stops.next_stop(rounds, 0.0) == 20
    assert stops.next_stop(rounds[20:], 0.0) == 1, "and not behind, it digests every round"


@pytest.mark.parametrize(
    ("evaluation_s", "made"),
    [(0.0, [10, 20, 30]), (10.0, [10, 20, 30]), (14.0, [20, 30]), (31.0, [30])],
)
def test_a_replica_makes_all_evaluations_that_are_due_if_there_is_time(
    evaluation_s: float, made: list[int]
) -> None:
    stops = stops_of(digest_every=1000, evaluate_every=10)
    rounds, at = list(range(1, 36)), []
    while rounds:
        count = stops.next_stop(rounds, evaluation_s)
        if stops.is_made(rounds[count - 1], rounds[count:], evaluation_s):
            at.append(rounds[count - 1])
        rounds = rounds[count:]
    assert at == made


def test_an_evaluation_waits_for_no_time_if_no_other_is_due() -> None:
    stops = stops_of(evaluate_every=10)
    assert stops.is_made(10, [11, 12], 1000.0)
    assert not stops.is_made(11, [], 0.0)
