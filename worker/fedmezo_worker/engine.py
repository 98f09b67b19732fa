"""The engine: everything that touches weights or data, on one thread, away from the event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, SnapshotDamagedError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator, open_row_states
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.data.task import Dataset
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.row_states import RowStates, SpooledRows
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.objectives import Objective, load_objective
from fedmezo_core.zo.party import Party, commits_of, open_party
from fedmezo_core.zo.snapshot_files import install_snapshot
from fedmezo_core.zo.weights import Weights
from fedmezo_worker.evaluations import HeldOutResult
from fedmezo_worker.scorer import CancelledMeasurementError, Scorer
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")

Result = TypeVar("Result")


class _EvaluationCutShortError(Exception):
    """Something more urgent came."""


class Engine:
    """Loads, measures, applies, digests and evaluates; one thing at a time, in the order of the calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._cut_short = threading.Event()
        self._evaluation_cut_short = threading.Event()
        self._party: Party | None = None
        self._batches: Batches | None = None
        self._heldout: Dataset | None = None
        self._estimator: Estimator | None = None
        self._scorer: Scorer | None = None
        self._row_states: RowStates | None = None

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> Party:
        """Load model and data for the run; raises what is wrong with either."""
        self._party = await self._run(lambda: self._load(settings, genesis))
        return self._party

    async def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass."""
        await self._run(lambda: self._weights.apply(commits[0].round, commits_of(commits)))

    async def replay_rate(self) -> float:
        """Pairs times trained elements a second that `apply` reaches, by a short probe."""
        return await self._run(lambda: self._weights.replay_rate())

    async def install(self, path: Path, snapshot: Snapshot) -> None:
        """Let the weights be a snapshot's.

        `SnapshotDamagedError` if they are not what was recorded; then nothing is loaded any more.
        """
        await self._run(lambda: self._install(path, snapshot))

    async def digest(self) -> bytes:
        """Digest of the weights, 32 bytes."""
        return await self._run(lambda: self._weights.digest())

    async def measure(self, order: Measure) -> Measured:
        """Measure one assignment.

        `MeasurementError` if a loss is no number, the objective fails, or it was cut short.
        """
        self._cut_short.clear()
        return await self._run(lambda: self._measure(order))

    def set_deadline(self, deadline_s: float) -> None:
        """Until when, by `time.monotonic`, an objective may take; holds for a running measurement too."""
        if self._scorer is not None:
            self._scorer.deadline_s = deadline_s

    def cut_short(self) -> None:
        """Let the running measurement end before its next pass, without its objective if that is running."""
        self._cut_short.set()

    def evaluate(self) -> asyncio.Future[HeldOutResult | None]:
        """Evaluate the weights on the worker's held-out rows; None if it was cut short.

        It is in the order of the calls at once, not only when it is awaited. `MeasurementError` if the
        loss is no number.
        """
        self._evaluation_cut_short.clear()
        return asyncio.get_running_loop().run_in_executor(self._thread, self._evaluate)

    def cut_evaluation_short(self) -> None:
        """Let the running evaluation end at its next batch."""
        self._evaluation_cut_short.set()

    async def close(self) -> None:
        """Cut short what runs and wait for it."""
        self._cut_short.set()
        self._evaluation_cut_short.set()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ------------------------------------------------------------ on the engine's thread

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> Party:
        config = genesis.config
        # What is quick first: a wrong name or column should not cost a model's loading time.
        objective = _objective(settings, config)
        columns = (*config.task.columns(), _answer_column(config))
        columns = tuple(dict.fromkeys(columns))
        rows = read_examples(settings.data, columns, keep_others=objective is not None)
        heldout_rows = [] if settings.heldout is None else read_examples(settings.heldout, columns)
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
        if settings.heldout is not None:
            self._heldout = _encoded(party, settings.heldout, heldout_rows)
        dataset = _encoded(party, settings.data, rows)
        _check_positions(party, dataset)
        self._batches = open_batches(party, dataset, settings.name)
        self._scorer = None if objective is None else Scorer(objective, self._cut_short)
        self._row_states = None
        if settings.row_states_max:
            rows_taken = config.rounds * config.local_steps * config.batch_size
            self._row_states = open_row_states(
                party,
                SpooledRows(settings.row_states_max),
                visits=rows_taken / self._batches.row_count,
                batch_size=config.batch_size,
            )
        self._estimator = open_estimator(
            party,
            threads=settings.threads,
            pass_tokens_max=settings.pass_tokens_max,
            objective=self._scorer,
            row_states=self._row_states,
            before_pass=self._end_if_cut_short,
        )
        return party

    def _install(self, path: Path, snapshot: Snapshot) -> None:
        try:
            install_snapshot(path, self._weights, snapshot)
        except SnapshotDamagedError:
            self._party = self._batches = self._estimator = self._scorer = self._row_states = None
            raise

    def _measure(self, order: Measure) -> Measured:
        assert self._party is not None
        assert self._estimator is not None
        assert self._batches is not None
        if self._scorer is not None:
            self._scorer.check_free()
        return measure(
            self._party,
            self._estimator,
            self._batches,
            order,
            digest=self._weights.digest,
        )

    def _evaluate(self) -> HeldOutResult | None:
        party, heldout, row_states = self._party, self._heldout, self._row_states
        assert party is not None
        assert heldout is not None, "the settings name no held-out rows"

        def go_on() -> None:
            if self._evaluation_cut_short.is_set():
                raise _EvaluationCutShortError

        try:
            result = evaluate(
                party.task,
                party.loaded.model,
                heldout,
                # There is room for these: a measurement takes each row of a batch at least twice.
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
        assert self._party is not None, "load comes first"
        return self._party.weights


def _encoded(party: Party, path: Path, rows: Sequence[Example]) -> Dataset:
    dataset = party.task.encode(rows)
    cut = ""
    if dataset.truncated_count:
        cut = f", {dataset.truncated_count} of them cut to {party.config.task.tokens_max} tokens"
    log.info("%s: %d rows%s", path, len(dataset), cut)
    return dataset


def _answer_column(config: RunConfig) -> str:
    task = config.task
    return task.label_column if task.kind == "classification" else task.response_column


def _objective(settings: WorkerSettings, config: RunConfig) -> Objective | None:
    """The run's objective, whose code runs only if this worker's operator named it too."""
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
    """Refuse to generate behind the last position that the model knows."""
    generated = party.config.task.generated_tokens_max
    longest = max(len(example.prompt) for example in dataset.examples)
    model_config: Any = party.loaded.model.config
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if generated and positions is not None and longest + generated > positions:
        raise ConfigError(
            f"A prompt of {longest} tokens and {generated} generated ones don't fit the model's "
            f"{positions} positions; lower tokens_max or generated_tokens_max."
        )
