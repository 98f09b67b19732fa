"""A worker's own held-out rows: when they are evaluated, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.serving.worker_session import WorkerSession
from fedmezo_core.errors import ConfigError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.evaluations import Evaluations, HeldOutResult
from tests.integration.support.harness import served, until
from tests.integration.support.parties import GatedEngine, Workers

ROUNDS = 6
HELD = 2
"""After this round, one worker waits for the other's evaluation."""
LONG_S = 30.0


def result(round_: int, auc: float | None = 0.5) -> HeldOutResult:
    return HeldOutResult(round_, 0.25, 0.875, auc, 40)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- when


def test_rounds_in_turn_are_due_once_and_the_last_is_left_to_the_end() -> None:
    evaluations = Evaluations(10, 30, None)
    assert [round_ for round_ in range(31) if evaluations.is_due(round_)] == [10, 20]
    evaluations.begin(10)
    assert [round_ for round_ in range(31) if evaluations.is_due(round_)] == [20]


def test_of_two_that_are_due_one_after_the_other_one_is_made() -> None:
    evaluations = Evaluations(10, 100, None)
    evaluations.add(result(0))
    made = []
    for round_ in range(10, 100, 10):
        if evaluations.must_finish(round_):  # The others are given up.
            made.append(round_)
            evaluations.add(result(round_))
    assert made == [20, 40, 60, 80]


# ---------------------------------------------------------------- where


