"""Whole jobs: NVFlare's simulator, and its provisioned processes with mutual TLS."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedmezo_core.records import Answered, Genesis
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import (
    ROOT,
    bodies_of,
    environment,
    free_port,
    records_of,
    run_values,
    served,
    toml_of,
)
from tests.integration.support.nvflare_project import project
from tests.integration.support.parties import Workers

JOB_PATIENCE_S = 400.0
"""NVFlare starts six processes one after another: half a minute alone, minutes under load."""

pytestmark = pytest.mark.timeout(900)

SITES = ("site-1", "site-2")
RUN: dict[str, Any] = {"workers_min": 2, "quorum": 2, "rounds": 30}
"""Both sites in every round, so that who is slow does not change the numbers."""
CLIP = 2.0**-20
"""Less than any projected gradient."""
JOB = ROOT / "examples/nvflare/job.py"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    head: str
    digest: str
    records: list[bytes]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, data_files: list[Path]) -> Path:
    """A folder with each site's rows under its name."""
    folder = tmp_path_factory.mktemp("rows")
    for site, file in zip(SITES, data_files, strict=False):
        (folder / f"{site}.jsonl").symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def over_grpc(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    rows: Path,
) -> Ended:
    """The run with a coordinator and workers of our own."""
    journal = tmp_path_factory.mktemp("grpc") / "journal.db"

    async def run() -> Ended:
        workers = Workers(model_folder)
        async with (
            served(journal, tiny_genesis(**RUN)) as coordinator,
            CoordinatorClient(coordinator.address) as client,
        ):
            try:
                started = [
                    workers.start(coordinator.address, site, rows / f"{site}.jsonl")
                    for site in SITES
                ]
                await asyncio.gather(*(worker.task for worker in started))
                head = (await client.get_run()).round_head
                digests = {d.weights_digest for d in (await client.get_status()).digests}
            finally:
                await workers.end()
        (digest,) = digests
        return Ended(head.hex(), digest.hex(), bodies_of(journal))

    return asyncio.run(run())


