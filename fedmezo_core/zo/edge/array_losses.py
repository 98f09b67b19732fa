"""From logits at few positions to a batch's mean loss, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.zo.data.encoding import IGNORED, EncodedExample, PaddedRows, padded

LOGITS_MAX: Final = 1 << 24
"""Logits that exist at a time (64 MiB of float32), if a single row has no more."""


@dataclass(frozen=True, slots=True)
class EdgeBatch:
    """One batch of a worker without torch: parts of its rows, each for one pass."""

    name: str
    """What messages call the batch."""
    parts: tuple[PassRows, ...]
    target_count: int
    """What the mean loss is over: rows (classification), or response tokens (instruction)."""


@dataclass(frozen=True, slots=True)
class PassRows:
    """Rows of one forward pass, and the positions whose logits their losses need."""

    padded: PaddedRows
    rows: npt.NDArray[np.int64]
    """[places]: which row each place is in."""
    columns: npt.NDArray[np.int64]
    """[places]: the position whose logits predict the place's target, in the padded row."""
    targets: npt.NDArray[np.int64]
    """[places]: classification: index of the right class; instruction: the token that comes."""

    def loss_sum(self, logits: npt.NDArray[np.float32], verbalizer_ids: Sequence[int]) -> float:
        """The losses of all places together, in nats, from float32 logits [places, vocabulary].

        verbalizer_ids: the tokens that are compared in classification; empty otherwise.
        """
        compared = logits[:, list(verbalizer_ids)] if verbalizer_ids else logits
        wide = compared.astype(np.float64)
        largest = wide.max(axis=1, keepdims=True)
        # A logit that is NaN or infinite gives a loss that is; the caller refuses that.
        with np.errstate(invalid="ignore", over="ignore"):
            wide -= largest
            of_target = wide[np.arange(len(wide)), self.targets]
            losses = np.log(np.exp(wide).sum(axis=1)) - of_target
        return float(losses.sum())


def edge_batch(
    examples: Sequence[EncodedExample],
    name: str,
    target_count: int,
    vocabulary_size: int,
    *,
    tokens_max: int,
) -> EdgeBatch:
    """A batch of `examples`, in parts of at most `tokens_max` tokens with padding, and few logits.

    A row that is longer than that is a part of its own.
    """
    parts = _parts(examples, vocabulary_size, tokens_max)
    return EdgeBatch(name, tuple(map(_pass_rows, parts)), target_count)


def _parts(
    examples: Sequence[EncodedExample], vocabulary_size: int, tokens_max: int
) -> Iterator[list[EncodedExample]]:
    part: list[EncodedExample] = []
    longest = logits = 0
    for example in examples:
        own_logits = max(1, len(example.response)) * vocabulary_size
        longer = max(longest, example.token_count)
        fits = longer * (len(part) + 1) <= tokens_max and logits + own_logits <= LOGITS_MAX
        if part and not fits:
            yield part
            part, logits, longer = [], 0, example.token_count
        part.append(example)
        longest, logits = longer, logits + own_logits
    yield part


def _pass_rows(examples: Sequence[EncodedExample]) -> PassRows:
    rows = padded(examples)
    count, tokens = rows.input_ids.shape
    if not rows.targets.shape[1]:
        last = np.full(count, tokens - 1, dtype=np.int64)
        return PassRows(rows, np.arange(count, dtype=np.int64), last, rows.labels)
    row, column = np.nonzero(rows.targets != IGNORED)
    # The logits at one position predict the next token.
    before = column + (tokens - rows.targets.shape[1] - 1)
    return PassRows(rows, row, before, rows.targets[row, column])
