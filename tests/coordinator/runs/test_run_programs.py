"""The programs: `fedmezo-coordinator --runs`, killed and started again, and `fedmezo run ...`."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command
from fedmezo_coordinator.programs.run_commands.creating_run import upload
from fedmezo_core.errors import ConfigError, FedMezoError, UnavailableError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.coordinator.runs.hosting_runs import settings_toml
from tests.faults.light_worker import LightEngine
from tests.integration.support.harness import (
    Program,
    Programs,
    config_of,
    free_port,
    genesis_of,
    run_values,
    served,
    toml_of,
    until,
    write_genesis,
)
from tests.integration.support.parties import save_model, write_rows

TINY: dict[str, Any] = {"rounds": 60, "workers_min": 2, "quorum": 2, "local_steps": 1}
RUN_IDS = ("one", "two", "three")


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.end()


def begin_run(folder: Path, run_id: str) -> None:
    """Put a run into a folder, whose base nobody has to load."""
    (folder / run_id).mkdir(parents=True)
    (folder / run_id / "settings.toml").write_text(settings_toml(run_id, **TINY))
    (folder / run_id / "run.json").write_text('{"created_ms": 1, "files": {}}')
    write_genesis(folder / run_id / "journal.db", genesis_of(config_of(run_id=run_id, **TINY)))


def has_loaded(library: str, program: Program) -> bool:
    """Whether a library is in the memory of a running program."""
    return library in Path(f"/proc/{program.process.pid}/maps").read_text()


def two_workers(address: str, run_id: str) -> list[Coroutine[Any, Any, None]]:
    """Two workers of a run, without a model, at work until it is over."""
    settings = [
        WorkerSettings(coordinator=address, name=name, data=Path(__file__), run_id=run_id)
        for name in ("w1", "w2")
    ]
    return [work(one, cast("Engine", LightEngine())) for one in settings]


async def heads(address: str, *run_ids: str) -> dict[str, bytes]:
    """Head of each run, which is over."""
    async with CoordinatorClient(address) as client:
        return {run_id: (await client.get_run(run_id)).head for run_id in run_ids}


@pytest.mark.slow
async def test_killed_with_many_runs_it_goes_on_with_all(
    programs: Programs, tmp_path: Path
) -> None:
    wanted: dict[str, bytes] = {}
    for run_id in RUN_IDS:
        genesis = genesis_of(config_of(run_id=run_id, **TINY))
        async with served(tmp_path / f"{run_id}.db", genesis) as at:
            await asyncio.gather(*two_workers(at.address, run_id))
            wanted |= await heads(at.address, run_id)
    folder, address = tmp_path / "runs", f"127.0.0.1:{free_port()}"
    for run_id in RUN_IDS:
        begin_run(folder, run_id)
    start = ("fedmezo_coordinator", "--runs", folder, "--listen", address)
    daemon: Program = programs.start(*start)
    await daemon.says("is served at")
    working = [
        asyncio.create_task(one) for run_id in RUN_IDS for one in two_workers(address, run_id)
    ]

    async def is_under_way() -> bool:
        async with CoordinatorClient(address) as client:
            return all(run.round >= 5 for run in await client.list_runs())

    await until(is_under_way, "every run to be under way")
    assert not has_loaded("torch", daemon)
    daemon.send(signal.SIGKILL)
    await daemon.wait()
    daemon = programs.start(*start)
    await asyncio.wait_for(asyncio.gather(*working), 60)
    assert await heads(address, *RUN_IDS) == wanted
    daemon.send(signal.SIGTERM)
    assert await daemon.wait() == 0


@pytest.mark.slow
async def test_from_a_settings_file_to_an_evaluated_run(programs: Programs, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    heldout = write_rows(tmp_path / "heldout.jsonl")
    address = f"127.0.0.1:{free_port()}"
    daemon = programs.start("fedmezo_coordinator", "--runs", tmp_path / "runs", "--listen", address)
    await daemon.says("with 0 runs, is served at")
    values = run_values(run_id="real", rounds=2, workers_min=1, quorum=1, local_steps=1)
    values.pop("model")
    top = {"model": str(tmp_path / "model"), "heldout": str(heldout), "evaluate_every_rounds": 1}
    (tmp_path / "run.toml").write_text(toml_of({**top, "run": values}))
    said = await asyncio.to_thread(fedmezo, address, "create", str(tmp_path / "run.toml"))
    assert "run real is running" in said
    worker = programs.worker(
        address, "w1", write_rows(tmp_path / "rows.jsonl"), tmp_path / "model", "--run-id", "real"
    )
    assert await worker.wait() == 0
    watching = await asyncio.to_thread(fedmezo, address, "watch", "real")
    assert "finished" in watching
    listed = json.loads(await asyncio.to_thread(fedmezo, address, "list", "--format", "json"))
    assert (listed["run_id"], listed["phase"], listed["round"]) == ("real", "finished", 2)
    assert listed["loss"] > 0
    shown = json.loads(
        await asyncio.to_thread(fedmezo, address, "status", "real", "--format", "json")
    )
    assert shown["status"]["config"]["run_id"] == "real"
    again = await asyncio.to_thread(fedmezo, address, "create", str(tmp_path / "run.toml"))
    assert "run real is finished" in again
    assert "deleted" in await asyncio.to_thread(fedmezo, address, "delete", "real")
    assert not list((tmp_path / "runs").glob("real*"))
    assert not has_loaded("torch", daemon)


def fedmezo(address: str, *arguments: str) -> str:
    """Run `fedmezo run ...` in this process; what it printed."""
    where = ["--coordinator", address]
    result = CliRunner().invoke(
        fedmezo_command.app, ["run", *arguments, *where], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


async def test_the_orders_from_a_command_line(programs: Programs, tmp_path: Path) -> None:
    for run_id in ("one", "two"):
        begin_run(tmp_path / "runs", run_id)
    address = f"127.0.0.1:{free_port()}"
    daemon = programs.start("fedmezo_coordinator", "--runs", tmp_path / "runs", "--listen", address)
    await daemon.says("with 2 runs, is served at")

    async def ask(*arguments: str) -> str:
        return await asyncio.to_thread(fedmezo, address, *arguments)

    async with CoordinatorClient(address) as client:

        async def are_served() -> bool:
            return {run.phase for run in await client.list_runs()} == {wire.RUN_PHASE_RUNNING}

        await until(are_served, "both runs to be served")
        for _ in range(2):
            assert "one is paused" in await ask("pause", "one", "--reason", "a look")
        assert "machine: a look" in await ask("status", "one")
        for _ in range(2):
            assert "one goes on" in await ask("resume", "one", "--rate-factor", "0.5")
        await client.decline_run("jetson-1", "two", "no data set is named reviews here")
        assert "no data set is named reviews here" in await ask("status", "two")
        assert "two: 1 worker declined" in await ask("list")
        for _ in range(2):
            assert "two is over" in await ask("stop", "two")
        for command, said in (
            (("status", "three"), "There is no run 'three' here: one is going on"),
            (("delete", "one"), "one is not over"),
            (("pause", "two"), "nothing to pause"),
        ):
            with pytest.raises(FedMezoError, match=said):
                await ask(*command)
        (tmp_path / "new.toml").write_text(toml_of({"run": run_values(run_id="new", **TINY)}))
        with pytest.raises(ConfigError, match="model is missing"):
            await ask("create", str(tmp_path / "new.toml"))
    daemon.send(signal.SIGTERM)
    assert await daemon.wait() == 0


async def test_a_run_that_nobody_takes_up_says_who_refused_and_why(
    programs: Programs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    begin_run(tmp_path / "runs", "one")
    address = f"127.0.0.1:{free_port()}"
    daemon = programs.start("fedmezo_coordinator", "--runs", tmp_path / "runs", "--listen", address)
    await daemon.says("is served at")
    config = tmp_path / "runs" / "one" / "settings.toml"
    async with CoordinatorClient(address) as client:
        await client.decline_run("w1", "one", "its policy allows at most 10 rounds")
    said = "takes part in run one after 0.1 s: w1: its policy allows at most 10 rounds"
    with pytest.raises(FedMezoError, match=said):
        await asyncio.to_thread(fedmezo, address, "create", str(config), "--wait", "0.1")
    assert '"tiny" = "FOLDER" under [models]' in caplog.text, "the base is the coordinator's folder"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "run.toml is not valid TOML"),
        ("heldout = 3", "heldout = 3 is not allowed"),
        ("heldout = 'none.jsonl'", "heldout = none.jsonl is no file here"),
        ("adapter = 'none'", "adapter = none is no folder with adapter_config.json here"),
        ("heldout = '~nobody-here/x'", "nobody of that name has a home folder"),
    ],
)
def test_a_settings_file_that_cannot_be_sent(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        fedmezo("127.0.0.1:9", "create", str(tmp_path / "run.toml"))


async def test_a_file_that_changes_while_it_is_sent(tmp_path: Path) -> None:
    class Shortens:
        async def upload_file(self, request: wire.UploadFileRequest) -> int:
            path.write_bytes(b"")
            return request.offset

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="is empty"):
        await upload(Shortens(), "heldout.jsonl", path)  # type: ignore[arg-type]
    path.write_bytes(b"rows")
    with pytest.raises(ConfigError, match="got shorter while it was sent"):
        await upload(Shortens(), "heldout.jsonl", path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"none cannot be read \(No such file"):
        await upload(Shortens(), "heldout.jsonl", tmp_path / "none")  # type: ignore[arg-type]


def test_nothing_to_read_and_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        fedmezo("127.0.0.1:9", "create", str(tmp_path / "none.toml"))
    with pytest.raises(UnavailableError, match="No coordinator answers"):
        fedmezo("127.0.0.1:9", "list")


@pytest.mark.parametrize("key", ["journal", "standby", "model", "run"])
def test_what_is_a_runs_own_is_refused_beside_runs(key: str) -> None:
    from fedmezo_coordinator.coordinator_settings import CoordinatorSettings

    value: Any = {"standby": True, "run": {"run_id": "one"}}.get(key, "x")
    with pytest.raises(ValueError, match=rf"{key} (and runs exclude|has no meaning with runs)"):
        CoordinatorSettings.model_validate({"runs": "folder", key: value})
