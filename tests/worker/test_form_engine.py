"""A worker that computes with a form of the base, and needs no torch for it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from fedmezo import Coordinator, Session
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, MeasurementError, ModelError, SnapshotDamagedError
from fedmezo_core.journal.journal import MemoryStore
from fedmezo_core.records import Committed, SeedRange
from fedmezo_core.wire.snapshots import file_name
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.edge.array_losses import EdgeBatch
from fedmezo_core.zo.edge.array_weights import Adapter
from fedmezo_core.zo.snapshot_files import write_snapshot
from fedmezo_worker import form_engine
from fedmezo_worker.form_engine import FormComputer, FormEngine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_command import check_paths, open_engine_thread
from fedmezo_worker.worker_settings import WorkerSettings
from tests.core.zo.conftest import make_tokenizer
from tests.core.zo.edge.conftest import (
    Run,
    base_folder,
    base_gguf,
    contract,
    order_of,
    rows,
    run_of,
)
from tests.integration.support.harness import served
from tests.library.dropped_records import drop_records, keep_snapshot

__all__ = ["base_folder", "base_gguf", "run_of"]
ROOT = Path(__file__).parents[2]
COMMIT = Committed(1, (SeedRange(9, (0.02, -0.03)),), rounding_seed=1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


class SumLosses:
    """Losses for tests: the sum of an adapter's absolute values."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None

    def __call__(self, adapters: Iterable[Adapter], _batch: EdgeBatch) -> list[float]:
        losses = []
        for adapter in adapters:
            losses.append(float(sum(abs(value).sum() for value in adapter.values())))
            self.before()
        return losses


@pytest.fixture
def run(run_of: Callable[[RunConfig], Run]) -> Run:
    return run_of(contract())


@pytest.fixture
def settings(run: Run, tmp_path: Path) -> WorkerSettings:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row.values) + "\n" for row in rows()))
    return WorkerSettings(name="w1", data=data, base_form=run.form, threads=1)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> SumLosses:
    made = SumLosses()
    monkeypatch.setattr(form_engine, "open_losses", lambda *_args, **_more: made)
    return made


@pytest.fixture
async def engine(
    settings: WorkerSettings, run: Run, losses: SumLosses
) -> AsyncIterator[FormEngine]:
    made = open_engine_thread(settings)
    assert isinstance(made, FormEngine)
    await made.load(settings, run.genesis)
    yield made
    await made.close()


async def test_it_follows_a_run_and_says_which_form_it_holds(engine: FormEngine, run: Run) -> None:
    assert [engine.base_form] == list(run.genesis.config.base_forms)
    assert engine.weights_bytes == run.party.weights.byte_count
    await engine.apply([COMMIT])
    run.party.weights.apply(1, commits_of([COMMIT]))
    assert await engine.digest() == run.party.weights.digest()
    measured = await engine.measure(order_of(run.genesis.config))
    assert len(measured.scalars.projected_grads) == 2
    assert await engine.replay_rate() > 0


class CoarseLosses(SumLosses):
    """Losses for tests: the sum of an adapter's values, in steps."""

    step = 1.0

    def __call__(self, adapters: Iterable[Adapter], batch: EdgeBatch) -> list[float]:
        signed = [sum(float(value.sum()) for value in adapter.values()) for adapter in adapters]
        return [round(loss / self.step) * self.step for loss in signed]


@pytest.mark.parametrize(("step", "says"), [(1.0, True), (1e-6, False)])
async def test_it_says_that_losses_are_too_coarse(
    settings: WorkerSettings,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: float,
    says: bool,
) -> None:
    coarse = CoarseLosses()
    coarse.step = step
    monkeypatch.setattr(form_engine, "open_losses", lambda *_args, **_more: coarse)
    engine = open_engine_thread(settings)
    await engine.load(settings, run.genesis)
    await engine.close()
    assert ("too coarse for the run's eps of 0.01" in caplog.text) is says


async def test_a_measurement_is_cut_short_between_points(
    engine: FormEngine, run: Run, losses: SumLosses
) -> None:
    losses.before = engine.cut_short
    with pytest.raises(MeasurementError, match="the round closed before the measurement ended"):
        await engine.measure(order_of(run.genesis.config))
    losses.before = lambda: None
    await engine.measure(order_of(run.genesis.config))


async def test_a_snapshot_replaces_the_weights(
    engine: FormEngine, run: Run, tmp_path: Path
) -> None:
    weights = run.party.weights
    weights.apply(1, commits_of([COMMIT]))
    snapshot = write_snapshot(
        tmp_path, weights, run_id="r", head=b"h" * 32, weights_digest=weights.digest()
    )
    path = tmp_path / file_name("r", 1)
    await engine.install(path, snapshot)
    assert await engine.digest() == weights.digest()
    await engine.apply([replace(COMMIT, round=2)])
    wrong = replace(snapshot, weights_digest=b"w" * 32)
    with pytest.raises(SnapshotDamagedError):
        await engine.install(path, wrong)
    with pytest.raises(RuntimeError, match="nothing is loaded"):
        await engine.digest()


