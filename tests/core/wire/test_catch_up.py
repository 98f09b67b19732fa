"""Journal or snapshot: the cheaper one."""

from __future__ import annotations

import pytest

from fedmezo_core.wire.catch_up import Speeds, journal_s, snapshot_s, takes_snapshot
from fedmezo_core.wire.snapshots import Snapshot, SnapshotOffer, Suffix

MODEL = 135_000_000
"""Trained elements of a small model; 540 MB in float32."""
FAST = Speeds(pair_elements_per_s=10e9, download_bytes_per_s=125e6)
SLOW_NET = Speeds(pair_elements_per_s=10e9, download_bytes_per_s=1.25e6)
GAUSSIAN = Speeds(pair_elements_per_s=0.7e9, download_bytes_per_s=12.5e6)


def offer_of(file_bytes: int, missing: Suffix) -> SnapshotOffer:
    return SnapshotOffer(Snapshot(1, b"h" * 32, b"w" * 32, b"f" * 32, file_bytes), missing)


@pytest.mark.parametrize(
    ("missing", "after", "elements", "speeds", "wanted"),
    [
        # A few pairs: 1.4 s of replay against 4.3 s of download and 0.9 s of installing.
        (Suffix(100, 4_000), Suffix(0, 0), MODEL, FAST, False),
        # Ten thousand pairs: 135 s of replay.
        (Suffix(10_000, 50_000), Suffix(100, 500), MODEL, FAST, True),
        # The same where a download takes 432 s.
        (Suffix(10_000, 50_000), Suffix(100, 500), MODEL, SLOW_NET, False),
        # Directions that are slow to draw: a thousand pairs are 193 s of replay.
        (Suffix(1_000, 5_000), Suffix(0, 0), MODEL, GAUSSIAN, True),
        # A snapshot before a commit from the base: both have the same left to do.
        (Suffix(10_000, 50_000), Suffix(10_000, 50_000), MODEL, FAST, False),
        # An adapter of 1 MB: nearly all of a long journal is reading it.
        (Suffix(1_000_000, 5_000_000), Suffix(0, 0), 250_000, FAST, True),
        (Suffix(1_000, 5_000), Suffix(0, 0), 250_000, FAST, True),
        (Suffix(10, 50), Suffix(0, 0), 250_000, FAST, False),
        (Suffix(0, 0), Suffix(0, 0), MODEL, FAST, False),
    ],
)
def test_the_cheaper_way_is_taken(
    missing: Suffix, after: Suffix, elements: int, speeds: Speeds, wanted: bool
) -> None:
    assert takes_snapshot(missing, offer_of(4 * elements, after), elements, speeds) is wanted


def test_without_an_offer_there_is_the_journal() -> None:
    assert not takes_snapshot(Suffix(10**9, 10**10), None, MODEL, FAST)


def test_both_costs_are_in_seconds() -> None:
    speeds = Speeds(pair_elements_per_s=100.0, download_bytes_per_s=10.0)
    assert journal_s(Suffix(pairs=50, bytes=20), 4, speeds) == 2.0 + 2.0
    assert snapshot_s(offer_of(100, Suffix(pairs=25, bytes=10)), 4, speeds) == pytest.approx(
        10.0 + 2.0, abs=1e-5
    )
