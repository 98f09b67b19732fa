"""One run: its inputs, its result, and where that is kept.

A finished run is kept under the hash of everything that its result depends on, so that an
interrupted series of runs goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from benchmarks.machine import Machine
from experiments.first_order import FedAvg, FirstOrder
from experiments.in_memory_federation import LOST, InMemoryFederation
from experiments.judging import Judge, Point, write_whole
from experiments.starting_point import Data, Settings, load_data
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, FedMezoError, ModelError
from fedmezo_core.layered_settings import ROW_STATES_MAX
from fedmezo_core.program import run_program
from fedmezo_core.zo.assignment import open_row_states
from fedmezo_core.zo.export import write_adapter
from fedmezo_core.zo.fitting import fit_adapter
from fedmezo_core.zo.forward.row_states import SpooledRows
from fedmezo_core.zo.model.allocator import keep_freed_memory
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.party import open_party

ROOT: Final = Path(__file__).parents[1]
KEPT: Final = Path("build/experiments")
CODE: Final = (
    "proto/fedmezo_proto/v1/*.proto",
    "fedmezo_core/**/*.py",
    "coordinator/fedmezo_coordinator/**/*.py",
    "worker/fedmezo_worker/*.py",
    *(
        f"experiments/{name}.py"
        for name in ("in_memory_federation", "first_order", "judging", "runs", "starting_point")
    ),
)
"""Sources that a result depends on."""


class RunError(FedMezoError):
    """A run's process failed."""


class Run(BaseModel):
    """One training run: all that its result depends on, apart from code, model and data."""

    model_config = ConfigDict(frozen=True)

    settings: Settings
    config: RunConfig
    first_order: FirstOrder | None = None
    """If given, the run is federated averaging of back-propagated steps instead of FedMeZO."""


class Result(BaseModel):
    """The result of a run."""

    run: Run
    curve: list[Point]
    """Held-out results by round, all on the same rows, which may be a part of all."""
    whole: list[Point]
    """Results on all held-out rows: before the first round and, if reached, after the last."""
    train_losses: list[float]
    """Mean losses over the workers' batches, by round from 1."""
    rounds: int
    """Number of rounds done."""
    ended: str
    """Why the run ended before its last round; empty if it did not."""
    workers: int
    bytes_up: int
    """Bytes from all workers: messages for FedMeZO, trained weights for averaging."""
    bytes_down: int
    forwards: int
    """Forward passes of one batch, by all workers."""
    forward_rows: int
    """Rows of all these passes; a row counts once in each pass that it is in."""
    backwards: int
    workers_cpu_s: float
    """CPU seconds of all workers' measurements or local steps."""
    apply_cpu_s: float
    """CPU seconds that each worker takes to apply all commits and digest its weights."""
    judging_cpu_s: float
    wall_s: float
    """Seconds with evaluations, without loading the model."""
    trained_elements: int
    trained_bytes: int
    head: str
    """Head of the journal, as hexadecimal digits; empty for averaging."""
    machine: str


def execute(run: Run, folder: Path | None = None) -> Result:
    """Do a run; if it cannot go on, that is its result. `folder` keeps the base's evaluations."""
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as ledgers:
        return _execute(run, folder, Path(ledgers))


def _execute(run: Run, folder: Path | None, ledgers: Path) -> Result:
    keep_freed_memory()
    settings, config = run.settings, run.config
    data = load_data(settings, config.task)
    party = open_party(
        config,
        settings.model,
        adapter=fitted_adapter(settings, config, data),
        threads=settings.threads,
        placement=Placement(settings.device),
    )
    rows = KeptRows(run, folder) if folder else SpooledRows(ROW_STATES_MAX)
    row_states = open_row_states(party, rows, visits=math.inf, batch_size=config.batch_size)
    judge = Judge(
        party,
        data.heldout,
        every_rounds=settings.evaluate_every_rounds,
        batch_size=settings.evaluate_batch_size,
        curve_rows=settings.curve_rows,
        generated_tokens_max=settings.generated_tokens_max,
        row_states=row_states,
        kept=folder,
    )
    method: InMemoryFederation | FedAvg = (
        InMemoryFederation(
            party,
            data.clients,
            judge=judge,
            threads=settings.threads,
            pass_tokens_max=settings.pass_tokens_max,
            row_states=row_states,
            privacy=settings.privacy_budget(ledgers),
            attack=settings.attack,
            attackers=settings.attackers,
        )
        if run.first_order is None
        else FedAvg(party, data.clients, run.first_order, judge=judge, row_states=row_states)
    )
    begin = time.perf_counter()
    ended = ""
    try:
        method.run()
    except LOST as error:
        ended = f"{type(error).__name__}: {error}"
    genesis = party.genesis()
    return Result(
        run=run,
        curve=judge.curve,
        whole=judge.whole,
        train_losses=[
            sum(losses) / len(losses) for _, losses in sorted(method.train_losses.items())
        ],
        rounds=method.round,
        ended=ended,
        workers=len(data.clients),
        bytes_up=method.bytes_up,
        bytes_down=method.bytes_down,
        forwards=method.forwards,
        forward_rows=method.forward_rows,
        backwards=0 if isinstance(method, InMemoryFederation) else method.forwards,
        workers_cpu_s=method.working_s,
        apply_cpu_s=method.applying_s,
        judging_cpu_s=judge.seconds,
        wall_s=time.perf_counter() - begin,
        trained_elements=genesis.trainable_elements,
        trained_bytes=genesis.trainable_bytes,
        head=method.journal.head.hex() if isinstance(method, InMemoryFederation) else "",
        machine=Machine(execution_device(party.loaded.model)).describe(),
    )


