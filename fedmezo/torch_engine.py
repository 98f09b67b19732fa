"""What computes with torch: the base of a run, a worker's rows, and measurements on them."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo.genesis import GenesisLike, decode_genesis
from fedmezo.presets import (
    measured_sentence,
    parse_contract,
    unmeasured_rate,
    with_measured,
)
from fedmezo.run_policy import RunPolicy
from fedmezo.scorer import Scorer
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, CutShortError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.layered_settings import ROW_STATES_MAX
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.admission import check_worker_name
from fedmezo_core.wire.snapshots import file_name
from fedmezo_core.zo.assignment import (
    collate_for,
    measure,
    open_batches,
    open_estimator,
    open_row_states,
)
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.held_out import Evaluation, evaluate
from fedmezo_core.zo.data.rows import Example, read_rows, rows_of
from fedmezo_core.zo.data.task import Batch
from fedmezo_core.zo.forward.row_states import RowStates, SpooledRows
from fedmezo_core.zo.model.loading import SharedBases
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.objectives import Objective, Predictions
from fedmezo_core.zo.party import Party, open_party
from fedmezo_core.zo.plain.snapshot_header import read_snapshot
from fedmezo_core.zo.privacy.accounting import PrivacyBudget
from fedmezo_core.zo.privacy.private_measurements import PrivateMeasurements
from fedmezo_core.zo.probing.readings import probe_for_limits
from fedmezo_core.zo.snapshot_files import install_snapshot, write_snapshot

log = logging.getLogger("fedmezo.worker")

Rows = str | Path | Iterable[Mapping[str, Any]]
"""A worker's data: the path of a JSONL, CSV or Parquet file or of a folder of them, or rows as
mappings of column names to values, such as a list of dicts or a `datasets.Dataset`."""


_ORDINARY = RunPolicy()
"""Lets ordinary runs pass."""


class TorchEngine:
    """Computes with torch: it loads a run's base and a worker's rows, measures and applies commits.

    One thread at a time may use it, except for `cut_short`.
    """

    def __init__(
        self,
        genesis: GenesisLike,
        worker: str,
        model: str | Path,
        rows: Rows,
        *,
        heldout: Rows | None = None,
        columns: Mapping[str, str] | None = None,
        adapter: str | Path | None = None,
        objective: Callable[[Predictions], Any] | None = None,
        threads: int | None = None,
        device: str = "auto",
        device_memory_max_bytes: int | None = None,
        offload_folder: str | Path | None = None,
        frozen_base_bits: int | None = None,
        pass_tokens_max: int | None = None,
        row_states_max_bytes: int = ROW_STATES_MAX,
        policy: RunPolicy | None = _ORDINARY,
        privacy: PrivacyBudget | None = None,
        bases: SharedBases | None = None,
    ) -> None:
        """Load `model` (folder or hub name) and `rows` for `worker` in the run of `genesis`.

        The worker's name decides the order of its rows. `objective` scores batches in a run whose
        contract names one. `heldout` are rows to evaluate on. `columns` maps columns that the run
        names to their names in `rows` and `heldout`, where these are others. `policy` is what a
        run may ask of this machine; None: anything. `privacy` makes each measurement
        differentially private. Engines on one thread that train adapters and get the same `bases`
        keep a base that they have in common only once. The other arguments are settings of the same
        names of `fedmezo-worker`. Raises `ConfigError` before anything is read if the policy
        refuses the run, `MismatchError` if the base is not the run's, and what `open_party`,
        `read_rows` and `Task.encode` raise.
        """
        genesis = decode_genesis(genesis)
        config = genesis.config
        if policy is not None:
            policy.check(genesis, own_model=True, own_objective=True)
        # What is quick first: a wrong name or column should not cost a model's loading time.
        check_worker_name(worker)
        scored_by = _objective(config, objective)
        data = _Source(rows, columns or {})
        examples = data.read(config, keep_others=scored_by is not None)
        heldout_data = None if heldout is None else _Source(heldout, columns or {})
        heldout_examples = [] if heldout_data is None else heldout_data.read(config)
        log.info("loading %s", model)
        self.party = party = open_party(
            config,
            str(model),
            adapter=_path(adapter),
            threads=threads,
            placement=Placement(device, device_memory_max_bytes, _path(offload_folder)),
            frozen_base_bits=frozen_base_bits,
            bases=bases,
        )
        """The model, the task and the weights."""
        if policy is not None:
            policy.check_trained(party.loaded.manifest.element_count)
        party.check_same_base(genesis)
        self.heldout: Dataset | None = None
        """Held-out rows; None if none were given."""
        if heldout_data is not None:
            self.heldout = party.encode(heldout_data.name, heldout_examples)
        dataset = party.encode(data.name, examples)
        _check_positions(party, dataset)
        self.batches = open_batches(party, dataset, worker)
        """Which rows are measured on in which step; without `privacy`."""
        self._cut_short = threading.Event()
        self.scorer = None if scored_by is None else Scorer(scored_by, self._cut_short)
        """Calls the run's objective; None if the run has none."""
        self.row_states: RowStates | None = None
        """Kept results of the frozen part of the model; None if they are not kept."""
        if row_states_max_bytes:
            rows_taken = config.rounds * config.local_steps * config.batch_size
            self.row_states = open_row_states(
                party,
                SpooledRows(row_states_max_bytes),
                visits=rows_taken / self.batches.row_count,
                batch_size=config.batch_size,
            )
        self.estimator = open_estimator(
            party,
            threads=threads,
            pass_tokens_max=pass_tokens_max,
            objective=self.scorer,
            row_states=self.row_states,
            before_pass=self._end_if_cut_short,
        )
        """Measures along a direction."""
        self._private: PrivateMeasurements[Batch] | None = None
        if privacy is not None:
            self._private = PrivateMeasurements(
                privacy, genesis, self.estimator, collate_for(party), dataset
            )

    @property
    def base_form(self) -> str:
        """The form of the base that it measures with; empty for the base itself."""
        return self.party.base_form

    @property
    def model(self) -> nn.Module:
        """A transformers model, or its `PeftModel` in a LoRA run, with the weights as they are.

        Only commits may change them.
        """
        return self.party.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.party.loaded.tokenizer

    def apply(self, commits: Sequence[Committed]) -> None:
        """Fold commits into the weights, in one pass over them; raises `NumericError`."""
        self.party.weights.apply(commits[0].round, commits_of(commits))

    def measure(self, order: Measure) -> Measured:
        """Measure one assignment.

        Raises `MeasurementError` if a loss is not finite, the objective fails, or it was cut short;
        `PrivacyBudgetError` if the rows have given away what they may.
        """
        if self.scorer is not None:
            self.scorer.check_free()
        if self._private is not None:
            return self._private.measure_order(order, self.digest)
        return measure(self.party, self.estimator, self.batches, order, digest=self.digest)

    def digest(self) -> bytes:
        """The digest of the weights, 32 bytes."""
        return self.party.weights.digest()

    def evaluate(self, before_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Loss and accuracy of the weights as they are on the held-out rows.

        `before_batch` is called before each batch, and may raise to end the evaluation. Raises
        `ConfigError` if no held-out rows were given, `MeasurementError` if the loss is not finite.
        """
        if self.heldout is None:
            raise ConfigError("There are no held-out rows to evaluate on; give heldout.")
        return evaluate(
            self.party.task,
            self.model,
            self.heldout,
            # They fit into memory: a measurement takes each row of a batch at least twice.
            self.party.config.batch_size,
            before_batch=before_batch,
            around_batch=None
            if self.row_states is None
            else functools.partial(self.row_states.known, before_row=before_batch),
        )

    def save(self, folder: Path, head: bytes) -> Path:
        """Write the weights with their round and `head` into a safetensors file in `folder`.

        Raises `SnapshotError` if the disk refuses.
        """
        weights, run_id = self.party.weights, self.party.config.run_id
        saved = write_snapshot(
            folder, weights, run_id=run_id, head=head, weights_digest=self.digest()
        )
        return folder / file_name(run_id, saved.round)

    def restore(self, path: Path) -> tuple[int, bytes]:
        """Replace the weights by those of a snapshot; returns their round and head.

        `save`, or the coordinator's replica, wrote it to `path`. Raises `SnapshotDamagedError` if
        the weights are not what was saved, or another model's.
        """
        saved = read_snapshot(path, self.party.config.run_id)
        install_snapshot(path, self.party.weights, saved)
        return saved.round, saved.head

    def cut_short(self) -> None:
        """End the running measurement before its next pass; any thread may call this.

        Until `go_on`, every later measurement ends at once, too.
        """
        self._cut_short.set()

    def go_on(self) -> None:
        """Let measurements run again after `cut_short`."""
        self._cut_short.clear()

    def _end_if_cut_short(self) -> None:
        if self._cut_short.is_set():
            raise CutShortError("the round closed before the measurement ended")


def begin_run(
    contract: RunConfig | Mapping[str, Any],
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    rate_rows: Rows | None = None,
    columns: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> Genesis:
    """The genesis of a new run from a base model, which is loaded once for its digests.

    contract: a `RunConfig`, or its values as they stand under `[run]` in a TOML file, where
    `preset` may name a recipe. model: folder or hub name. adapter: folder of the LoRA adapter that
    the run begins from. rate_rows: rows like the workers', such as held-out ones. A contract that
    names no `learning_rate` takes a shorter one if these rows show that its own is too long for
    this model, and the `eps` that suits, if it names none. Without rows a warning says that
    nothing was measured. columns: as for `TorchEngine`.

    Raises `ConfigError` for a wrong contract, and for `rate_rows` of one that has its rate; as
    `read_rows` and `open_party`; `DataError` for too few rows, `MeasurementError` if they tell
    nothing.
    """
    given = contract.model_dump() if isinstance(contract, RunConfig) else contract
    has_rate = "learning_rate" in given
    if has_rate and rate_rows is not None:
        raise ConfigError(
            "rate_rows measure a learning_rate, and the contract has one, as a RunConfig always "
            "does; leave out either."
        )
    config = (
        contract
        if isinstance(contract, RunConfig)
        else parse_contract(contract, "the run's contract")
    )
    rows = None if rate_rows is None else _Source(rate_rows, columns or {}).read(config)
    party = open_party(config, str(model), adapter=_path(adapter), threads=threads)
    party.check_can_begin()
    genesis = party.genesis()
    if rows is not None:
        measured = probe_for_limits(
            party, rows, config.workers_expected, threads=threads, row_states_max=ROW_STATES_MAX
        )
        config = with_measured(genesis.config, measured, given)
        log.info("measured: %s", measured_sentence(genesis.config, config))
        return replace(genesis, config=config)
    if not has_rate:
        log.warning("%s", unmeasured_rate(config, "there are no rows for that; give rate_rows"))
    return genesis


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


class _Source:
    """Rows with a name for messages."""

    def __init__(self, rows: Rows, names: Mapping[str, str]) -> None:
        self._rows = rows
        self._names = names
        self.name = rows if isinstance(rows, (str, Path)) else "the data given"

    def read(self, config: RunConfig, *, keep_others: bool = False) -> list[Example]:
        if isinstance(self._rows, (str, Path)):
            log.info("reading %s", self._rows)
            return read_rows(self._rows, config.task, keep_others=keep_others, names=self._names)
        return rows_of(self._rows, config.task, keep_others=keep_others, names=self._names)


def _objective(config: RunConfig, given: Callable[[Predictions], Any] | None) -> Objective | None:
    """The objective that the contract names; the caller gives its function."""
    wanted = config.task.objective
    if given is None and not wanted:
        return None
    if not wanted:
        raise ConfigError(
            "The run scores batches by their loss, not by an objective; leave objective out."
        )
    if given is None:
        raise ConfigError(f"The run scores batches by {wanted}; give that function as objective.")
    return given if isinstance(given, Objective) else Objective(wanted, given)


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
