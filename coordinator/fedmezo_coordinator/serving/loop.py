"""What a coordinator and a relay have in common: the loop that serves workers, and its edges.

Everything that changes the run goes through one queue and one task, so the machine needs no locks; the
journal is touched by one thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fedmezo_coordinator.serving.commit_index import CommitIndex
from fedmezo_coordinator.serving.hello import CATCH_UP_ROUNDS_MAX, check_hello, check_run_id
from fedmezo_coordinator.serving.loop_lag import LoopLag
from fedmezo_coordinator.serving.outbox import Outbox, Outgoing
from fedmezo_coordinator.serving.session_limit import (
    RETRY_AFTER_MAX_S,
    SESSIONS_LIMIT,
    SessionLimit,
)
from fedmezo_core.errors import (
    DivergedError,
    FedMezoError,
    JournalCompactedError,
    NotReadyError,
    ProtocolError,
    SnapshotError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    Assign,
    Expel,
    Ready,
    Refuse,
    RoundEvent,
    RoundMessage,
    Tick,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import config_to_pb, decode_record
from fedmezo_core.journal.journal import COMMITTED, GENESIS, Entry, Journal, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.machines.divergence import DigestBoard, PartyDigest
from fedmezo_core.machines.rounds import Phase, RoundSummary, WorkerView
from fedmezo_core.records import Committed, Genesis, digest64_of
from fedmezo_core.wire.messages import (
    answer_from_pb,
    commit_to_pb,
    message_to_pb,
    unable_from_pb,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

EVENTS_MAX = 4096
"""Events that may wait for the loop; beyond it the senders wait."""
BATCH_MAX = 256
"""Events that share one append: group commit."""
SIBLINGS_S = 0.001
"""How long an append may wait for the other answers of its round, which then share it: less than the
disk takes for one of its own."""
OUTBOX_MAX = 1024
"""Messages that may wait for one worker; a worker that reads more slowly is cut off and catches up."""
OUTBOX_BYTES_MAX = 8 * 1024 * 1024
"""The same in bytes; the largest commit has somewhat more than 1 MiB."""
RECENT_BYTES_MAX = 8 * 1024 * 1024
"""Newest commits that are kept in memory for workers that come back."""
SLICE = 16
"""Workers served, or events taken, before everything else on the loop gets its turn."""
NOTED_A_SECOND_MAX = 20
"""Workers whose coming and going gets a line of its own in the log; of more, only the count."""
WORKERS_MAX = SESSIONS_LIMIT
"""Names whose figures are remembered, and so sessions at a time under different ones."""
PAGE_RECORDS_MAX = 4096
PAGE_RECORDS_DEFAULT = 1024
PAGE_BYTES_MAX = 1024 * 1024
ORIGIN_BYTES_MAX = 6 * 1024 * 1024
"""Largest origin that is sent, beside a page; readers take messages of 8 MiB."""
WAIT_MS_MAX = 30_000
TICK_MS = 200

Result = TypeVar("Result")
ReadyT = TypeVar("ReadyT", bound=Ready)
ReadyT_co = TypeVar("ReadyT_co", bound=Ready, covariant=True)


class Machine(Protocol[ReadyT_co]):
    """What decides: the round machine, or a relay's."""

    def step(self, event: RoundEvent) -> ReadyT_co:
        """Take one event."""

    @property
    def phase(self) -> Phase:
        """Where the run is."""

    @property
    def round(self) -> int:
        """Last committed round that workers are told of."""

    @property
    def epoch(self) -> int:
        """Coordinator starts so far."""

    @property
    def reason(self) -> str:
        """Why nothing goes on; empty if it does."""

    @property
    def awaited(self) -> Sequence[str]:
        """Workers whose answers are."""

    @property
    def awaits_answers(self) -> bool:
        """Whether there are any."""

    @property
    def diverged(self) -> frozenset[str]:
        """Workers whose weights were found to differ."""

    @property
    def workers(self) -> Mapping[str, WorkerView]:
        """Every worker seen since the start, by name."""

    @property
    def recent_rounds(self) -> Iterable[RoundSummary]:
        """The newest rounds, oldest first."""


class HalfClosedError(FedMezoError):
    """The worker said that it has nothing more to send: the session ends without an error."""


@dataclass(slots=True)
class Traffic:
    """What is counted for a worker since this start, over all its sessions."""

    bytes_up: int = 0
    bytes_down: int = 0
    assigned_at_s: float | None = None
    answered_after_ms: int = 0


