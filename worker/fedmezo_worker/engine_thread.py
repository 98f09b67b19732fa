"""All work on weights and data, on a thread of its own, not on the event loop's."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self, TypeVar

from fedmezo_core.errors import SnapshotDamagedError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

Result = TypeVar("Result")


class Computer(Protocol):
    """What computes, as a `fedmezo.Engine`, and can be cut short."""

    @property
    def base_form(self) -> str:
        """The form of the base that it measures with; empty for the base itself."""

    def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights."""

    def measure(self, order: Measure) -> Measured:
        """Measure one assignment; raises `MeasurementError`."""

    def digest(self) -> bytes:
        """The digest of the weights, 32 bytes."""

    def cut_short(self) -> None:
        """End the running measurement before its next pass; any thread may call this."""

    def go_on(self) -> None:
        """Let measurements run again after `cut_short`."""


class HeldWeights(Protocol):
    """The weights that a computer holds."""

    @property
    def byte_count(self) -> int:
        """Bytes of the trained tensors."""

    def replay_rate(self) -> float:
        """The speed of applying commits, in pairs times elements a second."""


class EvaluationCutShortError(Exception):
    """Something more urgent came."""


class EngineThread(ABC):
    """Loads, measures, applies, digests and evaluates: one at a time, in the order of the calls.

    Engines on one thread take turns: it does their work in the order in which they ask.
    """

    def __init__(self, thread: ThreadPoolExecutor | None = None) -> None:
        """Start with nothing loaded, on the `thread` of others or one of its own."""
        self._owns_thread = thread is None
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._evaluation_cut_short = threading.Event()
        self.load_s = 0.0
        """How long the newest load took."""
        self.model_bytes = 0
        """Bytes of the whole model; 0 until it is loaded."""
        self.shared_bytes = 0
        """Those of them that runs with an adapter on the same base have in common."""
        self._used_s = time.monotonic()

    def another(self) -> Self:
        """An engine of the same kind with nothing loaded, on the same thread."""
        return type(self)(self._thread)

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """Load model and data for the run; raises what is wrong with either."""
        await self._run(lambda: self._load_alone(settings, genesis))

    async def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass over them."""
        await self._run(lambda: self._computer.apply(commits))

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
        return await self._run(lambda: self._computer.digest())

    def measure(self, order: Measure) -> Awaitable[Measured]:
        """Measure one assignment; the call itself queues the work, before it is awaited.

        Raises `MeasurementError` if a loss is not finite, the objective fails, or it was cut short.
        """
        self._computer.go_on()
        return self._on_thread(lambda: self._computer.measure(order))

    def set_deadline(self, deadline_s: float) -> None:
        """Set when an objective must be done, by `time.monotonic`; a running one must obey, too."""
        del deadline_s  # Not every engine has one.

    def cut_short(self) -> None:
        """End the running measurement before its next pass, without waiting for its objective."""
        if self._has_loaded:
            self._computer.cut_short()

    def evaluate(self) -> asyncio.Future[HeldOutResult | None]:
        """Evaluate the weights on the worker's held-out rows; None if it was cut short.

        The call itself queues the work, before it is awaited. Raises `MeasurementError` if the loss
        is not finite, and `ConfigError` if there are no held-out rows.
        """
        self._evaluation_cut_short.clear()
        return self._on_thread(self._evaluate)

    def cut_evaluation_short(self) -> None:
        """End the running evaluation at its next batch."""
        self._evaluation_cut_short.set()

    async def close(self) -> None:
        """Cut short what runs, wait for it, and let go of what is loaded."""
        self.cut_short()
        self.cut_evaluation_short()
        if self._owns_thread:
            await asyncio.to_thread(self._thread.shutdown)
        else:
            await self._run(self._forget_all)

    @property
    def base_form(self) -> str:
        """The form of the base that it measures with; empty for the base itself."""
        return self._computer.base_form

    @property
    def weights_bytes(self) -> int:
        """Bytes of the trained tensors."""
        return self._weights.byte_count

    @property
    def idle_s(self) -> float:
        """Seconds since it last did anything, or was made."""
        return time.monotonic() - self._used_s

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await self._on_thread(work)

    def _on_thread(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Queue `work`, whose log lines say what those of the caller do."""
        context = contextvars.copy_context()

        def use() -> Result:
            try:
                return context.run(work)
            finally:
                self._used_s = time.monotonic()

        return asyncio.get_running_loop().run_in_executor(self._thread, use)

    # ------------------------------------------------------------ on the engine's thread

    @property
    @abstractmethod
    def _has_loaded(self) -> bool:
        """Whether there is a computer."""

    @property
    @abstractmethod
    def _computer(self) -> Computer:
        """What was loaded for the run."""

    @property
    @abstractmethod
    def _weights(self) -> HeldWeights:
        """The weights of what was loaded."""

    @abstractmethod
    def _load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """Load for the run, and note `model_bytes` and `shared_bytes`; raises what is wrong."""

    @abstractmethod
    def _forget(self) -> None:
        """Have nothing loaded any more."""

    @abstractmethod
    def _take(self, path: Path, snapshot: Snapshot) -> None:
        """Replace the weights by the snapshot's; raises `SnapshotDamagedError`."""

    @abstractmethod
    def _evaluated(self, before_batch: Callable[[], None]) -> HeldOutResult:
        """Evaluate on the held-out rows; calls `before_batch` before each batch."""

    def _load_alone(self, settings: WorkerSettings, genesis: Genesis) -> None:
        self._forget_all()  # This engine has room for one model at a time.
        began_s = time.monotonic()
        self._load(settings, genesis)
        self.load_s = time.monotonic() - began_s

    def _forget_all(self) -> None:
        self.model_bytes = self.shared_bytes = 0
        self._forget()
        gc.collect()

    def _install(self, path: Path, snapshot: Snapshot) -> None:
        try:
            self._take(path, snapshot)
        except SnapshotDamagedError:
            self._forget_all()
            raise

    def _evaluate(self) -> HeldOutResult | None:
        def go_on() -> None:
            if self._evaluation_cut_short.is_set():
                raise EvaluationCutShortError

        try:
            return self._evaluated(go_on)
        except EvaluationCutShortError:
            return None
