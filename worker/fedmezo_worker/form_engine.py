"""The engine of a worker that computes with a form of the base, without torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedmezo_core.errors import ConfigError, CutShortError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.edge.array_weights import ArrayWeights
from fedmezo_core.zo.edge.base_form import BaseForm, check_can_take_forms, read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine, Losses
from fedmezo_core.zo.plain.snapshot_header import read_snapshot
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")


class FormComputer:
    """An `EdgeEngine` on the runtime of its form, which can be cut short between two points."""

    def __init__(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """Load the form and the rows that `settings` name; raises what is wrong with either."""
        settings = settings.for_run(genesis)
        assert settings.base_form is not None
        # What is quick first: a wrong name or column should not cost a model's loading time.
        check_can_take_forms(genesis.config)
        rows = read_rows(settings.rows, genesis.config.task, names=settings.columns)
        form = read_form(settings.base_form, genesis)
        self.base_form = form.name
        self.form_bytes = sum(file.stat().st_size for file in settings.base_form.iterdir())
        """Bytes of the form's files."""
        self._run_id = genesis.config.run_id
        self._cut_short = threading.Event()
        self._engine = EdgeEngine(
            genesis,
            settings.name,
            form,
            open_losses(form, threads=settings.threads, gpu_layers=settings.gpu_layers),
            rows,
            threads=settings.threads,
            before_pass=self._end_if_cut_short,
            privacy=settings.privacy_budget,
        )
        if sentence := self._engine.noise_sentence():
            log.warning("%s", sentence)

    @property
    def weights(self) -> ArrayWeights:
        """The trained matrices."""
        return self._engine.weights

    def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights."""
        self._engine.apply(commits)

    def measure(self, order: Measure) -> Measured:
        """Measure one assignment; raises `MeasurementError` if it cannot, or was cut short."""
        return self._engine.measure(order)

    def digest(self) -> bytes:
        """The digest of the weights, 32 bytes."""
        return self._engine.digest()

    def restore(self, path: Path) -> tuple[int, bytes]:
        """Replace the weights by those of the snapshot at `path`; returns their round and head.

        Raises `SnapshotDamagedError` if it is not one of this run.
        """
        saved = read_snapshot(path, self._run_id)
        self.weights.restore(path, saved)
        return saved.round, saved.head

    def cut_short(self) -> None:
        """End the running measurement before its next point; any thread may call this."""
        self._cut_short.set()

    def go_on(self) -> None:
        """Let measurements run again after `cut_short`."""
        self._cut_short.clear()

    def _end_if_cut_short(self) -> None:
        if self._cut_short.is_set():
            raise CutShortError("the round closed before the measurement ended")


def open_losses(form: BaseForm, *, threads: int | None, gpu_layers: int) -> Losses:
    """Load what gives the losses of `form`; raises `ModelError` if it is not installed."""
    if form.description.kind == "onnx":
        from fedmezo_core.zo.edge.onnx_losses import OnnxLosses

        return OnnxLosses(form, threads=threads)
    from fedmezo_core.zo.edge.llama_losses import LlamaLosses

    return LlamaLosses(form, threads=threads, gpu_layers=gpu_layers)


class FormEngine(EngineThread):
    """Computes with a form of the base."""

    def __init__(self, thread: ThreadPoolExecutor | None = None) -> None:
        """Start with nothing loaded; `thread` as for `EngineThread`."""
        super().__init__(thread)
        self._loaded: FormComputer | None = None

    @property
    def _has_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def _computer(self) -> FormComputer:
        if self._loaded is None:
            raise RuntimeError("nothing is loaded; await `load` first")
        return self._loaded

    @property
    def _weights(self) -> ArrayWeights:
        return self._computer.weights

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        self._loaded = FormComputer(settings, genesis)
        self.model_bytes = self._loaded.form_bytes

    def _forget(self) -> None:
        self._loaded = None

    def _take(self, path: Path, snapshot: Snapshot) -> None:
        self._weights.restore(path, snapshot)

    def _evaluated(self, before_batch: Callable[[], None]) -> HeldOutResult:
        raise ConfigError("A worker with base_form evaluates nothing; leave heldout out.")
