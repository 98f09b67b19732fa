"""Ways to learn, over real gRPC: every party ends with the same weights under every contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.journal.codec import decode_record
from fedmezo_core.records import Committed, Genesis, Opened, Paused, Resumed
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.party import open_party
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    Programs,
    at_round,
    joined,
    records_of,
    run_values,
    served,
    until,
    write_genesis,
)
from tests.integration.support.parties import Workers

THREE: dict[str, Any] = {"workers_min": 3, "quorum": 3}
ALONE: dict[str, Any] = {"workers_min": 1, "quorum": 1}
WAYS: dict[str, dict[str, Any]] = {
    "shared, normalized, cosine": {
        "seed_policy": "shared",
        "normalized_step": True,
        "probes": 3,
        "estimator": "one_sided",
        "schedule": "cosine",
        "warmup_rounds": 2,
        "eps_follows_rate": True,
        "learning_rate": 1e-3,
    },
    "pool, weighted draws, decay": {
        "seed_policy": "pool",
        "pool_size": 32,
        "pool_sampling": "weighted",
        "rebase_every_rounds": 3,
        "weight_decay": 1.0,
        "learning_rate": 1e-3,
    },
    "own rates, by rows, bfloat16": {
        "personal_rate": "update_distance",
        "weighting": "rows",
        "weight_decay": 1.0,
        "learning_rate": 1e-3,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
async def test_all_parties_and_the_journal_agree(
    way: dict[str, Any],
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
) -> None:
    journal = tmp_path / "journal.db"
    genesis = tiny_genesis(**THREE, **way, rounds=7)
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = workers.start_all(coordinator.address, data_files[:3])
        assert [await worker.outcome() for worker in working] == [None] * 3
        status = await client.get_status()
    assert status.round == 7
    digests = {digest.weights_digest for digest in status.digests}
    assert len(status.digests) == 3
    assert len(digests) == 1
    assert not status.divergences

    records = records_of(journal)
    commits = [record for record in records if isinstance(record, Committed)]
    rebuilt = open_party(genesis.config, str(model_folder), threads=1).weights
    rebuilt.apply(1, commits_of(commits))
    assert rebuilt.digest() in digests
    one_by_one = open_party(genesis.config, str(model_folder), threads=1).weights
    for commit in commits:
        one_by_one.apply(commit.round, commits_of([commit]))
    assert one_by_one.digest() in digests

    rates = [record.learning_rates for record in records if isinstance(record, Opened)]
    if way.get("personal_rate"):
        assert rates[0] == ()
        assert all(len(set(own)) > 1 for own in rates[1:]), "each its own"
    if way.get("schedule"):
        # Two rounds up; the third has the whole rate, which is the contract's; then down.
        assert rates[0][0] < rates[1][0] < genesis.config.learning_rate
        assert rates[2] == ()
        down = [own[0] for own in rates[3:]]
        assert down == sorted(down, reverse=True)


async def test_a_late_worker_of_a_pool_begins_at_the_newest_commit_from_the_base(
    workers: Workers,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    way = WAYS["pool, weighted draws, decay"]
    genesis = tiny_genesis(**way, **ALONE, rounds=40)
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        early = workers.start(coordinator.address, "early", data_files[0])
        async with CoordinatorClient(coordinator.address) as client:
            await at_round(client, 5)
            early.engine.gate.clear()
            await early.engine.waiting.wait()
            page = await client.read_journal(0, commits_only=True, from_newest_base=True)
            first = decode_record(page.entries[0].record)
            assert isinstance(first, Committed)
            assert first.from_base
            assert first.round % 3 == 0
            assert len(page.head_before) == 32
            late = workers.start(coordinator.address, "late", data_files[1])
            await joined(client, "late")
            early.engine.gate.set()
            assert [await early.outcome(), await late.outcome()] == [None, None]
            status = await client.get_status()
    digests = {digest.party: digest.weights_digest for digest in status.digests}
    assert digests["early"] == digests["late"]


@pytest.mark.timeout(400)
async def test_a_diverging_run_pauses_and_a_person_lets_it_go_on(
    programs: Programs,
    workers: Workers,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
) -> None:
    journal = tmp_path / "journal.db"
    way = {
        **ALONE,
        "learning_rate": 3.0,
        "report_losses": True,
        "pause_rounds": 2,
        "pause_loss_factor": 1.5,
        "rounds": 30,
    }
    async with (
        served(journal, tiny_genesis(**way)) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        workers.start(coordinator.address, "w1", data_files[0])

        async def is_paused() -> bool:
            return (await client.get_status()).phase == wire.PHASE_PAUSED

        await until(is_paused, "the pause")
        status = await client.get_status()
        assert "the training loss is" in status.reason
        assert 2 <= status.round < 30
        await asyncio.sleep(0.5)
        assert (await client.get_status()).round == status.round, "nothing goes on"
    await workers.end()

    run = run_values(**way)
    paused, address = await programs.coordinator(journal, run, "--no-replica")
    assert "the run is paused: the training loss is" in paused.said
    shown = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "status", "--coordinator", address
    )
    await shown.wait()
    assert "PAUSED" in shown.said
    assert "fedmezo run resume" in " ".join(shown.said.split())
    paused.end()

    resumed, address = await programs.coordinator(
        journal, run, "--no-replica", "--resume", "--resume-rate-factor", "1e-6"
    )
    worker = workers.start(address, "w1", data_files[0])
    async with CoordinatorClient(address) as client:

        async def goes_on() -> bool:
            return (await client.get_status()).round > status.round

        await until(goes_on, "a round after the pause")
        now = await client.get_status()
        assert now.workers[0].learning_rate == pytest.approx(3e-6)
    worker.task.cancel()
    resumed.end()
    records = records_of(journal)
    kinds = [type(record) for record in records]
    assert kinds.index(Paused) < kinds.index(Resumed)
    # It went on with the smaller rate, until the weights, which were still bad, paused it again.
    opened = [r for r in records[kinds.index(Resumed) :] if isinstance(r, Opened)]
    assert opened[0].round == status.round + 1
    assert list(opened[0].learning_rates) == pytest.approx([3e-6])

    healthy = tmp_path / "healthy.db"
    write_genesis(healthy, tiny_genesis(**way))
    refused = programs.start(
        "fedmezo_coordinator", "--journal", str(healthy), "--no-replica", "--resume",
        "--listen", "127.0.0.1:0",
    )  # fmt: skip
    assert await refused.wait() == 2
    assert "nothing to resume" in refused.said
