"""What the agent owes to the session machine when a stream breaks in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from fedmezo_core.errors import UnavailableError
from fedmezo_core.events import ApplyCommit, SendAnswer, SessionAction, Ticket
from fedmezo_core.records import Committed, Scalars
from fedmezo_core.wire.client import SessionStream
from fedmezo_worker.agent import Agent
from fedmezo_worker.engine import Engine
from fedmezo_worker.worker_settings import WorkerSettings


class RecordingEngine(Engine):
    """An engine without a model that remembers which commits it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.applied: list[int] = []

    async def apply(self, commits: Sequence[Committed]) -> None:
        self.applied += [commit.round for commit in commits]


class TornStream:
    """A stream that breaks at its first message."""

    def __init__(self) -> None:
        self.tries = 0

    async def send(self, message: Any) -> None:
        self.tries += 1
        raise UnavailableError("gone")


async def test_every_commit_is_applied_although_the_stream_breaks_between_them() -> None:
    """The machine has counted them; a commit left out would make the next one impossible."""
    engine, stream = RecordingEngine(), TornStream()
    agent = Agent(WorkerSettings(name="w", data=Path("rows.jsonl")), engine)
    answer = SendAnswer(Ticket(1, 1, 0), Scalars((0.5,), None, None))
    actions: list[SessionAction] = [
        ApplyCommit(Committed(1, (), 0)),
        answer,
        ApplyCommit(Committed(2, (), 0)),
        answer,
        ApplyCommit(Committed(3, (), 0)),
    ]
    with pytest.raises(UnavailableError, match="gone"):
        await agent._act(actions, cast("SessionStream", stream))
    assert engine.applied == [1, 2, 3]
    assert stream.tries == 1
    await engine.close()
