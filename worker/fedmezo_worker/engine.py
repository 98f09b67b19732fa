"""The engine of a worker that computes with torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import nn

from fedmezo.torch_engine import TorchEngine
from fedmezo_core.config import how_to_name_a_copy, is_folder_name
from fedmezo_core.errors import MismatchError, ModelError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.model.loading import SharedBases, folder_of_hub_name
from fedmezo_core.zo.objectives import load_objective
from fedmezo_core.zo.snapshot_files import install_snapshot
from fedmezo_core.zo.weights import Weights
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")


class Engine(EngineThread):
    """Computes with torch."""

    def __init__(self, thread: ThreadPoolExecutor | None = None) -> None:
        """Start with nothing loaded; `thread` as for `EngineThread`."""
        super().__init__(thread)
        self._bases = SharedBases()
        self._loaded: TorchEngine | None = None

    def another(self) -> Self:
        """An engine with nothing loaded, on the same thread, with the same bases."""
        made = super().another()
        made._bases = self._bases
        return made

    @property
    def loaded(self) -> TorchEngine:
        """What was loaded for the run."""
        if self._loaded is None:
            raise RuntimeError("nothing is loaded; await `load` first")
        return self._loaded

    def set_deadline(self, deadline_s: float) -> None:
        """Set when an objective must be done, by `time.monotonic`; a running one must obey, too."""
        if self.loaded.scorer is not None:
            self.loaded.scorer.deadline_s = deadline_s

    @property
    def _has_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def _computer(self) -> TorchEngine:
        return self.loaded

    @property
    def _weights(self) -> Weights:
        return self.loaded.party.weights

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        self._loaded = open_engine(settings, genesis, self._bases)
        base = self._loaded.party.loaded.base
        self.model_bytes = _bytes_of(self._loaded.model)
        self.shared_bytes = 0 if base is None else _bytes_of(base.model)

    def _forget(self) -> None:
        self._loaded = None

    def _forget_all(self) -> None:
        super()._forget_all()
        torch.cuda.empty_cache()  # For other programs on the device; nothing without CUDA.

    def _take(self, path: Path, snapshot: Snapshot) -> None:
        install_snapshot(path, self._weights, snapshot)

    def _evaluated(self, before_batch: Callable[[], None]) -> HeldOutResult:
        result = self.loaded.evaluate(before_batch)
        return HeldOutResult(
            self._weights.round, result.loss, result.accuracy, result.auc, result.row_count
        )


def _bytes_of(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())


def open_engine(
    settings: WorkerSettings, genesis: Genesis, bases: SharedBases | None = None
) -> TorchEngine:
    """Load what a worker with these settings computes with; `bases` as for `TorchEngine`.

    Raises what `WorkerSettings.for_run`, `folder_of_hub_name` and `TorchEngine` do.
    """
    settings = settings.for_run(genesis)
    policy, config = settings.policy, genesis.config
    return TorchEngine(
        genesis,
        settings.name,
        settings.model or _folder_of(config.model, policy.disk_max),
        settings.rows,
        heldout=settings.heldout,
        columns=settings.columns,
        adapter=settings.adapter,
        objective=load_objective(config.task.objective) if config.task.objective else None,
        threads=settings.threads,
        device=settings.device,
        device_memory_max_bytes=settings.device_memory_max,
        offload_folder=settings.offload_folder,
        frozen_base_bits=settings.frozen_base_bits,
        pass_tokens_max=settings.pass_tokens_max,
        row_states_max_bytes=settings.row_states_max,
        policy=policy,
        privacy=settings.privacy_budget,
        bases=bases,
    )


def _folder_of(model: str, bytes_max: int) -> Path:
    """The folder of a run's model that these settings do not name."""
    try:
        return folder_of_hub_name(model, bytes_max)
    except ModelError as error:
        if not is_folder_name(model):
            raise
        # Unlike other errors with models, this one is told to the coordinator's operator in full.
        log.info("%s", error)
        raise MismatchError(
            f"This worker cannot load the run's model = {model!r}. It is a folder of the "
            "coordinator, or a model on the hub. For a folder, name this worker's own copy: "
            f"{how_to_name_a_copy(model)}. For the hub, this worker's log says why."
        ) from None
