"""Whole jobs: NVFlare's simulator, and its provisioned processes with mutual TLS."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.support.harness import PATIENCE_S, ROOT, environment, toml_of
from tests.integrations.nvflare.conftest import SITES, Ended, sorted_records

pytestmark = pytest.mark.slow

JOB = ROOT / "examples/nvflare/job.py"
PROJECT = """
api_version: 3
name: fedmezo
description: the test's
participants:
- {{name: server, type: server, org: test, default_host: localhost, fed_learn_port: {port}}}
- {{name: admin@nvidia.com, type: admin, org: test, role: project_admin}}
- {{name: site-1, type: client, org: test}}
- {{name: site-2, type: client, org: test}}
builders:
- path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  args: {{template_file: [master_template.yml]}}
- path: nvflare.lighter.impl.static_file.StaticFileBuilder
  args: {{config_folder: config}}
- path: nvflare.lighter.impl.cert.CertBuilder
- path: nvflare.lighter.impl.signature.SignatureBuilder
"""


class Job:
    """The example's job in a process of its own, and everything that NVFlare starts for it."""

    def __init__(
        self, folder: Path, contract: dict[str, Any], model: Path, rows: Path, *more: str
    ) -> None:
        self.folder = folder
        (folder / "run.toml").write_text(toml_of({"run": contract}))
        self.log = folder / "job.log"
        arguments = ("--run", folder / "run.toml", "--model", model, "--workspace", folder / "sim")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, JOB, *map(str, arguments), *more],
                cwd=folder,
                env=environment(
                    FEDMEZO_SITE_DATA=f"{rows}/{{site}}.jsonl",
                    FEDMEZO_SITE_MODEL=str(model),
                    FEDMEZO_SITE_THREADS="1",
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

    def wait(self) -> int:
        """The exit status; after it nothing of the job may be left."""
        status = self.process.wait(PATIENCE_S)
        end_s = time.monotonic() + 20
        while left := self.processes:
            assert time.monotonic() < end_s, [p.cmdline() for p in left]
            time.sleep(0.2)
        return status

    def ended(self) -> Ended:
        """How the run ended, by the result and the journal in the server's workspace."""
        assert self.wait() == 0, self.log.read_text()
        result = json.loads(self.log.read_text().splitlines()[-1])
        assert set(result["digests"]) == set(SITES)
        (digest,) = set(result["digests"].values())
        journal = Path(result["folder"]) / "fedmezo_journal.db"
        return Ended(result["head"], digest, sorted_records(journal))

    def end(self) -> None:
        """End whatever is left."""
        for process in self.processes:
            process.kill()
        self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_the_simulator_ends_as_grpc_does(
    jobs: list[Job],
    tmp_path: Path,
    contract: dict[str, Any],
    model_folder: Path,
    rows_folder: Path,
    over_grpc: Ended,
) -> None:
    jobs.append(job := Job(tmp_path, contract, model_folder, rows_folder))
    assert job.ended() == over_grpc


def test_provisioned_processes_with_mutual_tls_and_a_model_that_dies(
    jobs: list[Job],
    tmp_path: Path,
    contract: dict[str, Any],
    model_folder: Path,
    rows_folder: Path,
    over_grpc: Ended,
) -> None:
    project = tmp_path / "project.yml"
    project.write_text(PROJECT.format(port=free_port()))
    arguments = ("--poc", "--project", str(project))
    jobs.append(job := Job(tmp_path, contract, model_folder, rows_folder, *arguments))
    end_s = time.monotonic() + PATIENCE_S
    while len(models := job.models()) < len(SITES):
        assert time.monotonic() < end_s, job.log.read_text()
        assert job.process.poll() is None, job.log.read_text()
        time.sleep(0.05)
    models[0].kill()
    assert job.ended() == over_grpc
    kit = next((tmp_path / "poc").rglob("site-1/startup/fed_client.json"))
    assert json.loads(kit.read_text())["client"]["connection_security"] == "mtls"


def test_sites_that_cannot_take_part_end_the_job(
    jobs: list[Job],
    tmp_path: Path,
    contract: dict[str, Any],
    model_folder: Path,
) -> None:
    jobs.append(job := Job(tmp_path, contract, model_folder, tmp_path / "nowhere"))
    assert job.wait() != 0
    said = job.log.read_text()
    assert "of 2 sites can take part, but a round needs 2; read the logs of site-" in said
    assert "this site leaves the job: There is no data file or folder" in said