class Job:
    """The example's job in a process of its own, and everything that NVFlare starts for it."""

    def __init__(
        self, folder: Path, model: Path, rows: Path, *more: str, run: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        (folder / "run.toml").write_text(toml_of({"run": run_values(**(run or RUN))}))
        self.log = folder / "job.log"
        arguments = ("--run", folder / "run.toml", "--model", model, "--workspace", folder / "sim")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, JOB, *map(str, arguments), *more],
                cwd=folder,
                env=environment(
                    FEDMEZO_WORKER_DATA=f"{rows}/{{site}}.jsonl",
                    FEDMEZO_WORKER_MODEL=str(model),
                    FEDMEZO_WORKER_THREADS="1",
                    HOME=str(folder),
                    NVFLARE_POC_WORKSPACE=str(folder / "poc"),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def processes(self) -> list[psutil.Process]:
        """Every process that the job, or NVFlare for it, has started and that still runs."""
        return [p for p in psutil.process_iter() if self._is_ours(p)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("HOME") == str(self.folder)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    def models(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        return [p for p in self.processes if "fedmezo_nvflare.model_process" in p.cmdline()]

    def wait_for_round(self, round_: int) -> None:
        """Wait until a site holds that round, or a later one."""
        end_s = time.monotonic() + JOB_PATIENCE_S
        while not any(int(held) >= round_ for held in re.findall(r"holds round (\d+)", self.said)):
            assert time.monotonic() < end_s, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.05)

    @property
    def said(self) -> str:
        """What it wrote, with the logs of its sites."""
        logs = [self.log, *self.folder.rglob("poc_console.log")]
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def wait(self) -> int:
        """The exit status; after it nothing of the job may be left."""
        try:
            status = self.process.wait(JOB_PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job goes on after {JOB_PATIENCE_S:.0f} s; it said: {self.said}")
        end_s = time.monotonic() + 20
        while left := self.processes:
            assert time.monotonic() < end_s, [p.cmdline() for p in left]
            time.sleep(0.2)
        return status

    def result(self) -> dict[str, Any]:
        """The last line of the example's output; both sites must have reported."""
        assert self.wait() == 0, self.said
        result: dict[str, Any] = json.loads(self.log.read_text().splitlines()[-1])
        assert set(result["digests"]) == set(SITES)
        return result

    def ended(self) -> Ended:
        """How the run ended, by the result and the journal in the server's workspace."""
        result = self.result()
        (digest,) = set(result["digests"].values())
        return Ended(
            result["head"], digest, bodies_of(Path(result["folder"]) / "fedmezo_journal.db")
        )

    def end(self) -> None:
        """End whatever is left."""
        while left := self.processes:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def test_the_simulator_ends_as_grpc_does(
    jobs: list[Job],
    tmp_path: Path,
    model_folder: Path,
    rows: Path,
    over_grpc: Ended,
) -> None:
    jobs.append(job := Job(tmp_path, model_folder, rows))
    assert job.ended() == over_grpc


def test_provisioned_processes_with_mutual_tls_and_a_model_that_dies(
    jobs: list[Job],
    tmp_path: Path,
    model_folder: Path,
    rows: Path,
    over_grpc: Ended,
) -> None:
    provisioned = tmp_path / "project.yml"
    provisioned.write_text(project(free_port(), SITES))
    arguments = ("--poc", "--project", str(provisioned), "--clip", "100")
    jobs.append(job := Job(tmp_path, model_folder, rows, *arguments))
    job.wait_for_round(3)
    job.models()[0].kill()
    assert job.ended() == over_grpc
    kit = next((tmp_path / "poc").rglob("site-1/startup/fed_client.json"))
    assert json.loads(kit.read_text())["client"]["connection_security"] == "mtls"


def test_a_job_goes_on_with_the_journal_of_one_that_was_killed(
    jobs: list[Job],
    tmp_path: Path,
    model_folder: Path,
    rows: Path,
    over_grpc: Ended,
) -> None:
    arguments = ("--journal", str(tmp_path / "journal.db"))
    jobs.append(job := Job(tmp_path, model_folder, rows, *arguments))
    job.wait_for_round(3)
    job.end()
    jobs.append(job := Job(tmp_path, model_folder, rows, *arguments))
    result = job.result()
    assert (result["head"], set(result["digests"].values())) == (
        over_grpc.head,
        {over_grpc.digest},
    )


def test_a_sites_own_filter_applies_to_a_job_that_brings_none(
    jobs: list[Job], tmp_path: Path, model_folder: Path, rows: Path
) -> None:
    filter_ = {
        "path": "fedmezo_nvflare.scalar_privacy.ScalarPrivacy",
        "args": {"clip": CLIP, "noise_multiplier": 0.0},
    }
    scope = {"name": "clipped", "task_result_filters": [filter_]}
    local = tmp_path / "sim/tiny-run/local"
    local.mkdir(parents=True)
    (local / "privacy.json").write_text(json.dumps({"scopes": [scope], "default_scope": "clipped"}))
    jobs.append(job := Job(tmp_path, model_folder, rows, run={**RUN, "rounds": 2}))
    records = records_of(Path(job.result()["folder"]) / "fedmezo_journal.db")
    answers = [r.scalars.projected_grads for r in records if isinstance(r, Answered)]
    assert {abs(grad) for grads in answers for grad in grads} == {CLIP}


def test_sites_that_cannot_take_part_end_the_job(
    jobs: list[Job],
    tmp_path: Path,
    model_folder: Path,
) -> None:
    jobs.append(job := Job(tmp_path, model_folder, tmp_path / "nowhere"))
    assert job.wait() != 0
    said = job.log.read_text()
    assert "of 2 sites can take part, but a round needs 2; read the logs of site-" in said
    assert "this site leaves the job: There is no data file or folder" in said
