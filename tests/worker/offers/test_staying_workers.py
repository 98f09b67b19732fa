"""Workers that stay with a coordinator of many runs: real models, real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmezo.preflight.check_report import Report
from fedmezo.run_policy import RunPolicy
from fedmezo_coordinator.programs.run_commands.creating_run import upload
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import PolicyError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter
from fedmezo_core.zo.model.loading import Base, SharedBases
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.party import open_party
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.data_sets import DataSet
from fedmezo_worker.offers import offered_runs
from fedmezo_worker.preflight.worker_preflight import preflight
from fedmezo_worker.worker_settings import WorkerSettings
from tests.coordinator.runs.hosting_runs import Hosting, hosted, settings_toml
from tests.integration.support.harness import config_of, served, until
from tests.integration.support.parties import Workers, write_rows

pytestmark = pytest.mark.slow

LORA = {"rank": 2, "alpha": 4, "target_modules": ["c_attn"]}
Describe = Callable[[RunConfig], Genesis]


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch, tiny_genesis: Callable[..., Genesis]) -> Describe:
    """What stands for loading a run's base at the coordinator."""
    monkeypatch.setattr(offered_runs, "ASK_EVERY_S", 0.05)

    def genesis(config: RunConfig) -> Genesis:
        return replace(tiny_genesis(), config=config)

    return genesis


@asynccontextmanager
async def coordinator(
    folder: Path, monkeypatch: pytest.MonkeyPatch, describe: Describe
) -> AsyncIterator[Hosting]:
    monkeypatch.setattr("tests.coordinator.runs.hosting_runs.genesis_of", describe)
    async with hosted(folder, monkeypatch) as at:
        yield at


async def digests_of(client: CoordinatorClient, run_id: str) -> dict[str, bytes]:
    """The digests of the last weights, by worker."""
    status = await client.get_status(run_id)
    return {d.party: d.weights_digest for d in status.digests if d.round == status.round}


async def finished(at: Hosting, run_id: str, *workers: str) -> bytes:
    """The digest of a finished run's weights, once all workers have reported the same."""
    await at.in_phase(run_id, "FINISHED")
    async with at.client() as client:

        async def reported() -> bool:
            return (await digests_of(client, run_id)).keys() >= {*workers}

        await until(reported, f"the digests of {workers} in run {run_id}")
        [digest] = set((await digests_of(client, run_id)).values())
        return digest


async def declined(at: Hosting, run_id: str) -> dict[str, str]:
    """What workers have said of a run, once one has."""

    async def has_said() -> bool:
        return bool((await at.summary(run_id)).declined)

    await until(has_said, f"somebody to decline run {run_id}")
    return {one.worker: one.reason for one in (await at.summary(run_id)).declined}


