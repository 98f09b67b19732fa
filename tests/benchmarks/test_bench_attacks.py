"""The benchmark of attacks runs, on sizes that say nothing."""

from __future__ import annotations

import math

import pytest

from benchmarks import figures
from benchmarks.bench_attacks import NONE, Sizes, measure

TINY = Sizes(seconds=0.5, records=100)


@pytest.mark.parametrize("name", [NONE, "idle", "status-flood"])
def test_an_attack_is_measured(name: str) -> None:
    measured = figures.collect([lambda: measure(name, TINY)])
    assert all(math.isfinite(figure.value) for figure in measured)
    by_name = {figure.name.removeprefix(f"{name}: "): figure.value for figure in measured}
    assert by_name["failures"] == 0
    assert by_name["rounds"] > 0
    assert ("memory for each of 300 connections" in by_name) is (name == "idle")
