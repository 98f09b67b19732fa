"""The programs: a worker that stays lives through restarts of everything around it, and its own."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.errors import FedMezoError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.integration.support.harness import (
    Program,
    Programs,
    free_port,
    run_values,
    toml_of,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 300.0
"""A run begins with three programs that import torch."""


async def create(client: CoordinatorClient, run_id: str, model: Path, **changes: Any) -> None:
    values = run_values(
        **{"run_id": run_id, "workers_min": 2, "quorum": 2, "data_set": "reviews"} | changes
    )
    del values["model"]
    text = toml_of({"model": str(model), "replica": False, "run": values})
    await client.create_run(wire.CreateRunRequest(settings_toml=text))


async def over(client: CoordinatorClient, run_id: str) -> None:
    """Wait until a run is finished and both workers have reported the same weights."""

    async def is_over() -> bool:
        try:
            status = await client.get_status(run_id)
        except FedMezoError:
            return False  # It is being loaded.
        found = {d.party: d.weights_digest for d in status.digests if d.round == status.round}
        if not found.keys() >= {"w1", "w2"}:
            return False
        assert len({*found.values()}) == 1
        return status.round == status.config.rounds

    await until(is_over, f"both workers to end run {run_id}", PATIENCE_S)


async def at_round(client: CoordinatorClient, run_id: str, round_: int) -> None:
    async def reached() -> bool:
        try:
            return (await client.get_status(run_id)).round >= round_
        except FedMezoError:
            return False

    await until(reached, f"round {round_} of run {run_id}", PATIENCE_S)


async def test_a_worker_stays_through_restarts_of_the_coordinator_and_a_rebooted_one_comes_back(
    programs: Programs, model_folder: Path, data_files: list[Path], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"

    async def coordinator() -> Program:
        program = programs.start(
            "fedmezo_coordinator", "--runs", tmp_path / "runs", "--listen", address
        )
        async with CoordinatorClient(address) as client:

            async def answers() -> bool:
                assert program.running, program.said
                try:
                    await client.list_runs()
                except FedMezoError:
                    return False
                return True

            await until(answers, "the coordinator to answer")
        return program

    def worker(number: int) -> Program:
        settings = tmp_path / f"w{number}.toml"
        values = {"coordinator": address, "name": f"w{number}", "threads": 1, "device": "cpu"}
        settings.write_text(
            toml_of(values)
            + f'\n[data.reviews]\npath = "{data_files[number]}"\n'
            + f'[models]\n{model_folder.name} = "{model_folder}"\n'
        )
        return programs.start("fedmezo_worker", "--config", settings)

    serving = await coordinator()
    stays, rebooted = worker(1), worker(2)
    async with CoordinatorClient(address) as client:
        await create(client, "one", model_folder)
        await over(client, "one")

        # The coordinator is away while nothing is to be done.
        serving.send(signal.SIGTERM)
        assert await serving.wait() == 0
        await asyncio.sleep(1)
        assert stays.running
        serving = await coordinator()

        # The device reboots in the middle, and the coordinator dies too.
        await create(client, "two", model_folder, rounds=40)
        await at_round(client, "two", 3)
        rebooted.send(signal.SIGKILL)
        await rebooted.wait()
        serving.send(signal.SIGKILL)
        await serving.wait()
        serving = await coordinator()
        worker(2)
        await over(client, "two")

        await create(client, "three", model_folder)
        await over(client, "three")
        assert not [run for run in await client.list_runs() if run.declined]
    assert stays.running
    stays.send(signal.SIGTERM)
    assert await stays.wait() == 0
    assert "run three: " in stays.said
