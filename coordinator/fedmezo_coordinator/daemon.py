"""The one loop: event -> step -> append -> send. Owns the clock, the machine, the journal and the outboxes.

Everything that changes the run goes through one queue and one task, so the machine needs no locks; the
journal is touched by one thread only. An error from the journal ends the process: nothing is
acknowledged after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedmezo_coordinator.admission import check_hello, check_run_id
from fedmezo_coordinator.model_index import ModelIndex
from fedmezo_coordinator.snapshots import SnapshotShelf
from fedmezo_core.codec import (
    answer_from_pb,
    assign_to_pb,
    config_to_pb,
    diverged_to_pb,
    evaluated_from_pb,
    evaluated_to_pb,
    snapshot_to_pb,
    ticket_to_pb,
    unable_from_pb,
)
from fedmezo_core.cohort import REPLICA_PARTY
from fedmezo_core.config import RunConfig
from fedmezo_core.digests import DigestBoard, PartyDigest
from fedmezo_core.errors import (
    DivergedError,
    FedMezoError,
    JournalCorruptError,
    NotReadyError,
    ProtocolError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    Ack,
    Assign,
    Expel,
    Finish,
    Ready,
    Refuse,
    ReplicaDigest,
    ReplicaEvaluated,
    RoundEvent,
    RoundMessage,
    Tick,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal import Entry, Journal, Row
from fedmezo_core.records import (
    Committed,
    Diverged,
    Genesis,
    Paused,
    Record,
    Resumed,
    Snapshotted,
    Stopped,
    digest64_of,
)
from fedmezo_core.rounds import Phase, RoundMachine
from fedmezo_core.snapshots import Snapshot
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

EVENTS_MAX = 4096
"""Events that may wait for the loop; beyond it the senders wait."""
BATCH_MAX = 256
"""Events that share one append: group commit."""
OUTBOX_MAX = 1024
"""Messages that may wait for one worker; a worker that reads more slowly is cut off and catches up."""
WORKERS_MAX = 20_000
"""Sessions at a time; one file descriptor each. Also the names whose figures are remembered."""
PAGE_RECORDS_MAX = 4096
PAGE_RECORDS_DEFAULT = 1024
PAGE_BYTES_MAX = 1024 * 1024
WAIT_MS_MAX = 30_000
TICK_MS = 200


Result = TypeVar("Result")


class HalfClosedError(FedMezoError):
    """The worker said that it has nothing more to send: the session ends without an error."""


@dataclass
class Traffic:
    """What is counted for a worker since this start, over all its sessions."""

    bytes_up: int = 0
    bytes_down: int = 0
    assigned_at_s: float | None = None
    answered_after_ms: int = 0


@dataclass(eq=False)
class Session:
    """A worker's open stream, as the loop sees it."""

    worker: str
    outbox: asyncio.Queue[wire.SessionResponse | FedMezoError] = field(
        default_factory=lambda: asyncio.Queue(OUTBOX_MAX)
    )
    ended: FedMezoError | None = None
    traffic: Traffic = field(default_factory=Traffic)
    """The worker's, once it has joined: shared by all its sessions."""

    def put(self, message: wire.SessionResponse) -> None:
        """Queue a message; a full queue ends the session instead of holding anyone up."""
        if self.ended is not None:
            return
        if self.outbox.qsize() >= OUTBOX_MAX - 1:
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


@dataclass(frozen=True, slots=True)
class _Join:
    session: Session
    hello: wire.Hello
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Left:
    session: Session


@dataclass(frozen=True, slots=True)
class _FromWorker:
    session: Session
    message: wire.SessionRequest


@dataclass(frozen=True, slots=True)
class _FromReplica:
    request: wire.ReportReplicaRequest


@dataclass(frozen=True, slots=True)
class _Time:
    now_ms: int


_Item = _Join | _Left | _FromWorker | _FromReplica | _Time