@dataclass(eq=False, slots=True)
class Session:
    """A worker's open stream, as the loop sees it."""

    worker: str
    outbox: Outbox = field(default_factory=Outbox)
    ended: FedMezoError | None = None
    traffic: Traffic = field(default_factory=Traffic)
    """The worker's, once it has joined: shared by all its sessions."""

    def put(self, message: Outgoing) -> None:
        """Queue a message; a full queue ends the session instead of holding anyone up."""
        if self.ended is not None:
            return
        full = self.outbox.qsize() >= OUTBOX_MAX - 1
        # A queue that is empty takes a message of any size.
        if full or self.outbox.bytes_waiting > OUTBOX_BYTES_MAX:
            self.end(
                NotReadyError(
                    f"Worker {self.worker} reads more slowly than the run writes; reconnect to catch up."
                )
            )
            return
        self.outbox.put_nowait(message)

    def end(self, error: FedMezoError) -> None:
        """Let the stream end with `error` after what is queued."""
        if self.ended is None:
            self.ended = error
            self.outbox.put_nowait(error)


class Item:
    """What waits for the loop."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Join(Item):
    session: Session
    hello: wire.Hello
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Left(Item):
    session: Session


@dataclass(frozen=True, slots=True)
class _FromWorker(Item):
    session: Session
    message: wire.SessionRequest


@dataclass(frozen=True, slots=True)
class _Time(Item):
    now_ms: int


class ServingLoop(ABC, Generic[ReadyT]):
    """Serves one run to the workers that join it; what becomes of their answers is the machine's affair."""

    _journal: Journal
    _machine: Machine[ReadyT]

    def __init__(self, session_limit: SessionLimit | None) -> None:
        """The subclass owes a journal and a machine before anything is served."""
        self.session_limit = session_limit or SessionLimit()
        self._index = CommitIndex()
        self._folds: list[Callable[[Entry], None]] = [
            self._take_genesis,
            self._index.fold,
            self._remember_commit,
        ]
        """What follows the journal, in this order, live and at a restart alike."""
        self._digests = DigestBoard()
        self._recent: deque[Row] = deque()
        self._recent_bytes = 0
        self._sessions: dict[str, Session] = {}
        self._overflowed: list[Session] = []
        self._noted = 0
        self._noted_second = 0
        self._paces = 0
        self._traffic: dict[str, Traffic] = {}
        self._items: asyncio.Queue[Item] = asyncio.Queue(EVENTS_MAX)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._news = asyncio.Event()
        self._started_at_s = time.monotonic()
        self._lag = LoopLag()
        self._genesis: Genesis | None = None
        self._genesis_body = b""

    @property
    def genesis(self) -> Genesis:
        """Record 0."""
        assert self._genesis is not None, "load() comes first"
        return self._genesis

    # ------------------------------------------------------------ what differs

    @property
    @abstractmethod
    def checkpoint_key(self) -> bytes:
        """Public key that checkpoints are signed with; empty if they are not."""

    @abstractmethod
    def _welcome(self, round_: int, head: bytes) -> wire.Welcome:
        """Who joins now is at `round_` and `head`; `UnavailableError` if nobody can vouch for that yet."""

    def _welcome_now(self) -> wire.Welcome:
        round_ = self._machine.round
        return self._welcome(round_, self._index.head_at(round_))

    def _check_hello(self, hello: wire.Hello) -> None:
        """Refuse a worker that would not compute this run's numbers."""
        check_hello(
            hello,
            self.genesis,
            self._machine.round,
            self._index.head_at(hello.round),
            self._index.begins,
        )

    @abstractmethod
    async def _flush(self, readies: Sequence[ReadyT]) -> None:
        """Do what steps asked for."""

    @abstractmethod
    def _step_other(self, item: Item) -> list[ReadyT]:
        """Take an item that does not come from a worker."""

    @abstractmethod
    def _digest_reported(self, digest: PartyDigest) -> list[ReadyT]:
        """Take a party's full digest."""

    async def _after_turn(self) -> None:
        """What is left to do when everything was sent."""

    async def read_snapshot(
        self, request: wire.ReadSnapshotRequest
    ) -> AsyncGenerator[wire.ReadSnapshotResponse, None]:
        """A snapshot's file from an offset on, in chunks; the first message says what it is."""
        raise SnapshotError("No snapshots are kept here; read the journal instead.")
        yield wire.ReadSnapshotResponse()  # makes this a generator

    async def report_replica(self, request: wire.ReportReplicaRequest) -> None:
        """Take the replica's report; only the process that was started here knows the secret."""
        raise UnknownWorkerError(
            "Only the replica process that this coordinator started may report for it."
        )

    # ------------------------------------------------------------ life

    async def serve(self) -> None:
        """Run the loop until it is cancelled or the journal fails."""
        watchers = [asyncio.create_task(self._tick()), asyncio.create_task(self._lag.watch())]
        try:
            while True:
                await self._turn()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    def end_sessions(self) -> None:
        """Tell every worker that the coordinator is going away."""
        for session in self._sessions.values():
            session.end(UnavailableError("The coordinator is stopping; reconnect later."))

    async def check_journal(self) -> None:
        """See that the journal is still there and still ours; raises `JournalError` if not."""
        await self._on_disk(lambda: self._journal.read(0, 1))

    async def close(self) -> None:
        """Close the journal; nothing is served afterwards."""
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
        """Take what waits, step, append once, then send in order."""
        items = [await self._items.get()]
        until_s = time.monotonic() + SIBLINGS_S
        readies: list[ReadyT] = []
        taken = 0
        while items:
            while taken + len(items) < BATCH_MAX and not self._items.empty():
                items.append(self._items.get_nowait())
            taken += len(items)
            readies = await self._take(items, readies)
            items = [] if taken >= BATCH_MAX else await self._siblings(readies, until_s)
        await self._flush(readies)
        while self._overflowed:
            # Its stream may stay blocked for as long as it reads nothing: the run goes on without it.
            await self._flush(self._step(_Left(self._overflowed.pop())))
        await self._after_turn()

    async def _take(self, items: Sequence[Item], readies: list[ReadyT]) -> list[ReadyT]:
        """Step through the items; what is owed after them, and was before."""
        for item in items:
            await self._pace()
            if isinstance(item, _Join):
                # A joining worker is sent the commits it lacks, so those must be durable by now.
                await self._flush(readies)
                readies = []
                await self._join(item)
            else:
                readies += self._step(item)
        return readies

    async def _siblings(self, readies: Sequence[ReadyT], until_s: float) -> list[Item]:
        """What else comes until then, if there is something to append and an answer to wait for."""
        waits_s = until_s - time.monotonic()
        if waits_s <= 0 or not self._machine.awaits_answers:
            return []
        records = [record for ready in readies for record in ready.records]
        # After a commit the answers that are awaited are the next round's, which nobody was asked for yet.
        if not records or any(type(record) is Committed for record in records):
            return []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(waits_s):
                return [await self._items.get()]
        return []

    async def _pace(self) -> None:
        """After every so many calls, let everything else on the loop have its turn."""
        self._paces += 1
        if self._paces % SLICE == 0:
            await asyncio.sleep(0)

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

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
            case _FromWorker(session, message):
                if self._sessions.get(session.worker) is not session or session.ended is not None:
                    return []
                return self._from_worker(session, message)
            case _:
                return self._step_other(item)

    def _from_worker(self, session: Session, message: wire.SessionRequest) -> list[ReadyT]:
        worker = session.worker
        match message.WhichOneof("kind"):
            case "answer":
                event: RoundEvent = answer_from_pb(worker, message.answer)
                if not self._knows_history_of(message.answer):
                    session.end(
                        DivergedError(
                            f"Worker {worker} measured round {message.answer.ticket.round} after another "
                            "history than this journal's; restart the worker, so that it rebuilds from "
                            "base and journal."
                        )
                    )
                    return []
                traffic = session.traffic
                if traffic.assigned_at_s is not None:
                    waited_s = time.monotonic() - traffic.assigned_at_s
                    traffic.answered_after_ms = int(1000 * waited_s)
                return [self._machine.step(event)]
            case "unable":
                unable = unable_from_pb(worker, message.unable)
                log.warning("worker %s cannot measure: %s", worker, unable.reason)
                return [self._machine.step(unable)]
            case "weights_report":
                report = message.weights_report
                if len(report.weights_digest) != 32 or report.round > self._machine.round:
                    session.end(
                        ProtocolError(
                            f"A weights report names a committed round (so far {self._machine.round}, "
                            f"not {report.round}) and a digest of 32 bytes (not "
                            f"{len(report.weights_digest)}); use the same FedMeZO version."
                        )
                    )
                    return []
                return self._digest_reported(
                    PartyDigest(worker, report.round, report.weights_digest)
                )
            case kind:
                session.end(
                    ProtocolError(
                        f"Message {kind or 'of no known kind'} has no place in an open session; "
                        "use the same FedMeZO version."
                    )
                )
                return []

    def _knows_history_of(self, answer: wire.Answer) -> bool:
        """Whether an answer names, if it names one, the head that its round began from."""
        if not answer.HasField("head64"):
            return True
        head = self._index.head_at(max(answer.ticket.round - 1, 0))
        return not head or digest64_of(head) == answer.head64

    async def _join(self, item: _Join) -> None:
        """Admit a worker, or fail its `done` with what is wrong."""
        session, hello = item.session, item.hello
        try:
            self._welcome_now()
            self._check_hello(hello)
            self._make_room(session.worker)
        except FedMezoError as error:
            log.warning("refused a worker: %s", error)
            if not item.done.done():
                item.done.set_exception(error)
            return
        if item.done.done():  # the caller has gone away meanwhile
            return
        worker = session.worker
        replaced = self._sessions.pop(worker, None)
        if replaced is not None:
            replaced.end(
                ProtocolError(
                    f"Another process has joined as worker {worker}; give each worker its own --name."
                )
            )
            await self._flush([self._machine.step(WorkerLost(worker))])
        rows = await self._commits_after(hello.round)
        if item.done.done():
            return
        try:
            welcome = self._welcome_now()
        except FedMezoError as error:
            item.done.set_exception(error)
            return
        self._sessions[worker] = session
        session.traffic = self._traffic.setdefault(worker, session.traffic)
        self._note("worker %s joined at round %d", worker, hello.round)
        self._put(session, wire.SessionResponse(welcome=welcome))
        for row in rows:
            self._put(session, commit_to_pb(row).SerializeToString())
        item.done.set_result(None)
        await self._flush([self._machine.step(WorkerReady(worker))])

    def _fold(self, entry: Entry) -> None:
        """Take one more record that is in the journal."""
        for fold in self._folds:
            fold(entry)

    def _take_genesis(self, entry: Entry) -> None:
        if entry.row.kind == GENESIS:
            genesis = decode_record(entry.row.body)
            assert isinstance(genesis, Genesis)
            self._genesis, self._genesis_body = genesis, entry.row.body

    def _remember_commit(self, entry: Entry) -> None:
        """Keep a commit for workers that come back; the oldest make room."""
        if entry.row.kind != COMMITTED:
            return
        self._recent.append(entry.row)
        self._recent_bytes += len(entry.row.body)
        while self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > CATCH_UP_ROUNDS_MAX:
            self._recent_bytes -= len(self._recent.popleft().body)

    def _announce(self) -> None:
        """Wake whoever waits for news of the journal."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _commits_after(self, round_: int) -> Sequence[Row]:
        """All commits that a worker at `round_` lacks; most who come back lack one or none."""
        missing = self._index.after(round_)
        kept = min(len(self._recent), len(missing))
        rows = list(self._recent)[len(self._recent) - kept :]
        older = missing[: len(missing) - kept]
        if older:
            rows[:0] = await self._rows_at(older)
        return rows

    async def _rows_at(self, seqnos: Sequence[int]) -> list[Row]:
        return await self._on_disk(lambda: [self._row_at(n) for n in seqnos])

    def _row_at(self, seqno: int) -> Row:
        """In the journal's thread; its first records may have been dropped since someone looked."""
        [row] = self._journal.read(seqno, 1)
        if row.seqno != seqno:
            raise self._compacted()
        return row

    def _compacted(self) -> JournalCompactedError:
        return JournalCompactedError(
            f"The journal's records before {self._journal.begins}, up to round {self._index.begins}, were "
            f"dropped; {self._way_past_dropped()}."
        )

    def _way_past_dropped(self) -> str:
        """What a reader can do who asked for records that were dropped."""
        return "read from_newest_base"

    def _note(self, line: str, *values: object) -> None:
        """Log that a worker came or went, unless too many do."""
        self._noted += 1
        if self._noted <= NOTED_A_SECOND_MAX:
            log.info(line, *values)

    def _note_the_rest(self) -> None:
        """Once a second, by the ticks."""
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

    def _make_room(self, worker: str) -> None:
        """Refuse a session too many; forget the figures of the longest gone for a new name."""
        if worker in self._traffic or len(self._traffic) < WORKERS_MAX:
            return
        gone = next((name for name in self._traffic if name not in self._sessions), None)
        if gone is None:
            error = NotReadyError(
                f"{WORKERS_MAX} workers are connected, the most that one coordinator takes; try later."
            )
            error.retry_after_s = RETRY_AFTER_MAX_S
            raise error
        del self._traffic[gone]
        self._digests.forget(gone)

    # ------------------------------------------------------------ out

    async def _send_commit(self, row: Row, signature: bytes) -> None:
        """To everyone; it comes before what its step addressed to one worker each."""
        # Serialised once for all; only this task changes the sessions.
        notice = commit_to_pb(row, signature).SerializeToString()
        for session in self._sessions.values():
            await self._pace()
            self._put(session, notice)

    async def _send(self, messages: Sequence[RoundMessage]) -> None:
        """What a step addressed to one worker each."""
        for message in messages:
            await self._pace()
            self._send_one(message)

    def _put(self, session: Session, message: Outgoing) -> None:
        """Queue a message; whoever does not read is out of the run until it joins again."""
        if session.ended is None:
            session.put(message)
            if session.ended is not None:
                self._overflowed.append(session)

    def _send_one(self, message: RoundMessage) -> None:
        session = self._sessions.get(message.worker)
        if session is None:
            return
        match message:
            case Expel(_, sentence):
                session.end(DivergedError(sentence))
                return
            case Refuse(worker, _, _, sentence):
                log.warning("refused an answer of worker %s: %s", worker, sentence)
            case Assign():
                session.traffic.assigned_at_s = time.monotonic()
            case _:
                pass
        self._put(session, message_to_pb(message, self.genesis.config, self._index.head_at))

    # ------------------------------------------------------------ what the service calls

    def describe(self, version: int, run_id: str, round_: int = 0) -> wire.GetRunResponse:
        """What the run is, to a caller who means this one and holds the weights after `round_`."""
        check_run_id(run_id, self.genesis.config.run_id)
        answer = wire.GetRunResponse(
            protocol_version=version,
            genesis=self._genesis_body,
            round=self._machine.round,
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

    async def join(self, hello: wire.Hello) -> Session:
        """Open a session for a worker; raises what is wrong with its hello."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session = Session(hello.worker)
        await self._items.put(_Join(session, hello, done))
        try:
            await done
        except asyncio.CancelledError:
            # It may have been let in at that very moment; if not, this changes nothing.
            await self._items.put(_Left(session))
            raise
        return session

    async def receive(self, session: Session, message: wire.SessionRequest) -> None:
        """Take a message that came in an open session."""
        session.traffic.bytes_up += message.ByteSize()
        await self._items.put(_FromWorker(session, message))

    def sent(self, session: Session, message: Outgoing) -> bytes:
        """Count a message that goes out now; its bytes."""
        serialized = message if isinstance(message, bytes) else message.SerializeToString()
        session.traffic.bytes_down += len(serialized)
        return serialized

    async def leave(self, session: Session) -> None:
        """A worker has closed its side of a session, or the session's stream is gone."""
        await self._items.put(_Left(session))

    async def read_journal(self, request: wire.ReadJournalRequest) -> wire.ReadJournalResponse:
        """A page of records, after waiting for a first one if the caller wants to."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        if request.records_max > PAGE_RECORDS_MAX or request.wait_ms > WAIT_MS_MAX:
            raise ProtocolError(
                f"records_max is at most {PAGE_RECORDS_MAX} and wait_ms at most {WAIT_MS_MAX}; ask for less."
            )
        if (request.from_newest_base or request.from_round) and not request.commits_only:
            raise ProtocolError(
                "from_newest_base and from_round go with commits_only; set that too, or neither."
            )
        if request.from_origin and (request.commits_only or request.from_seqno):
            raise ProtocolError(
                "from_origin goes with from_seqno 0 and all records; leave commits_only out, or from_origin."
            )
        deadline_s = time.monotonic() + request.wait_ms / 1000
        origin = await self._on_disk(self._sendable_origin) if request.from_origin else None
        from_seqno = request.from_seqno if origin is None else origin.seqno
        while True:
            news = self._news
            rows, next_seqno, head_before = await self._page(request, from_seqno)
            remaining_s = deadline_s - time.monotonic()
            if rows or remaining_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), remaining_s)
        return wire.ReadJournalResponse(
            entries=[
                wire.JournalEntry(seqno=row.seqno, record=row.body, chain=row.chain) for row in rows
            ],
            next_seqno=next_seqno,
            finished=self._machine.phase is Phase.FINISHED and next_seqno >= len(self._journal),
            head_before=head_before,
            origin=b"" if origin is None else origin.sealed,
        )

    def _sendable_origin(self) -> StoredState | None:
        stored = self._journal.stored_origin
        if stored is not None and len(stored.sealed) > ORIGIN_BYTES_MAX:
            raise JournalCompactedError(
                f"What this journal's dropped records came to has {len(stored.sealed)} bytes, more than the "
                f"{ORIGIN_BYTES_MAX} that are sent; read the journal itself, beside its coordinator."
            )
        return stored

    async def _page(
        self, request: wire.ReadJournalRequest, start: int
    ) -> tuple[Sequence[Row], int, bytes]:
        """Rows, where to read on, and the head before the first row if that is taken from the base."""
        count_max = request.records_max or PAGE_RECORDS_DEFAULT
        length, head_before = len(self._journal), b""
        if request.from_round:
            start = self._index.seqno_of(request.from_round, length)
            if request.from_round <= self._index.begins:
                start = 0
        if start >= length:
            return (), start, b""
        if request.commits_only:
            base_round = self._index.newest_base_round
            base_seqno = self._index.seqno_of(base_round, 0)
            if request.from_newest_base and base_round and base_seqno >= start:
                start = base_seqno
                head_before = self._index.head_at(base_round - 1)
            self._check_is_there(start)
            places = self._index.seqnos_from(start, count_max)
            rows: Sequence[Row] = await self._rows_at(places)
            is_last = len(places) < count_max
        else:
            rows = await self._on_disk(lambda: self._journal.read(start, count_max))
            self._check_is_there(start)
            is_last = False
        kept = _within(rows, PAGE_BYTES_MAX)
        if len(kept) == len(rows) and is_last:
            return kept, length, head_before
        return kept, kept[-1].seqno + 1 if kept else length, head_before

    def _check_is_there(self, seqno: int) -> None:
        if seqno < self._journal.begins:
            raise self._compacted()

    def status(self, run_id: str) -> wire.GetStatusResponse:
        """The whole picture."""
        check_run_id(run_id, self.genesis.config.run_id)
        machine = self._machine
        awaited, diverged = frozenset(machine.awaited), machine.diverged
        phases = {
            Phase.WAITING: wire.PHASE_WAITING,
            Phase.OPEN: wire.PHASE_OPEN,
            Phase.FINISHED: wire.PHASE_FINISHED,
            Phase.PAUSED: wire.PHASE_PAUSED,
        }
        return wire.GetStatusResponse(
            config=config_to_pb(self.genesis.config),
            phase=phases[machine.phase],
            round=machine.round,
            epoch=machine.epoch,
            records=len(self._journal),
            head=self._journal.head,
            workers=[
                self._worker_status(name, awaited, diverged) for name in sorted(self._traffic)
            ],
            digests=[
                wire.PartyDigest(party=d.party, round=d.round, weights_digest=d.weights_digest)
                for d in self._digests.newest()
            ],
            recent_rounds=[
                wire.RoundStatus(round=s.round, mean_loss=s.mean_loss, answers=s.answers)
                for s in self._machine.recent_rounds
            ],
            trainable_bytes=self.genesis.trainable_bytes,
            uptime_ms=self._now_ms(),
            reason=machine.reason,
            loop_lag_p99_ms=self._lag.percentile_ms(0.99),
            sessions=self.session_limit.sessions,
            sessions_refused=self.session_limit.refused,
        )

    def _worker_status(
        self, name: str, awaited: frozenset[str], diverged: frozenset[str]
    ) -> wire.WorkerStatus:
        traffic, view = self._traffic[name], self._machine.workers.get(name)
        return wire.WorkerStatus(
            worker=name,
            connected=name in self._sessions,
            rounds_answered=view.rounds_answered if view else 0,
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            mean_loss=view.mean_loss if view else None,
            answered_after_ms=traffic.answered_after_ms,
            diverged=name in diverged,
            complaint=view.complaint if view else "",
            measuring=name in awaited,
            learning_rate=view.learning_rate if view else None,
        )


def _within(rows: Sequence[Row], bytes_max: int) -> Sequence[Row]:
    """The first rows that fit, and at least one."""
    total = 0
    for count, row in enumerate(rows):
        total += len(row.body) + len(row.chain)
        if total > bytes_max and count > 0:
            return rows[:count]
    return rows
