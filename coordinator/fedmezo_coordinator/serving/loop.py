"""The loop that serves workers, in a coordinator and in a relay.

Everything that changes the run goes through one queue and one task, so the machine needs no locks.
Only one thread changes the journal; a second one reads it for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fedmezo_coordinator.coordinator_settings import SESSIONS_LIMIT
from fedmezo_coordinator.event_queue import EventQueue
from fedmezo_coordinator.limits.said_seldom import SaidSeldom
from fedmezo_coordinator.serving.journal_pages import JournalPages
from fedmezo_coordinator.serving.loop_lag import AppendTimes, LoopLag
from fedmezo_coordinator.serving.name_contests import (
    CONTEST_REPLACEMENTS,
    NameContests,
    replaced_error,
)
from fedmezo_coordinator.serving.session_limit import RETRY_AFTER_MAX_S, SessionLimit
from fedmezo_coordinator.serving.status_report import MachineStatus, hide_others, status_report
from fedmezo_coordinator.serving.worker_session import (
    HalfClosedError,
    Outgoing,
    Traffic,
    WorkerSession,
)
from fedmezo_coordinator.signature_checker import SignatureChecker
from fedmezo_core.errors import (
    FedMezoError,
    NotReadyError,
    ProtocolError,
    SnapshotError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    AnswerReceived,
    Assign,
    Expel,
    Ready,
    Refuse,
    RoundEvent,
    RoundMessage,
    SumReceived,
    Tick,
    UnableReceived,
    WeightsReported,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import (
    COMMITTED,
    GENESIS,
    ZERO_HASH,
    Entry,
    Journal,
    Row,
    head_after,
)
from fedmezo_core.machines.roster import Phase
from fedmezo_core.records import Committed, Evaluated, Genesis, RoundSlot
from fedmezo_core.trust.authorisation import Caller, sees_everyone
from fedmezo_core.wire.admission import (
    SignedAnswer,
    check_hello,
    check_run_id,
    event_from_request,
    signed_answer,
    signing_of,
)
from fedmezo_core.wire.commit_index import CommitIndex
from fedmezo_core.wire.grpc_status import BY_REASON
from fedmezo_core.wire.messages import commit_to_pb, message_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

EVENTS_MAX = 4096
"""Most events that wait for the loop; beyond it the senders wait."""
BATCH_MAX = 256
"""Most events that share one append (group commit)."""
SIBLINGS_S = 0.001
"""Longest time that an append waits for other answers of its round, which then share it; a disk
takes longer for an append of its own."""
SLICE = 16
"""Workers served, or events taken, before every other task of the event loop gets its turn."""
NOTED_A_SECOND_MAX = 20
"""Joins and departures that the log names in one second; it counts the others."""
WARN_EVERY_MS = 10_000
"""Time between two of a machine's warnings in the log; it counts those in between."""
WORKERS_MAX = SESSIONS_LIMIT
"""Most workers whose counters are kept, and so most sessions under different names."""
STATUS_WORKERS = 1000
"""A status with more workers is large; each takes about 70 bytes."""
TICK_MS = 200
"""Time between two ticks of the machine."""

Result = TypeVar("Result")
ReadyT = TypeVar("ReadyT", bound=Ready)
ReadyT_co = TypeVar("ReadyT_co", bound=Ready, covariant=True)


class Machine(MachineStatus, Protocol[ReadyT_co]):
    """The state machine that decides: a coordinator's or a relay's."""

    @property
    def is_busy(self) -> bool:
        """Whether it computes something long; it goes on with each tick."""

    def step(self, event: RoundEvent) -> ReadyT_co:
        """Take one event; returns what the driver has to do."""


class Item:
    """One entry of the loop's queue."""

    __slots__ = ()

    def refuse(self, error: FedMezoError) -> None:
        """Tell whoever waits for this entry that nobody will take it."""