class Daemon:
    """Serves one run from one journal."""

    def __init__(self, journal: Journal, *, snapshots: Path | None = None) -> None:
        """`journal` is opened and not yet loaded; it must hold a genesis record.

        `snapshots` is the folder that the replica writes to; None: there are none.
        """
        self._journal = journal
        self._shelf = SnapshotShelf(snapshots)
        self._machine = RoundMachine()
        self._index = ModelIndex()
        self._digests = DigestBoard()
        self._sessions: dict[str, Session] = {}
        self._traffic: dict[str, Traffic] = {}
        self._items: asyncio.Queue[_Item] = asyncio.Queue(EVENTS_MAX)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._news = asyncio.Event()
        self._started_at_s = time.monotonic()
        self._genesis: Genesis | None = None
        self._genesis_body = b""
        self.replica_secret = secrets.token_bytes(32)

    # ------------------------------------------------------------ life

    async def load(self) -> None:
        """Verify and fold the journal, and make this start's epoch durable."""
        entries = await self._on_disk(lambda: list(self._journal.load()))
        for entry in entries:
            self._index.fold(entry)
            self._machine.apply(entry.record)
            self._shelf.fold(entry.record, self._machine.state.agreed)
        if not entries or not isinstance(entries[0].record, Genesis):
            raise JournalCorruptError(
                "The journal does not begin with a genesis record; restore it from a copy."
            )
        self._genesis = entries[0].record
        self._genesis_body = entries[0].row.body
        self._shelf.open(self._genesis.config.run_id)
        await self._on_disk(lambda: self._shelf.sweep(at_start=True))
        await self._flush([self._machine.start(self._now_ms())])

    async def resume(self, rate_factor: float) -> None:
        """Let a paused run go on; before `serve`. Raises `ConfigError` if it is not paused."""
        await self._flush([self._machine.resume(rate_factor)])

    @property
    def pause_reason(self) -> str:
        """Why the run is paused; empty if it is not."""
        return self._machine.reason if self._machine.phase is Phase.PAUSED else ""

    async def serve(self) -> None:
        """Run the loop until it is cancelled or the journal fails."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                await self._turn()
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker

    def end_sessions(self) -> None:
        """Tell every worker that the coordinator is going away."""
        for session in self._sessions.values():
            session.end(UnavailableError("The coordinator is stopping; reconnect later."))

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
        while len(items) < BATCH_MAX and not self._items.empty():
            items.append(self._items.get_nowait())
        readies: list[Ready] = []
        for item in items:
            if isinstance(item, _Join):
                # A joining worker is sent the commits it lacks, so those must be durable by now.
                await self._flush(readies)
                readies = []
                await self._join(item)
            else:
                readies += self._step(item)
        await self._flush(readies)
        await self._record_snapshot()

    async def _record_snapshot(self) -> None:
        """Write down the replica's newest snapshot, once the run has agreed to its weights."""
        snapshotted = self._shelf.take_agreed()
        if snapshotted is not None:
            await self._flush([self._recorded(snapshotted)])
            # Beside the loop: a large file takes its time to go.
            asyncio.get_running_loop().run_in_executor(None, self._shelf.sweep)

    async def _flush(self, readies: Sequence[Ready]) -> None:
        records = [record for ready in readies for record in ready.records]
        entries = iter(await self._append(records) if records else ())
        for ready in readies:
            self._send([next(entries) for _ in ready.records], ready.messages)

    async def _append(self, records: Sequence[Record]) -> list[Entry]:
        entries = await self._on_disk(lambda: self._journal.append(records))
        for entry in entries:
            self._index.fold(entry)
            self._shelf.fold(entry.record, self._machine.state.agreed)
            self._tell(entry.record)
        news, self._news = self._news, asyncio.Event()
        news.set()
        return entries

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _step(self, item: _Item) -> list[Ready]:
        match item:
            case _Time(now_ms):
                return [self._machine.step(Tick(now_ms))]
            case _Left(session):
                if self._sessions.get(session.worker) is not session:
                    return []
                del self._sessions[session.worker]
                session.end(HalfClosedError())
                log.info("worker %s left", session.worker)
                return [self._machine.step(WorkerLost(session.worker))]
            case _FromWorker(session, message):
                if self._sessions.get(session.worker) is not session or session.ended is not None:
                    return []
                return self._from_worker(session, message)
            case _FromReplica(request):
                return self._from_replica(request)
            case _Join():
                raise AssertionError("joins are taken one by one")

    def _from_worker(self, session: Session, message: wire.SessionRequest) -> list[Ready]:
        worker = session.worker
        match message.WhichOneof("kind"):
            case "answer":
                event: RoundEvent = answer_from_pb(worker, message.answer)
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

    def _from_replica(self, request: wire.ReportReplicaRequest) -> list[Ready]:
        digest = request.weights_digest
        readies = self._digest_reported(PartyDigest(REPLICA_PARTY, request.round, digest))
        readies.append(self._machine.step(ReplicaDigest(request.round, digest64_of(digest))))
        if request.HasField("evaluation"):
            evaluation = evaluated_from_pb(request.evaluation)
            readies.append(self._machine.step(ReplicaEvaluated(evaluation)))
        if request.HasField("snapshot"):
            self._snapshot_reported(request)
        return readies

    def _snapshot_reported(self, request: wire.ReportReplicaRequest) -> None:
        report = request.snapshot
        if report.complaint:
            log.warning("no snapshot of round %d: %s", request.round, report.complaint)
            return
        self._shelf.offer(
            Snapshotted(
                request.round, request.weights_digest, report.file_sha256, report.file_bytes
            )
        )

    def _digest_reported(self, digest: PartyDigest) -> list[Ready]:
        known = {(d.party, d.round) for d in self._machine.state.divergences}
        found = self._digests.report(digest)
        return [self._recorded(d) for d in found if (d.party, d.round) not in known]

    def _recorded(self, record: Diverged | Snapshotted) -> Ready:
        """A fact that the daemon found, not the machine: folded here, appended like the others."""
        self._machine.apply(record)
        return Ready(records=(record,))

    async def _join(self, item: _Join) -> None:
        """Admit a worker, or fail its `done` with what is wrong."""
        session, hello = item.session, item.hello
        try:
            check_hello(hello, self.genesis, self._machine.round, self._index.head_at(hello.round))
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
        missing = self._index.seqnos[hello.round + 1 :]
        rows = await self._on_disk(lambda: [self._journal.read(n, 1)[0] for n in missing])
        self._sessions[worker] = session
        session.traffic = self._traffic.setdefault(worker, session.traffic)
        log.info("worker %s joined at round %d", worker, hello.round)
        session.put(
            wire.SessionResponse(
                welcome=wire.Welcome(epoch=self._machine.epoch, round=self._machine.round)
            )
        )
        for row in rows:
            session.put(commit_to_pb(row))
        item.done.set_result(None)
        await self._flush([self._machine.step(WorkerReady(worker))])

    def _make_room(self, worker: str) -> None:
        """Refuse a session too many; forget the figures of the longest gone for a new name."""
        if worker in self._traffic or len(self._traffic) < WORKERS_MAX:
            return
        gone = next((name for name in self._traffic if name not in self._sessions), None)
        if gone is None:
            raise NotReadyError(
                f"{WORKERS_MAX} workers are connected, the most that one coordinator takes; try later."
            )
        del self._traffic[gone]
        self._digests.forget(gone)

    # ------------------------------------------------------------ out

    def _send(self, entries: Sequence[Entry], messages: Sequence[RoundMessage]) -> None:
        """Commits to everyone first, then what the step addressed to one worker each."""
        for entry in entries:
            if isinstance(entry.record, Committed):
                notice = commit_to_pb(entry.row)
                for session in self._sessions.values():
                    session.put(notice)
        for message in messages:
            session_or_none = self._sessions.get(message.worker)
            if session_or_none is not None:
                self._send_one(session_or_none, message)

    def _send_one(self, session: Session, message: RoundMessage) -> None:
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
        session.put(message_to_pb(message, self.genesis.config))

    def _tell(self, record: Record) -> None:
        match record:
            case Committed():
                log.info("round %d committed, %d pairs", record.round, record.pairs)
                if self._machine.phase is Phase.FINISHED and record.round == self._machine.round:
                    log.info("the run is finished")
            case Diverged():
                log.error(
                    "%s diverged: its weights after round %d have digest %016x, the run's have %016x",
                    record.party,
                    record.round,
                    record.found_digest64,
                    record.expected_digest64,
                )
            case Paused(round_, reason):
                log.error("the run is paused after round %d: %s", round_, reason)
            case Resumed(rate_factor):
                log.info("the run is resumed, with learning rates times %g", rate_factor)
            case Snapshotted(round_):
                log.info("snapshot of round %d, %d bytes", round_, record.file_bytes)
            case Stopped(round_, reason):
                log.info("the run ends after round %d: %s", round_, reason)
            case _:
                pass

    # ------------------------------------------------------------ what the service calls

    @property
    def genesis(self) -> Genesis:
        """Record 0."""
        assert self._genesis is not None, "load() comes first"
        return self._genesis

    def describe(self, version: int, run_id: str, round_: int = 0) -> wire.GetRunResponse:
        """What the run is, to a caller who means this one and holds the weights after `round_`."""
        check_run_id(run_id, self.genesis.config.run_id)
        answer = wire.GetRunResponse(
            protocol_version=version,
            genesis=self._genesis_body,
            round=self._machine.round,
            epoch=self._machine.epoch,
            missing=self._missing_after(round_),
        )
        newest = self._shelf.newest
        if newest is not None and newest.round > round_:
            answer.snapshot.CopyFrom(
                wire.SnapshotOffer(
                    snapshot=self._snapshot_to_pb(newest),
                    next_seqno=self._index.seqnos[newest.round] + 1,
                    missing=self._missing_after(newest.round),
                )
            )
        return answer

    def _missing_after(self, round_: int) -> wire.Suffix:
        suffix = self._index.suffix(min(round_, self._index.round))
        return wire.Suffix(pairs=suffix.pairs, bytes=suffix.bytes)

    def _snapshot_to_pb(self, record: Snapshotted) -> wire.Snapshot:
        head = self._index.head_at(record.round)
        return snapshot_to_pb(
            Snapshot(
                record.round, head, record.weights_digest, record.file_sha256, record.file_bytes
            )
        )

    async def read_snapshot(
        self, request: wire.ReadSnapshotRequest
    ) -> AsyncGenerator[wire.ReadSnapshotResponse, None]:
        """A snapshot's file from an offset on, in chunks; the first message says what it is."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        about = self._snapshot_to_pb(self._shelf.find(request.round))
        yield wire.ReadSnapshotResponse(snapshot=about)
        async with contextlib.aclosing(self._shelf.read(request.round, request.offset)) as chunks:
            async for chunk in chunks:
                yield wire.ReadSnapshotResponse(data=chunk)

    async def join(self, hello: wire.Hello) -> Session:
        """Open a session for a worker; raises what is wrong with its hello."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session = Session(hello.worker)
        await self._items.put(_Join(session, hello, done))
        await done
        return session

    async def receive(self, session: Session, message: wire.SessionRequest) -> None:
        """Take a message that came in an open session."""
        session.traffic.bytes_up += message.ByteSize()
        await self._items.put(_FromWorker(session, message))

    def sent(self, session: Session, message: wire.SessionResponse) -> None:
        """Count a message that has gone out."""
        session.traffic.bytes_down += message.ByteSize()

    async def leave(self, session: Session) -> None:
        """A worker has closed its side of a session, or the session's stream is gone."""
        await self._items.put(_Left(session))

    async def report_replica(self, request: wire.ReportReplicaRequest) -> None:
        """Take the replica's report; only the process that the daemon started knows the secret."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        if not hmac.compare_digest(request.secret, self.replica_secret):
            raise UnknownWorkerError(
                "Only the replica process that this coordinator started may report for it."
            )
        if len(request.weights_digest) != 32 or request.round > self._machine.round:
            raise ProtocolError("The replica's report names no committed round or no digest.")
        if request.HasField("evaluation"):
            evaluated_from_pb(request.evaluation)
        written = request.snapshot
        is_whole = len(written.file_sha256) == 32 and written.file_bytes and request.round
        if request.HasField("snapshot") and not (written.complaint or is_whole):
            raise ProtocolError("The replica's snapshot has no digest, no bytes or no round.")
        await self._items.put(_FromReplica(request))

    async def read_journal(self, request: wire.ReadJournalRequest) -> wire.ReadJournalResponse:
        """A page of records, after waiting for a first one if the caller wants to."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        if request.records_max > PAGE_RECORDS_MAX or request.wait_ms > WAIT_MS_MAX:
            raise ProtocolError(
                f"records_max is at most {PAGE_RECORDS_MAX} and wait_ms at most {WAIT_MS_MAX}; ask for less."
            )
        if request.from_newest_base and not request.commits_only:
            raise ProtocolError("from_newest_base goes with commits_only; set both or neither.")
        deadline_s = time.monotonic() + request.wait_ms / 1000
        while True:
            news = self._news
            rows, next_seqno, head_before = await self._page(request)
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
        )

    async def _page(self, request: wire.ReadJournalRequest) -> tuple[Sequence[Row], int, bytes]:
        """Rows, where to read on, and the head before the first row if that is taken from the base."""
        count_max = request.records_max or PAGE_RECORDS_DEFAULT
        start, length, head_before = request.from_seqno, len(self._journal), b""
        if start >= length:
            return (), start, b""
        if request.commits_only:
            base_round = self._index.newest_base_round
            if request.from_newest_base and base_round and self._index.seqnos[base_round] >= start:
                start = self._index.seqnos[base_round]
                head_before = self._index.head_at(base_round - 1)
            places = self._index.seqnos_from(start, count_max)
            rows: Sequence[Row] = await self._on_disk(
                lambda: [self._journal.read(n, 1)[0] for n in places]
            )
            is_last = len(places) < count_max
        else:
            rows = await self._on_disk(lambda: self._journal.read(start, count_max))
            is_last = False
        kept = _within(rows, PAGE_BYTES_MAX)
        if len(kept) == len(rows) and is_last:
            return kept, length, head_before
        return kept, kept[-1].seqno + 1 if kept else length, head_before

    def status(self, run_id: str) -> wire.GetStatusResponse:
        """The whole picture."""
        check_run_id(run_id, self.genesis.config.run_id)
        machine = self._machine
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
            workers=[self._worker_status(name) for name in sorted(self._traffic)],
            evaluations=[evaluated_to_pb(e) for e in machine.state.evaluations],
            digests=[
                wire.PartyDigest(party=d.party, round=d.round, weights_digest=d.weights_digest)
                for d in self._digests.newest()
            ],
            divergences=[diverged_to_pb(d) for d in machine.state.divergences],
            recent_rounds=[
                wire.RoundStatus(round=s.round, mean_loss=s.mean_loss, answers=s.answers)
                for s in machine.state.recent_rounds
            ],
            trainable_bytes=self.genesis.trainable_bytes,
            uptime_ms=self._now_ms(),
            reason=machine.reason,
        )

    def _worker_status(self, name: str) -> wire.WorkerStatus:
        traffic, view = self._traffic[name], self._machine.workers.get(name)
        return wire.WorkerStatus(
            worker=name,
            connected=name in self._sessions,
            rounds_answered=view.rounds_answered if view else 0,
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            mean_loss=view.mean_loss if view else None,
            answered_after_ms=traffic.answered_after_ms,
            diverged=name in self._machine.diverged,
            complaint=view.complaint if view else "",
            measuring=name in self._machine.awaited,
            learning_rate=view.learning_rate if view else None,
        )


def message_to_pb(
    message: Assign | Ack | Refuse | Finish, config: RunConfig
) -> wire.SessionResponse:
    """What the round machine addresses to a worker, as a session message."""
    match message:
        case Assign():
            return assign_to_pb(message, config)
        case Ack(_, ticket):
            return wire.SessionResponse(ack=wire.Ack(ticket=ticket_to_pb(ticket)))
        case Refuse(_, ticket, reason, sentence):
            return wire.SessionResponse(
                refused=wire.Refused(ticket=ticket_to_pb(ticket), reason=reason, message=sentence)
            )
        case Finish(_, round_):
            return wire.SessionResponse(finished=wire.Finished(round=round_))


def commit_to_pb(row: Row) -> wire.SessionResponse:
    """A commit as it stands in the journal, as a session message."""
    return wire.SessionResponse(commit=wire.CommitNotice(record=row.body))


def _within(rows: Sequence[Row], bytes_max: int) -> Sequence[Row]:
    """The first rows that fit, and at least one."""
    total = 0
    for count, row in enumerate(rows):
        total += len(row.body) + len(row.chain)
        if total > bytes_max and count > 0:
            return rows[:count]
    return rows
