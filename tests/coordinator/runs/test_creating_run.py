"""`fedmezo run create` while it waits: the coordinator may restart meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import pytest

from fedmezo_coordinator.programs.run_commands import creating_run
from fedmezo_coordinator.programs.run_commands.creating_run import serves, taken_up
from fedmezo_core.errors import FedMezoError, StartingError, UnavailableError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire

CREATING = wire.RunSummary(run_id="r1", phase=wire.RUN_PHASE_CREATING)
RUNNING = wire.RunSummary(run_id="r1", phase=wire.RUN_PHASE_RUNNING)
TAKEN_UP = wire.RunSummary(run_id="r1", phase=wire.RUN_PHASE_RUNNING, workers=1)


class Answers:
    """Stands for a client whose coordinator answers like this, one after the other."""

    def __init__(self, answers: Iterator[wire.RunSummary | FedMezoError]) -> None:
        self._answers = answers

    async def list_runs(self, run_id: str) -> list[wire.RunSummary]:
        assert run_id == "r1"
        answer = next(self._answers)
        if isinstance(answer, FedMezoError):
            answer.retry_after_s = 0.01
            raise answer
        return [answer]


def answering(*answers: wire.RunSummary | FedMezoError) -> CoordinatorClient:
    return cast("CoordinatorClient", Answers(iter(answers)))


async def test_a_coordinator_that_restarts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creating_run, "LOOK_EVERY_S", 0)
    restarts = UnavailableError("Cannot reach it."), StartingError("It starts.")
    assert await serves(answering(CREATING, *restarts, CREATING, RUNNING), "r1") == RUNNING
    seen = answering(RUNNING, *restarts, RUNNING, TAKEN_UP)
    assert await taken_up(seen, "r1", within_s=60) == TAKEN_UP


async def test_a_name_that_may_be_one_of_the_hub_is_called_no_folder(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run = wire.RunSummary(run_id="r1", phase=wire.RUN_PHASE_RUNNING, model="gpt2")
    assert await serves(answering(run), "r1") == run
    assert "if model 'gpt2' is a folder" in caplog.text
    assert '"gpt2" = "FOLDER" under [models]' in caplog.text


async def test_one_that_stays_away_is_given_up_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(creating_run, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(creating_run, "RECONNECT_S", -1.0)
    with pytest.raises(UnavailableError, match=r"reach it\. Run r1 .* the same command again"):
        await serves(answering(CREATING, UnavailableError("Cannot reach it.")), "r1")
