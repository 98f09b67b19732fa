"""A run with a worker that keeps its rows private: the journal holds what its ledger holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from fedmezo_core.errors import ConfigError
from fedmezo_core.records import Answered, Genesis, Opened
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import records_of, served
from tests.integration.support.parties import Workers

ROUNDS = 3
CONTRACT = {"rounds": ROUNDS, "workers_min": 2, "quorum": 2, "report_losses": False}


async def test_only_what_the_ledger_holds_leaves_a_private_worker(
    tiny_genesis: Callable[..., Genesis],
    data_files: list[Path],
    workers: Workers,
    tmp_path: Path,
) -> None:
    journal, ledger = tmp_path / "journal.db", tmp_path / "ledger"
    async with (
        served(journal, tiny_genesis(**CONTRACT)) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        private = workers.start(
            coordinator.address,
            "private",
            data_files[0],
            privacy_epsilon=8.0,
            privacy_delta=1e-3,
            privacy_clip=1.0,
            privacy_ledger=ledger,
        )
        plain = workers.start(coordinator.address, "plain", data_files[1])
        await asyncio.gather(private.task, plain.task)
        status = await client.get_status()
    digests = {digest.party: digest.weights_digest for digest in status.digests}
    assert digests["private"] == digests["plain"]
    records = records_of(journal)
    cohorts = {record.round: record.workers for record in records if isinstance(record, Opened)}
    sent = [
        list(record.scalars.projected_grads)
        for record in records
        if isinstance(record, Answered) and cohorts[record.round][record.slot] == "private"
    ]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
    assert len(lines) == ROUNDS
    assert sent == [line["projected_grads"] for line in lines]


async def test_a_run_that_wants_losses_is_left_before_anything_is_sent(
    tiny_genesis: Callable[..., Genesis],
    data_files: list[Path],
    workers: Workers,
    tmp_path: Path,
) -> None:
    genesis = tiny_genesis(**{**CONTRACT, "report_losses": True})
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        private = workers.start(
            coordinator.address,
            "private",
            data_files[0],
            privacy_epsilon=8.0,
            privacy_clip=1.0,
            privacy_ledger=tmp_path / "ledger",
        )
        error = await private.outcome()
    assert isinstance(error, ConfigError)
    assert "allows no report_losses" in str(error)
