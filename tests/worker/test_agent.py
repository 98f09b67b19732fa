"""The agent against a real daemon: how it ends, and how it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmezo_coordinator.serving import name_contests
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.errors import ReplacedError, UnavailableError
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import joined, scripted_workers, served, until
from tests.integration.support.parties import Workers


async def test_a_replaced_worker_says_so_and_comes_back(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(name_contests, "REPLACED_RETRY_S", 0.2)
    genesis = tiny_genesis(workers_min=2, quorum=2, rounds=2)
    async with (
        served(tmp_path / "journal.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        first = workers.start(coordinator.address, "w1", data_files[0])
        await joined(client, "w1")
        async with scripted_workers(coordinator.address, genesis, "w1") as [typo]:
            await typo.open()
            error = await typo.ended()
            assert isinstance(error, ReplacedError)
        assert "Another process has joined as worker w1" in caplog.text
        other = workers.start(coordinator.address, "w2", data_files[1])
        assert [await first.outcome(), await other.outcome()] == [None, None]


async def test_it_gives_up_on_a_coordinator_that_stays_away(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    async with (
        served(tmp_path / "journal.db", tiny_genesis()) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = workers.start(coordinator.address, "w1", data_files[0], give_up_after_s=0.5)
        await joined(client, "w1")
    error = await working.outcome()
    assert isinstance(error, UnavailableError)
    assert coordinator.address in str(error)


async def test_a_coordinator_that_goes_away_at_the_very_end_is_no_error(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    """The run is over for the worker once it was told so, even if its last digest is lost."""
    genesis = tiny_genesis(rounds=1, workers_min=1, quorum=1)
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        working = workers.start(coordinator.address, "w1", data_files[0])
        digest = working.engine.digest
        told = asyncio.Event()
        gone = asyncio.Event()

        async def slow_digest() -> bytes:
            told.set()
            await gone.wait()
            return await digest()

        working.engine.digest = slow_digest  # type: ignore[method-assign]
        await asyncio.wait_for(told.wait(), 60)
    gone.set()
    assert await asyncio.wait_for(working.outcome(), 30) is None


async def test_a_finished_run_sends_a_late_worker_home_with_the_same_weights(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(rounds=2, workers_min=1, quorum=1)
    async with (
        served(tmp_path / "journal.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        assert await workers.start(coordinator.address, "w1", data_files[0]).outcome() is None
        assert await workers.start(coordinator.address, "late", data_files[1]).outcome() is None
        status = await client.get_status()
    assert status.phase == wire.PHASE_FINISHED
    assert {d.party for d in status.digests} == {"w1", "late"}
    assert len({d.weights_digest for d in status.digests}) == 1


async def test_a_worker_that_finds_no_place_comes_back_when_the_coordinator_says(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hints: list[float | None] = []

    def delay(attempt: int, uniform: float, retry_after_s: float | None, **_: float) -> float:
        assert 0 <= uniform < 1
        hints.append(retry_after_s)
        return 0.05

    monkeypatch.setattr("fedmezo_core.wire.reconnecting.delay_s", delay)
    genesis = tiny_genesis(workers_min=1, quorum=1, rounds=1)
    async with (
        served(
            tmp_path / "journal.db", genesis, session_limit=SessionLimit(sessions_max=1)
        ) as coordinator,
        scripted_workers(coordinator.address, genesis, "w1") as [scripted],
    ):
        await scripted.open()
        working = workers.start(coordinator.address, "w2", data_files[0])

        async def refused() -> bool:
            return bool(hints)

        await until(refused, "the worker to be refused")
        await scripted.work_to_the_end()
        scripted.stream.cancel()
        assert await working.outcome() is None
    assert set(hints) == {30.0}
