"""The coordinator's benchmark runs, on sizes that say nothing."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.bench_coordinator import GROUPS, Sizes

TINY = Sizes(
    submitting=8,
    bursts=2,
    loaded_s=0.3,
    polling=8,
    rounds=5,
    idle=8,
    idle_s=0.3,
    listening=8,
    commits=2,
    returning=12,
    records=500,
)


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_runs_and_loses_nothing(group: str, tmp_path: Path) -> None:
    measured = figures.collect([partial(GROUPS[group], TINY)])
    figures.write(measured, tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())
    assert rows
    for row in rows:
        assert set(row) == {"name", "value", "unit", "goal"}
        assert math.isfinite(row["value"])
    lost = [figure.value for figure in measured if figure.name.endswith("lost")]
    assert lost == ([0] if group == "reconnect" else [])
