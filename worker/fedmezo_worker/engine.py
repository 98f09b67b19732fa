"""The engine: everything that touches weights or data, on one thread, away from the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import MeasurementError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.party import Party, commits_of, open_party
from fedmezo_core.zo.placement import Placement
from fedmezo_core.zo.rows import read_rows
from fedmezo_core.zo.task import Batches
from fedmezo_core.zo.weights import Weights
from fedmezo_worker.settings import WorkerSettings

Result = TypeVar("Result")


class CancelledMeasurementError(MeasurementError):
    """The measurement can no longer count and was cut short."""


class Engine:
    """Loads, measures, applies and digests; one thing at a time, in the order of the calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._cut_short = threading.Event()
        self._party: Party | None = None
        self._batches: Batches | None = None
        self._estimator: Estimator | None = None

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> Party:
        """Load model and data for the run; raises what is wrong with either."""
        self._party = await self._run(lambda: self._load(settings, genesis))
        return self._party

    async def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass."""
        await self._run(lambda: self._weights.apply(commits[0].round, commits_of(commits)))

    async def digest(self) -> bytes:
        """Digest of the weights, 32 bytes."""
        return await self._run(lambda: self._weights.digest())

    async def measure(self, order: Measure) -> Measured:
        """Measure one assignment; `MeasurementError` if a loss is no number or it was cut short."""
        self._cut_short.clear()
        return await self._run(lambda: self._measure(order))

    def cut_short(self) -> None:
        """Let the running measurement end at its next step."""
        self._cut_short.set()

    async def close(self) -> None:
        """Cut short what runs and wait for it."""
        self._cut_short.set()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ------------------------------------------------------------ on the engine's thread

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> Party:
        config = genesis.config
        # The data first: a wrong column should not cost a model's loading time.
        columns = (*config.task.columns(), _answer_column(config))
        rows = read_rows(settings.data, tuple(dict.fromkeys(columns)))
        party = open_party(
            config,
            settings.model or config.model,
            threads=settings.threads,
            placement=Placement(
                settings.device, settings.device_memory_max, settings.offload_folder
            ),
            frozen_base_bits=settings.frozen_base_bits,
        )
        party.check_same_base(genesis)
        self._batches = open_batches(party, rows, settings.name)
        self._estimator = open_estimator(party, threads=settings.threads)
        return party

    def _measure(self, order: Measure) -> Measured:
        assert self._party is not None
        assert self._estimator is not None
        assert self._batches is not None
        return measure(
            self._party,
            self._estimator,
            self._batches,
            order,
            digest=self._weights.digest,
            before_step=self._check_not_cut_short,
        )

    def _check_not_cut_short(self) -> None:
        if self._cut_short.is_set():
            raise CancelledMeasurementError("the round closed before the measurement ended")

    @property
    def _weights(self) -> Weights:
        assert self._party is not None, "load comes first"
        return self._party.weights


def _answer_column(config: RunConfig) -> str:
    task = config.task
    return task.label_column if task.kind == "classification" else task.response_column
