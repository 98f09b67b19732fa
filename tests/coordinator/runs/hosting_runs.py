"""A coordinator of many runs in the test's process, whose bases nobody has to load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs import coordinator_command
from fedmezo_coordinator.runs import preparing
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import StartingError, UnavailableError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import identity_in
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.integration.support.harness import (
    PATIENCE_S,
    ScriptedWorker,
    free_port,
    genesis_of,
    run_values,
    toml_of,
    until,
)

SMALL: dict[str, Any] = {"rounds": 3, "workers_min": 1, "quorum": 1, "local_steps": 1}


def settings_toml(run_id: str, **changes: Any) -> str:
    """The settings of a small run, with `changes` in [run], except for `replica`."""
    top = {"model": "tiny", "replica": changes.pop("replica", False)}
    values = run_values(**(SMALL | {"run_id": run_id} | changes))
    values.pop("model", None)
    return toml_of({**top, "run": values})


@dataclass
class Hosting:
    """A coordinator of many runs, served at an address."""

    address: str
    folder: Path
    state: Path | None = None
    """The fleet's state folder, if it has one."""
    loads: asyncio.Event = field(default_factory=asyncio.Event)
    """Bases are loaded while it is set."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Ends the coordinator once it is set."""
    described: list[str] = field(default_factory=list)
    """Runs whose base was loaded."""

    async def describe(self, _: CoordinatorSettings, config: RunConfig, _step: object) -> Genesis:
        """Stands for the child process that loads a base."""
        await self.loads.wait()
        self.described.append(config.run_id)
        return genesis_of(config)

    def client(self) -> CoordinatorClient:
        """A client of the operator, or without an identity where there is no fleet."""
        identity = None if self.state is None else identity_in(self.state)
        return CoordinatorClient(self.address, identity=identity)

    async def summary(self, run_id: str) -> wire.RunSummary:
        """What `ListRuns` says of a run."""
        async with self.client() as client:
            [found] = await client.list_runs(run_id)
        return found

    async def create(self, *run_ids: str, **changes: Any) -> None:
        """Create runs and wait until they are served."""
        async with self.client() as client:
            for run_id in run_ids:
                text = settings_toml(run_id, **changes)
                request = wire.CreateRunRequest(settings_toml=text)
                assert await client.create_run(request) == run_id
        for run_id in run_ids:
            await self.in_phase(run_id, "RUNNING")

    async def in_phase(self, run_id: str, phase: str) -> wire.RunSummary:
        """Wait until a run is in a phase."""
        wanted = wire.RunPhase.Value(f"RUN_PHASE_{phase}")

        async def is_there() -> bool:
            return (await self.summary(run_id)).phase == wanted

        await until(is_there, f"run {run_id} to be {phase}")
        return await self.summary(run_id)

    @asynccontextmanager
    async def worker(self, run_id: str, name: str = "w1") -> AsyncIterator[ScriptedWorker]:
        """A worker of one run that the test scripts, not yet joined."""
        async with self.client() as client:
            run = await client.get_run(run_id)
            yield ScriptedWorker(client, run.genesis, name, run.head)


async def answers(client: CoordinatorClient) -> None:
    """Wait until a coordinator answers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await client.list_runs()
            except (StartingError, UnavailableError):
                await asyncio.sleep(0.02)
            else:
                return


@asynccontextmanager
async def hosted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, state: Path | None = None, **changes: Any
) -> AsyncIterator[Hosting]:
    """Host the runs in `folder` until the end of the block; `state` has their fleet, if any."""
    address = f"127.0.0.1:{free_port()}"
    at = Hosting(address, folder, state)
    at.loads.set()
    settings = CoordinatorSettings.model_validate(
        {"listen": address, "runs": str(folder)}
        | ({} if state is None else {"state": state})
        | changes
    )
    with monkeypatch.context() as patched:
        patched.setattr(preparing, "describe_base", at.describe)
        patched.setattr(coordinator_command, "stop_signal", lambda: at.stop)
        running = asyncio.create_task(coordinator_command.run(settings))
        try:
            async with at.client() as client:
                answering = asyncio.create_task(answers(client))
                await asyncio.wait({running, answering}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                await answering
            yield at
        finally:
            at.stop.set()
            await running
