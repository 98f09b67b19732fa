"""SIGTERM and Ctrl-C end both daemons cleanly; kill -9 leaves no replica behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedmezo import Coordinator
from fedmezo_core.errors import UnavailableError
from fedmezo_core.records import Genesis, SeedRange
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_worker.resident import ask
from tests.integration.support.harness import Program, Programs, run_values, until, write_genesis
from tests.integration.support.liar import Liar, commit, page_of, serving

SECONDS = 20.0
"""What "within seconds" may be on a machine that does much else."""
SLACK_S = 3.0
"""What such a machine may add to a bound."""


async def test_workers_in_mid_measurement_end_within_seconds(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    journal = tmp_path / "journal.db"
    # One measurement would take minutes.
    changes = {"local_steps": 1024, "workers_min": 2, "quorum": 2}
    write_genesis(journal, tiny_genesis(**changes))
    coordinator, address = await programs.coordinator(
        journal, run_values(**changes), "--no-replica"
    )
    both = [programs.worker(address, name, data_files[0], model_folder) for name in ("term", "int")]
    async with CoordinatorClient(address) as client:

        async def both_measure() -> bool:
            return [w.measuring for w in (await client.get_status()).workers] == [True, True]

        await until(both_measure, "both workers to measure")
        both[0].send(signal.SIGTERM)
        both[1].send(signal.SIGINT)
        assert [await worker.wait(SECONDS) for worker in both] == [0, 0]

        async def both_left() -> bool:
            return not any(w.connected for w in (await client.get_status()).workers)

        await until(both_left, "both workers to have left")
        # A client that stays connected does not hold the coordinator up.
        coordinator.send(signal.SIGINT)
        assert await coordinator.wait(SECONDS) == 0


async def test_a_worker_that_stays_ends_in_mid_measurement_within_seconds(
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    # One measurement would take minutes.
    genesis = tiny_genesis(local_steps=1024, workers_min=1, quorum=1)
    coordinator, path = Coordinator(genesis), tmp_path / "w.sock"
    worker = programs.start(
        "fedmezo_worker",
        *("--serve", path, "--name", "w", "--threads", "1"),
        *("--data", data_files[0], "--model", model_folder),
    )
    await worker.says("listens on")

    def exchanged(down: bytes) -> bytes:
        return ask(path, "job", coordinator.genesis_bytes, down)[1]

    down = coordinator.exchange(await asyncio.to_thread(exchanged, b""))
    measuring = asyncio.create_task(asyncio.to_thread(exchanged, down))
    await asyncio.sleep(2)
    assert not measuring.done()
    begin_s = time.monotonic()
    worker.send(signal.SIGTERM)
    assert await worker.wait(SECONDS) == 0
    assert time.monotonic() - begin_s < 5 + SLACK_S
    assert "was cut off" not in worker.said
    assert not path.exists()
    with pytest.raises(UnavailableError):
        await measuring


async def replica_of(coordinator: Program) -> psutil.Process:
    """The coordinator's child, once there is one."""

    async def there() -> bool:
        return bool(coordinator.children())

    await until(there, "the replica")
    return coordinator.children()[0]


async def gone(process: psutil.Process) -> None:
    async def ended() -> bool:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

    await until(ended, "the end of the replica", SECONDS)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)]
)
async def test_the_replica_ends_with_its_coordinator(
    programs: Programs,
    model_folder: Path,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    number: signal.Signals,
    status: int,
) -> None:
    journal = tmp_path / "journal.db"
    write_genesis(journal, tiny_genesis())
    coordinator, address = await programs.coordinator(
        journal, run_values(), "--model", model_folder
    )
    replica = await replica_of(coordinator)
    if (
        number == signal.SIGKILL
    ):  # The others may come at any time; this one when it waits for news.
        async with CoordinatorClient(address) as client:

            async def reported() -> bool:
                return bool((await client.get_status()).digests)

            await until(reported, "the replica's first digest")
    coordinator.send(number)
    assert await coordinator.wait(SECONDS) == status
    await gone(replica)


async def test_a_coordinator_that_still_loads_its_model_ends_too(
    programs: Programs, model_folder: Path, tmp_path: Path
) -> None:
    settings = programs.settings(run_values())
    coordinator = programs.start(
        *("fedmezo_coordinator", "--config", settings, "--model", model_folder),
        *("--listen", "127.0.0.1:0", "--journal", tmp_path / "journal.db"),
    )
    loading = await replica_of(coordinator)
    coordinator.send(signal.SIGTERM)
    assert await coordinator.wait(SECONDS) == 0
    await gone(loading)


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("importing", "is starting"),
        ("connecting", "connecting to"),
        ("reading", "reading"),
        ("catching up", "trainable elements"),
        ("applying", "trainable elements"),
    ],
)
async def test_a_worker_ends_in_time_in_any_phase(
    phase: str,
    said: str,
    programs: Programs,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    """Whatever a coordinator lets it do: nothing for ever, pages for ever, or long arithmetic."""
    # The commits of all rounds, in one page, take half a minute.
    genesis = tiny_genesis(local_steps=1024, probes=4, rounds=6, distribution="gaussian")
    config = genesis.config
    pairs = (SeedRange(0, (1e-6,) * config.pairs_per_answer),) * config.answers_max
    liar, data = Liar(genesis), data_files[0]
    if phase == "connecting":
        liar.delay_s = SECONDS
    elif phase == "reading":
        # Nobody writes into it, so it can never be read.
        data = tmp_path / "rows.jsonl"
        os.mkfifo(data)
    elif phase == "catching up":
        liar.delay_s = 0.5
        liar.page = lambda request: page_of(commit(config, request.from_round, seed_ranges=()))
    elif phase == "applying":
        every = page_of(*[commit(config, n, seed_ranges=pairs) for n in range(1, 7)])
        liar.page = lambda _: every
    async with serving(liar) as address:
        worker = programs.worker(address, "w", data, model_folder)
        await worker.says(said)
        if phase in ("catching up", "applying"):

            async def asked() -> bool:
                return liar.asked > (phase == "catching up")

            await until(asked, "the worker to ask for the journal")
            await asyncio.sleep(1)
        begin_s = time.monotonic()
        worker.send(signal.SIGTERM)
        assert await worker.wait(SECONDS) == 0
        assert time.monotonic() - begin_s < 5 + SLACK_S
        if phase in ("reading", "applying"):
            assert "did not end in time, so it was cut off" in worker.said
