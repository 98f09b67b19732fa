"""Which rows a worker measures on in which step (decision 0003)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fedmezo_core.zo.data.encoding import Dataset, EncodedExample

_WINDOW_BATCHES = 8
"""Batches whose rows are sorted by length together. More would save little padding."""


BatchT = TypeVar("BatchT")


class Batches(Generic[BatchT]):
    """The batches of one worker: a pure function of run seed, worker name, round and step.

    A worker's steps read its rows pass after pass, across rounds. No row comes twice in a pass, and
    every pass has its own order. So a restarted worker repeats exactly what it would have done.

    The rows of a batch have similar lengths. The shuffled rows are cut into windows of
    `_WINDOW_BATCHES` batches, each window is sorted by length and cut into batches, and then all
    batches are shuffled. On short texts this saves a third of the tokens, which would be padding.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[EncodedExample], str], BatchT],
        dataset: Dataset,
        *,
        run_seed: int,
        worker_name: str,
        batch_size: int,
        local_steps: int,
    ) -> None:
        """Make the batches of `worker_name` in a run with `run_seed` (u64) and `local_steps`.

        Batches have `batch_size` rows, or all rows of a smaller dataset; `collate` makes them of
        examples and a name. Each pass leaves out fewer rows than a batch has, and not always the
        same ones.
        """
        self._collate = collate
        self._dataset = dataset
        self._lengths = np.array([example.token_count for example in dataset.examples])
        self._key = struct.pack("<Q", run_seed) + worker_name.encode()
        self._batch_size = min(batch_size, len(dataset))
        self._local_steps = local_steps
        self._pass = -1
        self._batches: list[npt.NDArray[np.int64]] = []

    @property
    def row_count(self) -> int:
        """Number of rows of the worker's data."""
        return len(self._dataset)

    def indices(self, round_: int, step: int) -> list[int]:
        """Row numbers (from 0) of the batch of `step` (from 0) in `round_` (from 1)."""
        number, index = divmod(
            (round_ - 1) * self._local_steps + step, len(self._dataset) // self._batch_size
        )
        if number != self._pass:
            self._pass, self._batches = number, self._shuffled(number)
        return [int(row) for row in self._batches[index]]

    def batch(self, round_: int, step: int) -> BatchT:
        """The batch of `step` (from 0) in `round_` (from 1)."""
        examples = [self._dataset.examples[index] for index in self.indices(round_, step)]
        return self._collate(examples, f"round {round_}, step {step}")

    def _shuffled(self, number: int) -> list[npt.NDArray[np.int64]]:
        hashed = hashlib.sha256(b"fedmezo batches v1\0" + struct.pack("<Q", number) + self._key)
        # NumPy promises the same raw bits in all versions, but not the same permutations.
        bits = np.random.Philox(key=int.from_bytes(hashed.digest()[:16], "little"))
        size, count = self._batch_size, len(self._dataset) // self._batch_size
        order = np.argsort(bits.random_raw(len(self._dataset)), kind="stable")[: size * count]
        batches: list[npt.NDArray[np.int64]] = []
        for first in range(0, len(order), _WINDOW_BATCHES * size):
            window = order[first : first + _WINDOW_BATCHES * size]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += [window[start : start + size] for start in range(0, len(window), size)]
        return [batches[index] for index in np.argsort(bits.random_raw(count), kind="stable")]
