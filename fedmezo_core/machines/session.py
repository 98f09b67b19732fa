"""The worker's session machine: no clock, no socket, no disk, no entropy, no weights.

It takes what came from the coordinator and from the engine, and returns what to do next. Its driver
owes:

- Actions in the order given, one at a time. Only `Measure` runs while further events come; until
  its `Measured` or `MeasureFailed` the machine asks for nothing that touches the weights.
- `Measured` and `MeasureFailed` with the ticket of the `Measure` that they answer.
- On a `ProtocolError` from `step`: the event was dropped and the state is as before; close the
  stream, then send `Disconnected` and try again. On a `DivergedError`: stop.

In a buffered run (`staleness_max` above 0) a measurement goes on while rounds are committed, and is
answered if it is at most `staleness_max` rounds old by then; the commits wait until it ends.

A machine outlives its streams, but must not outlive the weights: after a crash the worker starts
again from the base and the journal, with a new machine.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, ClassVar

from fedmezo_core.config import STEPS_MAX
from fedmezo_core.errors import DivergedError, JournalBehindError, ProtocolError, SecureSumError
from fedmezo_core.events import (
    Acknowledged,
    ApplyCommit,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    FinishedByCoordinator,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    RefusedByCoordinator,
    ReportWeights,
    Restored,
    SendAnswer,
    SendHello,
    SendUnable,
    SessionAction,
    SessionEvent,
    SumAsked,
    Ticket,
    Welcomed,
    Work,
)
from fedmezo_core.records import Genesis, digest64_of
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from fedmezo_core.trust.secure_aggregation.sum_memory import (
    SumMemory,
    numbers_digest_of,
    revealed_sentence,
)

COMMITS_QUEUED_MAX = 1024
"""Most commits that wait for a running measurement."""
REASON_CHARS_MAX = 512
"""Longest reason sent with an Unable."""

_Actions = tuple[SessionAction, ...]


class SessionState(Enum):
    """Where the session is. A measurement may run in any of these states."""

    OFFLINE = "offline"
    """No stream. Commits may be read from the journal."""
    GREETING = "greeting"
    """Hello is sent, welcome has not come."""
    ONLINE = "online"
    """Welcomed: commits and assignments come."""
    LEFT = "left"
    """The run is over, and the coordinator has got everything."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What a measurement depends on; two assignments of equal jobs have equal answers.

    The weights are those before `round`: a machine follows one history, so there are no others.
    """

    round: int
    slot: int
    work: Work

    @classmethod
    def of(cls, event: Assigned) -> _Job:
        return cls(event.ticket.round, event.ticket.slot, event.work)


@dataclass(slots=True)
class _Running:
    job: _Job
    given: Ticket
    """The ticket in `Measure`: how the engine names this measurement."""
    newest: Ticket
    """The ticket to answer under: the work may be assigned again while it runs."""
    head: bytes
    """Head that names the weights measured on."""


class SessionMachine:
    """Follows commits, measures what is assigned, and answers each assignment once or again alike.

    `head` is the 32-byte head at `round`: SHA-256 over the genesis and the commits up to it.
    """

    def __init__(
        self,
        round_: int,
        head: bytes,
        *,
        report_losses: bool,
        report_rows: bool = False,
        staleness_max: int = 0,
        secure: SecureMember | None = None,
        is_revealed: Callable[[int], bool] = lambda _round: False,
    ) -> None:
        """`secure` is what takes part in sums that hide their terms, if the run has those.

        Then no answer carries a projected gradient. `is_revealed` says of which rounds nothing may
        be said, because the worker's numbers are in a sum already.
        """
        self._secure = secure
        self._is_revealed = is_revealed
        self.state = SessionState.OFFLINE
        self.round = round_
        """Last commit received. Its `ApplyCommit` may still wait for a running measurement."""
        self.head = head
        self.epoch = 0
        """Newest epoch that a coordinator welcomed this worker in."""
        self.refusal: RefusedByCoordinator | None = None
        """Newest refusal, except of stale tickets: they are normal after a restart or deadline."""
        self._report_losses = report_losses
        self._report_rows = report_rows
        self._staleness_max = staleness_max
        self._head_before = b""
        # The welcome, which may name the head of a round that this worker has not reached yet.
        self._promised: Welcomed | None = None
        self._running: _Running | None = None
        self._queued: deque[ApplyCommit] = deque()
        self._next: Assigned | None = None
        self._finish_pending = False
        self._cached: tuple[_Running, Measured] | None = None

    @classmethod
    def of_worker(
        cls,
        genesis: Genesis,
        genesis_head: bytes,
        worker: str,
        signing_key: bytes = b"",
        sum_memory: SumMemory | None = None,
    ) -> SessionMachine:
        """A machine at the run's base, as the contract wants it.

        `genesis_head` is the head after the genesis, and `signing_key` the public key that the
        worker signs with; empty if it does not. `sum_memory` is what the worker's process knows of
        sums; a machine without it begins to remember anew.
        """
        config = genesis.config
        memory = SumMemory() if sum_memory is None else sum_memory
        secure = None
        if config.secure_aggregation:
            secure = SecureMember(genesis, worker, signing_key, memory)
        return cls(
            0,
            genesis_head,
            report_losses=config.report_losses,
            report_rows=config.weighting == "rows",
            staleness_max=config.staleness_max,
            secure=secure,
            is_revealed=partial(memory.is_revealed, numbers_digest_of(genesis, worker)),
        )

    @property
    def measuring(self) -> bool:
        """Whether a `Measure` was given and has not ended."""
        return self._running is not None

    @property
    def measuring_in_vain(self) -> bool:
        """Whether the running measurement can no longer count: the driver may cut it short.

        It then sends `MeasureFailed`, and what waits comes out at once.
        """
        if self._running is None:
            return False
        return self._finish_pending or not self._counts(self._running.job.round)

    def step(self, event: SessionEvent) -> _Actions:
        """Take one event. An event that is not allowed here raises and changes nothing.

        `ProtocolError`: the peer, or the driver, broke the protocol. `JournalBehindError`: the
        coordinator's journal went back behind what this worker holds. `DivergedError`: it is of
        another history.
        """
        handler = self._TRANSITIONS.get((self.state, type(event)))
        if handler is None:
            raise ProtocolError(
                f"{type(event).__name__} came while the session is {self.state.value}; "
                "close the stream and connect again."
            )
        return handler(self, event)

    # ------------------------------------------------------------ the stream

    def _connected(self, _event: Connected) -> _Actions:
        self.state = SessionState.GREETING
        return (SendHello(self.round, self.head),)

    def _disconnected(self, _event: Disconnected) -> _Actions:
        # The coordinator assigns, or finishes, anew after the next hello.
        self.state = SessionState.OFFLINE
        self._next, self._finish_pending = None, False
        return ()

    def _welcomed(self, event: Welcomed) -> _Actions:
        if event.round < self.round or event.epoch < self.epoch:
            raise JournalBehindError(
                f"The coordinator is at epoch {event.epoch}, round {event.round}, but this worker "
                f"was already at epoch {self.epoch}, round {self.round}: the coordinator's journal "
                "went back. Put the newest journal back; to continue from this one, restart the "
                "worker so that it rebuilds its weights."
            )
        if event.round == self.round:
            self._check_head(event.head, self.head, event.round)
        self.state, self.epoch, self._promised = SessionState.ONLINE, event.epoch, event
        return ()

    def _commit(self, event: CommitReceived) -> _Actions:
        commit = event.commit
        head_of = hashlib.sha256
        if commit.round <= self.round:
            if (
                commit.round == self.round
                and self._head_before
                and head_of(self._head_before + event.record_bytes).digest() != self.head
            ):
                raise ProtocolError(
                    f"A second commit of round {commit.round} came with other bytes than the "
                    "first; check which coordinator this worker is connected to."
                )
            return ()
        jumps = commit.from_base and len(event.head_before) == len(self.head)
        if commit.round != self.round + 1 and not jumps:
            raise ProtocolError(
                f"The commit of round {commit.round} came after that of round {self.round}: those "
                "in between are missing; connect again to catch up."
            )
        if len(self._queued) >= COMMITS_QUEUED_MAX:
            raise ProtocolError(
                f"{len(self._queued)} commits wait for one measurement to end; cut it short, "
                "then connect again to catch up."
            )
        head_before = event.head_before if jumps else self.head
        head = head_of(head_before + event.record_bytes).digest()
        if self._promised is not None and self._promised.round == commit.round:
            self._check_head(self._promised.head, head, commit.round)
        self._head_before, self.head, self.round = head_before, head, commit.round
        if self._cached is not None and not self._counts(self._cached[0].job.round):
            self._cached = None
        if self._running is not None:
            self._queued.append(ApplyCommit(commit))
            return ()
        return (ApplyCommit(commit),)

    def _restored(self, event: Restored) -> _Actions:
        if self._running is not None or event.round <= self.round:
            raise ProtocolError(
                f"Weights of round {event.round} came to a worker that holds round {self.round}, "
                "or measures; read the journal instead."
            )
        self.round, self.head, self._head_before = event.round, event.head, b""
        self._cached = None
        return ()

    def _assigned(self, event: Assigned) -> _Actions:
        ticket = event.ticket
        is_ahead = ticket.round > self.round + 1
        if ticket.epoch != self.epoch or is_ahead or not self._counts(ticket.round):
            raise ProtocolError(
                f"Epoch {ticket.epoch}, round {ticket.round} was assigned, but this session is in "
                f"epoch {self.epoch} and its next round is {self.round + 1}; connect again to "
                "catch up."
            )
        if not 1 <= len(event.work.seeds) <= STEPS_MAX:
            raise ProtocolError(
                f"{len(event.work.seeds)} seeds were assigned; an assignment has 1 to {STEPS_MAX}."
            )
        if self._secure is not None:
            self._secure.check_seeds(ticket.round, event.work.seeds)
        if self._is_revealed(ticket.round):
            return (SendUnable(ticket, revealed_sentence(ticket.round)),)
        job = _Job.of(event)
        if self._cached is not None and self._cached[0].job == job:
            self._next = None
            return (self._answer(*self._cached, ticket),)
        if self._running is not None:
            if self._running.job == job:
                self._running.newest, self._next = ticket, None
            else:
                self._next = event
            return ()
        return self._begin(event)

    def _acknowledged(self, event: Acknowledged) -> _Actions:
        before = event.ticket.round - 1
        if before == self.round:
            self._check_head(event.head, self.head, before)
        elif before == self.round - 1 and self._head_before:
            self._check_head(event.head, self._head_before, before)
        return ()

    def _sum_asked(self, event: SumAsked) -> _Actions:
        ticket, cached = event.ticket, self._cached
        if self._secure is None:
            raise ProtocolError(
                f"A sum of round {ticket.round} was asked for in a run without secure_aggregation; "
                "use the same FedMeZO version."
            )
        if ticket.epoch != self.epoch or not self._counts(ticket.round):
            return ()  # It crossed a commit, or a start of the coordinator.
        if cached is None or (cached[0].job.round, cached[0].job.slot) != (
            ticket.round,
            ticket.slot,
        ):
            return (SendUnable(ticket, "this worker does not hold the round's measurement"),)
        try:
            return (self._secure.step(event, cached[1].scalars.projected_grads),)
        except SecureSumError as error:
            reason = str(error)[:REASON_CHARS_MAX]
            return (SendUnable(ticket, reason, error.useless_shares_of),)

    def _refused(self, event: RefusedByCoordinator) -> _Actions:
        if event.reason != "StaleTicketError":
            self.refusal = event
        return ()

    def _finished(self, event: FinishedByCoordinator) -> _Actions:
        if event.round != self.round:
            raise ProtocolError(
                f"The run was finished at round {event.round}, but this worker holds round "
                f"{self.round}; connect again to catch up."
            )
        self._finish_pending = True
        self._next = None
        return () if self._running is not None else self._drained()

    # ------------------------------------------------------------ the engine

    def _measured(self, event: Measured) -> _Actions:
        running = self._ended(event.ticket)
        actions: _Actions = ()
        if self._counts(running.job.round):
            self._cached = (running, event)
            if self._may_send(running.newest):
                actions = (self._answer(running, event, running.newest),)
        return actions + self._drained()

    def _measure_failed(self, event: MeasureFailed) -> _Actions:
        running = self._ended(event.ticket)
        actions: _Actions = ()
        is_wanted = self._counts(running.job.round) and not self._finish_pending
        if is_wanted and self._may_send(running.newest):
            actions = (SendUnable(running.newest, event.reason[:REASON_CHARS_MAX]),)
        return actions + self._drained()

    def _ended(self, ticket: Ticket) -> _Running:
        running = self._running
        if running is None or running.given != ticket:
            raise ProtocolError(
                f"A measurement for round {ticket.round}, slot {ticket.slot} ended that is not the "
                "one running; restart the worker."
            )
        self._running = None
        return running

    def _drained(self) -> _Actions:
        """The actions that waited for the measurement to end."""
        actions: list[SessionAction] = list(self._queued)
        self._queued.clear()
        if self._next is not None:
            event, self._next = self._next, None
            actions += self._begin(event)
        elif self._finish_pending:
            self._finish_pending = False
            self.state = SessionState.LEFT
            actions += [ReportWeights(self.round), Leave()]
        return tuple(actions)

    # ------------------------------------------------------------ small parts

    @staticmethod
    def _check_head(said: bytes, held: bytes, round_: int) -> None:
        if said and said != held:
            raise DivergedError(
                f"The coordinator's history up to round {round_} is not the one that this worker "
                f"was told (head {said.hex()[:16]} instead of {held.hex()[:16]}); find out which "
                "journal is served, then restart the worker so that it rebuilds its weights."
            )

    def _begin(self, event: Assigned) -> _Actions:
        """Measure if the worker holds the weights that the assignment means.

        If it holds newer ones and the assignment could still be answered, the worker declines it,
        so that newer work comes.
        """
        ticket = event.ticket
        if ticket.round == self.round + 1:
            self._running = _Running(_Job.of(event), ticket, ticket, self.head)
            return (Measure(ticket, event.work),)
        if not self._counts(ticket.round):
            return ()
        reason = (
            f"the weights before round {ticket.round} are no longer held, this worker has those "
            f"after round {self.round}"
        )
        return (SendUnable(ticket, reason),)

    def _counts(self, round_: int) -> bool:
        """Whether an answer to an assignment of `round_` can still be committed."""
        return self.round + 1 - round_ <= self._staleness_max

    def _may_send(self, ticket: Ticket) -> bool:
        return self.state is SessionState.ONLINE and ticket.epoch == self.epoch

    def _answer(self, running: _Running, measured: Measured, ticket: Ticket) -> SendAnswer:
        scalars = measured.scalars
        has_digest = scalars.weights_digest64 is not None
        return SendAnswer(
            ticket,
            scalars._replace(
                projected_grads=scalars.projected_grads if self._secure is None else (),
                mean_loss=scalars.mean_loss if self._report_losses else None,
                rows=scalars.rows if self._report_rows else None,
            ),
            head64=None if has_digest else digest64_of(running.head),
            head=running.head,
        )

    # Every legal pair; any other raises `ProtocolError`.
    _TRANSITIONS: ClassVar[
        dict[tuple[SessionState, type], Callable[[SessionMachine, Any], _Actions]]
    ] = {
        (SessionState.OFFLINE, Connected): _connected,
        (SessionState.OFFLINE, CommitReceived): _commit,
        (SessionState.OFFLINE, Restored): _restored,
        (SessionState.OFFLINE, Measured): _measured,
        (SessionState.OFFLINE, MeasureFailed): _measure_failed,
        (SessionState.GREETING, Welcomed): _welcomed,
        (SessionState.GREETING, Disconnected): _disconnected,
        (SessionState.GREETING, Measured): _measured,
        (SessionState.GREETING, MeasureFailed): _measure_failed,
        (SessionState.ONLINE, CommitReceived): _commit,
        (SessionState.ONLINE, Assigned): _assigned,
        (SessionState.ONLINE, Acknowledged): _acknowledged,
        (SessionState.ONLINE, SumAsked): _sum_asked,
        (SessionState.ONLINE, RefusedByCoordinator): _refused,
        (SessionState.ONLINE, FinishedByCoordinator): _finished,
        (SessionState.ONLINE, Disconnected): _disconnected,
        (SessionState.ONLINE, Measured): _measured,
        (SessionState.ONLINE, MeasureFailed): _measure_failed,
        # The coordinator's last words may cross the worker's.
        (SessionState.LEFT, Acknowledged): _acknowledged,
        (SessionState.LEFT, SumAsked): lambda _machine, _event: (),
        (SessionState.LEFT, RefusedByCoordinator): _refused,
        (SessionState.LEFT, Disconnected): lambda _machine, _event: (),
    }
