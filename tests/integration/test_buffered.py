"""Buffered rounds over gRPC: nobody waits for a slow worker, and its answer still counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fedmezo_core.records import Committed, Genesis, Opened, RoundSlot
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.commits import commits_of
from fedmezo_core.zo.party import open_party
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import at_round, records_of, served, until
from tests.integration.support.parties import Workers, Working

ROUNDS = 20
ROUNDS_MISSED = 4


async def has_answered(client: CoordinatorClient, worker: str) -> None:
    async def has() -> bool:
        status = await client.get_status()
        return any(w.worker == worker and w.HasField("mean_loss") for w in status.workers)

    await until(has, f"an answer of {worker}")


def slots_of(journal: Path, worker: str) -> set[RoundSlot]:
    """What a worker was assigned."""
    return {
        RoundSlot(record.round, slot)
        for record in records_of(journal)
        if isinstance(record, Opened)
        for slot, name in enumerate(record.workers, start=record.first_slot)
        if name == worker
    }


async def run_with_a_slow_worker(
    client: CoordinatorClient, slow: Working, fast: list[Working]
) -> None:
    """The slow one begins to measure, and ends when the others are some rounds further."""
    await asyncio.wait_for(slow.engine.waiting.wait(), 60)
    begun_at = (await client.get_status()).round
    await at_round(client, begun_at + ROUNDS_MISSED)
    for worker in fast:
        worker.engine.gate.clear()
    slow.engine.gate.set()
    await has_answered(client, "slow")
    for worker in fast:
        worker.engine.gate.set()


async def test_fast_workers_do_not_wait_and_a_late_answer_counts_with_its_age(
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    journal = tmp_path / "journal.db"
    genesis = tiny_genesis(
        rounds=ROUNDS,
        workers_min=3,
        quorum=1,
        buffer_answers=2,
        staleness_max_rounds=ROUNDS,
        local_steps=3,
        report_losses=True,
        pause_rounds=0,
    )
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        slow = workers.start(coordinator.address, "slow", data_files[0])
        slow.engine.gate.clear()
        fast = [
            workers.start(coordinator.address, f"fast-{k}", path)
            for k, path in enumerate(data_files[1:3])
        ]
        await run_with_a_slow_worker(client, slow, fast)
        assert [await worker.outcome() for worker in (slow, *fast)] == [None] * 3
        status = await client.get_status()
    commits = [record for record in records_of(journal) if isinstance(record, Committed)]
    assert (status.phase, status.round, len(commits)) == (wire.PHASE_FINISHED, ROUNDS, ROUNDS)
    assert all(len(commit.answers) == 2 for commit in commits)
    ages = {place: c.round - place.round for c in commits for place in c.answers}
    assert max(ages[place] for place in slots_of(journal, "slow") & ages.keys()) >= ROUNDS_MISSED
    # Everyone ends with the weights that the journal alone gives, the late answer in them.
    party = open_party(genesis.config, str(model_folder), threads=1)
    party.weights.apply(1, commits_of(commits))
    digests = {digest.party: digest.weights_digest for digest in status.digests}
    assert digests == dict.fromkeys(["fast-0", "fast-1", "slow"], party.weights.digest())
    assert not status.divergences
    assert not any(worker.complaint for worker in status.workers)
