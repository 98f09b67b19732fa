"""The trained weights of one party: which round they are at, and how they move on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedmezo_core.errors import DivergedError, SnapshotDamagedError
from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit, commits_to_apply
from fedmezo_core.zo.kept_base import KeptBase
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.model.weight_digest import weights_digest
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.entries import Manifest

_PROBE_ELEMENTS = 1 << 20
_PROBE_PAIRS = 16


class Weights:
    """A model's trained tensors and the round whose commit was applied last.

    Invariant: the tensors hold what the commits of rounds 1 to `round`, in order, make of the base
    (the last one that starts from it, and those after that). They were applied here, or restored
    from a party that applied them, and nothing else ever writes to the tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        *,
        distribution: Distribution,
        rounding: Rounding,
        threads: int | None = None,
        keeps_base: bool = False,
        base_folder: Path | None = None,
    ) -> None:
        """Take `model` at its base weights, that is at round 0.

        threads: how many apply and digest (default: as `materialize` chooses, and one per core).
        keeps_base: copy the base to a disk, in `base_folder` or where `KeptBase` finds one; commits
        that start from the base need it. Raises `MismatchError` if the model isn't the manifest's,
        `ConfigError` if the disk has no room.
        """
        self.model = model
        self.manifest = manifest
        self.round = 0
        self._distribution = distribution
        self._rounding = rounding
        self._threads = threads
        self._interrupted_round: int | None = None
        tensors = trained_tensors(model, manifest)
        self._base = KeptBase(tensors, base_folder) if keeps_base else None

    def apply(
        self,
        first_round: int,
        commits: Sequence[Commit],
        advance: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """Apply the commits of rounds `first_round`, `first_round` + 1, ... in place, in one pass.

        Many at once give the same bits as one at a time. The last commit that starts from the base
        makes all commits before it superfluous: those are skipped, and may be missing. The first
        one applied must be of the round after `round`, or of any later round if it starts from the
        base: raises `DivergedError` otherwise. Raises `MismatchError` if the base was not kept, and
        `NumericError` if a resulting weight is NaN or infinite, after which these weights must not
        be used. `advance` is called after each tensor, with its count of elements.
        """
        self._check()
        first_round, commits, from_base = commits_to_apply(
            self.round, first_round, commits, keeps_base=self._base is not None
        )
        base = self._base if from_base else None
        tensors = trained_tensors(self.model, self.manifest)
        self._interrupted_round = first_round
        for entry, tensor in zip(self.manifest, tensors, strict=True):
            source = tensor
            if base is not None:
                source = base[entry.tensor_id]
                if devices.elsewhere(tensor.device):
                    source = tensor.copy_(source)
            operands = Operands(
                entry.tensor_id, self._distribution, self._rounding, 0, entry.columns, entry.name
            )
            materialize(tensor, source, commits, operands, threads=self._threads)
            if base is not None:
                base.release(entry.tensor_id)
            advance(tensor.numel())
        self._interrupted_round = None
        self.round = first_round + len(commits) - 1

    def restore(self, round_: int, tensors: Iterable[torch.Tensor], digest: bytes) -> None:
        """Replace the weights by those after `round_`, which another party computed.

        tensors: in manifest order; each is copied before the next is asked for. Raises
        `SnapshotDamagedError` if the result's digest is not `digest`, after which these weights
        must not be used.
        """
        self._check()
        self._interrupted_round = round_
        for tensor, value in zip(trained_tensors(self.model, self.manifest), tensors, strict=True):
            tensor.copy_(value)
        found = weights_digest(self.model, self.manifest, threads=self._threads)
        if found != digest:
            raise SnapshotDamagedError(
                f"The weights in the snapshot of round {round_} have digest {found.hex()[:16]} "
                f"instead of {digest.hex()[:16]}; read the journal instead."
            )
        self._interrupted_round = None
        self.round = round_

    @property
    def byte_count(self) -> int:
        """Bytes of the trained tensors."""
        return sum(t.nbytes for t in trained_tensors(self.model, self.manifest))

    def digest(self) -> bytes:
        """Digest of the weights after `round` (see `weights_digest`), 32 bytes."""
        self._check()
        return weights_digest(self.model, self.manifest, threads=self._threads)

    def replay_rate(self) -> float:
        """The speed of `apply` here, in pairs times elements a second; a probe of milliseconds."""
        like = trained_tensors(self.model, self.manifest)[0]
        scratch = torch.zeros(1024, _PROBE_ELEMENTS // 1024, dtype=like.dtype, device=like.device)
        commit = Commit(
            np.arange(_PROBE_PAIRS, dtype=np.uint64),
            np.full(_PROBE_PAIRS, 1e-3, dtype=np.float32),
            0,
        )
        operands = Operands(0, self._distribution, self._rounding)
        seconds: list[float] = []
        for _ in range(2):  # the first may wake threads
            begin_s = time.perf_counter()
            materialize(scratch, scratch, [commit], operands, threads=self._threads)
            seconds.append(time.perf_counter() - begin_s)
        return _PROBE_ELEMENTS * _PROBE_PAIRS / min(seconds)

    def _check(self) -> None:
        if self._interrupted_round is not None:
            raise DivergedError(
                f"An error interrupted the commit of round {self._interrupted_round}, so these "
                "weights are no round's; start again from the base checkpoint."
            )
