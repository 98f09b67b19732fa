"""The trained weights of a party without torch: float32 arrays that commits move in place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import DivergedError, SnapshotDamagedError
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.commits import Commit, commits_to_apply
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.arrays import materialize_array
from fedmezo_core.zo.plain.digest_tree import array_weights_digest
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.snapshot_header import check_snapshot_header

_PROBE_ELEMENTS: Final = 1 << 20
_PROBE_PAIRS: Final = 16

Adapter = dict[str, npt.NDArray[np.float32]]
"""An adapter's matrices, trained and frozen ones, by the names of the model's parameters."""


class ArrayWeights:
    """An adapter's trained matrices and the round whose commit was applied last.

    It has the bits and the digests of `Weights`, and refuses what that refuses.
    """

    def __init__(
        self,
        start: Mapping[str, npt.NDArray[np.float32]],
        manifest: Manifest,
        config: RunConfig,
        *,
        threads: int | None = None,
    ) -> None:
        """Copy the adapter that the run `config` begins from; `manifest` names what is trained.

        threads: how many apply and digest (default: one for each core).
        """
        self.manifest: Final = manifest
        self.round = 0
        self._distribution = Distribution[config.distribution.upper()]
        self._rounding = Rounding[config.rounding.upper()]
        self._threads = threads
        trained = {entry.name for entry in manifest}
        self._frozen = {name: value for name, value in start.items() if name not in trained}
        self._arrays = [start[entry.name].copy() for entry in manifest]
        keeps_base = config.seed_policy == "pool"
        self._base = [array.copy() for array in self._arrays] if keeps_base else None
        self._interrupted_round: int | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now: the arrays themselves, which nothing else may write to."""
        trained = zip(self.manifest, self._arrays, strict=True)
        return {**self._frozen, **{entry.name: array for entry, array in trained}}

    def apply(self, first_round: int, commits: Sequence[Commit]) -> None:
        """Apply the commits of rounds `first_round`, `first_round` + 1, ... in place, in one pass.

        It raises as `Weights.apply` does: `DivergedError` for rounds that do not follow,
        `NumericError` for a result that is NaN or infinite.
        """
        self._check()
        first_round, commits, from_base = commits_to_apply(
            self.round, first_round, commits, keeps_base=self._base is not None
        )
        sources = self._base if from_base and self._base is not None else self._arrays
        self._interrupted_round = first_round
        self._materialize(self._arrays, sources, commits)
        self._interrupted_round = None
        self.round = first_round + len(commits) - 1

    def restore(self, path: Path, snapshot: Snapshot) -> None:
        """Replace the weights by those in the file of `snapshot` at `path`.

        Raises `SnapshotDamagedError` if they are not; then these weights must not be used.
        """
        self._check()
        self._interrupted_round = snapshot.round
        try:
            with safe_open(path, framework="numpy") as file:
                check_snapshot_header(file, self.manifest, snapshot)
                for entry, array in zip(self.manifest, self._arrays, strict=True):
                    array[...] = file.get_tensor(entry.name)
        except (OSError, SafetensorError) as error:
            raise SnapshotDamagedError(
                f"The snapshot of round {snapshot.round} is no safetensors file that can be read "
                f"({error}); read the journal instead."
            ) from None
        found = array_weights_digest(self._arrays, self.manifest, threads=self._threads)
        if found != snapshot.weights_digest:
            raise SnapshotDamagedError(
                f"The weights in the snapshot of round {snapshot.round} have digest "
                f"{found.hex()[:16]} instead of {snapshot.weights_digest.hex()[:16]}; read the "
                "journal instead."
            )
        self._interrupted_round = None
        self.round = snapshot.round

    @property
    def byte_count(self) -> int:
        """Bytes of the trained matrices."""
        return sum(array.nbytes for array in self._arrays)

    def replay_rate(self) -> float:
        """The speed of `apply` here, in pairs times elements a second; a probe of milliseconds."""
        scratch = np.zeros((1024, _PROBE_ELEMENTS // 1024), dtype=np.float32)
        commit = Commit(
            np.arange(_PROBE_PAIRS, dtype=np.uint64),
            np.full(_PROBE_PAIRS, 1e-3, dtype=np.float32),
            0,
        )
        operands = Operands(0, self._distribution, self._rounding)
        seconds: list[float] = []
        for _ in range(2):  # the first may compile, or wake threads
            begin_s = time.perf_counter()
            materialize_array(scratch, scratch, [commit], operands, threads=self._threads)
            seconds.append(time.perf_counter() - begin_s)
        return _PROBE_ELEMENTS * _PROBE_PAIRS / min(seconds)

    def moved(self, commit: Commit) -> Adapter:
        """The adapter after one more `commit`, which is not applied; its trained arrays are new."""
        self._check()
        outs = [np.empty_like(array) for array in self._arrays]
        self._materialize(outs, self._arrays, [commit])
        named = {entry.name: out for entry, out in zip(self.manifest, outs, strict=True)}
        return {**self._frozen, **named}

    def digest(self) -> bytes:
        """Digest of the weights after `round` (see `weights_digest`), 32 bytes."""
        self._check()
        return array_weights_digest(self._arrays, self.manifest, threads=self._threads)

    def _materialize(
        self,
        outs: Sequence[npt.NDArray[np.float32]],
        sources: Sequence[npt.NDArray[np.float32]],
        commits: Sequence[Commit],
    ) -> None:
        for entry, out, source in zip(self.manifest, outs, sources, strict=True):
            operands = Operands(
                entry.tensor_id, self._distribution, self._rounding, 0, entry.columns, entry.name
            )
            materialize_array(out, source, commits, operands, threads=self._threads)

    def _check(self) -> None:
        if self._interrupted_round is not None:
            raise DivergedError(
                f"An error interrupted the commit of round {self._interrupted_round}, so these "
                "weights are no round's; start again from the base."
            )