@dataclass(frozen=True, slots=True)
class _Join(Item):
    session: WorkerSession
    hello: wire.Hello
    done: asyncio.Future[None]

    def refuse(self, error: FedMezoError) -> None:
        """Let the worker know."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Left(Item):
    session: WorkerSession


@dataclass(slots=True)  # Frozen ones take three times as long to make.
class _FromWorker(Item):
    session: WorkerSession
    message: wire.SessionRequest
    signed: SignedAnswer | None
    """What its signature is of, decoded when it came; None if it has none."""


@dataclass(frozen=True, slots=True)
class _Settled(Item):
    """Everything before this is on the disk once `done` is."""

    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Time(Item):
    now_ms: int


def _not_here() -> ProtocolError:
    return ProtocolError(
        "A relay excludes nobody; exclude its site at the coordinator above, or stop the worker."
    )


class ServingLoop(ABC, Generic[ReadyT]):
    """Serves one run to the workers that join it; the machine decides what their answers do."""

    _machine: Machine[ReadyT]

    def __init__(self, session_limit: SessionLimit | None) -> None:
        """The subclass sets `_machine` and `_pages.journal` before anything is served."""
        self.session_limit = session_limit or SessionLimit()
        self._index = CommitIndex()
        self._sessions: dict[str, WorkerSession] = {}
        self._overflowed: list[WorkerSession] = []
        self._folds: list[Callable[[Entry], None]] = [
            self._take_genesis,
            self._index.fold,
            self._remember_commit,
        ]
        """What follows the journal, in this order, live and at a restart alike."""
        self._refusals = SaidSeldom(log)
        self.refused_answers: Counter[str] = Counter()
        """Answers refused since this start, by the class name of the error."""
        self.append_times = AppendTimes()
        self._refused_workers = SaidSeldom(log)
        self._unable = SaidSeldom(log)
        self._noted = 0
        self._noted_second = 0
        self._warned_at_ms = -WARN_EVERY_MS
        self._unsaid = 0
        self._paces = 0
        self._contests = NameContests()
        self._traffic: dict[str, Traffic] = {}
        self._items: EventQueue[Item] = EventQueue(EVENTS_MAX)
        self._under_way: list[Item] = []
        """What the turn that is under way has taken."""
        self._failed: FedMezoError | None = None
        """Why nothing is served any more, once `fail` has said so."""
        self.joined = asyncio.Event()
        """Set once the first worker has joined."""
        self.on_phase: Callable[[], None] = lambda: None
        """Called whenever `phase` has changed."""
        self.on_join: Callable[[str], None] = lambda _: None
        """Called with the name of each worker that joins."""
        self._signatures = SignatureChecker(self._items.look_again)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pages = JournalPages(self._index, self._way_past_dropped)
        self._durable_phase = Phase.WAITING
        """The machine's phase as far as the journal has what led to it."""
        self._started_at_s = time.monotonic()
        self.lag = LoopLag()
        """How late the event loop is; loops in one process share it."""
        self._genesis: Genesis | None = None
        self._genesis_body = b""

    @property
    def _journal(self) -> Journal:
        return self._pages.journal

    @property
    def genesis(self) -> Genesis:
        """Record 0."""
        assert self._genesis is not None, "load() comes first"
        return self._genesis

    @property
    def genesis_body(self) -> bytes:
        """Record 0, serialised."""
        return self._genesis_body

    @property
    def phase(self) -> Phase:
        """Phase of the run, as far as the journal has what led to it."""
        return self._durable_phase

    @property
    def round(self) -> int:
        """Newest round whose commit is durable."""
        return self._index.round

    @property
    def workers(self) -> int:
        """Count of the workers that are connected."""
        return len(self._sessions)

    @property
    def reason(self) -> str:
        """Why the run is paused, or was stopped early; empty if it is neither."""
        return self._machine.reason

    @property
    def newest_evaluation(self) -> Evaluated | None:
        """The newest evaluation that is known here; None if there is none."""
        return None

    # ------------------------------------------------------------ what differs

    @property
    @abstractmethod
    def checkpoint_key(self) -> bytes:
        """Ed25519 public key (32 bytes) that signs checkpoints; empty if nothing is signed."""

    @abstractmethod
    def _welcome(self, round_: int, head: bytes) -> wire.Welcome:
        """The welcome of a worker that joins at `round_` and `head`.

        Raises `UnavailableError` if nobody can vouch for them yet.
        """

    def _welcome_now(self) -> wire.Welcome:
        round_ = self._index.round
        return self._welcome(round_, self._index.head_at(round_))

    def _check_hello(self, hello: wire.Hello) -> None:
        """Refuse a worker that would compute other numbers than the run's."""
        check_hello(
            hello,
            self.genesis,
            self._machine.round,
            self._index.head_at(hello.round),
            self._index.begins,
            self._pages.rounds_in_memory,
        )

    @abstractmethod
    async def _flush(self, readies: Sequence[ReadyT]) -> None:
        """Append and send what the machine's steps asked for, in order."""

    @abstractmethod
    def _step_other(self, item: Item) -> list[ReadyT]:
        """Step the machine with an item that only the subclass knows."""

    async def _after_turn(self) -> None:
        """Do what is left after everything of a turn was sent."""

    async def read_snapshot(
        self, request: wire.ReadSnapshotRequest
    ) -> AsyncGenerator[wire.ReadSnapshotResponse, None]:
        """Send a snapshot's file from an offset on; the first message describes the snapshot."""
        raise SnapshotError("No snapshots are kept here; read the journal instead.")
        yield wire.ReadSnapshotResponse()  # makes this a generator

    async def report_replica(self, request: wire.ReportReplicaRequest) -> None:
        """Take a report of the replica; only the process that was started here may send one."""
        raise UnknownWorkerError(
            "Only the replica process that this coordinator started may report for it."
        )

    async def order(self, order: Callable[[Any], ReadyT]) -> None:
        """Step the machine with what an operator asks for; returns when that is durable."""
        raise ProtocolError(
            "A relay decides nothing about the run; give the order to the coordinator above."
        )

    async def exclude(self, worker: str, reason: str) -> None:
        """Take a worker out of the run, for a person's `reason`; returns when that is durable."""
        raise _not_here()

    async def readmit(self, worker: str) -> None:
        """Let an excluded worker take part again; returns when that is durable."""
        raise _not_here()

    # ------------------------------------------------------------ start and stop

    async def serve(self) -> None:
        """Run the loop until it is cancelled or the journal fails."""
        watchers = [asyncio.create_task(self._tick()), asyncio.create_task(self.lag.watch())]
        try:
            while True:
                await self._turn()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await self._signatures.close()

    async def settle(self) -> None:
        """Return once all that has arrived so far is on the disk."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._items.put(_Settled(done))
        await done

    def end_sessions(self) -> None:
        """Tell every worker that the coordinator is going away."""
        for session in self._sessions.values():
            session.end(UnavailableError("The coordinator is stopping; reconnect later."))

    async def fail(self, error: FedMezoError) -> None:
        """End all sessions with `error`, and answer nothing but `error` from now on.

        `serve` has ended before, and others go on.
        """
        self._failed = error
        for session in self._sessions.values():
            session.end(error)
        self._sessions.clear()
        for item in self._under_way:
            item.refuse(error)
        while True:
            while self._items.qsize():
                self._items.get_nowait().refuse(error)
            await asyncio.sleep(0)  # For those who waited for room in the queue.
            if not self._items.qsize():
                return

    async def _enqueue(self, item: Item, signed: SignedAnswer | None = None) -> None:
        if self._failed is not None:
            raise self._failed
        await self._items.put(item, signed)

    async def check_journal(self) -> None:
        """Raise `JournalError` if the journal is gone or belongs to another process now."""
        await self._on_disk(lambda: self._journal.read(0, 1))

    async def close(self) -> None:
        """Close the journal; nothing is served afterwards."""
        await self._pages.close()
        await self._on_disk(self._journal.close)
        self._writer.shutdown()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_MS / 1000)
            await self._items.put(_Time(self._now_ms()))

    def _now_ms(self) -> int:
        return int((time.monotonic() - self._started_at_s) * 1000)

    # ------------------------------------------------------------ the loop

    async def _turn(self) -> None:
        """Take the items that wait, step the machine, append once, then send in order."""
        items = await self._next_items()
        self._under_way = []
        until_s = time.monotonic() + SIBLINGS_S
        readies: list[ReadyT] = []
        taken = 0
        while items:
            while taken + len(items) < BATCH_MAX and not self._items.empty():
                items.append(self._items.get_nowait())
            taken += len(items)
            self._under_way += items
            readies = await self._take(items, readies)
            items = [] if taken >= BATCH_MAX else await self._siblings(readies, until_s)
        await self._flush(readies)
        while self._overflowed:
            # A worker that reads nothing blocks its stream; the run continues without it.
            await self._flush(self._step(_Left(self._overflowed.pop())))
        await self._after_turn()

    async def _next_items(self) -> list[Item]:
        """What comes next; a machine that computes goes on once all other tasks had their turn."""
        if not self._machine.is_busy:
            return [await self._items.get()]
        await asyncio.sleep(0)
        return [_Time(self._now_ms())]

    async def _take(self, items: Sequence[Item], readies: list[ReadyT]) -> list[ReadyT]:
        """Step through the items; returns what is left to flush, `readies` included."""
        for item in items:
            await self._pace()
            if isinstance(item, _Join):
                # A joining worker gets the commits that it lacks, so they must be durable now.
                await self._flush(readies)
                readies = []
                await self._join(item)
                continue
            if isinstance(item, _Settled):
                await self._flush(readies)
                readies = []
                if not item.done.done():
                    item.done.set_result(None)
                continue
            readies += self._step(item)
        return readies

    async def _siblings(self, readies: Sequence[ReadyT], until_s: float) -> list[Item]:
        """The next item before `until_s`, if there is something to append and an answer is due."""
        waits_s = until_s - time.monotonic()
        if waits_s <= 0 or not self._machine.roster.assignments:
            return []
        records = [record for ready in readies for record in ready.records]
        # After a commit, the awaited answers are the next round's, which is not assigned yet.
        if not records or any(type(record) is Committed for record in records):
            return []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(waits_s):
                return [await self._items.get()]
        return []

    async def _pace(self) -> None:
        """Let every other task of the event loop have its turn after each `SLICE` calls."""
        self._paces += 1
        if self._paces % SLICE == 0:
            await asyncio.sleep(0)

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        in_context = contextvars.copy_context().run  # For the log.
        return await asyncio.get_running_loop().run_in_executor(self._writer, in_context, work)

    def _step(self, item: Item) -> list[ReadyT]:
        match item:
            case _Time(now_ms):
                self._note_the_rest()
                return [self._machine.step(Tick(now_ms))]
            case _Left(session):
                if self._sessions.get(session.worker) is not session:
                    return []
                del self._sessions[session.worker]
                session.end(HalfClosedError())
                self._note("worker %s left", session.worker)
                return [self._machine.step(WorkerLost(session.worker))]
            case _FromWorker(session, message, signed):
                if self._sessions.get(session.worker) is not session or session.ended is not None:
                    return []
                return self._from_worker(session, message, signed)
            case _:
                return self._step_other(item)

    def _from_worker(
        self, session: WorkerSession, message: wire.SessionRequest, signed: SignedAnswer | None
    ) -> list[ReadyT]:
        worker = session.worker
        try:
            event = event_from_request(
                worker, message, self._machine.round, self._index.head_at, session.signing, signed
            )
        except FedMezoError as error:
            session.end(error)
            return []
        match event:
            case AnswerReceived():
                traffic = session.traffic
                if traffic.assigned_at_s is not None:
                    waited_s = time.monotonic() - traffic.assigned_at_s
                    traffic.answered_after_ms = int(1000 * waited_s)
            case UnableReceived():
                self._unable.warn("worker %s cannot measure: %s", worker, event.reason)
            case WeightsReported() | SumReceived():
                pass
        return [self._machine.step(event)]

    async def _join(self, item: _Join) -> None:
        """Let a worker join, or fail its `done` with what is wrong."""
        session, hello = item.session, item.hello
        try:
            self._welcome_now()
            self._check_hello(hello)
            genesis_head = head_after(ZERO_HASH, self._genesis_body)
            session.signing = signing_of(hello, session.caller, self.genesis, genesis_head)
            self._make_room(session.worker)
        except FedMezoError as error:
            self._refused_workers.warn("refused a worker: %s", error)
            if not item.done.done():
                item.done.set_exception(error)
            return
        if item.done.done():  # The caller went away in the meantime.
            return
        before = self._sessions.get(session.worker)
        if session.exchanges and before is not None and before.exchanges and before.ended:
            # What this call carries may have ended that session, and the caller must know why.
            item.done.set_exception(before.ended)
            await self._flush(self._step(_Left(before)))
            return
        worker = session.worker
        replaced = self._sessions.pop(worker, None)
        if replaced is not None and replaced.exchanges and session.exchanges:
            item.done.set_result(None)  # The caller may go away while `_go_on` waits.
            await self._go_on(session, replaced, hello.round)
            return
        if replaced is not None:
            self._replace(replaced)
            await self._flush([self._machine.step(WorkerLost(worker))])
            if item.done.done():
                return
        try:
            welcome = self._welcome_now()
            self._check_hello(hello)  # That flush may have committed a round.
        except FedMezoError as error:
            item.done.set_exception(error)
            return
        self._sessions[worker] = session
        session.traffic = self._traffic.setdefault(worker, session.traffic)
        self._note("worker %s joined at round %d", worker, hello.round)
        self._put(session, wire.SessionResponse(welcome=welcome))
        for message in self._pages.commits_after(hello.round):
            self._put(session, message)
        item.done.set_result(None)
        self.joined.set()
        self.on_join(worker)
        await self._flush([self._machine.step(WorkerReady(worker))])

    def _replace(self, session: WorkerSession) -> None:
        """End a session because a newer one of its name has come; tell of names in a contest."""
        worker = session.worker
        session.end(replaced_error(worker))
        count = self._contests.replaced(worker)
        if count % CONTEST_REPLACEMENTS == 0:
            complaint = self._contests.complaint(worker)
            log.warning("worker %s: %s", worker, complaint, extra={"worker": worker})

    async def _go_on(self, session: WorkerSession, before: WorkerSession, round_: int) -> None:
        """Let a worker's next call, whose hello names `round_`, go on from the session before.

        For the machine the worker was there all the time, so nothing closes early without it.
        """
        worker, assign = session.worker, before.assign
        replies = before.unread_replies()
        before.end(UnavailableError(f"A later call of worker {worker} has said hello."))
        self._sessions[worker] = session
        session.traffic = before.traffic
        self._put(session, wire.SessionResponse(welcome=self._welcome_now()))
        missing: list[Outgoing] = [*replies, *self._pages.commits_after(round_)]
        for message in missing:
            self._put(session, message)
        if self._machine.phase is Phase.FINISHED:
            await self._flush([self._machine.step(WorkerReady(worker))])
        elif assign is not None:
            slot = RoundSlot(assign.ticket.round, assign.ticket.slot)
            if self._machine.roster.assignments.get(worker) == slot:
                self._send_one(assign)

    def _fold(self, entry: Entry) -> None:
        """Take one more record of the journal into everything that follows it."""
        for fold in self._folds:
            fold(entry)

    def _take_genesis(self, entry: Entry) -> None:
        if entry.row.kind == GENESIS:
            genesis = decode_record(entry.row.body)
            assert isinstance(genesis, Genesis)
            self._genesis, self._genesis_body = genesis, entry.row.body

    def _remember_commit(self, entry: Entry) -> None:
        if entry.row.kind == COMMITTED:
            self._pages.remember(entry.row)

    def _way_past_dropped(self) -> str:
        """Advice for a reader who asked for records that were dropped; ends a sentence."""
        return "read from_newest_base"

    def _note(self, line: str, worker: str, *values: object) -> None:
        """Log that a worker came or went, unless the log names too many already."""
        self._noted += 1
        if self._noted <= NOTED_A_SECOND_MAX:
            log.info(line, worker, *values, extra={"worker": worker})

    def _note_the_rest(self) -> None:
        """Log once a second how many more came or went."""
        if self._now_ms() // 1000 == self._noted_second:
            return
        self._noted_second = self._now_ms() // 1000
        if self._noted > NOTED_A_SECOND_MAX:
            log.info(
                "%d more workers joined or left, %d are connected",
                self._noted - NOTED_A_SECOND_MAX,
                len(self._sessions),
            )
        self._noted = 0

    def _warn(self, warnings: Sequence[str]) -> None:
        """Log a machine's warnings, unless the last one was a moment ago."""
        for sentence in warnings:
            if self._now_ms() - self._warned_at_ms < WARN_EVERY_MS:
                self._unsaid += 1
                continue
            more = f" (and {self._unsaid} such warnings before)" if self._unsaid else ""
            log.warning("%s%s", sentence, more)
            self._warned_at_ms, self._unsaid = self._now_ms(), 0

    def _make_room(self, worker: str) -> None:
        """Make room for a new worker's counters by forgetting those of a worker that has left.

        Raises `NotReadyError` if all `WORKERS_MAX` workers are connected.
        """
        if worker in self._traffic or len(self._traffic) < WORKERS_MAX:
            return
        gone = next((name for name in self._traffic if name not in self._sessions), None)
        if gone is None:
            error = NotReadyError(
                f"{WORKERS_MAX} workers are connected, the most that one coordinator takes; "
                "try later."
            )
            error.retry_after_s = RETRY_AFTER_MAX_S
            raise error
        del self._traffic[gone]

    # ------------------------------------------------------------ sending

    async def _send_commit(self, row: Row, signature: bytes) -> None:
        """Send a commit to every worker, before the messages of its step to single workers."""
        # Serialised once for all of them. Only this task changes the sessions.
        notice = commit_to_pb(row, signature).SerializeToString()
        for session in self._sessions.values():
            await self._pace()
            self._put(session, notice)

    async def _send(self, messages: Sequence[RoundMessage]) -> None:
        """Send a step's messages to single workers."""
        for message in messages:
            await self._pace()
            self._send_one(message)

    def _put(self, session: WorkerSession, message: Outgoing) -> None:
        """Queue a message; a worker that does not read leaves the run until it joins again."""
        if session.ended is None:
            session.put(message)
            if session.ended is not None:
                self._overflowed.append(session)

    def _send_one(self, message: RoundMessage) -> None:
        session = self._sessions.get(message.worker)
        if session is None:
            return
        match message:
            case Expel(_, sentence, reason):
                session.end(BY_REASON[reason](sentence))
                return
            case Refuse(worker, _, reason, sentence):
                self.refused_answers[reason] += 1
                self._refusals.warn("refused an answer of worker %s: %s", worker, sentence)
            case Assign():
                session.assign = message
                session.traffic.assigned_at_s = time.monotonic()
            case _:
                pass
        self._put(session, message_to_pb(message, self.genesis.config, self._index.head_at))

    # ------------------------------------------------------------ what the service calls

    def describe(self, version: int, run_id: str, round_: int = 0) -> wire.GetRunResponse:
        """Describe the run, as far as it is durable, to a caller who holds the weights of `round_`.

        `version` is the protocol version to name. Raises `WrongRunError` for the id of another run.
        """
        check_run_id(run_id, self.genesis.config.run_id)
        answer = wire.GetRunResponse(
            protocol_version=version,
            genesis=self._genesis_body,
            round=self._index.round,
            epoch=self._machine.epoch,
            checkpoint_key=self.checkpoint_key,
            missing=self._missing_after(round_),
            needs_snapshot=not self._index.can_follow(round_),
        )
        with contextlib.suppress(UnavailableError):
            welcome = self._welcome_now()
            answer.head, answer.signature = welcome.head, welcome.signature
        return answer

    def _missing_after(self, round_: int) -> wire.Suffix:
        suffix = self._index.suffix(min(round_, self._index.round))
        return wire.Suffix(pairs=suffix.pairs, bytes=suffix.bytes)

    async def join(
        self, hello: wire.Hello, *, caller: Caller = Caller.ANYONE, exchanges: bool = False
    ) -> WorkerSession:
        """Open a session for a worker; raises a `FedMezoError` that says why it may not join.

        With `exchanges` it goes on from the worker's last session, if that has them too.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session = WorkerSession(hello.worker, exchanges, caller)
        await self._enqueue(_Join(session, hello, done))
        try:
            await done
        except asyncio.CancelledError:
            # It may have joined at this very moment; if not, this changes nothing.
            self.leave(session)
            raise
        return session

    async def receive(self, session: WorkerSession, message: wire.SessionRequest) -> None:
        """Queue a message that came in an open session for the loop."""
        session.traffic.bytes_up += message.ByteSize()
        signed = None
        if session.signing is not None:
            signed = signed_answer(session.worker, message, session.signing, self._index.head_at)
            if signed is not None:
                self._signatures.begin(signed)
        await self._enqueue(_FromWorker(session, message, signed), signed)

    def sent(self, session: WorkerSession, message: Outgoing) -> bytes:
        """Count a message that is sent now; returns its bytes."""
        serialized = message if isinstance(message, bytes) else message.SerializeToString()
        session.traffic.bytes_down += len(serialized)
        return serialized

    def leave(self, session: WorkerSession) -> None:
        """End a session whose worker has closed its side, or whose stream is gone.

        It never waits: whoever is cancelled meanwhile would leave the worker connected.
        """
        if self._failed is None:
            self._items.put_anyway(_Left(session))

    def end_session(self, worker: str, error: FedMezoError) -> None:
        """End a worker's session with `error`, in place of what it has not read yet, if it has one.

        Nothing that it has sent and that was not taken yet counts.
        """
        session = self._sessions.get(worker)
        if session is not None:
            session.cut(error)
            # The worker may read nothing any more, and nobody should wait for it.
            self.leave(session)

    def is_connected(self, worker: str) -> bool:
        """Whether a worker has an open session."""
        return worker in self._sessions

    async def read_journal(
        self,
        request: wire.ReadJournalRequest,
        enter: Callable[[], Awaitable[None]],
        caller: Caller = Caller.ANYONE,
    ) -> bytes:
        """A page of records, as `JournalPages.read` makes it; `enter` takes its place."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        sees = sees_everyone(caller, self.genesis.config)
        return await self._pages.read(request, self._is_finished, enter, sees_everyone=sees)

    @property
    def records_shown(self) -> int:
        """Count of durable records, which readers may see."""
        return self._pages.length

    async def rows_from(self, seqno: int, rows_max: int) -> Sequence[Row]:
        """Some of these records from `seqno` on, as `JournalPages.rows_from` reads them."""
        return await self._pages.rows_from(seqno, rows_max)

    def _is_finished(self) -> bool:
        return self._durable_phase is Phase.FINISHED

    def _take_phase(self) -> None:
        """Note that the journal has all that led to the machine's phase."""
        if self._durable_phase is not self._machine.phase:
            self._durable_phase = self._machine.phase
            self.on_phase()

    @property
    def status_is_large(self) -> bool:
        """Whether the status has so many workers that it needs a place, as a page does."""
        return len(self._traffic) > STATUS_WORKERS

    def status(self, run_id: str, caller: Caller = Caller.ANYONE) -> wire.GetStatusResponse:
        """What `caller` may know of the run; raises `WrongRunError` if `run_id` is another's."""
        check_run_id(run_id, self.genesis.config.run_id)
        status = self._whole_status()
        if not sees_everyone(caller, self.genesis.config):
            hide_others(status, caller.name)
        return status

    def _whole_status(self) -> wire.GetStatusResponse:
        """The status of the run."""
        return status_report(
            self._machine,
            self.genesis,
            self._journal,
            phase=self._durable_phase,
            round_=self._index.round,
            traffic=self._traffic,
            connected=self._sessions,
            contested=self._contests.complaint,
            session_limit=self.session_limit,
            uptime_ms=self._now_ms(),
            loop_lag_p99_ms=self.lag.percentile_ms(0.99),
        )