async def test_one_worker_serves_three_runs_and_then_two_at_once(
    workers: Workers,
    data_files: list[Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Describe,
) -> None:
    async with coordinator(tmp_path / "runs", monkeypatch, describe) as at:
        more: dict[str, Any] = {"model": "", "models": {"tiny": model_folder}}
        first = workers.start(at.address, "w1", data_files[0], **more)
        digests: list[bytes] = []
        for run_id in ("one", "two", "three"):
            await at.create(run_id, seed=len(digests))
            digests.append(await finished(at, run_id, "w1"))
        assert len(set(digests)) == 3
        second = workers.start(at.address, "w2", data_files[1], **more)
        await at.create("four", "five", workers_min=2, quorum=2, rounds=4)
        await finished(at, "four", "w1", "w2")
        await finished(at, "five", "w1", "w2")
        assert not first.task.done()
        assert not second.task.done()


async def test_preflight_looks_at_all_runs_that_are_offered(
    data_files: list[Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Describe,
) -> None:
    async with coordinator(tmp_path / "runs", monkeypatch, describe) as at:
        await at.create("one", "two", workers_min=2, quorum=2)
        await at.create("long", rounds=30)
        report = Report("preflight")
        values: dict[str, Any] = {"policy": RunPolicy(rounds_max=29), "model": str(model_folder)}
        settings = WorkerSettings(
            name="w1", coordinator=at.address, data=data_files[0], threads=1, **values
        )
        await preflight(settings, report)
    policy = {check.section: check.outcome for check in report.checks if check.name == "policy"}
    assert policy == {"run one": "ok", "run two": "ok", "run long": "warning"}
    measured = [check.section for check in report.checks if check.name == "measurement"]
    assert measured == ["run one", "run two"]


async def test_the_shared_device_gives_the_numbers_of_a_device_of_its_own(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Describe,
) -> None:
    async with coordinator(tmp_path / "runs", monkeypatch, describe) as at:
        await at.create("one", "two", rounds=4)
        workers.start(at.address, "w1", data_files[0])
        together = [await finished(at, run_id, "w1") for run_id in ("one", "two")]
        await workers.end()
    async with coordinator(tmp_path / "others", monkeypatch, describe) as at:
        await at.create("one", "two", rounds=4)
        for run_id, digest in zip(("one", "two"), together, strict=True):
            alone = workers.start(at.address, "w1", data_files[0], run_id=run_id)
            assert await alone.outcome() is None  # With run_id it ends with its run.
            assert await finished(at, run_id, "w1") == digest


async def test_runs_with_adapters_on_one_base_have_it_in_memory_once(
    workers: Workers,
    data_files: list[Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offered_runs, "ASK_EVERY_S", 0.05)
    found: list[tuple[Base, bytes]] = []
    add = SharedBases.add

    def note(self: SharedBases, key: Hashable, base: Base) -> None:
        found.append((base, base_digest(base.model)))
        add(self, key, base)

    monkeypatch.setattr(SharedBases, "add", note)
    changes: dict[str, dict[str, Any]] = {
        "fast": {"lora": LORA},
        "other": {"lora": LORA | {"rank": 3, "target_modules": ["c_proj"]}, "seed": 7},
        "whole": {},
    }

    def described(config: RunConfig) -> Genesis:
        return open_party(config, str(model_folder), threads=1).genesis()

    async with coordinator(tmp_path / "runs", monkeypatch, described) as at:
        for run_id, more in changes.items():
            await at.create(run_id, rounds=6, **more)
        workers.start(at.address, "w1", data_files[0])
        together = {run_id: await finished(at, run_id, "w1") for run_id in changes}
        await workers.end()
    [(base, before)] = found
    assert base_digest(base.model) == before, "somebody wrote to it"
    async with coordinator(tmp_path / "others", monkeypatch, described) as at:
        for run_id, more in changes.items():
            await at.create(run_id, rounds=6, **more)
            alone = workers.start(at.address, "w1", data_files[0], run_id=run_id)
            assert await alone.outcome() is None
            assert await finished(at, run_id, "w1") == together[run_id]


async def test_a_run_that_does_not_fit_this_worker_is_declined_and_the_others_go_on(
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Describe,
) -> None:
    rows = write_rows(tmp_path / "secret-rows.jsonl", more={"body": "A fine film."})
    other = {"template": "Title: {title} It was", "verbalizers": {"negative": " terrible",
             "positive": " great"}, "tokens_max": 32}  # fmt: skip

    def described(config: RunConfig) -> Genesis:
        genesis = describe(config)
        return replace(genesis, base_digest=b"o" * 32) if config.run_id == "base" else genesis

    async with coordinator(tmp_path / "runs", monkeypatch, described) as at:
        await at.create("long", rounds=50, data_set="reviews")
        await at.create("x-rays", data_set="x-rays")
        await at.create("base", data_set="reviews")
        await at.create("title", data_set="reviews", task=other)
        await at.create("good", data_set="reviews")
        working = workers.start(
            at.address,
            "w1",
            {"reviews": DataSet(path=rows, columns={"text": "body"})},
            policy=RunPolicy(rounds_max=10),
        )
        await finished(at, "good", "w1")
        said = {
            run_id: await declined(at, run_id) for run_id in ("long", "x-rays", "base", "title")
        }
        assert not working.task.done()
    assert "rounds = 50 is more than the 10 that this worker allows" in said["long"]["w1"]
    assert "none of that name; add [data.x-rays]" in said["x-rays"]["w1"]
    assert "The base weights loaded here differ from the run's" in said["base"]["w1"]
    assert said["title"]["w1"] == ("Worker w1 cannot serve this run (DataError); its log says why.")
    assert "secret" not in str(said)


async def test_a_worker_of_one_run_ends_with_it_and_says_why_it_does_not_take_part(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(rounds=2, workers_min=1, quorum=1)
    async with (
        served(tmp_path / "journal.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        strict = workers.start(
            coordinator.address, "w1", data_files[0], policy=RunPolicy(rounds_max=1)
        )
        assert isinstance(await strict.outcome(), PolicyError)
        [run] = await client.list_runs()
        assert [(one.worker, one.reason[:29]) for one in run.declined] == [
            ("w1", "The run's rounds = 2 is more ")
        ]
        assert await workers.start(coordinator.address, "w1", data_files[0]).outcome() is None
        # The run is over and offered to nobody; who comes late still ends well.
        assert await workers.start(coordinator.address, "w2", data_files[1]).outcome() is None


async def test_the_adapter_that_a_run_begins_from_comes_from_the_coordinator(
    workers: Workers,
    data_files: list[Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Describe,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = adapter_in(tmp_path / "adapter", model_folder)

    def with_adapter(config: RunConfig) -> Genesis:
        return open_party(config, str(model_folder), adapter=adapter, threads=1).genesis()

    async with (
        coordinator(tmp_path / "runs", monkeypatch, with_adapter) as at,
        at.client() as client,
    ):
        workers.start(at.address, "w1", data_files[0])
        for run_id in ("fitted", "damaged"):
            await create_with(client, adapter, run_id)
            await at.in_phase(run_id, "RUNNING")
            if run_id == "fitted":
                await finished(at, "fitted", "w1")
                for file in (tmp_path / "cache").rglob("*.safetensors"):
                    assert file.read_bytes() == (adapter / file.name).read_bytes()
                    file.unlink()
                monkeypatch.setattr(CoordinatorClient, "read_run_file", damaged)
        said = await declined(at, "damaged")
    assert "adapter/adapter_model.safetensors of run damaged is damaged" in said["w1"]


def adapter_in(folder: Path, model_folder: Path) -> Path:
    """An adapter that something has trained."""
    party = open_party(config_of(lora=LORA), str(model_folder), threads=1)
    party.weights.apply(1, [Commit(np.array([5], np.uint64), np.array([0.03], np.float32), 1)])
    export_adapter(party.loaded, folder, ModelCard("tiny", "tiny-run"))
    return folder


async def create_with(client: CoordinatorClient, adapter: Path, run_id: str) -> None:
    files = [
        await upload(client, f"adapter/{name}", adapter / name)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    text = 'adapter = "adapter"\n' + settings_toml(run_id, lora=LORA)
    await client.create_run(wire.CreateRunRequest(settings_toml=text, files=files))


async def damaged(
    self: CoordinatorClient, run_id: str, name: str, offset: int = 0
) -> AsyncIterator[bytes]:
    size = {file.name: file.file_bytes for file in (await self.offered_runs("w1")).offers[0].files}
    yield b"x" * (size[name] - offset)
