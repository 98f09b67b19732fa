"""A round machine with a journal in a list: short words for the events that the tests feed it."""

from __future__ import annotations

from typing import Any

from fedmezo_core.config import RunConfig, TaskConfig, parse_run
from fedmezo_core.events import (
    AnswerReceived,
    Expel,
    Ready,
    Refuse,
    RoundEvent,
    Tick,
    Ticket,
    UnableReceived,
    WeightsReported,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.machines.answers import is_digest_round
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Genesis, Record, Scalars

TRUE_DIGEST64 = 0xA11CE
WRONG_DIGEST64 = 0xBAD


def config_of(**values: Any) -> RunConfig:
    """A small run's contract, with `values` on top."""
    return RunConfig.model_validate(_BASE | values)


def full(digest64: int) -> bytes:
    """A digest of 32 bytes that begins with these 64 bits."""
    return digest64.to_bytes(32, "little")


def parse(**values: Any) -> RunConfig:
    """The same as a user's settings are read."""
    return parse_run(_BASE | values, "here")


_BASE: dict[str, Any] = {
    "run_id": "test",
    "model": "none",
    "task": TaskConfig(verbalizers={"no": "no", "yes": "yes"}),
    "rounds": 3,
    "local_steps": 2,
    "learning_rate": 0.5,
    "projected_grad_abs_max": 100.0,
    "deadline_ms": 1000,
}


class RoundsDriver:
    """Keeps every record in order, and restarts the machine from them."""

    def __init__(self, **values: Any) -> None:
        self._has_replica = values.pop("has_replica", False)
        self.config = config_of(**values)
        self.records: list[Record] = [Genesis(self.config, bytes(32), bytes(32), bytes(32), 1, 4)]
        self.restart()

    def restart(self, now_ms: int = 0) -> Ready:
        """A new machine from the records, in a new epoch."""
        self.machine = RoundMachine(has_replica=self._has_replica)
        for record in self.records:
            self.machine.apply(record)
        return self.keep(self.machine.start(now_ms))

    def step(self, event: RoundEvent) -> Ready:
        """Any event."""
        return self.keep(self.machine.step(event))

    @property
    def closes_at_ms(self) -> int | None:
        """When the open round may close on its quorum; None if no round is open."""
        return None if self.machine.state.open is None else self.machine._closes_at_ms

    def ready(self, *workers: str) -> Ready:
        """Workers become ready; what the last one led to."""
        ready = Ready()
        for worker in workers:
            ready = self.step(WorkerReady(worker))
        return ready

    def lost(self, worker: str) -> Ready:
        """A session ends."""
        return self.step(WorkerLost(worker))

    def answer(
        self,
        worker: str,
        slot: int | None = None,
        *,
        grads: tuple[float, ...] = (1.0, -2.0),
        loss: float | None = None,
        digest: int | None = TRUE_DIGEST64,
        epoch: int | None = None,
        round_: int | None = None,
        rows: int | None = None,
    ) -> Ready:
        """An answer, by default to the worker's own ticket of the open round."""
        ticket = self.ticket(worker, slot, epoch=epoch, round_=round_)
        if not is_digest_round(self.config, ticket.round):
            digest = None
        return self.step(AnswerReceived(worker, ticket, Scalars(grads, loss, digest, rows)))

    def unable(
        self,
        worker: str,
        slot: int | None = None,
        reason: str = "loss is nan",
        *,
        epoch: int | None = None,
        round_: int | None = None,
    ) -> Ready:
        """A worker cannot measure."""
        ticket = self.ticket(worker, slot, epoch=epoch, round_=round_)
        return self.step(UnableReceived(worker, ticket, reason))

    def tick(self, now_ms: int) -> Ready:
        """Time passes."""
        return self.step(Tick(now_ms))

    def replica(self, round_: int, digest: int = TRUE_DIGEST64) -> Ready:
        """The replica reports."""
        return self.step(WeightsReported(REPLICA_PARTY, round_, full(digest)))

    def ticket(
        self, worker: str, slot: int | None, *, epoch: int | None = None, round_: int | None = None
    ) -> Ticket:
        """The worker's ticket, with what is given in its place."""
        if slot is None:
            current = self.machine.state.open or self.machine.state.held(self.machine.round)
            slot = current.slots.get(worker, 0) if current else 0
        return Ticket(
            self.machine.epoch if epoch is None else epoch,
            self.machine.round + 1 if round_ is None else round_,
            slot,
        )

    def folded(self) -> RunState:
        """What a restart would rebuild."""
        state = RunState()
        for record in self.records:
            state.apply(record)
        return state

    def keep(self, ready: Ready) -> Ready:
        """Take the records that a step owes."""
        self.records.extend(ready.records)
        assert self.folded() == self.machine.state, "a restart would fold to another state"
        return ready


def refusal(ready: Ready) -> str:
    """The reason of the one refusal in `ready`."""
    [message] = ready.messages
    assert isinstance(message, Refuse)
    assert not ready.records
    assert message.message.endswith(".")
    return message.reason


def kinds(ready: Ready) -> list[str]:
    """Class names of records, then of messages."""
    return [type(item).__name__ for item in (*ready.records, *ready.messages)]


def expelled(ready: Ready) -> list[str]:
    """Workers sent away."""
    return [message.worker for message in ready.messages if isinstance(message, Expel)]
