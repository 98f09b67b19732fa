"""What a member owes to its machine when a stream breaks, and to its user at a refusal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from fedmezo_core.errors import UnavailableError
from fedmezo_core.events import (
    ApplyCommit,
    Connected,
    RefusedByCoordinator,
    SendAnswer,
    SessionAction,
    Ticket,
    Welcomed,
)
from fedmezo_core.records import Committed, Scalars
from fedmezo_core.wire.client import RunDescription, SessionStream
from fedmezo_core.wire.history import History
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Suffix
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.evaluations import Evaluations
from fedmezo_worker.member import Member
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import config_of, genesis_of


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
        self.attempts = 0

    async def send(self, message: Any) -> None:
        self.attempts += 1
        raise UnavailableError("gone")


def member_of(engine: Engine) -> Member:
    """A member at the base of a run."""
    genesis = genesis_of(config_of())
    return Member(
        WorkerSettings(name="w", data=Path("rows.jsonl")),
        engine,
        History(None, None),
        Reconnecting(logging.getLogger(__name__)),
        RunDescription(1, genesis, b"h" * 32, 0, 1, Suffix(0, 0), None),
        Evaluations(0, genesis.config.rounds, None),
        set(),
    )


async def test_every_commit_is_applied_although_the_stream_breaks_between_them() -> None:
    """The machine has counted them; a commit left out would make the next one impossible."""
    engine, stream = RecordingEngine(), TornStream()
    member = member_of(engine)
    answer = SendAnswer(Ticket(1, 1, 0), Scalars((0.5,), None, None))
    actions: list[SessionAction] = [
        ApplyCommit(Committed(1, (), 0)),
        answer,
        ApplyCommit(Committed(2, (), 0)),
        answer,
        ApplyCommit(Committed(3, (), 0)),
    ]
    with pytest.raises(UnavailableError, match="gone"):
        await member._act(actions, cast("SessionStream", stream))
    assert engine.applied == [1, 2, 3]
    assert stream.attempts == 1
    await engine.close()


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ("ScalarError", ["round 1: the answer was refused: It is 1e9, too large."]),
        # An answer and a deadline crossed on the way.
        ("StaleTicketError", []),
    ],
)
async def test_a_refused_answer_is_in_the_workers_log(
    reason: str, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine, ticket = RecordingEngine(), Ticket(1, 1, 0)
    member = member_of(engine)
    member._machine.step(Connected())
    welcome = wire.SessionResponse(welcome=wire.Welcome(epoch=1, head=b"h" * 32))
    await member._receive(Welcomed(1, 0, b"h" * 32), welcome)
    refused = RefusedByCoordinator(ticket, reason, "It is 1e9, too large.")
    await member._receive(refused, wire.SessionResponse())
    assert caplog.messages == lines
    await engine.close()
