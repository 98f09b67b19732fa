"""A worker's projected gradients with differential privacy: the subsampled Gaussian mechanism.

For one local step of K probes, DP-ZO (Tang et al. 2024, arXiv 2401.04343) and DPZero (Zhang et al.
2024, arXiv 2310.09639) clip what each row says and add noise to the sum. Here a row says a vector
of K projected gradients, which is clipped as a whole:

    sum over the rows of a Poisson sample of clip(vector, C)  +  sigma C N(0, I)

divided by the expected number of rows. Adding or removing one row moves the sum by C at most.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import numpy as np

from fedmezo_core.errors import CutShortError, MeasurementError
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.plain.measurements import Measurement, Measures, Pair
from fedmezo_core.zo.privacy.discrete_gaussian import discrete_gaussian

CLIP_UNITS: Final = 1 << 20
"""Integers that the clip is divided into. Their sums are exact, so that no rounding of the noise
tells what it was added to."""

BatchT = TypeVar("BatchT")


class PoissonBatches(Generic[BatchT]):
    """Batches in which each row comes with the same probability, whatever the others do.

    Which rows come is drawn from the operating system's random numbers, and nobody can replay it:
    the account counts on that. A batch is a list of batches of one row each.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[EncodedExample], str], BatchT],
        dataset: Dataset,
        batch_size: int,
    ) -> None:
        """`batch_size` is the expected number of rows; at most all."""
        self._collate = collate
        self._examples = dataset.examples
        # Rounded down: the true probability is not above the one that is accounted for.
        self._threshold = (batch_size << 64) // len(self._examples)

    @property
    def row_count(self) -> int:
        """1: the number of rows may not leave the worker."""
        return 1

    def batch(self, round_: int, step: int) -> list[BatchT]:
        """A fresh sample of rows, however often the same step is asked for."""
        bits = np.frombuffer(secrets.token_bytes(8 * len(self._examples)), dtype="<u8")
        chosen = list(range(len(bits)))
        if self._threshold < 1 << 64:
            chosen = np.flatnonzero(bits < np.uint64(self._threshold)).tolist()
        name = f"round {round_}, step {step}"
        return [self._collate([self._examples[index]], name) for index in chosen]


class PrivateMeasures(Generic[BatchT]):
    """Measures on the rows of a Poisson sample, one by one, and gives the noisy mean."""

    def __init__(
        self,
        measures: Measures[BatchT],
        *,
        clip: float,
        noise_multiplier: float,
        batch_size: int,
    ) -> None:
        """`clip` bounds the norm of what one row says, in the unit of a projected gradient.

        The noise of each coordinate of the sum has the standard deviation `noise_multiplier` times
        `clip`. `batch_size` is the expected number of rows.
        """
        self._measures = measures
        self._clip = clip
        self._sigma = math.ceil(noise_multiplier * CLIP_UNITS)
        self._batch_size = batch_size

    def measure(
        self, batch: Sequence[BatchT], local: Sequence[Pair], seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        """One measurement for each seed; its losses are 0, because they may not leave the worker.

        A row that cannot be measured says nothing, because saying so would tell of it. Raises
        `CutShortError`.
        """
        totals = [discrete_gaussian(self._sigma) for _ in seeds]
        for row in batch:
            try:
                measured = self._measures.measure(row, local, seeds, eps)
            except CutShortError:
                raise
            except MeasurementError:
                continue
            units = clipped_units([each.projected_grad for each in measured], self._clip)
            totals = [total + unit for total, unit in zip(totals, units, strict=True)]
        unit = self._clip / CLIP_UNITS / self._batch_size
        return [Measurement(0.0, 0.0, float(np.float32(total * unit)), 0.0) for total in totals]


def clipped_units(vector: Sequence[float], clip: float) -> list[int]:
    """`vector`, shortened to the norm `clip` if it is longer, in integers of clip / `CLIP_UNITS`.

    Each is rounded towards 0. The norm of the result is never above `CLIP_UNITS`. A vector that is
    not finite becomes zeros.
    """
    norm = math.hypot(*vector)
    if not math.isfinite(norm):
        return [0] * len(vector)
    scale = CLIP_UNITS / max(norm, clip)
    units = [int(value * scale) for value in vector]
    # Rounded operations can be one unit too long.
    while sum(unit * unit for unit in units) > CLIP_UNITS * CLIP_UNITS:
        longest = max(range(len(units)), key=lambda index: abs(units[index]))
        units[longest] -= 1 if units[longest] > 0 else -1
    return units
