"""A run over Flower's messages, and FedAvg in Flower on the same model and rows."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.integrations.rounds_over import (
    BATCH_SIZE,
    LOCAL_STEPS,
    WORKERS,
    contract,
    counting,
    measured,
    save_subject,
)
from tests.integration.support.flower_programs import Flower
from tests.integration.support.harness import ROOT, Programs

EXAMPLE = ROOT / "examples/flower"
FEDAVG = Path(__file__).with_name("fedavg_app")
OF_THE_EXAMPLE = ("seed", "rounds", "local_steps", "batch_size")
"""Keys of the contract that the example's configuration has, too."""


def figures(small: bool) -> Iterator[Figure]:
    """Seconds and bytes of a round, for both."""
    yield from asyncio.run(_figures(rounds=2 if small else 6))


async def _figures(rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_subject(folder)
        programs = Programs(folder)
        try:
            flower = Flower(programs, folder / "flower")
            await flower.started()
            with counting(flower.address) as proxy:
                for worker in WORKERS:
                    data = folder / f"{worker}.jsonl"
                    path = folder / f"{worker}.sock"
                    programs.start(
                        "fedmezo_worker",
                        *("--serve", path, "--name", worker, "--data", data, "--model", model),
                        *("--threads", "1"),
                    )
                    flower.node(proxy.address, fedmezo_socket=path, data=data)
                run: dict[str, Any] = {
                    key: value
                    for key, value in contract(rounds + 2).items()
                    if key in OF_THE_EXAMPLE
                }
                values: dict[str, Any] = {
                    "model": str(model),
                    "run": run | {"task": {"tokens_max": 32}},
                }
                running = flower.run(EXAMPLE, values)
                found = await measured(
                    "Flower",
                    running,
                    "Round 2 of",
                    f"Round {rounds + 2} of",
                    rounds,
                    proxy,
                )
                await running.says("is finished")
                values = {
                    "model": str(model),
                    "rounds": rounds + 2,
                    "local-steps": LOCAL_STEPS,
                    "batch-size": BATCH_SIZE,
                }
                running = flower.run(FEDAVG, values)
                found += await measured(
                    "FedAvg in Flower",
                    running,
                    rf"\[ROUND 2/{rounds + 2}\]",
                    rf"\[ROUND {rounds + 2}/{rounds + 2}\]",
                    rounds,
                    proxy,
                )
                return found
        finally:
            programs.end()
