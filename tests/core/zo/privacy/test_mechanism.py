"""One row moves the sum by the clip at most, whatever it says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.errors import CutShortError, MeasurementError
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.plain.measurements import Measurement, Pair
from fedmezo_core.zo.privacy import mechanism
from fedmezo_core.zo.privacy.mechanism import (
    CLIP_UNITS,
    PoissonBatches,
    PrivateMeasures,
    clipped_units,
)

ROWS = Dataset(tuple(EncodedExample((number,), (), 0, {}) for number in range(40)), 0)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.floats(1e-6, 1e6))
def test_no_row_says_more_than_the_clip(vector: list[float], clip: float) -> None:
    units = clipped_units(vector, clip)
    assert sum(unit * unit for unit in units) <= CLIP_UNITS**2
    assert len(units) == len(vector)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(0.1, 100))
def test_the_clip_keeps_the_direction_and_short_vectors(vector: list[float], clip: float) -> None:
    shrink = min(1.0, clip / max(math.hypot(*vector), 1e-300))
    for unit, value in zip(clipped_units(vector, clip), vector, strict=True):
        assert abs(unit * clip / CLIP_UNITS - value * shrink) <= 3 * clip / CLIP_UNITS


def test_rows_come_independently_and_with_their_probability() -> None:
    batches = PoissonBatches(lambda rows, _: rows[0].prompt[0], ROWS, batch_size=10)
    draws = [batches.batch(1, 0) for _ in range(2000)]
    sizes = Counter(map(len, draws))
    mean = sum(size * count for size, count in sizes.items()) / len(draws)
    variance = sum((size - mean) ** 2 * count for size, count in sizes.items()) / len(draws)
    assert abs(mean - 10) < 5 * math.sqrt(7.5 / 2000)
    assert abs(variance - 7.5) < 1.5
    counts = Counter(row for draw in draws for row in draw)
    assert all(abs(counts[row] / 2000 - 0.25) < 0.06 for row in range(40))


def test_all_rows_come_where_a_batch_is_all_rows() -> None:
    batches = PoissonBatches(lambda rows, _: rows[0].prompt[0], ROWS, batch_size=40)
    assert batches.batch(1, 0) == list(range(40))
    assert batches.row_count == 1


class Says:
    """Measures rows that are the vectors which they say, or errors to raise."""

    def measure(
        self,
        batch: Sequence[float] | MeasurementError,
        local: Sequence[Pair],
        seeds: Sequence[int],
        eps: float,
    ) -> list[Measurement]:
        if isinstance(batch, MeasurementError):
            raise batch
        return [Measurement(7.0, 7.0, value, 7.0) for value in batch]


def measured(
    monkeypatch: pytest.MonkeyPatch, rows: Sequence[Sequence[float] | MeasurementError]
) -> list[Measurement]:
    monkeypatch.setattr(mechanism, "discrete_gaussian", lambda sigma: sigma)
    private = PrivateMeasures(Says(), clip=2.0, noise_multiplier=0.5, batch_size=4)
    return private.measure(rows, [], [1, 2], 1e-3)


def test_the_noisy_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """(sum of clipped rows + sigma * clip) / expected rows; the noise here is its own sigma."""
    found = measured(monkeypatch, [[1.0, 0.0], [30.0, -40.0], [math.nan, 1.0]])
    grads = [measurement.projected_grad for measurement in found]
    np.testing.assert_allclose(grads, [(1 + 1.2 + 1) / 4, (0 - 1.6 + 1) / 4], atol=1e-5)


def test_no_loss_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in measured(monkeypatch, [[1.0, 0.0]]):
        assert (each.loss, each.loss_plus, each.loss_other) == (0.0, 0.0, 0.0)


def test_an_empty_sample_is_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [each.projected_grad for each in measured(monkeypatch, [])]
    np.testing.assert_allclose(grads, [0.25, 0.25])


def test_a_row_that_cannot_be_measured_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[float] | MeasurementError] = [
        MeasurementError("The loss is nan."),
        [1.0, 0.0],
    ]
    assert measured(monkeypatch, rows) == measured(monkeypatch, [[1.0, 0.0]])


def test_cutting_short_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CutShortError):
        measured(monkeypatch, [CutShortError("the round closed")])