async def test_it_evaluates_nothing(engine: FormEngine) -> None:
    with pytest.raises(ConfigError, match="leave heldout out"):
        await engine.evaluate()


async def test_a_runtime_that_is_not_installed_is_named(
    settings: WorkerSettings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    engine = open_engine_thread(settings)
    with pytest.raises(ModelError, match=r"install fedmezo\[llama-cpp\] to measure"):
        await engine.load(settings, run.genesis)
    await engine.close()


def test_a_folder_that_is_not_there_is_refused_at_once(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match="There is no folder"):
        check_paths(settings.model_copy(update={"base_form": Path("/nowhere")}))


def test_the_worker_loads_no_torch() -> None:
    code = (
        "import sys; from fedmezo_worker import agent, form_engine, worker_command; "
        "from fedmezo_core.zo.edge import llama_losses, onnx_losses; "
        "loaded = set(sys.modules) & {'torch', 'transformers', 'peft', 'accelerate'}; "
        "assert not loaded, loaded"
    )
    path = ":".join(map(str, (ROOT, ROOT / "proto", ROOT / "coordinator", ROOT / "worker")))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


async def test_over_grpc_it_ends_with_the_digest_of_the_torch_worker(
    settings: WorkerSettings, run: Run, losses: SumLosses, tmp_path: Path
) -> None:
    """The coordinator, which serves the run, knows by the hello which form of the base it holds."""
    config = run.genesis.config.model_copy(
        update={"rounds": 2, "workers_min": 2, "quorum": 2, "normalized_step": True}
    )
    genesis = replace(run.genesis, config=config)
    torch_settings = WorkerSettings(
        name="torch", data=settings.data, model=str(run.party.loaded.folder), threads=1
    )
    async with served(tmp_path / "run.journal", genesis) as coordinator:
        both = []
        for own in (settings, torch_settings):
            own = own.model_copy(update={"coordinator": coordinator.address})
            both.append((own, open_engine_thread(own)))
        await asyncio.gather(*(work(own, engine) for own, engine in both))
        digests = {await engine.digest() for _, engine in both}
    for _, engine in both:
        await engine.close()
    assert len(digests) == 1
    assert digests != {run.party.weights.digest()}


def test_a_late_session_begins_from_a_snapshot(
    settings: WorkerSettings, run: Run, losses: SumLosses, tmp_path: Path
) -> None:
    """The oldest commits were dropped; a session with torch and one without end alike."""
    config = run.genesis.config.model_copy(
        update={"rounds": 4, "workers_min": 1, "quorum": 1, "deadline_ms": 1000}
    )
    genesis, store = replace(run.genesis, config=config), MemoryStore()

    def with_torch(name: str) -> Session:
        return Session.open(genesis, name, run.party.loaded.folder, settings.rows, threads=1)

    def exchange(coordinator: Coordinator, session: Session, down: bytes = b"") -> bytes:
        return coordinator.exchange(session.exchange(down))

    coordinator, first = Coordinator(genesis, store), with_torch("first")
    down = b""
    while coordinator.round < 2:
        down = exchange(coordinator, first, down)
    first.exchange(down)
    assert first.round == 2
    drop_records(store, coordinator)
    keep_snapshot(store, first, tmp_path / "snapshots")
    coordinator = Coordinator(genesis, store, lease_ms=10**6, snapshots=tmp_path / "snapshots")
    late = {
        "torch": with_torch("torch"),
        "form": Session(genesis, "form", FormComputer(settings, genesis)),
    }
    downs = dict.fromkeys(late, b"")
    for name, session in late.items():
        for _ in range(3):  # The hello, the description, the file's only piece.
            downs[name] = exchange(coordinator, session, downs[name])
        assert session.engine.digest() == first.engine.digest()
    for second in range(20):
        coordinator.tick(second * 1000)  # The first worker's assignment comes to its deadline.
        for name, session in late.items():
            downs[name] = exchange(coordinator, session, downs[name])
    assert coordinator.digests.keys() == late.keys()
    assert len(set(coordinator.digests.values())) == 1
    assert set(coordinator.digests.values()) != {first.engine.digest()}


async def test_the_first_computer_is_gone_before_the_next_one_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: weakref.WeakSet[Computer] = weakref.WeakSet()

    class Computer:
        form_bytes = 0

        def __init__(self, *_: object) -> None:
            assert not held, "two models have no room"
            held.add(self)
            self._itself = self  # as an engine whose estimator calls it

        def cut_short(self) -> None:
            pass

    monkeypatch.setattr(form_engine, "FormComputer", Computer)
    settings = WorkerSettings(name="w", data=Path("rows"), base_form=run.form)
    engine = FormEngine()
    for _ in range(2):
        await engine.load(settings, run.genesis)
    await engine.close()
