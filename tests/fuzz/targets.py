"""What reads bytes of others: each target returns, or raises a `FedMezoError`, for any bytes.

A target that a caller reaches over the network also checks that a refused call changed nothing.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.programs.fedmezo_command import _line, _verified_run
from fedmezo_coordinator.programs.plain_values import json_line, record_values
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving import loop as serving_loop
from fedmezo_coordinator.serving.service import OF_THE_RUN, CoordinatorServicer, _reader
from fedmezo_core.errors import FedMezoError
from fedmezo_core.events import Connected, Disconnected
from fedmezo_core.journal.codec import decode_record, encode_record, encode_records
from fedmezo_core.journal.journal import ZERO_HASH, Journal, MemoryStore, Row, head_after
from fedmezo_core.journal.party_copy import JournalCopy, verified
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.session import SessionMachine
from fedmezo_core.machines.state_codec import state_of
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import key_fingerprint, key_of_request
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.trust.members import Members, Token
from fedmezo_core.wire.messages import event_from_pb
from fedmezo_core.zo.plain.snapshot_header import read_snapshot
from fedmezo_proto.v1 import admin_pb2, origin_pb2, secure_sum_pb2
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb
from tests.fuzz.file_targets import (
    read_adapter_files,
    read_export,
    read_journal_file,
    read_journal_mark,
    read_row_file,
    read_run_folder,
    read_signing_key,
    read_worker_settings,
)
from tests.fuzz.in_process import ChangedStateError, Context, EndedError, awaited
from tests.fuzz.page_target import read_page_request
from tests.fuzz.run_targets import (
    RUN_METHODS,
    pieces_of,
    read_exchange,
    read_library_responses,
    read_run_call,
    read_sum_asks,
    read_sum_replies,
)
from tests.fuzz.trust_targets import (
    ORDERS,
    folder,
    read_identity,
    read_ledger_file,
    read_members_file,
    read_order,
    read_signed_answer,
    read_tls_files,
)
from tests.integration.support.harness import config_of, genesis_of

CONFIG: Final = config_of(workers_min=2, quorum=2, cohort_size_max=2, rounds=100)
GENESIS: Final = genesis_of(CONFIG)
HEAD: Final = head_after(ZERO_HASH, encode_record(GENESIS))
TOKEN: Final = b"t" * 16
"""In a call's bytes: the token of the session that is open."""
METHODS: Final[dict[str, type[Message]]] = {
    "GetRun": wire.GetRunRequest,
    "PollSession": wire.PollSessionRequest,
    "ReadJournal": wire.ReadJournalRequest,
    "GetStatus": wire.GetStatusRequest,
    "ReportReplica": wire.ReportReplicaRequest,
    "ReadSnapshot": wire.ReadSnapshotRequest,
    "ExcludeWorker": admin_pb2.ExcludeWorkerRequest,
    "ReadmitWorker": admin_pb2.ReadmitWorkerRequest,
}
"""Methods with one request; the first byte of a call's input is the number of one."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads bytes."""

    read: Callable[[bytes], int | None]
    """Returns how many messages it read; None: one."""
    kind: type[Message] | None = None
    """What the bytes are a message of; None: something else."""
    pieces: type[Message] | None = None
    """What each record in the bytes, which are a `ReadJournalResponse`, is a message of."""
    methods: Mapping[str, type[Message]] | None = None
    """If the first byte is a method's number: which message the others are, for each method."""
    counts_as: str = ""
    """`messages` or `journals`, for the goals of `make fuzz`."""


# ---------------------------------------------------------------- calls of a coordinator


