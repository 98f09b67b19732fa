"""Whole runs: coordinator, replica and workers agree on every bit, whatever happens to them."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import DivergedError
from fedmezo_core.records import Answered, Committed, Diverged, Genesis, Started
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

ROUNDS = 8
ALL_FIVE = {"rounds": ROUNDS, "workers_min": 5, "quorum": 5}
"""Nothing is committed without everyone, so that who was slow cannot change the numbers."""


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    data_files: list[Path],
) -> wire.GetStatusResponse:
    """How the run ends when nothing goes wrong: its head and its weights."""

    async def run() -> wire.GetStatusResponse:
        journal = tmp_path_factory.mktemp("undisturbed") / "journal.db"
        workers = Workers(model_folder)
        async with (
            served(journal, tiny_genesis(**ALL_FIVE)) as coordinator,
            CoordinatorClient(coordinator.address) as client,
        ):
            try:
                await asyncio.gather(
                    *(w.task for w in workers.start_all(coordinator.address, data_files))
                )
                return await client.get_status()
            finally:
                await workers.end()

    return asyncio.run(run())


def digests_of(status: wire.GetStatusResponse) -> dict[str, bytes]:
    return {digest.party: digest.weights_digest for digest in status.digests}


def digest_rounds(status: wire.GetStatusResponse) -> dict[str, int]:
    return {digest.party: digest.round for digest in status.digests}


async def waits_only_for(client: CoordinatorClient, worker: str) -> None:
    """Wait for a round in which everyone else has answered."""

    async def does() -> bool:
        status = await client.get_status()
        return [w.worker for w in status.workers if w.measuring] == [worker]

    await until(does, f"a round that lacks {worker} only")


def assert_same_end(status: wire.GetStatusResponse, expected: wire.GetStatusResponse) -> None:
    """The same history and, at everyone who reported, the same weights."""
    assert status.phase == wire.PHASE_FINISHED
    assert status.round == ROUNDS
    assert status.head == expected.head
    assert set(digests_of(status).values()) == set(digests_of(expected).values())
    assert len(set(digests_of(status).values())) == 1
    assert not status.divergences


@pytest.mark.timeout(600)
async def test_separate_processes_agree_although_one_is_killed_and_one_comes_late(
    programs: Programs,
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
    undisturbed: wire.GetStatusResponse,
) -> None:
    """The main job: a coordinator, its replica and four workers, each a process of its own.

    A fifth worker, in this process, sets the pace.
    """
    journal, exported = tmp_path / "journal.db", tmp_path / "exported"
    coordinator, address = await programs.coordinator(
        *(journal, run_values(**ALL_FIVE)),
        *("--model", model_folder, "--heldout", heldout_file, "--evaluate-every-rounds", "4"),
    )
    processes = [
        programs.worker(address, f"w{k}", path, model_folder)
        for k, path in enumerate(data_files[:4], start=1)
    ]
    pacemaker = workers.start(address, "w5", data_files[4])
    async with CoordinatorClient(address) as client:
        await at_round(client, 2)
        pacemaker.engine.gate.clear()
        await waits_only_for(client, "w5")
        processes[3].send(signal.SIGSTOP)
        pacemaker.engine.gate.set()
        await waits_only_for(client, "w4")
        stopped_at = (await client.get_status()).round
        processes[3].send(signal.SIGKILL)
        processes[3] = programs.worker(address, "w4", data_files[3], model_folder)
        # The coordinator serves all this without torch in its process.
        assert not [m for m in loaded_libraries(coordinator.process.pid) if "torch" in m]
        assert [c for c in coordinator.children() if loads_torch(c)], "the replica"
        assert [await worker.wait() for worker in processes] == [0] * 4
        assert await pacemaker.outcome() is None

        async def replica_is_done() -> bool:
            status = await client.get_status()
            evaluated = [evaluation.round for evaluation in status.evaluations]
            return digest_rounds(status)["replica"] == ROUNDS and evaluated == [0, 4, 8]

        await until(replica_is_done, "the replica's last digest and evaluations")
        status = await client.get_status()
    assert 0 < stopped_at < ROUNDS
    assert f"caught up from round 0 to {stopped_at}" in processes[3].said
    assert_same_end(status, undisturbed)
    assert set(digests_of(status)) == {"w1", "w2", "w3", "w4", "w5", "replica"}

    shown = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "status", "--coordinator", address
    )
    assert await shown.wait() == 0
    assert status.head.hex()[:16] in shown.said
    asked = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command",
        "journal",
        "verify",
        "--coordinator",
        address,
    )
    assert await asked.wait() == 0
    assert f"head {status.head.hex()}" in asked.said

    coordinator.send(signal.SIGTERM)
    assert await coordinator.wait() == 0

    listed = programs.start(
        "fedmezo_coordinator.programs.fedmezo_command", "journal", "inspect", "--json", str(journal)
    )
    assert await listed.wait() == 0
    kinds = [json.loads(line)["kind"] for line in listed.said.splitlines()]
    assert kinds[:2] == ["genesis", "started"]
    assert kinds.count("committed") == ROUNDS
    assert kinds.count("evaluated") == 3

    flags = ["--model", str(model_folder), "--journal", str(journal), "--threads", "1"]
    taken = CliRunner().invoke(client_cli.app, ["export", str(exported), *flags])
    assert taken.exit_code == 0
    digest = digests_of(status)["replica"]
    assert digest.hex() in taken.output
    AutoTokenizer.from_pretrained(exported)
    AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tried = CliRunner().invoke(
        client_cli.app,
        ["evaluate", str(exported), "--data", str(heldout_file), "--format", "json"],
        catch_exceptions=False,
    )
    found, last = json.loads(tried.stdout), status.evaluations[-1]
    assert last.round == ROUNDS
    # The journal keeps binary32 numbers, and the replica has as many threads as it likes.
    assert np.float32(found["accuracy"]) == last.accuracy
    assert found["loss"] == pytest.approx(last.loss, abs=1e-6)
    genesis = records_of(journal)[0]
    assert isinstance(genesis, Genesis)
    assert open_party(genesis.config, str(exported), threads=1).weights.digest() == digest


def loaded_libraries(pid: int) -> list[str]:
    return [region.path for region in psutil.Process(pid).memory_maps(grouped=True)]


def loads_torch(process: psutil.Process) -> bool:
    return any("libtorch" in path for path in loaded_libraries(process.pid))


async def test_a_coordinator_killed_in_mid_round_goes_on_to_the_same_end(
    programs: Programs,
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    undisturbed: wire.GetStatusResponse,
) -> None:
    journal = tmp_path / "journal.db"
    write_genesis(journal, tiny_genesis(**ALL_FIVE))
    run = run_values(**ALL_FIVE)
    first, address = await programs.coordinator(journal, run, "--no-replica")
    working = workers.start_all(address, data_files)
    async with CoordinatorClient(address) as client:
        await at_round(client, 2)
        working[3].engine.gate.clear()
        await waits_only_for(client, "w4")
        first.send(signal.SIGKILL)
        await first.wait()
        port = int(address.rpartition(":")[2])
        second, _ = await programs.coordinator(journal, run, "--no-replica", port=port)
        working[3].engine.gate.set()
        assert [await worker.outcome() for worker in working] == [None] * 5
        status = await client.get_status()
    assert status.epoch == 2
    assert_same_end(status, undisturbed)
    second.send(signal.SIGTERM)
    assert await second.wait() == 0
    records = records_of(journal)
    assert [r.epoch for r in records if isinstance(r, Started)] == [1, 2]
    # Four answers were durable when the first one died, and were not measured again.
    assert len([r for r in records if isinstance(r, Answered)]) == 5 * ROUNDS


async def test_workers_survive_a_coordinator_that_is_gone_for_a_while(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    undisturbed: wire.GetStatusResponse,
) -> None:
    """Longer joined than `give_up_after_s`, then alone for less than it: nobody gives up."""
    journal = tmp_path / "journal.db"
    patience_s = 3.0
    async with served(journal, tiny_genesis(**ALL_FIVE)) as coordinator:
        port = int(coordinator.address.rpartition(":")[2])
        working = [
            workers.start(coordinator.address, f"w{k}", path, give_up_after_s=patience_s)
            for k, path in enumerate(data_files, start=1)
        ]
        async with CoordinatorClient(coordinator.address) as client:
            await at_round(client, 2)
            joined_at_s = asyncio.get_running_loop().time()
            working[0].engine.gate.clear()
            await asyncio.wait_for(working[0].engine.waiting.wait(), 60)

            async def long_joined() -> bool:
                return asyncio.get_running_loop().time() - joined_at_s > patience_s

            await until(long_joined, "a session older than the patience of its worker")
    assert not any(worker.task.done() for worker in working)
    working[0].engine.gate.set()
    async with (
        served(journal, listen=f"127.0.0.1:{port}") as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        assert [await worker.outcome() for worker in working] == [None] * 5
        assert_same_end(await client.get_status(), undisturbed)


async def test_a_late_worker_catches_up_from_the_journal_and_agrees(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(rounds=ROUNDS, workers_min=2, quorum=2)
    async with (
        served(tmp_path / "journal.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = workers.start_all(coordinator.address, data_files[:2])
        await at_round(client, 3)
        working[0].engine.gate.clear()
        working.append(workers.start(coordinator.address, "late", data_files[2]))
        await joined(client, "late")
        working[0].engine.gate.set()
        assert [await worker.outcome() for worker in working] == [None] * 3
        status = await client.get_status()
    assert set(digests_of(status)) == {"w1", "w2", "late"}
    assert len(set(digests_of(status).values())) == 1
    rounds = {w.worker: w.rounds_answered for w in status.workers}
    assert rounds["w1"] == ROUNDS
    assert 0 < rounds["late"] < ROUNDS


async def test_one_flipped_bit_is_reported_by_name_within_one_round(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(rounds=ROUNDS, quorum=3)
    journal = tmp_path / "journal.db"
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        working = workers.start_all(coordinator.address, data_files[:4])
        await at_round(client, 2)
        faulty = working[2]
        faulty.engine.gate.clear()
        await asyncio.wait_for(faulty.engine.waiting.wait(), 60)
        held_at = (await client.get_status()).round
        faulty.engine.flip_a_bit()
        faulty.engine.gate.set()
        error = await faulty.outcome()
        assert isinstance(error, DivergedError)
        assert f"The weights of worker w3 after round {held_at} are not the run's" in str(error)
        divergence = (await client.get_status()).divergences[0]
        assert (divergence.party, divergence.round) == ("w3", held_at)
        # Started again it rebuilds its weights from base and journal.
        working[2] = workers.start(coordinator.address, "w3", data_files[2])
        assert [await worker.outcome() for worker in working] == [None] * 4
        status = await client.get_status()
    assert set(digests_of(status)) == {"w1", "w2", "w3", "w4"}
    assert len(set(digests_of(status).values())) == 1
    records = records_of(journal)
    assert [(r.party, r.round) for r in records if isinstance(r, Diverged)] == [("w3", held_at)]
    commit = next(r for r in records if isinstance(r, Committed) and r.round == held_at + 1)
    assert len(commit.seed_ranges) == 3


async def test_thirty_steps_cost_at_most_150_bytes_up_and_losses_travel_only_if_asked(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for report_losses in (False, True):
        journal = tmp_path / f"journal-{report_losses}.db"
        genesis = tiny_genesis(
            rounds=2, local_steps=30, workers_min=1, quorum=1, report_losses=report_losses
        )
        sent: list[wire.SessionRequest] = []
        async with (
            served(journal, genesis) as coordinator,
            CoordinatorClient(coordinator.address) as client,
        ):
            take = coordinator.daemon.receive

            async def receive(session, message, take=take, sent=sent):  # type: ignore[no-untyped-def]
                sent.append(message)
                await take(session, message)

            monkeypatch.setattr(coordinator.daemon, "receive", receive)
            working = workers.start(coordinator.address, "w1", data_files[0])
            assert await working.outcome() is None
            status = await client.get_status()
        answers = [m.answer for m in sent if m.WhichOneof("kind") == "answer"]
        assert [len(answer.projected_grads) for answer in answers] == [30, 30]
        assert [m.WhichOneof("kind") for m in sent] == ["answer", "answer", "weights_report"]
        assert max(message.ByteSize() for message in sent) <= 150
        assert [answer.HasField("mean_loss") for answer in answers] == [report_losses] * 2
        assert status.workers[0].bytes_up == sum(message.ByteSize() for message in sent)
        assert status.workers[0].HasField("mean_loss") is report_losses


@pytest.mark.parametrize(
    "changes",
    [
        {"probes": 3, "estimator": "one_sided", "distribution": "gaussian"},
        {"probes": 2, "dtype": "bfloat16"},
    ],
    ids=["one-sided", "bfloat16"],
)
async def test_several_probes_a_step_end_in_the_same_weights_at_a_late_joiner_and_an_auditor(
    workers: Workers,
    model_folder: Path,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    changes: dict[str, Any],
) -> None:
    journal = tmp_path / "journal.db"
    genesis = tiny_genesis(rounds=5, workers_min=2, quorum=2, **changes)
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        early = workers.start_all(coordinator.address, data_files[:2])
        await at_round(client, 2)
        early[0].engine.gate.clear()
        await waits_only_for(client, "w1")
        late = workers.start(coordinator.address, "w3", data_files[2])
        await joined(client, "w3")
        early[0].engine.gate.set()
        assert [await worker.outcome() for worker in (*early, late)] == [None] * 3
        status = await client.get_status()
    held = digests_of(status)
    assert set(held) == {"w1", "w2", "w3"}
    assert len(set(held.values())) == 1
    assert not status.divergences

    commits = [record for record in records_of(journal) if isinstance(record, Committed)]
    per_answer = 2 * changes["probes"]
    assert {len(run.coefficients) for commit in commits for run in commit.seed_ranges} == {
        per_answer
    }
    auditor = open_party(genesis.config, str(model_folder), threads=1).weights
    base = auditor.digest()
    auditor.apply(1, commits_of(commits))
    assert base != auditor.digest() == held["w1"]
