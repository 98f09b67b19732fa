"""Which of the offered runs a worker serves, in which order, and what it says of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fedmezo import encode_genesis
from fedmezo.run_policy import RunPolicy
from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import (
    ConfigError,
    DataError,
    FedMezoError,
    MismatchError,
    RevokedError,
    UnavailableError,
    VersionError,
    WrongRunError,
)
from fedmezo_core.service.log_lines import shape_log
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire import reconnecting
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.data_sets import DataSet
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.offers import offered_runs
from fedmezo_worker.offers.offered_runs import OfferedRuns
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import config_of, genesis_of, until

PATIENCE_S = 10.0


def offer(run_id: str, **changes: Any) -> wire.RunOffer:
    genesis = genesis_of(config_of(run_id=run_id, **changes))
    return wire.RunOffer(run_id=run_id, genesis=encode_genesis(genesis))


class Offers:
    """Stands in for a client: it offers what the test sets."""

    def __init__(self) -> None:
        self.response = wire.OfferRunsResponse(revision=1, more_may_come=True)
        self.changed = asyncio.Event()
        self.wait_is_over = False
        self.error: FedMezoError | None = None
        self.declined: list[tuple[str, str]] = []
        self.task: asyncio.Task[None] | None = None
        self._end_was_seen = False

    async def ended(self) -> None:
        """Wait for the worker to end; raises its error."""
        assert self.task is not None
        self._end_was_seen = True
        await asyncio.wait_for(self.task, PATIENCE_S)

    def check_stayed(self) -> None:
        """Raise the error of a worker that ended without the test's knowledge."""
        assert self.task is not None
        if self.task.done() and not self._end_was_seen:
            self.task.result()

    def set(self, *offers: wire.RunOffer, more_may_come: bool = True) -> None:
        """Offer these runs from now on."""
        self.response = wire.OfferRunsResponse(
            revision=self.response.revision + 1, offers=offers, more_may_come=more_may_come
        )
        self.changed.set()

    async def answer_unchanged(self) -> None:
        """Answer one question as when the wait is over."""
        self.wait_is_over = True
        self.changed.set()
        await has(lambda: not self.wait_is_over, "the question")

    def fail(self, error: FedMezoError | None) -> None:
        """Let each question fail from now on, or none."""
        self.error = error
        self.changed.set()

    async def offered_runs(
        self, worker: str, revision: int = 0, wait_s: float = 0
    ) -> wire.OfferRunsResponse:
        while self.error is None and revision == self.response.revision:
            await self.changed.wait()
            self.changed.clear()
            if self.wait_is_over:
                self.wait_is_over = False
                return wire.OfferRunsResponse(revision=revision, more_may_come=True)
        if self.error is not None:
            raise self.error
        return self.response

    async def decline_run(self, worker: str, run_id: str, reason: str) -> None:
        if self.error is not None:
            raise self.error
        self.declined.append((run_id, reason))


class LoadedAtOnce:
    """Stands in for an engine: it has loaded as soon as it is there."""

    model_bytes = 100
    shared_bytes = 0
    idle_s = 0.0
    load_s = 0.0

    def __init__(self, thread: ThreadPoolExecutor | None = None) -> None:
        self.is_closed = False
        self.may_close = asyncio.Event()
        self.may_close.set()

    def another(self) -> LoadedAtOnce:
        return LoadedAtOnce()

    def cut_short(self) -> None:
        """It does nothing."""

    async def close(self) -> None:
        await self.may_close.wait()
        self.is_closed = True