class _Coordinator:
    """A coordinator in this process, with two workers that wait in an open round."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._fresh()

    def _fresh(self) -> None:
        journal = Journal(MemoryStore())
        journal.append(encode_records([GENESIS]))
        self.daemon = Daemon(journal)
        self.servicer = CoordinatorServicer("coordinator", CallerLimits(0), ConnectionWatch(1))
        self.tokens: list[bytes] = []

        async def begin() -> None:
            await self.daemon.load()
            self.servicer.begin(Runs.of(self.daemon))
            self.serving = asyncio.create_task(self.daemon.serve())
            for worker in ("w1", "w2"):
                request = wire.PollSessionRequest(messages=[hello(worker)])
                context: Any = Context()
                self.tokens.append((await self.servicer.PollSession(request, context)).token)

        self.loop.run_until_complete(begin())
        self.loop.run_until_complete(self._drained())
        self.before = self.state

    def _end(self) -> None:
        async def end() -> None:
            self.daemon.end_sessions()
            self.serving.cancel()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            for session in list(self.servicer._poll_sessions._sessions.values()):
                session.lease.cancel()
            # Not `close`, which wants a thread that there may be none of any more at the exit.
            self.daemon._pages._thread.shutdown()
            self.daemon._writer.shutdown()

        self.loop.run_until_complete(end())

    @property
    def state(self) -> tuple[object, ...]:
        """What no refused call may change."""
        roster = self.daemon._machine.roster
        journal = self.daemon._journal
        return (
            len(journal),
            journal.head,
            tuple(self.daemon._sessions.items()),
            frozenset(roster.ready),
            tuple(roster.assignments.items()),
            self.daemon.session_limit.sessions,
            self.daemon.session_limit.joining,
        )

    def call(self, make: Callable[[Context], Awaitable[None]], context: Context) -> bool:
        """Let a handler answer a call; returns whether it did so without an error."""
        try:
            self.loop.run_until_complete(awaited(make(context)))
            return True
        except EndedError:
            return False
        finally:
            context.done()

    async def _drained(self) -> None:
        """Wait until the coordinator waits."""
        items: Any = self.daemon._items
        while not items.empty() or items._reader is None:  # noqa: ASYNC110
            await asyncio.sleep(0)

    def check(self, *, unchanged: bool) -> None:
        """Begin anew if the state changed, which it may not if it must be `unchanged`."""
        self.loop.run_until_complete(self._drained())
        if self.state != self.before:
            self._end()
            self._fresh()
            if unchanged:
                raise ChangedStateError("a call changed the state that it may not change")


@cache
def _coordinator() -> _Coordinator:
    serving_loop.SIBLINGS_S = 0.0  # Then it waits for nothing while it has something to append.
    loop = asyncio.new_event_loop()
    coordinator = _Coordinator(loop)

    def end() -> None:
        coordinator._end()
        loop.close()

    atexit.register(end)
    return coordinator


def hello(worker: str) -> wire.SessionRequest:
    """A hello that is welcome."""
    return wire.SessionRequest(
        hello=wire.Hello(
            protocol_version=1,
            run_id=CONFIG.run_id,
            worker=worker,
            manifest_digest=GENESIS.manifest_digest,
            base_digest=GENESIS.base_digest,
            tokenizer_digest=GENESIS.tokenizer_digest,
            recipe=CONFIG.recipe,
            head=HEAD,
        )
    )


def read_call(data: bytes) -> None:
    """A call of any method with one request, through the handlers that gRPC calls."""
    coordinator = _coordinator()
    method, kind = list(METHODS.items())[data[0] % len(METHODS) if data else 0]
    request: Any = _reader(kind)(data[1:].replace(TOKEN, coordinator.tokens[0]))
    if hasattr(request, "wait_ms") and request.wait_ms <= 30_000:
        request.wait_ms = 0
    handler: Any = getattr(coordinator.servicer, method)
    may_change = False
    if method == "PollSession" and isinstance(request, wire.PollSessionRequest):
        # A sound hello opens a session, and a session may end or answer by what it sends.
        may_change = request.token in coordinator.tokens or (
            not request.token and bool(request.messages) and request.messages[0].HasField("hello")
        )

    async def answer(context: Context) -> None:
        if method != "ReadSnapshot":
            await handler(request, context)
            return
        async for _ in handler(request, context):
            pass

    went_well = coordinator.call(answer, Context())
    if method in OF_THE_RUN or (may_change and not request.token):
        may_change = went_well
    coordinator.check(unchanged=not may_change)


def read_stream(data: bytes) -> int:
    """The messages of a worker's stream, through the handler that gRPC calls."""
    coordinator = _coordinator()
    messages = pieces_of(data)
    begins = _first_kind(messages) == "hello"

    async def serve(context: Context) -> None:
        async with asyncio.timeout(20):
            await coordinator.servicer.session(None, context)  # type: ignore[arg-type]

    coordinator.call(serve, Context(messages))
    coordinator.check(unchanged=not begins)
    return max(1, len(pieces_of(data)))


def _first_kind(messages: list[bytes]) -> str | None:
    with contextlib.suppress(DecodeError):
        return wire.SessionRequest.FromString(messages[0]).WhichOneof("kind") if messages else None
    return None


# ---------------------------------------------------------------- what a worker reads


def read_responses(data: bytes) -> int:
    """The messages of a coordinator, as a worker's session machine takes them."""
    machine = SessionMachine(0, HEAD, report_losses=True)
    machine.step(Connected())
    count = 0
    for piece in pieces_of(data):
        count += 1
        try:
            event = event_from_pb(wire.SessionResponse.FromString(piece), CONFIG)
            machine.step(event)
        except DecodeError:
            break
        except FedMezoError:
            machine.step(Disconnected())
            machine.step(Connected())
    return max(1, count)


# ---------------------------------------------------------------- joining a fleet


@cache
def _members() -> Members:
    members = Members()
    secret = hashlib.sha256(b"s" * 16).digest()
    members.apply(Token(b"i" * 8, secret, Role.WORKER, expires_s=10))
    return members


def read_enrolment(data: bytes) -> None:
    """A request to join a fleet: token, name, key and certificate request."""
    try:
        request = admin_pb2.EnrollRequest.FromString(data)
    except DecodeError:
        return
    key = key_of_request(request.certificate_request)
    members = _members()
    count = len(members)
    members.admit(
        request.token_id, request.secret, key_fingerprint(key), request.signing_key, request.name, 0
    )
    assert len(members) == count


