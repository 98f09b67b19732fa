"""The battery for workers: ours conforms, and each broken one is found out by the right check."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fedmezo_coordinator.conformance import worker_battery
from fedmezo_coordinator.conformance.report import Report
from fedmezo_coordinator.conformance.scripted_server import scripted
from fedmezo_coordinator.conformance.worker_battery import WorkerTest, check_can_lead
from fedmezo_coordinator.conformance.worker_endings import Start, run_worker_battery
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.events import ApplyCommit, Measure
from fedmezo_core.machines.session import SessionMachine
from fedmezo_core.records import Committed
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.messages import answer_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker import member
from tests.faults.light_worker import LightEngine, work_lightly
from tests.integration.support.harness import PATIENCE_S, config_of, genesis_of
from tests.sim.checker import BASE_WEIGHTS, measure, weights_after

CONFIG = config_of(rounds=60, probes=4, local_steps=1, report_losses=True)
BASE_CHECKS = {f"refuses a run with another {what}" for what in ("base", "manifest", "tokenizer")}
"""What a worker without a model cannot do: it has nothing to compare with."""


class LightModel:
    """The weights and measurements of a worker without a model."""

    def __init__(self) -> None:
        self.weights = BASE_WEIGHTS

    def apply(self, commit: Committed) -> None:
        self.weights = weights_after(self.weights, commit)

    def digest(self) -> bytes:
        return self.weights

    def measure(self, order: Measure, worker: str) -> Sequence[float]:
        return measure(worker, order.work.seeds, self.weights)[0]


def likeness(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return (1.0 if difference < 1e-3 else 0.0), difference


class InProcess:
    """A worker that runs as a task of this process."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    async def status(self) -> int:
        try:
            await asyncio.shield(self._task)
        except FedMezoError:
            return 1
        return 0


def running(run: Callable[[str], Coroutine[Any, Any, None]]) -> Start:
    """Starts a worker as a task of this process."""

    @asynccontextmanager
    async def start(address: str) -> AsyncIterator[InProcess]:
        task = asyncio.create_task(run(address))
        try:
            yield InProcess(task)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, FedMezoError):
                await task

    return start


async def light(address: str) -> None:
    await work_lightly(address, "w1")


async def report_on(config: RunConfig) -> Report:
    """What the whole battery says of our worker."""
    report = Report("worker")
    test = WorkerTest(genesis_of(config), LightModel(), likeness, patience_s=PATIENCE_S)
    await run_worker_battery(test, report, "127.0.0.1:0", running(light), lambda _: None)
    return report


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.outcome == "failed"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weighting": "rows", "report_losses": False, "weight_decay": 0.1, "local_steps": 2},
        {"seed_policy": "shared", "estimator": "one_sided"},
    ],
    ids=["per worker", "rows, decay and local steps", "shared"],
)
async def test_our_worker_conforms(changes: dict[str, Any]) -> None:
    config = config_of(**({"rounds": 60, "probes": 4, "local_steps": 1} | changes))
    report = await report_on(config)
    # It has no model, so it agrees to any base.
    assert failed(report).keys() == BASE_CHECKS
    assert all(check.outcome != "skipped" for check in report.checks)
    assert len(report.checks) > 40


# ---------------------------------------------------------------- broken workers


async def only(
    sequences: set[str],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[str], Coroutine[Any, Any, None]] = light,
) -> dict[str, str]:
    """What fails of some sequences, with a worker that joins soundly."""
    every = worker_battery.WorkerBattery.sequences

    def some(self: Any) -> Any:
        return [sequence for sequence in every(self) if sequence[0] in sequences]

    monkeypatch.setattr(worker_battery.WorkerBattery, "sequences", some)
    report = Report("worker")
    test = WorkerTest(genesis_of(CONFIG), LightModel(), likeness, patience_s=PATIENCE_S)
    battery = worker_battery.WorkerBattery(test, report)
    async with scripted(battery.server, "127.0.0.1:0") as address, running(run)(address):
        await battery.run()
    return failed(report)


def answering(monkeypatch: pytest.MonkeyPatch, change: Callable[[wire.Answer, int], None]) -> None:
    """Change each answer before it is sent; `change` gets its number too."""
    count = iter(range(1, 1000))

    def changed(action: Any, signer: AnswerSigner | None) -> wire.SessionRequest:
        message = answer_to_pb(action, signer)
        change(message.answer, next(count))
        return message

    monkeypatch.setattr(member, "answer_to_pb", changed)


