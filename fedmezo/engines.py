"""What a session needs to compute: an interface for torch, ONNX Runtime, llama.cpp or others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed


class Engine(Protocol):
    """Holds a worker's copy of the trained weights and its rows, and computes with them.

    A `Session` calls it. Who makes one has checked that its base, its tokenizer and its trained
    tensors are those of the run's genesis, because the session's hello says so. One that measures
    with another form of the base, which the contract's `base_forms` must list, names it in an
    attribute `base_form`. One that can end a measurement early has a method `cut_short`, which any
    thread may call.
    """

    def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in the order given, which is that of their rounds.

        For each commit: the weights, or the base if it is `from_base`, times its `decay`, plus the
        sum of coefficient * z(seed) over its pairs, as the arithmetic standard says.
        """

    def measure(self, order: Measure) -> Measured:
        """Measure one assignment on the weights as they are, which afterwards are the same.

        The result has the order's ticket and one projected gradient for each seed. It always has
        `mean_loss` and `rows`; the session drops what the contract does not ask for. It has
        `weights_digest64` if `order.work.want_digest`. Raises `MeasurementError` if it cannot.
        """

    def digest(self) -> bytes:
        """The digest of the trained weights after all applied commits, 32 bytes."""


@runtime_checkable
class RestoringEngine(Engine, Protocol):
    """An engine that can take its weights from a file, so that its session can take a snapshot."""

    def restore(self, path: Path) -> tuple[int, bytes]:
        """Replace the weights by those in the file at `path`; returns their round and head.

        The file is a snapshot of the run, or one that `save` wrote. Raises `SnapshotDamagedError`
        if the weights are not what was saved, or another model's.
        """


@runtime_checkable
class SavingEngine(RestoringEngine, Protocol):
    """An engine that can also write its weights to a file, for `Session.save` and `restore`."""

    def save(self, folder: Path, head: bytes) -> Path:
        """Write the weights, the round that they are of and `head` into a new file in `folder`.

        `head` (32 bytes) is that after their round. The file is there durably and whole, or not at
        all. Returns its path; raises `SnapshotError` if the disk refuses.
        """
