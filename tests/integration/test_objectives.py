"""Runs scored by a user's function: a bad one keeps its worker out, and nobody else."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmezo_core.errors import ConfigError
from fedmezo_core.records import Answered, Committed, Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.objectives import load_objective
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support import scoring
from tests.integration.support.harness import (
    TASK,
    Programs,
    records_of,
    run_values,
    served,
    until,
)
from tests.integration.support.parties import Workers, write_rows

ERROR_RATE = "fedmezo_core.zo.objectives:error_rate"


def task_of(objective: str, **changes: Any) -> dict[str, Any]:
    return TASK | {"objective": objective} | changes


@pytest.fixture
def hanging() -> Iterator[None]:
    """Functions that hang do so until the test is over."""
    scoring.hanging_ended.clear()
    yield
    scoring.hanging_ended.set()


def rows_that(conduct: str, folder: Path) -> Path:
    """Rows that tell the objective what to do."""
    return write_rows(folder / f"{conduct}.jsonl", more={"conduct": conduct})


def digests_of(status: wire.GetStatusResponse) -> dict[str, bytes]:
    return {digest.party: digest.weights_digest for digest in status.digests}


def complaint_of(status: wire.GetStatusResponse, worker: str) -> str:
    return next(w.complaint for w in status.workers if w.worker == worker)


# ---------------------------------------------------------------- bad ones


@pytest.mark.parametrize(
    ("conduct", "words"),
    [
        ("raise", "raised LookupError; this worker's log says where."),
        ("none", "returned None; it must return one finite number."),
        ("nan", "returned nan; it must return one finite number."),
    ],
)
async def test_the_run_goes_on_without_a_worker_whose_objective_fails(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
    conduct: str,
    words: str,
) -> None:
    caplog.set_level(logging.WARNING, "fedmezo")
    journal = tmp_path / "journal.db"
    genesis = tiny_genesis(rounds=3, workers_min=2, quorum=1, task=task_of(scoring.NAME))
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        good = workers.start(coordinator.address, "good", data_files[0], objective=scoring.NAME)
        data = rows_that(conduct, tmp_path)
        bad = workers.start(coordinator.address, "bad", data, objective=scoring.NAME)
        assert [await good.outcome(), await bad.outcome()] == [None, None]
        status = await client.get_status()
    assert (status.phase, status.round) == (wire.PHASE_FINISHED, 3)
    assert complaint_of(status, "bad") == f"Objective {scoring.NAME} {words}"
    assert not complaint_of(status, "good")
    assert len(digests_of(status)) == 2
    assert len(set(digests_of(status).values())) == 1
    # No word of the data goes to the coordinator, but this machine's log has it.
    assert scoring.SECRET not in repr(records_of(journal)) + str(status)
    assert (scoring.SECRET in caplog.text) is (conduct == "raise")


@pytest.mark.usefixtures("hanging")
async def test_the_run_goes_on_without_a_worker_whose_objective_hangs(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first round waits until its deadline, the others don't wait at all."""
    caplog.set_level(logging.WARNING, "fedmezo")
    genesis = tiny_genesis(
        rounds=6, workers_min=2, quorum=1, deadline_ms=4000, task=task_of(scoring.NAME)
    )
    beats: list[float] = []

    async def heart() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(heart())
    async with (
        served(tmp_path / "journal.db", genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        good = workers.start(coordinator.address, "good", data_files[0], objective=scoring.NAME)
        data = rows_that("hang", tmp_path)
        bad = workers.start(coordinator.address, "bad", data, objective=scoring.NAME)

        async def complains() -> bool:
            status = await client.get_status()
            return any(worker.complaint for worker in status.workers)

        await until(complains, "a complaint")
        first_s = time.monotonic()
        assert [await good.outcome(), await bad.outcome()] == [None, None]
        assert time.monotonic() - first_s < 4 * 4
        status = await client.get_status()
    beating.cancel()
    assert (status.phase, status.round) == (wire.PHASE_FINISHED, 6)
    assert "is still busy with an earlier round" in complaint_of(status, "bad")
    assert f"objective {scoring.NAME}" in caplog.text.lower()
    assert len(set(digests_of(status).values())) == 1
    assert len(digests_of(status)) == 2
    longest_s = max(b - a for a, b in itertools.pairwise(beats))
    assert longest_s < 3, "the event loop went on all the while"


@pytest.mark.usefixtures("hanging")
async def test_a_worker_says_so_when_the_deadline_passes(
    workers: Workers,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody else answers either: the round stays open, and is assigned again."""
    caplog.set_level(logging.WARNING, "fedmezo")
    journal = tmp_path / "journal.db"
    genesis = tiny_genesis(
        rounds=1,
        workers_min=1,
        quorum=1,
        deadline_ms=1500,
        # On a slow machine two deadlines may pass before the objective is let go.
        pause_rounds=0,
        task=task_of(scoring.NAME),
    )
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        bad = workers.start(
            coordinator.address, "bad", rows_that("hang", tmp_path), objective=scoring.NAME
        )

        async def complains() -> bool:
            status = await client.get_status()
            return any(worker.complaint for worker in status.workers)

        await until(complains, "a complaint")
        assert "takes longer than the round's deadline" in caplog.text
        scoring.hanging_ended.set()
        assert await bad.outcome() is None
        status = await client.get_status()
    assert status.phase == wire.PHASE_FINISHED
    assert [type(record) for record in records_of(journal)].count(Answered) == 1


@pytest.mark.usefixtures("hanging")
async def test_a_worker_can_end_while_its_objective_hangs(
    workers: Workers, tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(workers_min=1, quorum=1, task=task_of(scoring.NAME))
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        bad = workers.start(
            coordinator.address, "bad", rows_that("hang", tmp_path), objective=scoring.NAME
        )

        async def hangs() -> bool:
            return any(thread.name == "objective" for thread in threading.enumerate())

        await until(hangs, "a call of the objective")
        bad.task.cancel()
        bad.engine.cut_short()
        await asyncio.wait_for(asyncio.wait({bad.task}), 30)
        await asyncio.wait_for(bad.engine.close(), 30)


# ---------------------------------------------------------------- trust


@pytest.mark.parametrize(
    ("wanted", "named", "words"),
    [
        (
            ERROR_RATE,
            "",
            f"batches by {ERROR_RATE}; start this worker with --objective {ERROR_RATE}",
        ),
        (ERROR_RATE, "a:b", f"start this worker with --objective {ERROR_RATE} if you trust that"),
        ("", ERROR_RATE, f"by their loss, not by {ERROR_RATE}; start this worker without"),
        ("nowhere_at_all:f", "nowhere_at_all:f", "module nowhere_at_all cannot be imported"),
        (f"{scoring.__name__}:SECRET", f"{scoring.__name__}:SECRET", "is a str, not a function"),
    ],
)
async def test_code_runs_only_where_its_operator_named_it(
    workers: Workers,
    data_files: list[Path],
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    wanted: str,
    named: str,
    words: str,
) -> None:
    async with served(tmp_path / "journal.db", tiny_genesis(task=task_of(wanted))) as coordinator:
        error = await workers.start(
            coordinator.address, "w1", data_files[0], objective=named
        ).outcome()
    assert isinstance(error, ConfigError)
    assert words in str(error)


async def test_more_than_the_models_positions_are_not_generated(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(task=task_of(ERROR_RATE, generated_tokens_max=60))
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        error = await workers.start(
            coordinator.address, "w1", data_files[0], objective=ERROR_RATE
        ).outcome()
    assert isinstance(error, ConfigError)
    assert "and 60 generated ones don't fit the model's 64 positions" in str(error)


# ---------------------------------------------------------------- whole runs


async def test_a_run_by_error_rate_ends_alike_everywhere(
    programs: Programs, model_folder: Path, data_files: list[Path], heldout_file: Path
) -> None:
    """Processes of their own; the function's module lies in the workers' folder only."""
    (programs.folder / "my_scores.py").write_text(
        "from fedmezo_core.zo.objectives import error_rate\n"
        "def score(predictions):\n"
        "    assert all(isinstance(text, str) for text in predictions.texts)\n"
        "    return error_rate(predictions) + len(predictions.texts) / 8\n"
    )
    apart = programs.folder / "coordinator"
    apart.mkdir()
    elsewhere = Programs(apart)
    run = run_values(
        rounds=4,
        workers_min=2,
        quorum=2,
        report_losses=True,
        learning_rate=1e-2,
        eps=1e-2,
        task=task_of("my_scores:score", generated_tokens_max=2),
    )
    try:
        _, address = await elsewhere.coordinator(
            *(apart / "journal.db", run, "--model", model_folder, "--heldout", heldout_file)
        )
        processes = [
            programs.worker(address, f"w{k}", data, model_folder, "--objective", "my_scores:score")
            for k, data in enumerate(data_files[:2], start=1)
        ]
        async with CoordinatorClient(address) as client:
            assert [await process.wait() for process in processes] == [0, 0]

            async def replica_is_done() -> bool:
                status = await client.get_status()
                return [evaluation.round for evaluation in status.evaluations] == [0, 4]

            await until(replica_is_done, "the replica's evaluations")
            status = await client.get_status()
    finally:
        elsewhere.end()
    assert set(digests_of(status)) == {"w1", "w2", "replica"}
    assert len(set(digests_of(status).values())) == 1
    # Four rows a batch: their texts count a half, their errors up to one.
    assert all(0.5 <= worker.mean_loss <= 1.5 for worker in status.workers)
    first, last = status.evaluations
    assert first.weights_digest != last.weights_digest, "the scores moved the weights"
    commits = [r for r in records_of(apart / "journal.db") if isinstance(r, Committed)]
    assert len(commits) == 4


def test_the_ready_made_ones_load() -> None:
    for name in ("error_rate", "one_minus_macro_f1", "one_minus_exact_match", "one_minus_token_f1"):
        load_objective(f"fedmezo_core.zo.objectives:{name}")
