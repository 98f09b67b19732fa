"""A run in NVFlare's provisioned processes, and NVFlare's FedAvg on the same model and rows."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.integrations.rounds_over import (
    WORKERS,
    Counted,
    counting,
    measured,
    save_subject,
)
from tests.integration.support.harness import Program, Programs, free_port
from tests.integration.support.nvflare_project import project


def figures(small: bool) -> Iterator[Figure]:
    """Seconds and bytes of a round, for both."""
    yield from asyncio.run(_figures(rounds=3 if small else 20))


async def _figures(rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_subject(folder)
        programs = Programs(folder)
        port = free_port()
        try:
            with counting(f"127.0.0.1:{port}") as proxy:
                found = await _measured("fedmezo", programs, model, port, proxy, rounds)
                return found + await _measured("fedavg", programs, model, port, proxy, rounds)
        finally:
            programs.end()


async def _measured(
    kind: str, programs: Programs, model: Path, port: int, proxy: Counted, rounds: int
) -> list[Figure]:
    folder = programs.folder / kind
    folder.mkdir()
    (folder / "project.yml").write_text(project(port, WORKERS, proxy.address))
    data = f"{programs.folder}/{{site}}.jsonl"
    job: Program = programs.start(
        "benchmarks.integrations.nvflare_job",
        *(kind, "--rounds", str(rounds + 2), "--model", model, "--data", data),
        *("--project", folder / "project.yml"),
        HOME=str(folder),
        NVFLARE_POC_WORKSPACE=str(folder / "poc"),
        FEDMEZO_WORKER_DATA=data,
        FEDMEZO_WORKER_MODEL=str(model),
        FEDMEZO_WORKER_THREADS="1",
    )
    if kind == "fedmezo":
        way, first, last = "NVFlare", "round 2 committed", f"round {rounds + 2} committed"
    else:
        way, first, last = "FedAvg in NVFlare", "Round 1 started", f"Round {rounds + 1} started"
    found = await measured(way, job, first, last, rounds, proxy)
    await job.says('"status": "FINISHED:COMPLETED"')
    return found