def read_join_string(data: bytes) -> None:
    """A join string; one that is read says the same when it is written again."""
    joined = parse_join_string(data.decode("utf-8", "replace"))
    assert parse_join_string(str(joined)) == joined


# ---------------------------------------------------------------- journals


def read_record(data: bytes) -> None:
    """One record; one that is read has the same bytes when it is written again, or is refused."""
    record = decode_record(data)
    assert decode_record(encode_record(record)) == record or _has_nan(data)


def _has_nan(data: bytes) -> bool:
    return "nan" in str(pb.Record.FromString(data))


def store_of(data: bytes) -> MemoryStore:
    """A store with the records in `data`; an entry with a `chain` keeps that one."""
    store = MemoryStore()
    try:
        page = wire.ReadJournalResponse.FromString(data)
    except DecodeError:
        return store
    Journal(store).append([entry.record for entry in page.entries])
    rows = store.read(0, len(store))
    changed = MemoryStore()
    changed.append(
        [
            Row(row.seqno, row.body, entry.chain or row.chain)
            for row, entry in zip(rows, page.entries, strict=False)
        ]
    )
    return changed


def read_journal(data: bytes) -> None:
    """A whole journal: decoded, verified and folded; every fourth is shown, too."""
    store = store_of(data)
    _verified_run(Journal(store))
    if zlib.crc32(data) % 4:
        return
    for entry, record in verified(Journal(store)):
        _line(entry.row, record)
        json_line(record_values(entry.row, record))


def read_copy(data: bytes) -> None:
    """A party's own copy of a run."""
    store = store_of(data)
    genesis = bytes(store.read(0, 1)[0].body) if len(store) else b""
    list(JournalCopy(Journal(store)).begin(genesis, 1, b""))


def read_seal(data: bytes) -> None:
    """A sealed state that a coordinator sent, restored."""
    stored = StoredState.received(data)
    store = MemoryStore()
    store.drop_before(stored)
    origin = Journal(store).origin()
    assert origin is not None
    machine = RoundMachine(slot_secret=bytes(32))
    machine.restore(state_of(origin))
    machine.start()


# ---------------------------------------------------------------- files


def read_snapshot_file(data: bytes) -> None:
    """A snapshot's file, by its safetensors header."""
    path = folder() / "snapshot.safetensors"
    path.write_bytes(data)
    read_snapshot(path, CONFIG.run_id)


def read_contract(data: bytes) -> None:
    """A coordinator's configuration file with a run's contract."""
    path = folder() / "coordinator.toml"
    path.write_bytes(data)
    settings = load_settings(CoordinatorSettings, ["--config", str(path)], program="fuzz")
    settings.run_config("the run")


TARGETS: Final[dict[str, Target]] = {
    "calls": Target(read_call, methods=METHODS, counts_as="messages"),
    "streams": Target(read_stream, pieces=wire.SessionRequest, counts_as="messages"),
    "responses": Target(read_responses, pieces=wire.SessionResponse, counts_as="messages"),
    "run-calls": Target(read_run_call, methods=RUN_METHODS, counts_as="messages"),
    "sum-asks": Target(read_sum_asks, pieces=secure_sum_pb2.SumAsk, counts_as="messages"),
    "sum-replies": Target(read_sum_replies, pieces=secure_sum_pb2.SumReply, counts_as="messages"),
    "exchanges": Target(read_exchange, kind=wire.PollSessionRequest, counts_as="messages"),
    "library-responses": Target(
        read_library_responses, pieces=wire.SessionResponse, counts_as="messages"
    ),
    "page-requests": Target(read_page_request, counts_as="messages"),
    "enrolments": Target(read_enrolment, kind=admin_pb2.EnrollRequest, counts_as="messages"),
    "orders": Target(read_order, methods=ORDERS, counts_as="messages"),
    "signed-answers": Target(read_signed_answer, kind=wire.SessionRequest, counts_as="messages"),
    "join-strings": Target(read_join_string),
    "members-files": Target(read_members_file),
    "identities": Target(read_identity),
    "ledgers": Target(read_ledger_file),
    "tls-files": Target(read_tls_files),
    "records": Target(read_record, kind=pb.Record),
    "journals": Target(read_journal, pieces=pb.Record, counts_as="journals"),
    "copies": Target(read_copy, pieces=pb.Record, counts_as="journals"),
    "seals": Target(read_seal, kind=origin_pb2.SealedOrigin),
    "snapshots": Target(read_snapshot_file),
    "contracts": Target(read_contract),
    "run-folders": Target(read_run_folder),
    "worker-settings": Target(read_worker_settings),
    "journal-files": Target(read_journal_file, counts_as="journals"),
    "journal-marks": Target(read_journal_mark),
    "signing-keys": Target(read_signing_key),
    "adapters": Target(read_adapter_files),
    "exports": Target(read_export),
    "rows": Target(read_row_file),
}
