"""The engine: all work on weights and data, on one thread of its own, not on the event loop's."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, SnapshotDamagedError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator, open_row_states
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.row_states import RowStates, SpooledRows
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.objectives import Objective, load_objective
from fedmezo_core.zo.party import Party, open_party
from fedmezo_core.zo.snapshot_files import install_snapshot
from fedmezo_core.zo.weights import Weights
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.scorer import CancelledMeasurementError, Scorer
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")

Result = TypeVar("Result")


class _EvaluationCutShortError(Exception):
    """Something more urgent came."""


@dataclass(frozen=True)
class Loaded:
    """Model and data of a run, and what measures and evaluates with them."""

    party: Party
    batches: Batches[Batch]
    heldout: Dataset | None
    """None: the settings name no held-out rows."""
    scorer: Scorer | None
    """Calls the run's objective; None if the run has none."""
    row_states: RowStates | None
    estimator: Estimator


class Engine:
    """Loads, measures, applies, digests and evaluates: one at a time, in the order of the calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._cut_short = threading.Event()
        self._evaluation_cut_short = threading.Event()
        self._loaded: Loaded | None = None

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """Load model and data for the run; raises what is wrong with either."""
        self._loaded = await self._run(lambda: self._load(settings, genesis))

    async def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass over them."""
        await self._run(lambda: self._weights.apply(commits[0].round, commits_of(commits)))

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
        return await self._run(lambda: self._weights.digest())

    async def measure(self, order: Measure) -> Measured:
        """Measure one assignment.

        Raises `MeasurementError` if a loss is not finite, the objective fails, or it was cut short.
        """
        self._cut_short.clear()
        return await self._run(lambda: self._measure(order))

    def set_deadline(self, deadline_s: float) -> None:
        """Set when an objective must be done, by `time.monotonic`; a running one must obey, too."""
        if self.loaded.scorer is not None:
            self.loaded.scorer.deadline_s = deadline_s

    def cut_short(self) -> None:
        """End the running measurement before its next pass, without waiting for its objective."""
        self._cut_short.set()

    def evaluate(self) -> asyncio.Future[HeldOutResult | None]:
        """Evaluate the weights on the worker's held-out rows; None if it was cut short.

        The call itself queues the work, before it is awaited. Raises `MeasurementError` if the loss
        is not finite, and `ConfigError` if the settings name no held-out rows.
        """
        self._evaluation_cut_short.clear()
        return asyncio.get_running_loop().run_in_executor(self._thread, self._evaluate)

    def cut_evaluation_short(self) -> None:
        """End the running evaluation at its next batch."""
        self._evaluation_cut_short.set()

    async def close(self) -> None:
        """Cut short what runs and wait for it."""
        self._cut_short.set()
        self._evaluation_cut_short.set()
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def loaded(self) -> Loaded:
        """What was loaded for the run."""
        if self._loaded is None:
            raise RuntimeError("nothing is loaded; await `load` first")
        return self._loaded

    @property
    def base_form(self) -> str:
        """The form of the base that it measures with; empty for the base itself."""
        return self.loaded.party.base_form

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ------------------------------------------------------------ on the engine's thread

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> Loaded:
        config = genesis.config
        # What is quick first: a wrong name or column should not cost a model's loading time.
        objective = _objective(settings, config)
        log.info("reading %s", settings.data)
        rows = read_rows(settings.data, config.task, keep_others=objective is not None)
        heldout_rows = [] if settings.heldout is None else read_rows(settings.heldout, config.task)
        log.info("loading %s", settings.model or config.model)
        party = open_party(
            config,
            settings.model or config.model,
            adapter=settings.adapter,
            threads=settings.threads,
            placement=Placement(
                settings.device, settings.device_memory_max, settings.offload_folder
            ),
            frozen_base_bits=settings.frozen_base_bits,
        )
        party.check_same_base(genesis)
        heldout = None
        if settings.heldout is not None:
            heldout = party.encode(settings.heldout, heldout_rows)
        dataset = party.encode(settings.data, rows)
        _check_positions(party, dataset)
        batches = open_batches(party, dataset, settings.name)
        scorer = None if objective is None else Scorer(objective, self._cut_short)
        row_states = None
        if settings.row_states_max:
            rows_taken = config.rounds * config.local_steps * config.batch_size
            row_states = open_row_states(
                party,
                SpooledRows(settings.row_states_max),
                visits=rows_taken / batches.row_count,
                batch_size=config.batch_size,
            )
        estimator = open_estimator(
            party,
            threads=settings.threads,
            pass_tokens_max=settings.pass_tokens_max,
            objective=scorer,
            row_states=row_states,
            before_pass=self._end_if_cut_short,
        )
        return Loaded(party, batches, heldout, scorer, row_states, estimator)

    def _install(self, path: Path, snapshot: Snapshot) -> None:
        try:
            install_snapshot(path, self._weights, snapshot)
        except SnapshotDamagedError:
            self._loaded = None
            raise

    def _measure(self, order: Measure) -> Measured:
        loaded = self.loaded
        if loaded.scorer is not None:
            loaded.scorer.check_free()
        return measure(
            loaded.party, loaded.estimator, loaded.batches, order, digest=self._weights.digest
        )

    def _evaluate(self) -> HeldOutResult | None:
        party, row_states = self.loaded.party, self.loaded.row_states
        if self.loaded.heldout is None:
            raise ConfigError("The settings name no held-out rows; set heldout.")

        def go_on() -> None:
            if self._evaluation_cut_short.is_set():
                raise _EvaluationCutShortError

        try:
            result = evaluate(
                party.task,
                party.loaded.model,
                self.loaded.heldout,
                # They fit into memory: a measurement takes each row of a batch at least twice.
                party.config.batch_size,
                before_batch=go_on,
                around_batch=None
                if row_states is None
                else functools.partial(row_states.known, before_row=go_on),
            )
        except _EvaluationCutShortError:
            return None
        return HeldOutResult(
            party.weights.round, result.loss, result.accuracy, result.auc, result.row_count
        )

    def _end_if_cut_short(self) -> None:
        if self._cut_short.is_set():
            raise CancelledMeasurementError("the round closed before the measurement ended")

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


def _check_positions(party: Party, dataset: Dataset) -> None:
    """Refuse prompts and answers that together exceed the positions that the model knows."""
    generated = party.config.task.generated_tokens_max
    longest = max(len(example.prompt) for example in dataset.examples)
    positions = party.positions_max
    if generated and positions is not None and longest + generated > positions:
        raise ConfigError(
            f"A prompt of {longest} tokens and {generated} generated ones don't fit the model's "
            f"{positions} positions; lower tokens_max or generated_tokens_max."
        )
