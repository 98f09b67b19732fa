"""A run over FedMeZO's own gRPC."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.integrations.rounds_over import WORKERS, contract, counting, measured, save_subject
from tests.integration.support.harness import Programs


def figures(small: bool) -> Iterator[Figure]:
    """Seconds and bytes of a round."""
    yield from asyncio.run(_figures(rounds=5 if small else 60))


async def _figures(rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_subject(folder)
        programs = Programs(folder)
        try:
            coordinator, address = await programs.coordinator(
                folder / "journal.db", contract(rounds + 2), "--model", model, "--no-replica"
            )
            with counting(address) as proxy:
                for worker in WORKERS:
                    programs.worker(proxy.address, worker, folder / f"{worker}.jsonl", model)
                return await measured(
                    "gRPC",
                    coordinator,
                    "round 2 committed",
                    f"round {rounds + 2} committed",
                    rounds,
                    proxy,
                )
        finally:
            programs.end()