def other_ticket(answer: wire.Answer, _: int) -> None:
    answer.ticket.slot += 1


def not_finite(answer: wire.Answer, _: int) -> None:
    answer.projected_grads[0] = float("nan")


def too_few(answer: wire.Answer, _: int) -> None:
    del answer.projected_grads[0]


def beyond_the_clip(answer: wire.Answer, _: int) -> None:
    answer.projected_grads[1] = 1e9


def wrong_digest(answer: wire.Answer, _: int) -> None:
    answer.weights_digest64 ^= 1


def without_digest(answer: wire.Answer, _: int) -> None:
    answer.ClearField("weights_digest64")


def without_loss(answer: wire.Answer, _: int) -> None:
    answer.ClearField("mean_loss")


def with_rows(answer: wire.Answer, _: int) -> None:
    answer.rows = 5


def of_other_rows(answer: wire.Answer, _: int) -> None:
    answer.projected_grads[0] += 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_ticket, "another ticket"),
        (not_finite, "nan"),
        (too_few, "3 projected gradients came, not 4"),
        (beyond_the_clip, "clip"),
        (wrong_digest, "its weights after round 0 are not the run's"),
        (without_digest, "lacks weights_digest64"),
        (without_loss, "mean_loss is not set"),
        (with_rows, "rows is set"),
        (of_other_rows, "correlate 0.00000"),
    ],
)
async def test_a_wrong_answer_is_found(
    change: Callable[[wire.Answer, int], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, change)
    found = await only({"answers its first assignment"}, monkeypatch)
    assert words in found["answers its first assignment"]


async def test_another_answer_to_a_repeated_assignment_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(answer: wire.Answer, number: int) -> None:
        answer.projected_grads[0] += 1e-4 * number

    answering(monkeypatch, change)
    name = "gives the same answer to a repeated assignment"
    found = await only({name}, monkeypatch)
    assert "differs from the first" in found[name]


async def test_an_answer_that_comes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = member.Member._act

    async def twice(self: Any, actions: Any, stream: Any) -> bool:
        answers = [action for action in actions if type(action).__name__ == "SendAnswer"]
        return await plain(self, [*actions, *answers], stream)

    monkeypatch.setattr(member.Member, "_act", twice)
    names = {"answers its first assignment", "applies a commit"}
    found = await only(names, monkeypatch)
    assert "another ticket" in found["applies a commit"]


class ForgetfulEngine(LightEngine):
    """Applies all commits of a batch but the first."""

    async def apply(self, commits: Sequence[Committed]) -> None:
        await super().apply(commits[1:])


async def test_weights_that_miss_a_commit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgetful(address: str) -> None:
        await work_lightly(address, "w1", ForgetfulEngine())

    found = await only({"applies a commit"}, monkeypatch, forgetful)
    assert "its weights after round 1 are not the run's" in found["applies a commit"]


async def test_a_commit_that_is_applied_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SessionMachine._commit

    def eager(self: SessionMachine, event: Any) -> Any:
        if event.commit.round == self.round and self._running is None:
            return (ApplyCommit(event.commit),)
        return plain(self, event)

    transitions = {
        key: eager if handler is plain else handler
        for key, handler in SessionMachine._TRANSITIONS.items()
    }
    monkeypatch.setattr(SessionMachine, "_TRANSITIONS", transitions)
    name = "applies a commit that comes twice once"
    found = await only({name}, monkeypatch)
    assert "are not the run's" in found[name]


async def test_a_worker_that_does_not_come_is_told_of() -> None:
    report = Report("worker")
    test = WorkerTest(genesis_of(CONFIG), None, patience_s=0.2)

    @asynccontextmanager
    async def nobody(_address: str) -> AsyncIterator[InProcess]:
        yield InProcess(asyncio.create_task(asyncio.sleep(0)))

    await run_worker_battery(test, report, "127.0.0.1:0", nobody, lambda _: None)
    assert "no session within 0.2 s" in failed(report)["opens a session with hello"]
    assert not report.passed


def test_contracts_without_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no sequences for seed_policy = 'pool'"):
        check_can_lead(config_of(seed_policy="pool", rounds=100))
    with pytest.raises(ConfigError, match="takes up to 40; set rounds = 40 or more"):
        check_can_lead(config_of(rounds=6))
