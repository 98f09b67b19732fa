"""Whose weights differ, by full digests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.events import WeightsReported
from fedmezo_core.machines.divergence import REPLICA_PARTY as REPLICA
from fedmezo_core.machines.divergence import DigestBoard

GOOD, BAD, WORSE = b"g" * 32, b"b" * 32, b"w" * 32


def named(*reports: tuple[str, int, bytes]) -> list[tuple[str, int]]:
    """Who is named after all reports, in order."""
    board = DigestBoard()
    found = [d for report in reports for d in board.report(WeightsReported(*report))]
    return [(d.party, d.round) for d in found]


def test_what_a_board_remembers_does_not_grow_with_the_rounds() -> None:
    board = DigestBoard()
    for round_ in range(100):
        for party, digest in (("w1", BAD), ("w2", GOOD), (REPLICA, GOOD)):
            found = board.report(WeightsReported(party, round_, digest))
        assert [(d.party, d.round) for d in found] == [("w1", round_)]
    assert len(board._named) == 1


def test_a_board_forgets_the_party_that_reported_longest_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedmezo_core.machines.divergence.WORKERS_SEEN_MAX", 2)
    board = DigestBoard()
    for report in (("w1", 3, GOOD), ("w2", 3, GOOD), ("w1", 4, GOOD), ("w3", 4, GOOD)):
        board.report(WeightsReported(*report))
    assert [report.party for report in board.newest()] == ["w1", "w3"]


def test_equal_digests_name_nobody() -> None:
    assert named(("w1", 3, GOOD), ("w2", 3, GOOD), (REPLICA, 3, GOOD)) == []


def test_the_one_of_three_that_differs_is_named_once() -> None:
    assert named(("w1", 3, GOOD), ("w2", 3, BAD), ("w3", 3, GOOD), ("w4", 3, GOOD)) == [("w2", 3)]


def test_of_two_nobody_can_be_named() -> None:
    assert named(("w1", 3, GOOD), ("w2", 3, BAD)) == []


def test_between_equals_the_replica_decides() -> None:
    assert named(("w1", 3, BAD), (REPLICA, 3, GOOD)) == [("w1", 3)]
    board = [("w1", 3, BAD), ("w2", 3, GOOD), ("w3", 3, WORSE), (REPLICA, 3, GOOD)]
    assert named(*board) == [("w1", 3), ("w3", 3)]


def test_no_majority_outvotes_the_replica() -> None:
    parties = [(f"w{n}", 3, BAD if n < 3 else GOOD) for n in range(5)]
    wrong = [("w0", 3), ("w1", 3), ("w2", 3)]
    assert named((REPLICA, 3, GOOD), *parties) == wrong
    board = DigestBoard()
    for report in parties:
        assert board.report(WeightsReported(*report), replica_comes=True) == []
    found = board.report(WeightsReported(REPLICA, 3, GOOD), replica_comes=True)
    assert [(d.party, d.round) for d in found] == wrong


def test_rounds_are_not_mixed() -> None:
    assert named(("w1", 3, GOOD), ("w2", 4, BAD), ("w3", 5, WORSE)) == []


def test_the_newest_of_each_party_is_kept_by_name() -> None:
    board = DigestBoard()
    for report in (("w2", 3, GOOD), ("w1", 3, GOOD), ("w2", 4, GOOD)):
        board.report(WeightsReported(*report))
    assert [(d.party, d.round) for d in board.newest()] == [("w1", 3), ("w2", 4)]


@given(st.lists(st.sampled_from(["w1", "w2", "w3", "w4", "w5", REPLICA]), unique=True, min_size=3))
def test_a_lone_deviant_is_named_in_whatever_order_they_report(order: list[str]) -> None:
    deviant = "w1"
    if deviant not in order:
        return
    found = named(*((party, 1, BAD if party == deviant else GOOD) for party in order))
    assert (deviant, 1) in found