# ---------------------------------------------------------------- kept results


def fitted_adapter(settings: Settings, config: RunConfig, data: Data) -> Path | None:
    """Fit an adapter to `data.fitting`, for a run that freezes A; returns its folder.

    None for any other run. Runs that agree in all that the adapter depends on share one.
    """
    if config.lora is None or not config.lora.freeze_a:
        return None
    if not data.fitting:
        raise ConfigError(
            f"lora.freeze_a needs rows to fit the adapter to, and {settings.data} leaves none; "
            "raise fit_rows (a domain gives at most a tenth of its rows), or leave out freeze_a."
        )
    depends = [settings.model, settings.data, settings.fit_rows, settings.heldout_per_label]
    placement = Placement(settings.device)
    text = f"{depends} {placement} {config.lora!r} {config.task!r} {_code_hash()}"
    folder = KEPT / "adapters" / hashlib.sha256(text.encode()).hexdigest()[:24]
    if not folder.exists():
        party = open_party(config, settings.model, threads=settings.threads, placement=placement)
        fit_adapter(party, data.fitting)
        try:
            write_adapter(party.loaded, folder, ModelCard(config.model, config.run_id))
        except ModelError:
            # Another run's process was faster.
            if not folder.exists():
                raise
    return folder


def key_of(run: Run) -> str:
    """Hash the run, the sources, the versions, the model and the data."""
    hashed = hashlib.sha256()
    for part in (
        run.model_dump_json(),
        _code_hash(),
        _files_hash(run.settings.model),
        _files_hash(run.settings.data),
        ", ".join(_versions()),
    ):
        hashed.update(hashlib.sha256(part.encode()).digest())
    return hashed.hexdigest()[:24]


def kept(run: Run, folder: Path = KEPT) -> Result | None:
    """Return the result of an equal run that was finished before, if there is one."""
    path = folder / f"{key_of(run)}.json"
    return Result.model_validate_json(path.read_text()) if path.exists() else None


def execute_and_keep(run: Run, folder: Path = KEPT) -> None:
    """Do a run and write its result into `folder`, whole or not at all."""
    result = execute(run, folder)
    write_whole(folder / f"{key_of(run)}.json", result.model_dump_json(indent=1))


class KeptRows:
    """A `RowStore` for all runs on one model: its frozen part gives a row the same state in all."""

    def __init__(self, run: Run, folder: Path) -> None:
        """Keep the rows below `folder`, in a folder for the run's model and precision."""
        facts = (_files_hash(run.settings.model), run.config.dtype, *_versions())
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        self._folder = folder / "rows" / name

    def get(self, key: bytes) -> bytes | None:
        """Return what was put under `key`, or None."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: bytes, body: bytes) -> None:
        """Keep `body` under `key`; another run's process may do the same."""
        write_whole(self._path(key), body)

    def _path(self, key: bytes) -> Path:
        return self._folder / key.hex()[:2] / f"{key.hex()}.bin"


class Processes:
    """Does each run in its own process, because a process keeps the memory that a model took.

    The processes end with this one.
    """

    def __init__(self, folder: Path = KEPT) -> None:
        self._folder = folder
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def result(self, run: Run) -> Result:
        """Do a run and wait for its result; raises `RunError` if its process failed."""
        if self._ended:
            raise RunError("The experiment was interrupted.")
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.runs", str(self._folder)],
            stdin=subprocess.PIPE,
            text=True,
            # One thread each: as many of them run as there are cores.
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._running.add(process)
        process.communicate(run.model_dump_json())
        self._running.discard(process)
        result = kept(run, self._folder)
        if process.returncode or result is None:
            raise RunError(
                f"A run ended with status {process.returncode}; its output is above. Finished runs "
                "are kept."
            )
        return result

    def end(self) -> None:
        """End all running processes."""
        self._ended = True
        for process in list(self._running):
            process.terminate()


@functools.cache
def _code_hash() -> str:
    hashed = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            hashed.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return hashed.hexdigest()


def _versions() -> tuple[str, str]:
    return f"torch {torch.__version__}", f"transformers {transformers.__version__}"


@functools.cache
def _files_hash(folder: str) -> str:
    """Hash a folder's files: their contents, or size and time of change if they are large."""
    hashed = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            facts = path.stat()
            large = facts.st_size > 1 << 24
            content = f"{facts.st_mtime_ns}".encode() if large else path.read_bytes()
            hashed.update(f"{path.relative_to(folder)}\0{facts.st_size}\0".encode() + content)
    return hashed.hexdigest()


if __name__ == "__main__":
    sys.exit(
        run_program(
            "experiments",
            lambda: execute_and_keep(Run.model_validate_json(sys.stdin.read()), Path(sys.argv[1])),
        )
    )
