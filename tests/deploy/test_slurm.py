"""The script for Slurm, with an `srun` that starts its tasks here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from tests.deploy.tools import DEPLOY
from tests.integration.support.harness import (
    Program,
    Programs,
    at_round,
    free_port,
    run_values,
    write_genesis,
)

MODULES = {
    "fedmezo": "fedmezo_coordinator.programs.fedmezo_command",
    "fedmezo-coordinator": "fedmezo_coordinator",
    "fedmezo-relay": "fedmezo_coordinator.programs.relay_command",
    "fedmezo-worker": "fedmezo_worker",
}
SRUN = """#!/bin/bash
# Starts a task on "another node" for each rank, and waits for all.
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do SLURM_PROCID=$rank "$@" & done
wait
"""


async def test_a_job_is_one_site_of_the_run(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    run = {"rounds": 2, "workers_min": 1, "quorum": 1}
    write_genesis(tmp_path / "journal.db", tiny_genesis(**run))
    _, address = await programs.coordinator(
        tmp_path / "journal.db", run_values(**run), "--no-replica"
    )
    for folder in ("bin", "rows"):
        (tmp_path / folder).mkdir()
    for name, module in MODULES.items():
        script = f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n'
        (tmp_path / "bin" / name).write_text(script)
    (tmp_path / "bin/srun").write_text(SRUN)
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    for rank in range(2):
        (tmp_path / f"rows/{rank}.jsonl").write_bytes(data_files[rank].read_bytes())
    job = Program(
        "site",
        ["bash", DEPLOY / "slurm/site.sbatch"],
        tmp_path,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        FEDMEZO_BIN=str(tmp_path / "bin"),
        FEDMEZO_SITE=str(tmp_path / "site"),
        FEDMEZO_SITE_NAME="cluster",
        FEDMEZO_PORT=str(free_port()),
        FEDMEZO_RELAY_UPSTREAM=address,
        FEDMEZO_WORKER_DATA=str(tmp_path / "rows"),
        FEDMEZO_WORKER_MODEL=str(model_folder),
        SLURM_NTASKS="2",
        SLURM_JOB_ID="7",
        SLURM_CPUS_PER_TASK="1",
    )
    try:
        assert await job.wait(180) == 0, job.said
        async with CoordinatorClient(address) as client:
            await at_round(client, 2)
            [site] = (await client.get_status()).workers
            assert site.worker == "cluster"
    finally:
        job.end()