class Agents:
    """Stands in for the class of agents; the test says how each run ends."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.engines: dict[str, LoadedAtOnce] = {}
        self.memories: list[SumMemory] = []
        self._ends: dict[str, asyncio.Future[None]] = {}

    def __call__(
        self,
        settings: WorkerSettings,
        engine: Any,
        *_: Any,
        run_id: str,
        sum_memory: SumMemory,
        **__: Any,
    ) -> Agents._One:
        self.memories.append(sum_memory)
        return self._One(self, run_id, engine)

    class _One:
        def __init__(self, agents: Agents, run_id: str, engine: LoadedAtOnce) -> None:
            self.agents, self.run_id, self.engine = agents, run_id, engine

        async def run(self) -> None:
            self.agents.began.append(self.run_id)
            self.agents.engines[self.run_id] = self.engine
            logging.getLogger("fedmezo.worker").info("takes part")
            await self.agents.end_of(self.run_id)

    def end_of(self, run_id: str) -> asyncio.Future[None]:
        future = self._ends.get(run_id)
        if future is None or future.done():
            future = self._ends[run_id] = asyncio.get_running_loop().create_future()
        return future

    def end(self, run_id: str, error: Exception | None = None) -> None:
        """End the agent of a run, as if the run was finished or by an error."""
        if error is None:
            self.end_of(run_id).set_result(None)
        else:
            self.end_of(run_id).set_exception(error)

    async def have_begun(self, *runs: str) -> None:
        async def begun() -> bool:
            return self.began == [*runs]

        await until(begun, f"the runs {runs} to begin; so far {self.began}", PATIENCE_S)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered_runs, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(offered_runs, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(offered_runs, "free_bytes", lambda _: 10**9)
    monkeypatch.setattr(reconnecting, "delay_s", lambda *_: 0.01)


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    made = Agents()
    monkeypatch.setattr(offered_runs, "Agent", made)
    return made


@asynccontextmanager
async def staying(settings: WorkerSettings, *first: wire.RunOffer) -> AsyncIterator[Offers]:
    """A worker that stays with a coordinator that offers these runs at first."""
    offers = Offers()
    offers.set(*first)
    offers.changed.clear()
    worker = OfferedRuns(
        settings,
        cast("EngineThread", LoadedAtOnce()),
        cast("CoordinatorClient", offers),
        None,
    )
    task = asyncio.create_task(worker.run(offers.response))
    offers.task = task
    try:
        yield offers
        offers.check_stayed()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(name="w1", data=tmp_path / "rows.jsonl")


async def has(holds: Callable[[], bool], what: str) -> None:
    async def holds_now() -> bool:
        return holds()

    await until(holds_now, what, PATIENCE_S)


async def test_runs_come_one_after_another_and_no_finished_one_is_joined_again(
    settings: WorkerSettings, agents: Agents
) -> None:
    async with staying(settings) as offers:
        for run_id in ("a", "b", "c"):
            offers.set(offer(run_id))
            await has(lambda run_id=run_id: agents.began[-1:] == [run_id], run_id)  # type: ignore[misc]
            agents.end(run_id)
            await has(lambda run_id=run_id: agents.engines[run_id].is_closed, "it to end")  # type: ignore[misc]
        await asyncio.sleep(0.1)
        assert agents.began == ["a", "b", "c"]
        # A new run of an old name is another run.
        offers.set(offer("c", rounds=9))
        await agents.have_begun("a", "b", "c", "c")


async def test_all_runs_have_one_memory_of_what_this_worker_has_put_into_sums(
    settings: WorkerSettings, agents: Agents
) -> None:
    """A run that gives way, or ends and comes back, begins with another session."""
    async with staying(settings, offer("a"), offer("b")) as offers:
        await agents.have_begun("a", "b")
        agents.end("a")
        await has(lambda: agents.engines["a"].is_closed, "it to end")
        offers.set(offer("a", rounds=9), offer("b"))
        await agents.have_begun("a", "b", "a")
    assert all(memory is agents.memories[0] for memory in agents.memories)


async def test_offers_stand_until_the_revision_is_another(
    settings: WorkerSettings, agents: Agents
) -> None:
    async with staying(settings, offer("a"), offer("b")) as offers:
        await agents.have_begun("a", "b")
        agents.end("a")
        await has(lambda: agents.engines["a"].is_closed, "it to end")
        await offers.answer_unchanged()
        await offers.answer_unchanged()  # By now it has looked at the first of the two.
        agents.end("b", RuntimeError("CUDA out of memory"))
        await has(lambda: [run_id for run_id, _ in offers.declined] == ["b"], "the refusal")
        offers.set(offer("a"), offer("b"), offer("c"))
        await agents.have_begun("a", "b", "c")


async def test_several_runs_are_served_at_a_time_and_the_log_names_them(
    settings: WorkerSettings,
    agents: Agents,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(caplog.handler, "formatter", caplog.handler.formatter)
    shape_log("text", "info")
    async with staying(settings, offer("a"), offer("b")):
        await agents.have_begun("a", "b")
    assert "run a: takes part" in caplog.text
    assert "run b: takes part" in caplog.text
    assert all(engine.is_closed for engine in agents.engines.values())


async def test_what_a_policy_refuses_is_told_once_and_the_others_go_on(
    settings: WorkerSettings, agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    strict = settings.model_copy(update={"policy": RunPolicy(rounds_max=10)})
    async with staying(strict, offer("long", rounds=11), offer("short")) as offers:
        await agents.have_begun("short")
        await has(lambda: bool(offers.declined), "the refusal")
        # Nothing new is said if only another run changes.
        offers.set(offer("long", rounds=11), offer("short"), offer("other"))
        await agents.have_begun("short", "other")
        assert [run_id for run_id, _ in offers.declined] == ["long"]
        assert "rounds = 11 is more than the 10 that this worker allows" in offers.declined[0][1]
        # The contract of a name is another one now.
        offers.set(offer("long", rounds=12), offer("short"), offer("other"))
        await has(lambda: len(offers.declined) == 2, "the second refusal")
    assert len([line for line in caplog.messages if "does not take part in run long" in line]) == 2


async def test_a_run_for_another_data_set_is_declined_without_a_word_about_those_here(
    tmp_path: Path, agents: Agents
) -> None:
    rows = tmp_path / "secret-rows.jsonl"
    settings = WorkerSettings(name="w1", data={"reviews": DataSet(path=rows)})
    async with staying(
        settings, offer("a", data_set="x-rays"), offer("b", data_set="reviews"), offer("c")
    ) as offers:
        await agents.have_begun("b", "c")  # c names none, and this worker has one
        await has(lambda: bool(offers.declined), "the refusal")
    [(run_id, said)] = offers.declined
    assert run_id == "a"
    assert said == (
        "The run is for the data set x-rays, and this worker has none of that name; add "
        "[data.x-rays] to its settings if it has such rows."
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            DataError("Row 7 of /secret/rows.jsonl has no label."),
            "Worker w1 cannot serve this run (DataError); its log says why.",
        ),
        (
            RuntimeError("CUDA out of memory"),
            "Worker w1 cannot serve this run (RuntimeError); its log says why.",
        ),
        (MismatchError("The base weights loaded here differ."), "The base weights loaded here "),
    ],
)
async def test_one_run_that_fails_is_told_without_rows_or_paths_and_the_others_go_on(
    settings: WorkerSettings,
    agents: Agents,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
) -> None:
    async with staying(settings, offer("bad"), offer("good")) as offers:
        await agents.have_begun("bad", "good")
        agents.end("bad", error)
        await has(lambda: bool(offers.declined), "the refusal")
        assert offers.declined[0][0] == "bad"
        assert offers.declined[0][1].startswith(told)
        assert not agents.engines["good"].is_closed
        await asyncio.sleep(0.1)
        assert agents.began == ["bad", "good"]
        # What was wrong may have been mended.
        monkeypatch.setattr(offered_runs, "TRY_AGAIN_AFTER_S", 0.0)
        agents.end("good", error)
        await has(lambda: agents.began[2:3] == ["good"], "another try")


async def test_offers_that_make_no_sense_are_no_runs(
    settings: WorkerSettings, agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    forged, other = offer("a"), offer("b")
    forged.run_id = "a\nWARNING forged"
    other.run_id = "c"
    garbage = wire.RunOffer(run_id="d", genesis=b"garbage")
    async with staying(settings, forged, other, garbage, offer("good")) as offers:
        await agents.have_begun("good")
        await has(lambda: len(offers.declined) == 2, "the refusals")
    assert {run_id for run_id, _ in offers.declined} == {"c", "d"}
    assert "forged" not in caplog.text


async def test_it_stays_through_an_outage_and_says_again_what_it_declined(
    settings: WorkerSettings, agents: Agents
) -> None:
    strict = settings.model_copy(update={"policy": RunPolicy(rounds_max=10)})
    async with staying(strict, offer("long", rounds=11)) as offers:
        await has(lambda: len(offers.declined) == 1, "the refusal")
        offers.fail(UnavailableError("No coordinator answers."))
        await asyncio.sleep(0.2)
        # An older coordinator, for a while.
        offers.fail(VersionError("What answers is of another version."))
        await asyncio.sleep(0.1)
        offers.fail(None)
        offers.set(offer("long", rounds=11), offer("new"))
        await agents.have_begun("new")
        await has(lambda: len(offers.declined) == 2, "the refusal, again")


async def test_it_gives_up_only_if_that_is_set(settings: WorkerSettings, agents: Agents) -> None:
    patient = WorkerSettings(name="w1", data=settings.data, give_up_after_s=0.1)
    async with staying(patient) as offers:
        offers.fail(UnavailableError("No coordinator answers."))
        with pytest.raises(UnavailableError, match="No coordinator"):
            await offers.ended()


async def test_an_error_of_the_worker_itself_ends_it(
    settings: WorkerSettings, agents: Agents
) -> None:
    async with staying(settings, offer("a")) as offers:
        await agents.have_begun("a")
        offers.fail(RevokedError("The key of w1 is no member's."))
        with pytest.raises(RevokedError):
            await offers.ended()
    assert agents.engines["a"].is_closed


async def test_it_ends_once_no_other_run_may_come(settings: WorkerSettings, agents: Agents) -> None:
    async with staying(settings, offer("a")) as offers:
        await agents.have_begun("a")
        offers.set(offer("a"), more_may_come=False)
        await asyncio.sleep(0.1)
        agents.end("a")
        await offers.ended()


async def test_a_file_for_one_run_is_refused(tmp_path: Path, agents: Agents) -> None:
    rows, copy, found = (tmp_path / name for name in ("rows.jsonl", "copy.db", "found.jsonl"))
    for path in (rows, copy, found):
        path.touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"journal_copy": copy}, "journal_copy"),
        (
            {"data": {"reviews": DataSet(path=rows, heldout=rows, evaluations=found)}},
            "data.reviews.evaluations",
        ),
    ]
    for changes, key in cases:
        values: dict[str, Any] = {"name": "w1", "data": rows} | changes
        async with staying(WorkerSettings(**values)) as offers:
            with pytest.raises(ConfigError, match=f"^{key} = .* is one file, but"):
                await offers.ended()


async def test_a_folder_for_a_file_of_each_run_is_made(
    settings: WorkerSettings, agents: Agents, tmp_path: Path
) -> None:
    folders = {"journal_copy": tmp_path / "kept/copies", "evaluations": tmp_path / "found.d"}
    async with staying(settings.model_copy(update=folders), offer("a")):
        await agents.have_begun("a")
    assert all(folder.is_dir() for folder in folders.values())


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, agents: Agents) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    async with staying(WorkerSettings(name="w1", data=rows, journal_copy=rows / "in")) as offers:
        with pytest.raises(ConfigError, match=r"^journal_copy = .* cannot be made as a folder"):
            await offers.ended()


# ---------------------------------------------------------------- room


async def test_runs_beyond_models_max_wait_for_room(
    settings: WorkerSettings, agents: Agents
) -> None:
    narrow = settings.model_copy(update={"models_max": 1})
    async with staying(narrow, offer("a"), offer("b"), offer("c")):
        await agents.have_begun("a")
        await asyncio.sleep(0.1)
        agents.end("a")
        await agents.have_begun("a", "b")


async def test_the_memory_says_how_many_models_have_room(
    settings: WorkerSettings, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered_runs, "free_bytes", lambda _: 199)  # not twice the 100 of a model
    async with staying(settings, offer("a"), offer("b")):
        await agents.have_begun("a")
        await asyncio.sleep(0.1)
        assert agents.began == ["a"]
        monkeypatch.setattr(offered_runs, "free_bytes", lambda _: 201)
        await agents.have_begun("a", "b")


async def test_a_base_that_is_in_memory_needs_no_room_again(
    settings: WorkerSettings, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered_runs, "free_bytes", lambda _: 120)
    lora = LoraConfig(rank=2, alpha=4, target_modules=("c_attn",))
    async with staying(settings, offer("a", lora=lora)) as offers:
        await agents.have_begun("a")
        agents.engines["a"].shared_bytes = 90
        offers.set(offer("a", lora=lora), offer("whole"), offer("other", lora=lora, model="x"))
        await asyncio.sleep(0.1)
        assert agents.began == ["a"]
        offers.set(offer("a", lora=lora), offer("b", lora=lora))
        await agents.have_begun("a", "b")


@pytest.mark.parametrize("reason", ["idle", "its turn is over"])
async def test_a_run_gives_its_room_to_one_that_waits_and_gets_it_back(
    settings: WorkerSettings, agents: Agents, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    narrow = settings.model_copy(update={"models_max": 1})
    async with staying(narrow, offer("a"), offer("b")):
        await agents.have_begun("a")
        await asyncio.sleep(0.1)
        assert agents.began == ["a"]
        if reason == "idle":
            agents.engines["a"].idle_s = 61.0
        else:
            monkeypatch.setattr(offered_runs, "TURN_S", 0.2)
        await has(lambda: agents.began[:2] == ["a", "b"], "b to begin")
        assert agents.engines["a"].is_closed
        if reason == "idle":
            agents.end("b")
        await has(lambda: agents.began[:3] == ["a", "b", "a"], "a to come back")


@pytest.mark.parametrize("error", [None, WrongRunError("Run a was deleted here; stop.")])
async def test_a_new_run_with_the_name_of_one_that_ends_is_begun(
    settings: WorkerSettings, agents: Agents, error: FedMezoError | None
) -> None:
    """The end of a deleted run is no reason to stay out of the run that took its name."""
    async with staying(settings, offer("a")) as offers:
        await agents.have_begun("a")
        offers.set(offer("a", rounds=9))
        await offers.answer_unchanged()
        assert agents.began == ["a"]
        agents.end("a", error)
        await agents.have_begun("a", "a")
        assert offers.declined == []


async def test_a_run_that_gave_way_is_looked_at_again(
    settings: WorkerSettings, agents: Agents
) -> None:
    """Its name may be another run's by the time it has ended."""
    narrow = settings.model_copy(update={"models_max": 1, "policy": RunPolicy(rounds_max=10)})
    async with staying(narrow, offer("a"), offer("b")) as offers:
        await agents.have_begun("a")
        engine = agents.engines["a"]
        engine.may_close.clear()
        engine.idle_s = 61.0
        offers.set(offer("a", rounds=11), offer("b"))
        await offers.answer_unchanged()
        engine.may_close.set()
        await agents.have_begun("a", "b")
        await has(lambda: bool(offers.declined), "the refusal")
        assert "rounds = 11 is more than the 10 that this worker allows" in offers.declined[0][1]


