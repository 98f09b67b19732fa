"""How a run of many begins, is begun again and ends, whoever goes away or fails meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs import many_runs, preparing, run_folder
from fedmezo_coordinator.runs.many_runs import ManyRuns, opened_runs
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import NotReadyError, RunExistsError, WrongRunError
from fedmezo_core.folders import sync
from fedmezo_core.records import Genesis
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.coordinator.runs.hosting_runs import hosted, settings_toml
from tests.integration.support.harness import genesis_of, until


class NoReplica:
    """Stands for the supervisor of a replica that never says anything."""

    def __init__(self, *_: object) -> None:
        """Takes what the supervisor takes."""

    async def keep(self) -> None:
        """Run until cancelled."""
        await asyncio.Event().wait()


@pytest.mark.parametrize("waits", [True, False])
async def test_a_run_does_not_wait_for_a_replica_that_waits_for_its_turn(
    waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ReplicaSupervisor", NoReplica)
    changes = {"rounds": 1, "workers_min": 4, "quorum": 3}
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(
            hosted(tmp_path / "runs", monkeypatch, replicas_max=1 if waits else 2)
        )
        await at.create("first", replica=True)
        await at.create("second", replica=True, **changes)
        first = await stack.enter_async_context(at.worker("first"))
        await first.open()
        await first.assigned()
        hands = [
            await stack.enter_async_context(at.worker("second", name))
            for name in ("w1", "w2", "w3", "w4")
        ]
        for hand in hands:
            await hand.open()
        for hand, digest64 in zip(hands, (1, 1, 1, 2), strict=True):
            await hand.answer(await hand.assigned(), weights_digest64=digest64)
        if waits:  # Nobody rebuilds its weights, so its workers decide.
            await hands[0].next("finished")
        else:
            await asyncio.sleep(0.3)
            assert (await at.summary("second")).round == 0


@asynccontextmanager
async def many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ManyRuns]:
    """The runs in `folder`, without the service before them."""

    async def describe(_: CoordinatorSettings, config: RunConfig, _step: object) -> Genesis:
        return genesis_of(config)

    monkeypatch.setattr(preparing, "describe_base", describe)
    settings = CoordinatorSettings.model_validate({"runs": folder})
    with opened_runs(settings, folder, SessionLimit(), "") as runs:
        serving = asyncio.create_task(runs.serve())
        try:
            yield runs
        finally:
            serving.cancel()
            await runs.close()


async def in_phase(runs: ManyRuns, run_id: str, phase: str) -> None:
    """Wait until a run is in a phase."""

    async def is_there() -> bool:
        with suppress(WrongRunError):
            return runs.find(run_id).phase == wire.RunPhase.Value(f"RUN_PHASE_{phase}")
        return False

    await until(is_there, f"run {run_id} to be {phase}")


class Held:
    """Holds up a function that another thread calls, until the caller has gone away."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.is_called, self.may_go_on = threading.Event(), threading.Event()
        self.has_returned = threading.Event()

    def __call__(self, *args: Any) -> Any:
        self.is_called.set()
        self.may_go_on.wait(20)
        self.result = self._function(*args)
        self.has_returned.set()
        return self.result

    async def leave(self, call: asyncio.Task[Any]) -> None:
        """Cancel a call once the function was called, then let the function go on."""
        await asyncio.to_thread(self.is_called.wait, 20)
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        self.may_go_on.set()


async def test_a_run_is_created_though_its_caller_has_gone_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(run_folder.make_folder)
    monkeypatch.setattr(many_runs, "make_folder", held)
    async with many(tmp_path / "runs", monkeypatch) as runs:
        await held.leave(asyncio.create_task(runs.create(settings_toml("one"), [], "ana")))
        await in_phase(runs, "one", "RUNNING")
        assert await runs.create(settings_toml("one"), [], "ana") == "one"


async def test_a_stop_finishes_what_was_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(run_folder.make_folder)
    monkeypatch.setattr(many_runs, "make_folder", held)
    async with many(tmp_path / "runs", monkeypatch) as runs:
        await held.leave(asyncio.create_task(runs.create(settings_toml("one"), [], "ana")))
    async with many(tmp_path / "runs", monkeypatch) as runs:
        await in_phase(runs, "one", "RUNNING")


