"""Many runs are measured: they start, are killed under load, and go on to their workers' heads."""

from __future__ import annotations

import pytest

from benchmarks.operation import runs_at_once


@pytest.mark.slow
def test_runs_are_started_and_killed() -> None:
    sizes = runs_at_once.Sizes(runs=2, workers=4, seconds=4.0)
    ready, processor, after_kill, same, sound = runs_at_once.starting(sizes)
    assert ready.value > 0
    assert processor.value > 0
    assert after_kill.value > 0
    assert (same.value, sound.value) == (2, 2)