@pytest.mark.parametrize("models_max", [None, 2])
async def test_a_run_that_never_has_its_model_keeps_no_other_from_its_turn(
    settings: WorkerSettings,
    agents: Agents,
    monkeypatch: pytest.MonkeyPatch,
    models_max: int | None,
) -> None:
    monkeypatch.setattr(LoadedAtOnce, "model_bytes", 0)
    settings = settings.model_copy(update={"models_max": models_max})
    async with staying(settings, offer("stuck")) as offers:
        await agents.have_begun("stuck")
        agents.engines["stuck"].idle_s = 1000.0
        if models_max is not None:
            offers.set(offer("stuck"), offer("other"))
            await agents.have_begun("stuck", "other")
            agents.engines["other"].model_bytes = 100
        offers.set(offer("stuck"), offer("other"), offer("waits"))
        await asyncio.sleep(0.1)
        assert "waits" not in agents.began
        monkeypatch.setattr(offered_runs, "TURN_S", 0.2)
        await has(lambda: "waits" in agents.began, "the run that waits to begin")
        assert agents.engines["stuck"].is_closed


async def test_a_loaded_run_does_not_give_way_while_another_one_loads(
    settings: WorkerSettings, agents: Agents
) -> None:
    """Its room would not help: what loads takes an amount that nobody knows yet."""
    async with staying(settings, offer("loaded")) as offers:
        await agents.have_begun("loaded")
        offers.set(offer("loaded"), offer("loads"))
        await agents.have_begun("loaded", "loads")
        agents.engines["loads"].model_bytes = 0
        agents.engines["loaded"].idle_s = 1000.0
        offers.set(offer("loaded"), offer("loads"), offer("waits"))
        await asyncio.sleep(0.1)
        assert agents.began == ["loaded", "loads"]
        assert not agents.engines["loaded"].is_closed
        agents.engines["loads"].model_bytes = 100
        await agents.have_begun("loaded", "loads", "waits")


