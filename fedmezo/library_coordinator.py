"""The coordinator's side of a run for any transport: bytes in, bytes out; no socket, no clock."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fedmezo.genesis import GenesisLike, bytes_of, decode_genesis, head_of
from fedmezo_core.config import MESSAGE_BYTES_MAX, RunConfig
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    JournalCompactedError,
    JournalError,
    NotReadyError,
    ProtocolError,
    ReplacedError,
    SnapshotError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    Ack,
    AskSum,
    Assign,
    Expel,
    Finish,
    Ready,
    Refuse,
    ReplicaEvaluated,
    RoundMessage,
    Tick,
    UnableReceived,
    WeightsReported,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import DIGEST_BYTES, decode_record, encode_records
from fedmezo_core.journal.journal import (
    ANSWERED,
    GENESIS,
    Entry,
    Journal,
    JournalStore,
    MemoryStore,
    Row,
)
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.records import Committed, Evaluated, Genesis, Record, RoundSlot
from fedmezo_core.trust.authorisation import Caller
from fedmezo_core.wire.admission import (
    Signing,
    check_hello,
    check_nonce,
    check_worker_name,
    event_from_request,
    signing_of,
)
from fedmezo_core.wire.commit_index import CommitIndex
from fedmezo_core.wire.grpc_status import BY_REASON
from fedmezo_core.wire.messages import (
    assign_to_pb,
    commit_to_pb,
    error_to_pb,
    message_to_pb,
    snapshot_to_pb,
)
from fedmezo_core.wire.snapshot_pieces import RecordedSnapshots
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.wire.sum_messages import ask_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

DOWN_BYTES_MAX = 4 * 1024 * 1024
"""Bytes of commits with which what goes down in one exchange is full; the next brings the rest.
Also the most bytes of a snapshot in one message."""
MESSAGES_WAITING_MAX = 1024
"""Most messages that wait for one worker, besides the commits that it lacked when it joined."""
WORKERS_MAX = 20_000
"""Most workers that are connected at a time."""
COMMITS_A_READ_MAX = 1024
"""Most commits that are read from the journal at once."""

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(slots=True)
class _Worker:
    """A connected worker."""

    is_calling: bool
    """Whether it comes by exchanges; otherwise its messages wait in its outbox."""
    round: int
    """Last round that its newest hello named."""
    waiting: int = 0
    """Messages that came into its outbox since it was last emptied."""
    nonce: bytes = b""
    """Of its newest exchange."""
    seen_ms: int = 0
    """When that came."""
    has_reported: bool = False
    """Whether that told the digest of its weights."""
    replies: list[wire.SessionResponse] = field(default_factory=list)
    """What the coordinator said about the messages of that exchange."""
    assign: Assign | None = None
    """Its newest assignment."""
    assigned_ms: int = 0
    ending: FedMezoError | None = None
    """Why it must leave; told with its next exchange."""
    knows_ending: bool = False
    """Whether that went down."""
    is_reading: bool = False
    """Whether it is not in the run yet, because it must take a snapshot first."""
    wanted: wire.ReadSnapshotRequest | None = None
    """The piece of a snapshot that it lacks. Round 0: it must be told which snapshot there is."""
    signing: Signing | None = None
    """How its answers are signed; None if they are not."""


class Coordinator:
    """The coordinator of one run, over any transport; it needs neither torch nor a network.

    Over a transport that keeps messages in order, give each worker's messages to `receive`, the
    first of which is its hello, and send what `outgoing` returns. Over one that has only calls, or
    may lose, repeat or reorder messages, use `exchange`, or `take` and `down_for` where the server
    begins. Call `tick` every second or so, because deadlines depend on it.

    Everything is in the journal before a worker is told of it: what is sent next appends what came
    since, all at once, so take what has come from many workers before you send to any. One thread
    at a time may use a coordinator. Nothing that a worker sends raises, except in `take`: it ends
    that worker's session, and the worker is told why. After a `JournalError` nothing more can be
    done with it: make a new one from the same store.
    """

    def __init__(
        self,
        genesis: GenesisLike | None = None,
        store: JournalStore | str | Path | None = None,
        *,
        lease_ms: int | None = None,
        snapshots: str | Path | None = None,
    ) -> None:
        """Begin the run of `genesis`, or go on with the one in `store`.

        store: any journal store, or the path of an SQLite file; None: memory. lease_ms: how long a
        worker that comes by exchanges counts as connected after the last one; None: the run's
        `deadline_ms`. snapshots: the folder of the files that a daemon wrote for a journal whose
        oldest records it dropped; None: next to an SQLite file, where the daemon has them. A worker
        that lacks dropped records begins from the newest. Raises `ConfigError` if there is no run,
        or the store holds another one, and `JournalError` for a store that cannot be used.
        """
        self._journal = Journal(_opened(store))
        self._snapshots = RecordedSnapshots(_snapshots_folder(store, snapshots))
        self._machine = RoundMachine(slot_secret=secrets.token_bytes(32))
        self._index = CommitIndex()
        self._genesis_body = b""
        self._workers: dict[str, _Worker] = {}
        self._outboxes: dict[str, list[bytes]] = {}
        self._digests: dict[str, bytes] = {}
        self._owed: list[Ready] = []
        # The machine's phase as far as the journal has what led to it.
        self._durable_phase = Phase.WAITING
        self._has_failed = False
        self._first_tick_ms: int | None = None
        self._now_ms = 0
        try:
            self._load(genesis)
            self._lease_ms = self.config.deadline_ms if lease_ms is None else lease_ms
            self._owed.append(self._machine.start(0))
            self._flush()
        except BaseException:
            self._journal.close()
            raise

    def _load(self, genesis: GenesisLike | None) -> None:
        """Fold the journal into the machine, after it has got its genesis if it is new."""
        body = None if genesis is None else bytes_of(genesis)
        if self._journal.is_empty:
            if body is None:
                raise ConfigError(
                    "The journal's store holds no run yet, and no genesis was given; give the "
                    "genesis of the run to begin."
                )
            decode_genesis(body)
            self._journal.append([body])
        origin = self._journal.origin()
        if origin is not None:
            self._genesis_body = origin.genesis_body
            self._machine.restore(state_of(origin))
            self._index.begin(origin)
        for entry in self._journal.load():
            self._machine.apply(decode_record(entry.row.body))
            if entry.row.kind == GENESIS:
                self._genesis_body = entry.row.body
            self._fold(entry)
        self._snapshots.open(self.config.run_id)
        self._snapshots.drop_before(self._index.begins)
        if body is not None and body != self._genesis_body:
            raise ConfigError(
                f"The journal's store holds run {self.config.run_id} with another genesis than the "
                "one given; give another store, or no genesis to go on with that run."
            )

    def _fold(self, entry: Entry) -> None:
        if entry.row.kind != ANSWERED:  # nearly all are
            self._index.fold(entry)
            self._snapshots.fold(entry)

    # ------------------------------------------------------------ what it shows

    @property
    def genesis(self) -> Genesis:
        """What the run is."""
        return self._machine.genesis

    @property
    def genesis_bytes(self) -> bytes:
        """The genesis as it stands in the journal; every worker needs it for its session."""
        return self._genesis_body

    @property
    def config(self) -> RunConfig:
        """The run's contract."""
        return self._machine.config

    @property
    def journal(self) -> Journal:
        """The run's journal, to be read; nobody else may append to it."""
        return self._journal

    @property
    def round(self) -> int:
        """Last committed round that is in the journal; 0 before the first."""
        return self._index.round

    @property
    def head(self) -> bytes:
        """Head after `round` (32 bytes): it names genesis and all commits."""
        return self._index.head_at(self.round)

    @property
    def epoch(self) -> int:
        """How often a coordinator was started on this journal."""
        return self._machine.epoch

    @property
    def phase(self) -> str:
        """Where the run is: `waiting`, `open`, `paused` or `finished`."""
        return self._durable_phase.value

    @property
    def reason(self) -> str:
        """Why the run is paused, or was stopped early; empty if it is neither."""
        return self._machine.reason

    @property
    def finished(self) -> bool:
        """Whether no more rounds follow."""
        return self._durable_phase is Phase.FINISHED

    @property
    def workers(self) -> frozenset[str]:
        """Names of the workers that are connected, those that still read a snapshot too."""
        return frozenset(self._workers)

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Worker -> digest of its weights after the last round (32 bytes), as it reported it."""
        return dict(self._digests)

    @property
    def done(self) -> bool:
        """Whether the run is over and each connected worker has reported its digest."""
        return self.finished and self._digests.keys() >= self._workers.keys()

    # ------------------------------------------------------------ time and end

    def tick(self, now_ms: int) -> None:
        """Note the time, in milliseconds of any clock that never goes back."""
        self._check()
        if self._first_tick_ms is None:
            self._first_tick_ms = now_ms
        self._now_ms = max(self._now_ms, now_ms - self._first_tick_ms)
        for name, worker in list(self._workers.items()):
            if worker.is_calling and self._now_ms - worker.seen_ms >= self._lease_ms:
                log.info("worker %s was not heard of for %d ms", name, self._lease_ms)
                self._lose(name)
        self._owed.append(self._machine.step(Tick(self._now_ms)))

    def resume(self, rate_factor: float) -> None:
        """Let a paused run go on, with learning rates `rate_factor` times what they were.

        Raises `ConfigError` if the run is not paused, or the factor is not above 0.
        """
        self._check()
        self._flush()
        self._owed.append(self._machine.resume(rate_factor))
        self._flush()

    def exclude(self, worker: str, reason: str) -> None:
        """Take a worker out of the run, with its answers that no commit holds; tells it `reason`.

        It takes no part until `readmit`, also after a restart. Raises `ConfigError` if it is
        excluded already, or without a reason of at most 512 characters.
        """
        check_worker_name(worker)
        self._check()
        self._flush()
        self._owed.append(self._machine.exclude(worker, reason))
        self._flush()

    def readmit(self, worker: str) -> None:
        """Let an excluded worker join again. Raises `ConfigError` if it is not excluded."""
        self._check()
        self._flush()
        self._owed.append(self._machine.readmit(worker))
        self._flush()

    def record_evaluation(self, evaluation: Evaluated) -> None:
        """Record a result on held-out rows, by which a run may pause or end early.

        The contract says when. Raises `ConfigError` for a round that is not committed, a loss that
        is not finite, or a digest that is not 32 bytes long.
        """
        self._check()
        self._flush()
        is_sound = 0 <= evaluation.round <= self.round and math.isfinite(evaluation.loss)
        if not is_sound or len(evaluation.weights_digest) != DIGEST_BYTES:
            raise ConfigError(
                f"An evaluation of round {evaluation.round} with loss {evaluation.loss} and a "
                f"digest of {len(evaluation.weights_digest)} bytes cannot be recorded; give a "
                f"finite loss, a round of at most {self.round} and the digest of its weights."
            )
        self._owed.append(self._machine.step(ReplicaEvaluated(evaluation)))
        self._flush()

    def disconnect(self, worker: str) -> None:
        """Note that a worker's connection is gone; nothing changes if it was not connected."""
        self._check()
        self._outboxes.pop(worker, None)
        self._lose(worker)

    def close(self) -> None:
        """Append what came last and close the journal's store; nothing can be done afterwards."""
        try:
            if not self._has_failed:
                self._flush()
        finally:
            self._has_failed = True
            self._journal.close()

    # ------------------------------------------------------------ over messages in order

    def receive(self, worker: str, data: bytes) -> None:
        """Take one message from the connection of `worker`; the first one must be its hello.

        `outgoing` has what is to be sent to this and to other workers afterwards.
        """
        self._check()
        try:
            message = _parsed(wire.SessionRequest, data)
            known = self._workers.get(worker)
            if message.WhichOneof("kind") == "hello":
                self._greet(worker, message.hello)
            elif known is not None and known.is_reading and not known.is_calling:
                known.wanted = message.read_snapshot
            else:
                if known is None or known.is_calling:
                    raise UnavailableError(
                        f"Worker {worker} has no open session here; connect again with a hello."
                    )
                self._step(worker, message)
        except FedMezoError as error:
            if self._has_failed:
                raise
            self._end(worker, error)

    def outgoing(self, worker: str) -> list[bytes]:
        """Remove and return the messages that wait for `worker`, to be sent in this order."""
        self._check()
        self._flush()
        known = self._workers.get(worker)
        if known is not None:
            known.waiting = 0
            if known.wanted is not None and not known.is_calling:
                # Made now: of several that were asked for, only the newest one takes memory.
                wanted, known.wanted = known.wanted, None
                try:
                    self._put(worker, self._piece(wanted).SerializeToString())
                except FedMezoError as error:
                    self._end(worker, error)
        return self._outboxes.pop(worker, [])

    def _greet(self, worker: str, hello: wire.Hello) -> None:
        signing, can_join = self._checked_hello(worker, hello)
        self._lose(worker)
        self._flush()
        outbox = self._outboxes[worker] = []
        if not can_join:
            self._workers[worker] = _Worker(
                is_calling=False,
                round=hello.round,
                is_reading=True,
                wanted=wire.ReadSnapshotRequest(),
            )
            return
        self._workers[worker] = _Worker(is_calling=False, round=hello.round, signing=signing)
        outbox.append(wire.SessionResponse(welcome=self._welcome()).SerializeToString())
        outbox += [
            commit_to_pb(row).SerializeToString() for row in self._commits_after(hello.round)
        ]
        log.info("worker %s joined at round %d", worker, hello.round)
        self._owed.append(self._machine.step(WorkerReady(worker)))

    # ------------------------------------------------------------ over calls

    def exchange(self, up: bytes) -> bytes:
        """Take what a worker sent up, and return what goes down to it; each is complete in itself.

        A repeated or late `up` changes nothing that counts. If `up` cannot be used, what goes down
        makes the worker's session raise the error.
        """
        try:
            return self.down_for(self.take(up))
        except FedMezoError as error:
            if self._has_failed:
                raise
            log.warning("refused a worker: %s", error)
            return self.refusal(up, error)

    def take(self, up: bytes, *, worker: str | None = None) -> str:
        """Take what a worker sent up; returns the worker's name.

        `worker` is the name that the transport knows the sender by, if it knows one; another one in
        the hello is refused. Raises the `FedMezoError` with which `up` is refused, for `refusal`.
        A store that fails raises where something is to be sent, not here.
        """
        self._check()
        request = _parsed(wire.PollSessionRequest, up)
        check_nonce(request)
        kinds = [message.WhichOneof("kind") for message in request.messages]
        if not kinds or kinds[0] != "hello" or "hello" in kinds[1:]:
            raise ProtocolError("What goes up in an exchange begins with its only hello.")
        hello = request.messages[0].hello
        name = hello.worker
        signing, can_join = self._checked_hello(name if worker is None else worker, hello)
        known = self._workers.get(name)
        if known is not None and known.knows_ending:
            self._lose(name)
            known = None
        if known is None or not known.is_calling:
            if known is not None:
                self._end(name, _replaced(name))
            known = self._workers[name] = _Worker(True, hello.round, is_reading=True)
        known.round, known.nonce, known.seen_ms = hello.round, request.nonce, self._now_ms
        known.replies, known.has_reported, known.wanted = [], "weights_report" in kinds, None
        known.signing = signing
        if not can_join:
            # A worker of the run stays one: this hello may be a late copy of its first.
            wanted = [m.read_snapshot for m in request.messages if m.HasField("read_snapshot")]
            known.wanted = wanted[-1] if wanted else wire.ReadSnapshotRequest()
            return name
        if known.is_reading:
            known.is_reading = False
            log.info("worker %s joined at round %d", name, hello.round)
            self._owed.append(self._machine.step(WorkerReady(name)))
        for message in request.messages[1:]:
            self._step(name, message)
        return name

    def down_for(self, worker: str) -> bytes:
        """What is to go down to a worker now, for the newest exchange that was taken from it.

        It may be asked for, and sent, again and again. Raises `UnknownWorkerError` if the worker is
        not connected by exchanges.
        """
        self._check()
        known = self._workers.get(worker)
        if known is None or not known.is_calling:
            raise UnknownWorkerError(
                f"Worker {worker} is not connected by exchanges; take what it sent up first."
            )
        self._flush()
        messages = [wire.SessionResponse(welcome=self._welcome()), *known.replies]
        if known.wanted is not None:
            try:
                messages = [self._piece(known.wanted)]
            except FedMezoError as error:
                messages = [error_to_pb(error)]
        elif known.ending is not None:
            messages = [error_to_pb(known.ending)]
            known.knows_ending = True
        else:
            last, size = known.round, 0
            for row in self._commits_after(known.round):
                if size and size + len(row.body) > DOWN_BYTES_MAX:
                    break
                messages.append(commit_to_pb(row))
                last, size = last + 1, size + len(row.body)
            if last == self.round:
                messages += self._what_to_do(worker)
        return wire.PollSessionResponse(
            messages=messages, lease_ms=self._lease_ms, nonce=known.nonce
        ).SerializeToString()

    def has_news(self, worker: str) -> bool:
        """Whether `down_for` would bring a connected worker commits, work, the end or an error."""
        self._check()
        known = self._workers.get(worker)
        if known is None or not known.is_calling:
            return False
        self._flush()
        if known.round < self.round or known.ending is not None:
            return True
        if self.finished:
            return not known.has_reported
        return self._assigned(worker) is not None or bool(self._machine.asked_of(worker))

    @staticmethod
    def refusal(up: bytes, error: FedMezoError) -> bytes:
        """What goes down where `up` was refused: the worker's session raises `error` from it."""
        try:
            nonce = wire.PollSessionRequest.FromString(up).nonce
        except DecodeError:
            nonce = b""
        return wire.PollSessionResponse(
            messages=[error_to_pb(error)], nonce=nonce
        ).SerializeToString()

    def _what_to_do(self, worker: str) -> list[wire.SessionResponse]:
        """What a worker that holds every commit is asked for, or the end of the run."""
        if self.finished:
            return [message_to_pb(Finish(worker, self.round), self.config, self._index.head_at)]
        asks = [ask_to_pb(ask) for ask in self._machine.asked_of(worker)]
        assign = self._assigned(worker)
        if assign is None:
            return asks
        message = assign_to_pb(assign, self.config)
        waited_ms = self._now_ms - self._workers[worker].assigned_ms
        message.assign.deadline_ms = max(assign.deadline_ms - waited_ms, 0)
        return [message, *asks]

    def _assigned(self, worker: str) -> Assign | None:
        """The worker's newest assignment, if it can still be answered."""
        assign = self._workers[worker].assign
        if assign is None:
            return None
        wanted = RoundSlot(assign.ticket.round, assign.ticket.slot)
        return assign if self._machine.roster.assignments.get(worker) == wanted else None

    # ------------------------------------------------------------ what both ways share

    def _checked_hello(self, worker: str, hello: wire.Hello) -> tuple[Signing | None, bool]:
        """How a worker signs its answers, and whether it has what it needs to join.

        Otherwise it must take a snapshot first. Raises the error with which its hello is refused.
        """
        head, begins = self._index.head_at(hello.round), self._index.begins
        can_join = True
        try:
            check_hello(hello, self.genesis, self.round, head, begins, catch_up_rounds=self.round)
        except JournalCompactedError:
            if self._snapshots.newest is None:
                raise
            can_join = False
        if worker not in self._workers and len(self._workers) >= WORKERS_MAX:
            raise NotReadyError(
                f"{WORKERS_MAX} workers are connected, the most that one coordinator takes; try "
                "later."
            )
        if hello.worker != worker:
            raise ProtocolError(
                f"The hello of {hello.worker} came over the connection of {worker}; let each "
                "worker use its own."
            )
        signing = signing_of(hello, Caller.ANYONE, self.genesis, head_of(self._genesis_body))
        return signing, can_join

    def _piece(self, wanted: wire.ReadSnapshotRequest) -> wire.SessionResponse:
        """The newest snapshot's description, or a piece of the one that is wanted.

        Raises `SnapshotError` for one that is not kept or cannot be read, `ProtocolError` for an
        offset beyond its file.
        """
        newest = self._snapshots.newest
        round_ = wanted.round if wanted.round or newest is None else newest.round
        snapshot = self._snapshots.find(round_, wanted.offset)
        descriptor = self._snapshots.opened(snapshot)
        try:
            data = os.pread(descriptor, DOWN_BYTES_MAX, wanted.offset) if wanted.round else b""
        except OSError as error:
            raise SnapshotError(
                f"The snapshot of round {round_} cannot be read at the coordinator "
                f"({error.strerror}); check its disk."
            ) from None
        finally:
            os.close(descriptor)
        about = Snapshot(
            snapshot.round,
            self._index.head_at(snapshot.round),
            snapshot.weights_digest,
            snapshot.file_sha256,
            snapshot.file_bytes,
        )
        return wire.SessionResponse(
            snapshot=wire.ReadSnapshotResponse(snapshot=snapshot_to_pb(about), data=data)
        )

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(epoch=self.epoch, round=self.round, head=self.head)

    def _commits_after(self, round_: int) -> Iterator[Row]:
        seqno = self._index.seqno_of(round_ + 1, len(self._journal))
        while seqnos := self._index.seqnos_from(seqno, COMMITS_A_READ_MAX):
            rows = self._journal.read_beside(seqnos, DOWN_BYTES_MAX)
            yield from rows
            seqno = rows[-1].seqno + 1

    def _step(self, worker: str, message: wire.SessionRequest) -> None:
        signing = self._workers[worker].signing
        event = event_from_request(worker, message, self.round, self._index.head_at, signing)
        match event:
            case UnableReceived():
                log.warning("worker %s cannot measure: %s", worker, event.reason)
            case WeightsReported():
                if self.finished and event.round == self.round:
                    self._digests[worker] = event.weights_digest
            case _:
                pass
        self._owed.append(self._machine.step(event))

    def _flush(self) -> None:
        """Append what the machine's steps asked for, then let it be sent, in this order."""
        while self._owed or self._machine.is_busy:
            if self._machine.is_busy:
                self._owed.append(self._machine.step(Tick(self._now_ms)))
            owed, self._owed = self._owed, []
            records = [record for ready in owed for record in ready.records]
            entries: Iterator[Entry] = iter(())
            if records:
                self._has_failed = True
                entries = iter(self._journal.append(encode_records(records)))
                self._has_failed = False
            for ready in owed:
                for record in ready.records:
                    self._appended(record, next(entries))
                for message in ready.messages:
                    self._send(message)
                for sentence in ready.warnings:
                    log.warning("%s", sentence)
        self._durable_phase = self._machine.phase

    def _appended(self, record: Record, entry: Entry) -> None:
        self._fold(entry)
        if isinstance(record, Committed):
            notice = commit_to_pb(entry.row).SerializeToString()
            for name, worker in list(self._workers.items()):
                if not worker.is_calling and not worker.is_reading:
                    self._put(name, notice)

    def _put(self, worker: str, data: bytes) -> None:
        """Let a message wait for a worker; one that takes none for long must join again."""
        known = self._workers[worker]
        known.waiting += 1
        if known.waiting <= MESSAGES_WAITING_MAX:
            self._outboxes.setdefault(worker, []).append(data)
            return
        self._outboxes.pop(worker, None)
        sentence = f"{MESSAGES_WAITING_MAX} messages waited for worker {worker}; connect again."
        self._end(worker, NotReadyError(sentence))

    def _send(self, message: RoundMessage) -> None:
        name = message.worker
        worker = self._workers.get(name)
        if worker is None or worker.is_reading:
            return
        match message:
            case Expel(_, sentence, reason):
                if worker.is_calling:
                    worker.ending = BY_REASON[reason](sentence)
                else:
                    self._end(name, BY_REASON[reason](sentence))
                return
            case Assign():
                worker.assign, worker.assigned_ms = message, self._now_ms
            case Refuse(_, _, _, sentence):
                log.warning("refused an answer of worker %s: %s", name, sentence)
            case Ack() | Finish() | AskSum():
                pass
        if worker.is_calling and not isinstance(message, (Ack, Refuse)):
            return  # `down_for` makes it anew.
        as_pb = message_to_pb(message, self.config, self._index.head_at)
        if worker.is_calling:
            worker.replies.append(as_pb)
        else:
            self._put(name, as_pb.SerializeToString())

    def _end(self, worker: str, error: FedMezoError) -> None:
        """End a session over messages; the error is the last of them."""
        log.warning("ended the session of worker %s: %s", worker, error)
        self._outboxes.setdefault(worker, []).append(error_to_pb(error).SerializeToString())
        self._lose(worker)

    def _lose(self, worker: str) -> None:
        if self._workers.pop(worker, None) is not None:
            self._owed.append(self._machine.step(WorkerLost(worker)))

    def _check(self) -> None:
        if self._has_failed:
            raise JournalError(
                "This coordinator is closed, or its journal failed; make a new one from the same "
                "store."
            )


def _opened(store: JournalStore | str | Path | None) -> JournalStore:
    if store is None:
        return MemoryStore()
    if not isinstance(store, (str, Path)):
        return store
    from fedmezo_core.journal.sqlite import SqliteStore

    return SqliteStore(Path(store).expanduser())


def _snapshots_folder(
    store: JournalStore | str | Path | None, given: str | Path | None
) -> Path | None:
    """Where the snapshots' files are; None: nowhere."""
    if given is not None:
        return Path(given).expanduser()
    return Path(f"{store}.snapshots").expanduser() if isinstance(store, (str, Path)) else None


def _parsed(kind: type[MessageT], data: bytes) -> MessageT:
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(
            f"A worker sent {len(data)} bytes at once, more than {MESSAGE_BYTES_MAX}; use the same "
            "FedMeZO version."
        )
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ProtocolError(
            f"A worker sent {len(data)} bytes that are no message; check what the transport does "
            "to them."
        ) from None


def _replaced(worker: str) -> ReplacedError:
    return ReplacedError(
        f"Another process has joined as worker {worker}; give each worker its own name."
    )
