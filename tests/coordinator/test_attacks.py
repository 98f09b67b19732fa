"""Honest workers beside each attack of `make bench-attacks`, in small: their rounds go on."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.attacks.attacker import ATTACKS
from tests.integration.support.harness import (
    ROOT,
    ScriptedWorker,
    config_of,
    environment,
    genesis_of,
    scripted_workers,
    served,
    until,
)

pytestmark = pytest.mark.slow

GENESIS = genesis_of(
    config_of(
        rounds=1_000_000, workers_min=2, quorum=2, cohort_size_max=4, local_steps=1, deadline_ms=500
    )
)
SECONDS = 1.0
CROWD = 40
"""Connections of the attacks that hold many."""
CONNECTION_MB_MAX = 0.5
BESIDE_MB = 120.0
"""Memory that this process, with both honest workers in it, may take meanwhile."""
CLOSING_MB = 250.0
"""The same beside thousands of connections a second, of which some hundreds are still closing."""


@pytest.mark.parametrize("name", ATTACKS)
async def test_honest_rounds_go_on_beside(name: str, tmp_path: Path) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as hands,
    ):
        for hand in hands:
            await hand.open()
        working = [asyncio.create_task(work(hand)) for hand in hands]
        (tmp_path / "hello").write_bytes(hands[0].hello(worker="hostile").SerializeToString())
        before_mb = resident_mb()
        attacker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.attacks.attacker", name),
            *(at.address.rpartition(":")[2], "--plain", "--seconds", str(SECONDS)),
            *("--hello", tmp_path / "hello", "--crowd", str(CROWD)),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        )
        try:
            assert attacker.stdout is not None
            begun = json.loads(await attacker.stdout.readline())
            first = at.daemon.status("").round

            async def went_on() -> bool:
                return at.daemon.status("").round >= first + 3

            # Members that never answer hold up their first rounds until the deadline.
            await until(went_on, f"rounds beside {name}")
            ended = json.loads(await attacker.stdout.readline())
            await attacker.wait()
            after = at.daemon.status("").round
            await until(lambda: is_beyond(at.daemon.status("").round, after), "rounds after it")
        finally:
            if attacker.returncode is None:
                attacker.kill()
                await attacker.wait()
        assert ended["connections"] >= begun["connections"] >= 1
        grown_mb = resident_mb() - before_mb
        beside_mb = CLOSING_MB if name == "reconnects" else BESIDE_MB
        assert grown_mb <= CONNECTION_MB_MAX * ended["connections"] + beside_mb
        for task in working:
            assert not task.done(), task.result()
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def is_beyond(round_: int, after: int) -> bool:
    return round_ > after


async def work(hand: ScriptedWorker) -> None:
    """Answer whatever is assigned; fails if the session ends or an answer is refused."""
    while True:
        message = await hand.stream.receive()
        assert message is not None
        match message.WhichOneof("kind"):
            case "assign":
                await asyncio.sleep(0.02)
                await hand.answer(message.assign)
            case "refused":
                assert message.refused.reason == "StaleTicketError", message
            case "ended":
                raise AssertionError(message)
            case _:
                pass


def resident_mb() -> float:
    """Memory of this process."""
    return float(psutil.Process().memory_info().rss) / 1e6