async def test_two_runs_do_not_share_a_privacy_ledger_at_once(
    tmp_path: Path, agents: Agents
) -> None:
    rows = DataSet(
        path=tmp_path / "rows.jsonl",
        privacy_epsilon=1.0,
        privacy_clip=1.0,
        privacy_ledger=tmp_path / "ledger",
    )
    settings = WorkerSettings(name="w1", data={"reviews": rows})
    async with staying(settings, offer("a"), offer("b")):
        await agents.have_begun("a")
        await asyncio.sleep(0.1)
        assert agents.began == ["a"]
        agents.end("a")
        await agents.have_begun("a", "b")


def test_a_genesis_of_a_run_has_its_own_settings(tmp_path: Path) -> None:
    """Files of each run lie in the folders that the settings name; nothing from the wire is one."""
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    genesis = genesis_of(config_of(run_id="a", model="/etc/passwd", data_set="reviews"))
    settings = WorkerSettings(
        name="w1",
        data={"reviews": DataSet(path=rows, columns={"text": "body"}, objective="")},
        models={genesis.base_digest.hex(): base},
        journal_copy=tmp_path,
    )
    ours = settings.for_run(genesis)
    assert (ours.rows, ours.columns, ours.model) == (rows, {"text": "body"}, str(base))
    assert ours.journal_copy == tmp_path / "a.db"
    assert ours.for_run(genesis) is ours
    with pytest.raises(ConfigError, match="is no name on the hub"):
        settings.for_run(replace(genesis, base_digest=b"o" * 32))