async def test_the_folder_of_a_run_that_was_not_begun_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"

    def full(path: Path) -> None:
        if path == root:
            raise OSError(28, "No space left on device")
        sync(path)

    async with many(root, monkeypatch) as runs:
        with monkeypatch.context() as patched:
            patched.setattr(run_folder, "sync", full)
            with pytest.raises(NotReadyError, match="No space left"):
                await runs.create(settings_toml("one"), [], "ana")
        assert (root / "one").exists()
        with pytest.raises(RunExistsError, match="holds another run"):
            await runs.create(settings_toml("one", rounds=9), [], "ana")
        assert await runs.create(settings_toml("one"), [], "ana") == "one"
        await in_phase(runs, "one", "RUNNING")


async def test_a_run_is_deleted_though_its_caller_has_gone_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    async with many(root, monkeypatch) as runs:
        await runs.create(settings_toml("one"), [], "ana")
        await in_phase(runs, "one", "RUNNING")
        run = runs.find("one")
        await runs.stop(run, "it is enough")
        held = Held(runs._note)
        monkeypatch.setattr(runs, "_note", held)
        await held.leave(asyncio.create_task(runs.delete(run, "ana")))

        async def is_gone() -> bool:
            return not runs.hosted() and not (root / "one").exists()

        await until(is_gone, "the run to be deleted")


async def test_a_run_that_cannot_be_deleted_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(13, "Permission denied")

    async with many(tmp_path / "runs", monkeypatch) as runs:
        await runs.create(settings_toml("one"), [], "ana")
        await in_phase(runs, "one", "RUNNING")
        run = runs.find("one")
        await runs.stop(run, "it is enough")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", refuse)
            with pytest.raises(NotReadyError, match=r"one cannot be deleted \(Permission denied\)"):
                await runs.delete(run, "ana")
        assert run.phase == wire.RUN_PHASE_FAILED
        assert "cannot be deleted (Permission denied)" in run.reason
        await runs.resume(run, 1.0)
        await in_phase(runs, "one", "FINISHED")
        await runs.delete(run, "ana")
        assert not runs.hosted()


@pytest.mark.parametrize("order", ["resume", "delete"])
async def test_an_order_to_a_run_that_fails_waits_until_its_journal_is_closed(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, may_close, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    close, serve = Daemon.close, Daemon.serve

    async def slow_close(self: Daemon) -> None:
        closing.set()
        await may_close.wait()
        await close(self)
        closed.set()

    async def failing(self: Daemon) -> None:
        raise OSError(5, "Input/output error")

    async with many(tmp_path / "runs", monkeypatch) as runs:
        monkeypatch.setattr(Daemon, "close", slow_close)
        monkeypatch.setattr(Daemon, "serve", failing)
        await runs.create(settings_toml("one"), [], "ana")
        await asyncio.wait_for(closing.wait(), 20)
        run = runs.find("one")
        assert run.failure
        monkeypatch.setattr(Daemon, "serve", serve)
        ordered = runs.resume(run, 1.0) if order == "resume" else runs.delete(run, "ana")
        call = asyncio.create_task(ordered)
        await asyncio.sleep(0.1)
        assert not call.done()
        may_close.set()
        await asyncio.wait_for(call, 20)
        assert closed.is_set()
        if order == "resume":
            await in_phase(runs, "one", "RUNNING")
        else:
            assert not runs.hosted()


async def test_a_failed_run_that_two_resume_is_begun_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(journal: str) -> Any:
        opened.append(journal)
        return open_store(journal)

    async with many(tmp_path / "runs", monkeypatch) as runs:
        await runs.create(settings_toml("one"), [], "ana")
        await in_phase(runs, "one", "RUNNING")
        run = runs.find("one")
        with monkeypatch.context() as patched:
            patched.setattr(many_runs, "open_store", counted)
            await runs._end(run)
            await run.fail("its disk was full")
            await asyncio.gather(runs.resume(run, 1.0), runs.resume(run, 1.0))
            await in_phase(runs, "one", "RUNNING")
        assert len(opened) == 1


async def test_a_journal_that_a_stop_finds_half_open_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(open_store)
    with monkeypatch.context() as patched:
        patched.setattr(many_runs, "open_store", held)
        async with many(tmp_path / "runs", monkeypatch) as runs:
            await runs.create(settings_toml("one"), [], "ana")
            await asyncio.to_thread(held.is_called.wait, 20)
            asyncio.get_running_loop().call_later(0.2, held.may_go_on.set)
    await asyncio.to_thread(held.has_returned.wait, 20)
    async with many(tmp_path / "runs", monkeypatch) as runs:
        await in_phase(runs, "one", "RUNNING")
