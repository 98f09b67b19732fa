"""The example app on a real SuperLink with two SuperNodes: over Flower, and beside it."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.config import parse_run
from fedmezo_core.records import Genesis
from fedmezo_core.zo.party import open_party
from tests.integration.support.flower_programs import Flower
from tests.integration.support.harness import (
    ROOT,
    Programs,
    bodies_of,
    served,
    toml_of,
)
from tests.integration.support.parties import Workers

EXAMPLE = ROOT / "examples/flower"
CHANGES: dict[str, Any] = {"rounds": 3, "local_steps": 2, "batch_size": 4}
TASK_CHANGES: dict[str, Any] = {"tokens_max": 32}
RUN_WITHIN_S = 300.0
"""Longest time of a run on a machine that is busy."""
NAMES = ("w1", "w2")


def contract() -> dict[str, Any]:
    """The example's contract, with this test's changes."""
    app = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    run: dict[str, Any] = app["tool"]["flwr"]["app"]["config"]["run"]
    return {"model": "tiny", **run, **CHANGES, "task": run["task"] | TASK_CHANGES}


async def over_grpc(journal: Path, model: Path, data: list[Path]) -> bytes:
    """The digest of the weights after the same run over gRPC."""
    config = parse_run(contract(), "the example")
    genesis: Genesis = open_party(config, str(model), threads=1).genesis()
    workers = Workers(model)
    async with served(journal, genesis) as coordinator:
        working = workers.start_all(coordinator.address, data)
        await asyncio.gather(*(worker.task for worker in working))
        digest = working[0].engine.party.weights.digest()
        await workers.end()
    return digest


@pytest.mark.timeout(900)
async def test_the_example_over_flower_and_beside_it_ends_as_over_grpc(
    tmp_path: Path, programs: Programs, model_folder: Path, data_files: list[Path]
) -> None:
    flower = Flower(programs, tmp_path / "flower")
    await flower.started()
    for name, data in zip(NAMES, data_files, strict=False):
        settings = {"name": name, "data": str(data), "model": str(model_folder), "threads": 1}
        path = tmp_path / f"{name}.toml"
        path.write_text(toml_of(settings))
        programs.start("fedmezo_worker", "--config", path, "--serve", tmp_path / f"{name}.sock")
        flower.node(fedmezo_socket=tmp_path / f"{name}.sock", fedmezo_worker=path)
    expected = tmp_path / "grpc.db"
    digest = await over_grpc(expected, model_folder, data_files[:2])
    changes = {"run": CHANGES | {"task": TASK_CHANGES}, "model": str(model_folder)}

    over = tmp_path / "over.db"
    running = flower.run(EXAMPLE, changes | {"journal": str(over)})
    for name in NAMES:
        await running.says(f"Worker {name} has weights {digest.hex()}", RUN_WITHIN_S)
    assert bodies_of(over) == bodies_of(expected)

    beside = tmp_path / "beside.db"
    coordinator, address = await programs.coordinator(beside, contract(), "--model", model_folder)
    running = flower.run(EXAMPLE, changes | {"coordinator": address})
    done = "The worker of node [0-9]+ is done"
    await running.says(rf"{done}(.|\n)*{done}", RUN_WITHIN_S)
    coordinator.end()
    assert bodies_of(beside) == bodies_of(expected)