def test_results_are_logged_and_appended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedmezo.worker")
    path = tmp_path / "here.jsonl"
    path.write_text('{"round": 3}\n')
    evaluations = Evaluations(10, 30, path)
    evaluations.add(result(0))
    evaluations.log_summary()
    evaluations.add(result(10, None))
    evaluations.log_summary()
    assert lines_of(path) == [
        {"round": 3},
        {"round": 0, "loss": 0.25, "accuracy": 0.875, "auc": 0.5, "rows": 40},
        {"round": 10, "loss": 0.25, "accuracy": 0.875, "auc": None, "rows": 40},
    ]
    assert caplog.messages == [
        "round 0: held-out loss 0.2500, accuracy 87.5 %, AUC 0.500, 40 rows",
        "round 10: held-out loss 0.2500, accuracy 87.5 %, 40 rows",
        f"held-out, 40 rows: round 0 {result(0)} -> round 10 {result(10, None)}",
    ]


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"evaluations = '.*' cannot be written \(Is a directory"):
        Evaluations(10, 30, tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    evaluations = Evaluations(10, 30, folder / "here.jsonl")
    (folder / "here.jsonl").unlink()
    folder.rmdir()
    evaluations.add(result(10))  # The run goes on.
    assert "here.jsonl cannot be written (No such file or directory)" in caplog.messages[-1]


# ---------------------------------------------------------------- whole runs


async def run(
    workers: Workers,
    data: list[Path],
    journal: Path,
    genesis: Genesis,
    ready: Callable[[], Awaitable[bool]] | None = None,
    **more: Any,
) -> tuple[wire.GetStatusResponse, dict[str, list[wire.SessionRequest]]]:
    """Two workers to the end, w1 with `more` settings: the status, and what each has sent.

    After round HELD, w2 does not answer before `ready`.
    """
    sent: dict[str, list[wire.SessionRequest]] = {"w1": [], "w2": []}
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        take = coordinator.daemon.receive

        async def receive(session: WorkerSession, message: wire.SessionRequest) -> None:
            sent[session.worker].append(message)
            await take(session, message)

        coordinator.daemon.receive = receive  # type: ignore[method-assign]
        working = [
            workers.start(coordinator.address, "w1", data[0], **more),
            workers.start(coordinator.address, "w2", data[1]),
        ]
        measure = working[1].engine.measure

        async def slow_measure(order: Measure) -> Measured:
            if order.ticket.round == HELD + 1 and ready is not None:
                await until(ready, "the other worker", LONG_S)
            return await measure(order)

        working[1].engine.measure = slow_measure  # type: ignore[method-assign]
        assert [await worker.outcome() for worker in working] == [None, None]
        return await client.get_status(), sent


@pytest.mark.slow
async def test_evaluating_changes_nothing_that_others_see(
    workers: Workers,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedmezo.worker")
    genesis = tiny_genesis(rounds=ROUNDS, workers_min=2, quorum=2)
    path = tmp_path / "evaluations.jsonl"

    async def evaluated() -> bool:
        return any(line["round"] == HELD for line in lines_of(path))

    plain = await run(workers, data_files, tmp_path / "plain.db", genesis)
    found = await run(
        workers,
        data_files,
        tmp_path / "evaluated.db",
        genesis,
        evaluated,
        heldout=heldout_file,
        evaluations=path,
        evaluate_every_rounds=HELD,
    )
    lines = lines_of(path)
    rounds = [line["round"] for line in lines]
    # Whether round 4 had the time to be evaluated, only this machine knows.
    assert [round_ for round_ in rounds if round_ != 4] == [0, HELD, ROUNDS]
    assert all(set(line) == {"round", "loss", "accuracy", "auc", "rows"} for line in lines)
    assert len({line["loss"] for line in lines}) == len(lines)
    assert any(text.startswith("held-out, 10 rows: round 0 loss ") for text in caplog.messages)

    assert found[0].head == plain[0].head
    digests = [{d.weights_digest for d in status.digests} for status in (plain[0], found[0])]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 1
    assert not found[0].evaluations
    assert found[1] == plain[1], "every message is the same"


async def test_a_commit_cuts_an_evaluation_short_and_the_next_one_is_made(
    workers: Workers,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one after the base would go on for ever, if the commit did not end it."""
    path = tmp_path / "evaluations.jsonl"
    evaluate = GatedEngine._evaluate
    begun: list[int] = []

    def endless_once(engine: GatedEngine) -> HeldOutResult | None:
        begun.append(engine.party.weights.round)
        if len(begun) == 2:
            assert engine._evaluation_cut_short.wait(LONG_S), "nobody cut it short"
        return evaluate(engine)

    async def has_begun() -> bool:
        return len(begun) > 1

    monkeypatch.setattr(GatedEngine, "_evaluate", endless_once)
    await run(
        workers,
        data_files,
        tmp_path / "journal.db",
        tiny_genesis(rounds=ROUNDS, workers_min=2, quorum=2),
        has_begun,
        heldout=heldout_file,
        evaluations=path,
        evaluate_every_rounds=HELD,
    )
    assert begun == [0, HELD, 2 * HELD, ROUNDS]
    assert [line["round"] for line in lines_of(path)] == [0, 2 * HELD, ROUNDS]


async def test_a_worker_that_is_not_asked_evaluates_all_the_same(
    workers: Workers,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    """A cohort of one: of two workers one has nothing to do in each round."""
    path = tmp_path / "evaluations.jsonl"
    genesis = tiny_genesis(rounds=2, workers_min=2, quorum=1, cohort_size_max=1)
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        working = [
            workers.start(
                coordinator.address,
                f"w{number}",
                data_files[number],
                heldout=heldout_file,
                evaluations=path,
                evaluate_every_rounds=1,
            )
            for number in (1, 2)
        ]

        async def evaluated() -> bool:
            return any(line["round"] == 1 for line in lines_of(path))

        for worker in working:
            measure = worker.engine.measure

            async def slow(order: Measure, measure: Any = measure) -> Any:
                if order.ticket.round == 2:
                    await until(evaluated, "the worker that is not asked", LONG_S)
                return await measure(order)

            worker.engine.measure = slow  # type: ignore[method-assign]
        assert [await worker.outcome() for worker in working] == [None, None]
    assert {line["round"] for line in lines_of(path)} == {0, 1, 2}


async def test_an_end_in_the_middle_of_an_evaluation(
    workers: Workers,
    data_files: list[Path],
    heldout_file: Path,
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As SIGTERM does: the agent is cancelled and the engine closed."""
    evaluate = GatedEngine._evaluate
    begun = threading.Event()

    def endless(engine: GatedEngine) -> HeldOutResult | None:
        begun.set()
        assert engine._evaluation_cut_short.wait(LONG_S), "nobody cut it short"
        return evaluate(engine)

    monkeypatch.setattr(GatedEngine, "_evaluate", endless)
    async with served(tmp_path / "journal.db", tiny_genesis()) as coordinator:
        working = workers.start(coordinator.address, "w1", data_files[0], heldout=heldout_file)
        assert await asyncio.to_thread(begun.wait, LONG_S)
        working.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working.task
        await asyncio.wait_for(working.engine.close(), LONG_S)
