"""A run whose journal drops records: replica, restarts, late workers and export still agree."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import (
    Programs,
    at_round,
    joined,
    replica_digested,
    run_values,
    until,
)
from tests.integration.support.parties import Workers
from tests.integration.test_snapshots import Held, snapshot_of

ROUNDS = 16
RUN = {"rounds": ROUNDS, "workers_min": 2, "quorum": 2}


async def needs_snapshot(client: CoordinatorClient) -> bool:
    return (await client.get_run()).needs_snapshot


@pytest.mark.timeout(500)
async def test_restarts_late_workers_and_export_do_without_the_dropped_records(
    programs: Programs,
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal = tmp_path / "journal.db"
    flags = (
        "--model",
        model_folder,
        "--snapshot-every-rounds",
        "2",
        "--compact-after-records",
        "9",
    )
    coordinator, address = await programs.coordinator(journal, run_values(**RUN), *flags)
    working = workers.start_all(address, data_files[:2])
    held = Held(working[0].engine, 0)
    async with CoordinatorClient(address) as client:
        for stop in (3, 5, 7, 9):
            held.let(stop)
            await at_round(client, stop)
            await snapshot_of(client, stop - 1)
        await until(lambda: needs_snapshot(client), "records to go")
    coordinator.process.kill()
    await coordinator.wait()
    coordinator, _ = await programs.coordinator(
        journal, run_values(**RUN), *flags, port=int(address.rpartition(":")[2])
    )
    async with CoordinatorClient(address) as client:
        # The replica is back, from its own snapshot.
        await replica_digested(client, 9)
        with caplog.at_level(logging.INFO, logger="fedmezo.worker"):
            # Never by its own choice; but there is no other way.
            late = workers.start(address, "late", data_files[2], download_rate=0)
            working.append(late)
            await joined(client, "late")
        assert "took the snapshot of round 8" in caplog.text
        copying = workers.start(
            address, "copying", data_files[2], journal_copy=tmp_path / "copy.db"
        )
        error = await copying.outcome()
        assert isinstance(error, ConfigError)
        assert "copy.db cannot go on" in str(error)
        for stop in (11, 13, 15):
            held.let(stop)
            await at_round(client, stop)
            await snapshot_of(client, stop - 1)
        held.let(ROUNDS)
        assert [await worker.outcome() for worker in working] == [None] * 3
        await replica_digested(client, ROUNDS)
        status = await client.get_status()
        digests = {d.weights_digest for d in status.digests if d.round == ROUNDS}
        assert len(digests) == 1
        assert not status.divergences
    digest = digests.pop().hex()

    def exported(name: str, *more: str) -> str:
        flags = ["--model", str(model_folder), *more]
        return CliRunner().invoke(client_cli.app, ["export", str(tmp_path / name), *flags]).output

    expected = f"the model after round {ROUNDS}, weights digest {digest}"
    assert expected in await asyncio.to_thread(exported, "from", "--coordinator", address)
    coordinator.process.terminate()
    assert await coordinator.wait() == 0
    assert expected in exported("out", "--journal", str(journal))
    said = CliRunner().invoke(
        client_cli.app,
        ["export", str(tmp_path / "early"), "--journal", str(journal), "--round", "3"],
    )
    assert isinstance(said.exception, ConfigError)
    assert "snapshots of rounds" in str(said.exception)
    left = Journal(SqliteStore(journal))
    assert len(list(left.load())) < len(left) / 2
    left.close()
