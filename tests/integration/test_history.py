"""Signed history: what workers refuse to follow, and a run that is rebuilt from a worker's copy."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import DivergedError, JournalBehindError, MismatchError
from fedmezo_core.journal.signed_heads import Signer, open_signer
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import at_round, records_of, served, until
from tests.integration.support.parties import Workers, Working

ROUNDS = 6
TWO = {"rounds": ROUNDS, "workers_min": 2, "quorum": 2}


async def end(workers: Sequence[Working]) -> None:
    """Stop workers, wherever they are."""
    for working in workers:
        working.engine.gate.set()
        working.task.cancel()
    await asyncio.gather(*(working.task for working in workers), return_exceptions=True)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return open_signer(tmp_path / "journal.db.key")


async def test_a_run_goes_on_from_a_workers_copy_to_the_end_it_would_have_had(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    signer: Signer,
) -> None:
    genesis = tiny_genesis(**TWO, digest_every_rounds=2)
    ends: list[wire.GetStatusResponse] = []
    async with served(tmp_path / "undisturbed.db", genesis) as coordinator:
        both = workers.start_all(coordinator.address, data_files[:2])
        assert [await working.outcome() for working in both] == [None, None]
        async with CoordinatorClient(coordinator.address) as client:
            ends.append(await client.get_status())

    copy = tmp_path / "copy.db"
    async with served(tmp_path / "journal.db", genesis, signer=signer) as coordinator:
        keeper = workers.start(coordinator.address, "w1", data_files[0], journal_copy=copy)
        other = workers.start(coordinator.address, "w2", data_files[1])
        async with CoordinatorClient(coordinator.address) as client:
            await at_round(client, 2)
            other.engine.gate.clear()
            await asyncio.wait_for(other.engine.waiting.wait(), 60)
    # The coordinator's machine is lost, with its journal; the workers end too.
    await end([keeper, other])
    kept = [record.round for record in records_of(copy) if isinstance(record, Committed)]
    assert 2 <= len(kept) < ROUNDS

    restored = tmp_path / "restored.db"
    done = CliRunner().invoke(client_cli.app, ["journal", "restore", str(copy), str(restored)])
    assert done.exit_code == 0, done.output
    assert f"{len(kept)} rounds committed" in done.output
    assert (
        f"signed up to round {len(kept)} by {signer.public_key.hex()}, signatures checked"
        in done.output
    )
    async with served(restored, signer=signer) as coordinator:
        again = workers.start(coordinator.address, "w1", data_files[0], journal_copy=copy)
        fresh = workers.start(coordinator.address, "w2", data_files[1])
        assert [await again.outcome(), await fresh.outcome()] == [None, None]
        async with CoordinatorClient(coordinator.address) as client:
            ends.append(await client.get_status())
    assert ends[0].head == ends[1].head
    assert len({d.weights_digest for end in ends for d in end.digests}) == 1
    assert len([r for r in records_of(copy) if isinstance(r, Committed)]) == ROUNDS


async def test_workers_wait_for_the_right_journal_and_give_up_on_an_older_one(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    signer: Signer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal, older, copy = tmp_path / "journal.db", tmp_path / "older.db", tmp_path / "copy.db"
    async with served(journal, tiny_genesis(**TWO), signer=signer) as coordinator:
        both = [
            workers.start(coordinator.address, "w1", data_files[0], journal_copy=copy),
            workers.start(coordinator.address, "w2", data_files[1]),
        ]
        async with CoordinatorClient(coordinator.address) as client:
            await at_round(client, 1)
            both[1].engine.gate.clear()
            await asyncio.wait_for(both[1].engine.waiting.wait(), 60)
    shutil.copy(journal, older)
    async with served(journal, signer=signer) as coordinator:
        await end(both)
        both = [
            workers.start(coordinator.address, "w1", data_files[0], journal_copy=copy),
            workers.start(coordinator.address, "w2", data_files[1]),
        ]
        assert [await working.outcome() for working in both] == [None, None]
    # A backup from before is put back; the worker has restarted, but its copy remembers.
    met = "the journal is older than the worker"
    async with served(older, signer=signer) as coordinator:
        listen = coordinator.address
        again = workers.start(listen, "w1", data_files[0], journal_copy=copy, give_up_after_s=0.5)
        error = await again.outcome()
        assert isinstance(error, JournalBehindError)
        assert met in str(error)
        told = caplog.text.count(met)
        patient = workers.start(listen, "w1", data_files[0], journal_copy=copy)

        async def has_met_it() -> bool:
            return caplog.text.count(met) > told

        await until(has_met_it, "the worker to meet the older journal")
    async with served(journal, listen=listen, signer=signer):
        assert await patient.outcome() is None


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_worker_follows_only_the_key_that_it_knows(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    signer: Signer,
    pinned: bool,
) -> None:
    genesis = tiny_genesis(rounds=1, workers_min=1, quorum=1)
    impostor = open_signer(tmp_path / "impostor.key")
    copy = tmp_path / "copy.db"
    async with served(tmp_path / "a.db", genesis, signer=signer) as coordinator:
        working = workers.start(coordinator.address, "w1", data_files[0], journal_copy=copy)
        assert await working.outcome() is None
    known = {"checkpoint_key": signer.public_key.hex()} if pinned else {"journal_copy": copy}
    async with served(tmp_path / "b.db", genesis, signer=impostor) as coordinator:
        error = await workers.start(coordinator.address, "w1", data_files[0], **known).outcome()
    assert isinstance(error, MismatchError if pinned else DivergedError)
    assert impostor.public_key.hex() in str(error)


async def test_a_worker_stops_at_a_commit_that_the_runs_key_did_not_sign(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sign = signer.sign

    def forged(run_id: str, round_: int, head: bytes) -> bytes:
        return sign(run_id, round_, b"x" * 32 if round_ == 2 else head)

    monkeypatch.setattr(signer, "sign", forged)
    genesis = tiny_genesis(rounds=3, workers_min=1, quorum=1)
    async with served(tmp_path / "journal.db", genesis, signer=signer) as coordinator:
        error = await workers.start(coordinator.address, "w1", data_files[0]).outcome()
    assert isinstance(error, DivergedError)
    assert "signature for round 2" in str(error)
