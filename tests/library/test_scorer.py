"""An objective that overruns is no matter of the row that it was scoring."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from fedmezo.scorer import Scorer
from fedmezo_core.errors import CutShortError
from fedmezo_core.zo.objectives import Objective
from fedmezo_core.zo.plain.measurements import Measurement, Pair
from fedmezo_core.zo.privacy.mechanism import PrivateMeasures


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets the objective that hangs go on."""
    event = threading.Event()
    yield event
    event.set()


def test_a_row_that_hangs_does_not_silence_the_rows_after_it(release: threading.Event) -> None:
    """Otherwise one row would move the sum by all of them, and no noise would hide it."""

    def scored(row: Any) -> float:
        return float(release.wait(60) if row == "slow" else 1.0)

    scorer = Scorer(Objective("test", scored), threading.Event())
    scorer.deadline_s = 0.0

    class Scores:
        def measure(
            self, batch: Any, local: Sequence[Pair], seeds: Sequence[int], eps: float
        ) -> list[Measurement]:
            return [Measurement(0.0, 0.0, scorer(batch), 0.0) for _ in seeds]

    private = PrivateMeasures(Scores(), clip=1.0, noise_multiplier=1.0, batch_size=4)
    with pytest.raises(CutShortError, match="takes longer than the round's deadline"):
        private.measure(["slow", "quick", "quick"], [], [1], 1e-3)
    with pytest.raises(CutShortError, match="still busy with an earlier round"):
        scorer.check_free()
