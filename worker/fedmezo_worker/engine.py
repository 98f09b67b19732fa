"""The engine: all work on weights and data, on one thread of its own, not on the event loop's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fedmezo.torch_engine import TorchEngine
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, SnapshotDamagedError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.objectives import Objective, load_objective
from fedmezo_core.zo.snapshot_files import install_snapshot
from fedmezo_core.zo.weights import Weights
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

Result = TypeVar("Result")


class _EvaluationCutShortError(Exception):
    """Something more urgent came."""


class Engine:
    """Loads, measures, applies, digests and evaluates: one at a time, in the order of the calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._evaluation_cut_short = threading.Event()
        self._loaded: TorchEngine | None = None

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """Load model and data for the run; raises what is wrong with either."""
        self._loaded = await self._run(lambda: self._load(settings, genesis))

    async def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass over them."""
        await self._run(lambda: self.loaded.apply(commits))

    async def replay_rate(self) -> float:
        """Pairs times trained elements per second that `apply` reaches, by a short probe."""
        return await self._run(lambda: self._weights.replay_rate())

    async def install(self, path: Path, snapshot: Snapshot) -> None:
        """Replace the weights by the snapshot's, whose file is at `path`.

        Raises `SnapshotDamagedError` if they are not what was recorded; then nothing is loaded any
        more.
        """
        await self._run(lambda: self._install(path, snapshot))

    async def digest(self) -> bytes:
        """Return the digest of the weights, 32 bytes."""
        return await self._run(lambda: self.loaded.digest())

    async def measure(self, order: Measure) -> Measured:
        """Measure one assignment.

        Raises `MeasurementError` if a loss is not finite, the objective fails, or it was cut short.
        """
        self.loaded.go_on()
        return await self._run(lambda: self.loaded.measure(order))

    def set_deadline(self, deadline_s: float) -> None:
        """Set when an objective must be done, by `time.monotonic`; a running one must obey, too."""
        if self.loaded.scorer is not None:
            self.loaded.scorer.deadline_s = deadline_s

    def cut_short(self) -> None:
        """End the running measurement before its next pass, without waiting for its objective."""
        if self._loaded is not None:
            self._loaded.cut_short()

    def evaluate(self) -> asyncio.Future[HeldOutResult | None]:
        """Evaluate the weights on the worker's held-out rows; None if it was cut short.

        The call itself queues the work, before it is awaited. Raises `MeasurementError` if the loss
        is not finite, and `ConfigError` if there are no held-out rows.
        """
        self._evaluation_cut_short.clear()
        return asyncio.get_running_loop().run_in_executor(self._thread, self._evaluate)

    def cut_evaluation_short(self) -> None:
        """End the running evaluation at its next batch."""
        self._evaluation_cut_short.set()

    async def close(self) -> None:
        """Cut short what runs and wait for it."""
        self.cut_short()
        self.cut_evaluation_short()
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def loaded(self) -> TorchEngine:
        """What was loaded for the run."""
        if self._loaded is None:
            raise RuntimeError("nothing is loaded; await `load` first")
        return self._loaded

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ------------------------------------------------------------ on the engine's thread

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> TorchEngine:
        return TorchEngine(
            genesis,
            settings.name,
            settings.model or genesis.config.model,
            settings.data,
            heldout=settings.heldout,
            adapter=settings.adapter,
            objective=_objective(settings, genesis.config),
            threads=settings.threads,
            device=settings.device,
            device_memory_max_bytes=settings.device_memory_max,
            offload_folder=settings.offload_folder,
            frozen_base_bits=settings.frozen_base_bits,
            pass_tokens_max=settings.pass_tokens_max,
            row_states_max_bytes=settings.row_states_max,
        )

    def _install(self, path: Path, snapshot: Snapshot) -> None:
        try:
            install_snapshot(path, self._weights, snapshot)
        except SnapshotDamagedError:
            self._loaded = None
            raise

    def _evaluate(self) -> HeldOutResult | None:
        def go_on() -> None:
            if self._evaluation_cut_short.is_set():
                raise _EvaluationCutShortError

        try:
            result = self.loaded.evaluate(go_on)
        except _EvaluationCutShortError:
            return None
        return HeldOutResult(
            self._weights.round, result.loss, result.accuracy, result.auc, result.row_count
        )

    @property
    def _weights(self) -> Weights:
        return self.loaded.party.weights


def _objective(settings: WorkerSettings, config: RunConfig) -> Objective | None:
    """Load the run's objective; its code runs only if this worker's operator named it too."""
    wanted, trusted = config.task.objective, settings.objective
    if wanted == trusted:
        return load_objective(wanted) if wanted else None
    if not wanted:
        raise ConfigError(
            f"The run scores batches by their loss, not by {trusted}; start this worker without "
            "--objective."
        )
    raise ConfigError(
        f"The run scores batches by {wanted}; start this worker with --objective {wanted} if you "
        "trust that code."
    )
