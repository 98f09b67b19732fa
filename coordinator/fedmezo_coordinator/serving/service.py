"""The gRPC services and servers: they translate, map errors and set limits, and decide nothing.

The one check of who may call what is here too, before every handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fedmezo_coordinator.admission.fleet import Fleet
from fedmezo_coordinator.admission.tls_files import TlsFiles
from fedmezo_coordinator.coordinator_settings import (
    CALLER_CALLS_PER_S,
    CALLER_CONNECTIONS_MAX,
    SESSIONS_MAX,
)
from fedmezo_coordinator.introspection import health_service
from fedmezo_coordinator.introspection.health_service import Health
from fedmezo_coordinator.limits.caller_limits import (
    WAIT_MAX_S,
    CallerLimits,
    address_of,
    worker_caller,
)
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.limits.said_seldom import SaidSeldom
from fedmezo_coordinator.serving.callers import (
    PRIVATE_SCHEME,
    caller_of,
    check_operator,
    check_worker_name,
)
from fedmezo_coordinator.serving.grpc_wakeups import reading_all_wakeups
from fedmezo_coordinator.serving.journal_pages import PagePlaces
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.poll_sessions import PollSessions
from fedmezo_coordinator.serving.run_directory import Call, RunDirectory
from fedmezo_coordinator.serving.session_limit import SessionPermit
from fedmezo_coordinator.serving.worker_session import HalfClosedError, WorkerSession
from fedmezo_coordinator.serving.write_pacing import WritePacing
from fedmezo_core.config import MESSAGE_BYTES_MAX
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    ProtocolError,
    StartingError,
    UnavailableError,
)
from fedmezo_core.program import current_step
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.trust.authorisation import Caller, check_allowed
from fedmezo_core.trust.certificates import public_key_of
from fedmezo_core.wire.admission import check_run_id, choose_version
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY
from fedmezo_proto.v1 import admin_pb2 as admin
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from fedmezo_proto.v1 import runs_pb2 as runs

log = logging.getLogger("fedmezo.coordinator")

HELLO_TIMEOUT_S = 20.0
"""Longest time from the start of a stream to its hello; then the stream is closed."""
START_RETRY_MIN_S = 1.0
START_RETRY_MAX_S = 10.0
"""Callers of a program that is starting are asked to come back within half the time that the start
has taken so far, but not sooner or later than these."""
STOPPED_RETRY_S = 5.0
"""Callers of a program that stops are asked to come back within this time."""
WRITES_A_TURN = 4
"""Messages that are sent in one turn of the event loop. They are few, because gRPC accepts one new
stream after the other, and each takes three turns."""

PENDING_CALLS = 256
PENDING_CALLS_MAX = 512
"""Calls that have come and that the event loop has not taken yet. Beyond the first number gRPC
cancels more and more of the new ones, beyond the second all of them. Each keeps what has come of
its message, and goes on waiting when its caller has reset it."""

CONNECTIONS_BESIDE = 128
"""Connections beside those of the most sessions: of readers, of idle clients."""

ENROLMENT_BYTES_MAX = 8192
"""Longest message to the enrolment service."""
ENROLMENTS_PER_S = 10.0
"""Calls a second that one address makes to the enrolment service in the long run."""
ENROLMENT_CONNECTIONS_MAX = 64
"""Most connections at a time to the enrolment service."""
ENROLMENT_CALLER_CONNECTIONS_MAX = 16
"""Most of them that one address has."""
ENROLMENT_OPTIONS = (
    ("grpc.max_receive_message_length", ENROLMENT_BYTES_MAX),
    # Joining takes a second, and whoever stays longer keeps others out.
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
)

HEALTH_CONNECTIONS_MAX = 64
"""Most connections at a time to a port for health alone."""
HEALTH_CALLS_PER_S = 20.0
"""Calls a second that one address makes there in the long run."""
HEALTH_OPTIONS = (("grpc.max_receive_message_length", 1024), *ENROLMENT_OPTIONS[1:3])

SERVICES = ("CoordinatorService", "MembershipService", "AdminService", "RunService")
"""Services of the main port, whose health a probe can ask for."""

OF_THE_RUN = frozenset({"ExcludeWorker", "ReadmitWorker"})
"""Orders to the run, which need no fleet."""

SERVER_OPTIONS = (
    # Otherwise a second coordinator can bind the same port and silently takes half the workers.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.server.max_pending_requests", PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
    # Without any call for so long, which is longer than a polled session's lease.
    ("grpc.max_connection_idle_ms", 300_000),
    # After a restart, thousands of handshakes of a millisecond or more share one core.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A small compressed message can unpack to a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Workers ping every minute; this is for peers that don't. 10,000 pings a minute take 4 % of a
    # core.
    ("grpc.keepalive_time_ms", 150_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC would ping after each message that arrives, to measure the bandwidth and widen the
    # window. Workers' messages fit into any window, and the pings cost a third of a submission at
    # both ends.
    ("grpc.http2.bdp_probe", 0),
    # As in the client. gRPC's default is a minute.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    # Pings arrive in bunches from a machine that is too busy; that is no reason to disconnect.
    ("grpc.http2.max_ping_strikes", 0),
)

Server = grpc.aio.Server

Context = grpc.aio.ServicerContext[Any, Any]
RawContext = grpc.aio.ServicerContext[Any, bytes]
"""Context of a handler without serializers, which reads bytes or `grpc.aio.EOF`."""

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


async def abort(context: Context, error: FedMezoError) -> NoReturn:
    """End a call with the status, reason and sentence of `error`."""
    metadata = [(REASON_KEY, type(error).__name__)]
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, str(int(1000 * error.retry_after_s))))
    await context.abort(
        getattr(grpc.StatusCode, error.status), str(error), trailing_metadata=tuple(metadata)
    )


def _serialized(response: Message | bytes) -> bytes:
    """The bytes of a response, which a handler may have made itself."""
    return response if isinstance(response, bytes) else response.SerializeToString()


class _Garbage:
    """Stands for a request whose bytes are no message of its type."""


def _reader(kind: type[Message]) -> Callable[[bytes], Message | _Garbage]:
    """Read requests of `kind`, without the exception that gRPC would log with a traceback."""

    def read(serialized: bytes) -> Message | _Garbage:
        try:
            return kind.FromString(serialized)
        except DecodeError:
            return _Garbage()

    return read


def _mapped(handler: Handler) -> Handler:
    """Turn a `FedMezoError` of a unary handler into a gRPC status."""

    @functools.wraps(handler)
    async def wrapper(self: Any, request: Any, context: Any) -> Any:
        try:
            self.check_readable(request)
            self.check_started()
            return await handler(self, request, context)
        except FedMezoError as error:
            await abort(context, error)

    return wrapper  # type: ignore[return-value]


class PageLinks(Protocol):
    """The page, as far as callers ask for it."""

    @property
    def address(self) -> str:
        """host:port that it listens on."""

    @property
    def is_tls(self) -> bool:
        """Whether it is served with TLS."""

    def path_for(self, caller: Caller) -> str:
        """The path that lets `caller`, who has the right to it, look."""


class CoordinatorServicer(rpc.CoordinatorServiceServicer):
    """`fedmezo.v1.CoordinatorService`, answered by the runs' serving loops once they are there."""

    _runs: RunDirectory
    _poll_sessions: PollSessions

    def __init__(
        self,
        what: str,
        caller_limits: CallerLimits,
        watch: ConnectionWatch,
        fleet: Fleet | None = None,
    ) -> None:
        """`what` is the program, for callers that come while it starts: `coordinator`, `relay`.

        `fleet` has the members; None: everybody may call.
        """
        self._what = what
        self.caller_limits = caller_limits
        self.watch = watch
        self._fleet = fleet
        self._is_started = False
        self._is_stopping = False
        self._were_all_loaded = False
        self._created_s = time.monotonic()
        self._places = PagePlaces()
        self._pacing = WritePacing(WRITES_A_TURN)
        self._garbage = SaidSeldom(log)
        self.page: PageLinks | None = None
        """The page that is served beside, if there is one."""

    def begin(self, runs: RunDirectory) -> None:
        """Let `runs` answer calls from now on."""
        self._runs = runs
        self._poll_sessions = PollSessions(runs.loop)
        self._is_started = True
        if self._fleet is not None:
            self._fleet.on_loss = self._end_sessions_of
            self._fleet.is_connected = lambda worker: any(
                loop.is_connected(worker) for loop in runs.loops()
            )

    def _end_sessions_of(self, worker: str, error: FedMezoError) -> None:
        """End a worker's sessions in all runs with `error`."""
        for loop in list(self._runs.loops()):
            loop.end_session(worker, error)

    def refuse_from_now_on(self) -> None:
        """Ask every later caller to come back, because this program stops."""
        self._is_stopping = True

    def is_served(self, service: str) -> bool | None:
        """Whether the process (an empty name) or a service is served; None: there is none such."""
        if service and service not in _FULL_NAMES:
            return None
        # A run that is created later takes nothing away from the others.
        if self._is_started and not self._were_all_loaded:
            self._were_all_loaded = self._runs.are_loaded
        return self._were_all_loaded and not self._is_stopping

    def is_served_or_run(self, name: str) -> bool | None:
        """As `is_served`, also for the ID of a run."""
        served = self._runs.is_served(name) if self._is_started else None
        return self.is_served(name) if served is None else served and not self._is_stopping

    def caller_of(self, context: Context) -> Caller:
        """Who makes a call; raises `IdentityError` if that cannot be established."""
        return caller_of(context, None if self._fleet is None else self._fleet.members)

    def worker_of(self, request: Any) -> str:
        """The caller whose session a call goes on with by its token; empty for any other call."""
        if not self._is_started or not isinstance(request, wire.PollSessionRequest):
            return ""
        return self._poll_sessions.worker_of(request.token)

    def check_started(self) -> None:
        """Tell a caller that comes before `begin`, or at the end, to wait, and what for."""
        if self._is_stopping:
            stopping = UnavailableError(f"The {self._what} is stopping; reconnect later.")
            stopping.retry_after_s = STOPPED_RETRY_S
            raise stopping
        if self._is_started:
            return
        so_far_s = time.monotonic() - self._created_s
        error = StartingError(
            f"The {self._what} is starting ({current_step() or f'{so_far_s:.0f} s so far'}); it "
            "answers when that is done."
        )
        error.retry_after_s = min(max(so_far_s / 2, START_RETRY_MIN_S), START_RETRY_MAX_S)
        raise error

    def check_readable(self, request: Any) -> None:
        """Refuse a call whose bytes are no request."""
        if not isinstance(request, _Garbage):
            return
        self._garbage.warn("a call came with bytes that are no request")
        raise _unreadable()

    def handler(self, name: str) -> Callable[..., Any]:
        """The handler of the RPC `name`."""
        handler: Callable[..., Any] = getattr(self, name)
        return handler

    @_mapped
    async def GetRun(  # noqa: N802 - the name in the .proto file
        self, request: wire.GetRunRequest, context: Context
    ) -> wire.GetRunResponse:
        """Describe the run."""
        version = choose_version(list(request.protocol_versions))
        described = self._runs.loop(request.run_id).describe(version, request.run_id, request.round)
        described.unix_ms = time.time_ns() // 1_000_000
        return described

    @_mapped
    async def PollSession(  # noqa: N802
        self, request: wire.PollSessionRequest, context: Context
    ) -> wire.PollSessionResponse:
        """Serve one call of a session without a stream."""
        return await self._poll_sessions.poll(
            request, lambda: self._enter(context), lambda: self.caller_of(context)
        )

    @_mapped
    async def read_journal(self, request: wire.ReadJournalRequest, context: Context) -> bytes:
        """Read a page of the journal; returns the serialized response.

        gRPC would keep the message beside its bytes for as long as nobody reads them.
        """
        caller = self.caller_of(context)
        loop = self._runs.loop(request.run_id)
        return await loop.read_journal(request, lambda: self._enter(context), caller)

    ReadJournal = read_journal  # type: ignore[assignment]

    @_mapped
    async def GetStatus(  # noqa: N802
        self, request: wire.GetStatusRequest, context: Context
    ) -> wire.GetStatusResponse:
        """Report the status of the run."""
        loop = self._runs.loop(request.run_id)
        if loop.status_is_large:
            await self._enter(context)
        return loop.status(request.run_id, self.caller_of(context))

    @_mapped
    async def ReportReplica(  # noqa: N802
        self, request: wire.ReportReplicaRequest, context: Context
    ) -> wire.ReportReplicaResponse:
        """Take a digest, evaluation or snapshot that the replica reports."""
        await self._runs.loop(request.run_id).report_replica(request)
        return wire.ReportReplicaResponse()

    @_mapped
    async def ExcludeWorker(  # noqa: N802
        self, request: admin.ExcludeWorkerRequest, context: Context
    ) -> admin.ExcludeWorkerResponse:
        """Take a worker out of the run, for an operator."""
        caller = self.caller_of(context)
        check_operator(caller, context.peer())
        loop = self._run_of(request.run_id)
        if self._fleet is not None:
            self._fleet.members.named(request.worker)  # Raises for a name that nobody has.
        await loop.exclude(request.worker, request.reason)
        log.warning("%s excluded worker %s", caller, request.worker)
        return admin.ExcludeWorkerResponse()

    @_mapped
    async def ReadmitWorker(  # noqa: N802
        self, request: admin.ReadmitWorkerRequest, context: Context
    ) -> admin.ReadmitWorkerResponse:
        """Let an excluded worker take part again, for an operator."""
        caller = self.caller_of(context)
        check_operator(caller, context.peer())
        await self._run_of(request.run_id).readmit(request.worker)
        log.warning("%s readmitted worker %s", caller, request.worker)
        return admin.ReadmitWorkerResponse()

    def _run_of(self, run_id: str) -> ServingLoop[Any]:
        """The loop of the run that an order names; raises `WrongRunError` for no such run."""
        loop = self._runs.loop(run_id)
        check_run_id(run_id, loop.genesis.config.run_id)
        return loop

    async def answer_about_runs(
        self, method: str, request: Any, context: Context
    ) -> Message | bytes:
        """Answer a call of `RunService`."""
        try:
            self.check_readable(request)
            call = Call(self.caller_of(context), context.peer())
            if method == "OpenPage":
                return self._link_to_page(call)
            self.check_started()
            return await self._runs.answer(method, request, call)
        except FedMezoError as error:
            await abort(context, error)

    def _link_to_page(self, call: Call) -> runs.OpenPageResponse:
        check_operator(call.caller, call.peer)
        if self.page is None:
            raise ConfigError("No page is served here; start the coordinator with --page 127.0.0.1")
        path = self.page.path_for(call.caller)
        return runs.OpenPageResponse(listen=self.page.address, tls=self.page.is_tls, path=path)

    async def ReadRunFile(  # noqa: N802
        self, request: Any, context: Context
    ) -> AsyncIterator[Message]:
        """Send a file that a run offers, with one piece in memory."""
        try:
            self.check_readable(request)
            self.check_started()
            async with contextlib.aclosing(self._runs.read_file(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except FedMezoError as error:
            await abort(context, error)

    async def _enter(self, context: Context) -> None:
        """Take the place of a large response until gRPC is done with it."""
        connection = context.peer()
        if connection.startswith("unix:"):
            return  # The replica, which reads what it asks for, never waits behind others.
        await self._places.take(connection, context.time_remaining())
        context.add_done_callback(lambda _: self._places.leave(connection))  # type: ignore[arg-type]

    async def ReadSnapshot(  # noqa: N802
        self, request: wire.ReadSnapshotRequest, context: Context
    ) -> AsyncIterator[wire.ReadSnapshotResponse]:
        """Send a snapshot's file, with one chunk in memory; a slow reader delays only itself."""
        try:
            self.check_readable(request)
            self.check_started()
            async with contextlib.aclosing(
                self._runs.loop(request.run_id).read_snapshot(request)
            ) as pieces:
                async for piece in pieces:
                    yield piece
        except FedMezoError as error:
            await abort(context, error)

    async def session(self, _requests: Any, context: RawContext) -> None:
        """Serve a worker's stream; a second task reads it while this one writes."""
        try:
            self.check_started()
            with self._runs.session_limit.session() as permit:
                await self._open_session(context, permit)
        except HalfClosedError:
            return
        except FedMezoError as error:
            await abort(context, error)

    # The generated base class wants this name; it is registered without serializers.
    Session = session  # type: ignore[assignment]

    async def _open_session(self, context: RawContext, permit: SessionPermit) -> None:
        """Serve a session until it ends; raises the error that ended it."""
        session: WorkerSession | None = None
        loop: ServingLoop[Any] | None = None
        reader: asyncio.Task[None] | None = None
        try:
            hello = await self._hello(context)
            caller = self.caller_of(context)
            check_worker_name(caller, hello.worker)
            loop = self._runs.loop(hello.run_id)
            session = await loop.join(hello, caller=caller)
            log_with(run=loop.genesis.config.run_id, worker=session.worker)
            self.caller_of(context)  # It may have been revoked while it joined.
            self._runs.session_limit.joined(permit)
            reader = asyncio.create_task(self._read(context, loop, session))
            while True:
                message = await session.outbox.get()
                if isinstance(message, FedMezoError):
                    raise message
                await self._pacing.next_write()
                await context.write(loop.sent(session, message))
        finally:
            if loop is not None and session is not None:
                loop.leave(session)  # Before anything is awaited: this handler may be cancelled.
            if reader is not None:
                reader.cancel()
                # gather tells a cancellation of this handler from the reader's. A handler that
                # swallows its own cancellation leaks memory in grpc.
                await asyncio.gather(reader, return_exceptions=True)

    async def _hello(self, context: RawContext) -> wire.Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                serialized = await context.read()
            first = wire.SessionRequest.FromString(
                b"" if serialized is grpc.aio.EOF else serialized
            )
        except (DecodeError, TimeoutError):
            first = wire.SessionRequest()
        if first.WhichOneof("kind") != "hello":
            raise ProtocolError("A session begins with a hello; send it first.")
        return first.hello

    async def _read(
        self, context: RawContext, loop: ServingLoop[Any], session: WorkerSession
    ) -> None:
        take, worker = self.caller_limits.take, worker_caller(session.worker)
        while (serialized := await context.read()) is not grpc.aio.EOF:
            if wait_s := take(worker):
                await asyncio.sleep(min(wait_s, WAIT_MAX_S))
            try:
                message = wire.SessionRequest.FromString(serialized)
            except DecodeError:
                session.end(
                    ProtocolError(
                        "A message came that is not a SessionRequest; use the same FedMeZO version."
                    )
                )
                return
            await loop.receive(session, message)
        # The worker has closed its side; its messages are in the queue ahead of this.
        loop.leave(session)


class _HealthServicer:
    """`grpc.health.v1.Health`, with our errors as gRPC statuses."""

    def __init__(self, answers: Health) -> None:
        self._answers = answers

    def handler(self, name: str) -> Callable[..., Any]:
        """The handler of the RPC `name`; newer files have a List, which nobody may call."""
        return self._watch if name == "Watch" else self._check

    async def _check(self, request: Any, context: Context) -> Message:
        try:
            if isinstance(request, _Garbage):
                raise _unreadable()
            answer: Message = self._answers.check(request)
            return answer
        except FedMezoError as error:
            await abort(context, error)

    async def _watch(self, request: Any, context: Context) -> AsyncIterator[Message]:
        if isinstance(request, _Garbage):
            await abort(context, _unreadable())
        async for status in self._answers.watch(request):
            yield status


class LiveTls:
    """Credentials of a server whose certificate can change while it serves."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._looking = threading.Lock()
        self._current = self._taken = self._configuration()
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._current,
            self._take,  # type: ignore[arg-type]  # None means: as before.
            require_client_authentication=bool(files.material.client_ca),
        )

    def refresh(self) -> None:
        """Let new connections have the certificate that the files hold now; any thread may call."""
        with self._looking:  # An older certificate must not come after a newer one.
            if self._files.changed():
                self._current = self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        material = self._files.material
        return grpc.ssl_server_certificate_configuration(
            [(material.key, material.chain)], material.client_ca or None
        )

    def _take(self) -> grpc.ServerCertificateConfiguration | None:
        # gRPC calls this at every handshake, in threads of its own.
        current = self._current
        if current is self._taken:
            return None
        self._taken = current
        return current


class _RefusalLog:
    """Tells of refused calls. Those with errors of one class are of one kind.

    Their sentences name the caller, so that there are as many of them as callers.
    """

    def __init__(self, line: str) -> None:
        """`line` has a place for the peer and one for the error."""
        self._line = line
        self._kinds = defaultdict[type[FedMezoError], SaidSeldom](lambda: SaidSeldom(log))

    def say(self, context: Context, error: FedMezoError) -> None:
        """Log a line about a refusal, or only count it."""
        self._kinds[type(error)].warn(self._line, context.peer(), error)


class _Edge:
    """What every call passes before its handler: is it the caller's turn, and has it the right?"""

    def __init__(
        self,
        who: Callable[[Context], Caller],
        caller_limits: CallerLimits,
        watch: ConnectionWatch,
        *,
        can_revoke: bool,
        worker_of: Callable[[Any], str] = lambda _request: "",
    ) -> None:
        """`can_revoke`: a caller can lose its rights while a call is under way.

        `worker_of` is the caller whose session a request goes on with; empty if there is none.
        """
        self._who = who
        self._limits = caller_limits
        self._watch = watch
        self._worker_of = worker_of
        self._can_revoke = can_revoke
        self._refusals = _RefusalLog("refused a call from %s: %s")

    def guarded(
        self, path: str, handler: Callable[..., Any], *, streams: bool, is_session: bool = False
    ) -> Any:
        """`handler` of the RPC `path` behind the check; `streams`: it yields its responses.

        Of a session only the beginning is checked: the loop ends it when its worker is revoked, and
        it may live longer than the certificate that it began with.
        """

        async def unary(request: Any, context: Any) -> Any:
            try:
                charged = await self._admit(context, request)
                self._check(path, context)
            except FedMezoError as error:
                await self._refuse(context, error)
            response = await handler(request, context)
            if response is not None:  # A stream's handler has written its responses itself.
                response = _serialized(response)
                self._limits.charge(charged, len(response))
            if self._can_revoke and not is_session:
                try:
                    self._check(path, context)
                except FedMezoError as error:
                    await self._refuse(context, error)
            return response

        async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                await self._admit(context, request)
                self._check(path, context)
                async with contextlib.aclosing(handler(request, context)) as responses:
                    async for response in responses:
                        if self._can_revoke:
                            self._check(path, context)
                        yield response
            except FedMezoError as error:
                await self._refuse(context, error)

        return streaming if streams else unary

    async def _admit(self, context: Context, request: Any) -> str:
        """Hold a call back as long as its caller's limits say; returns the caller that they are of.

        It is a member, or the worker of an open session, or else an address. Raises `NotReadyError`
        for a call that comes too soon.
        """
        peer = context.peer()
        if peer.startswith(PRIVATE_SCHEME):
            return ""  # The replica, which this process has started.
        charged = address_of(peer)
        with contextlib.suppress(FedMezoError):  # The check of rights says what is wrong.
            member = self._who(context)
            charged = str(member) if member.name else charged
        self._watch.called(peer, charged)
        charged = self._worker_of(request) or charged
        await self._limits.admit(charged)
        return charged

    def _check(self, path: str, context: Context) -> None:
        check_allowed(path, self._who(context))

    async def _refuse(self, context: Context, error: FedMezoError) -> NoReturn:
        """End a call without a right to it."""
        self._refusals.say(context, error)
        await abort(context, error)


class _FleetServicer:
    """The services about a fleet's members; without a fleet nobody has the right to call them."""

    def __init__(self, fleet: Fleet | None, who: Callable[[Context], Caller]) -> None:
        self._who = who
        self._fleet = fleet
        self._refusals = _RefusalLog("refused to enrol %s: %s")

    def handler(self, name: str) -> Callable[[Any, Context], Awaitable[Message]]:
        """The handler of the RPC `name`."""

        async def handle(request: Any, context: Context) -> Message:
            try:
                if isinstance(request, _Garbage):
                    raise _unreadable()
                return await self._answer(name, request, context)
            except FedMezoError as error:
                await abort(context, error)

        return handle

    async def _answer(self, name: str, request: Any, context: Context) -> Message:
        fleet = self._fleet
        assert fleet is not None, "the check of rights comes first"
        match name:
            case "Enroll":
                try:
                    return await fleet.enroll(request)
                except FedMezoError as error:
                    self._refusals.say(context, error)
                    raise
            case "Renew":
                shown = b"".join(context.auth_context()["x509_pem_cert"])
                return await fleet.renew(self._who(context), public_key_of(shown))
            case "CreateTokens":
                return await fleet.create_tokens(request, self._who(context))
            case "ListMembers":
                return await fleet.list_members(request, self._who(context))
            case "RevokeMember":
                return await fleet.revoke_member(request, self._who(context))
            case "RotateMember":
                return await fleet.rotate_member(request, self._who(context))
            case _:
                raise AssertionError(f"{name} has rights and no handler")


def _unreadable() -> ProtocolError:
    return ProtocolError(
        "The bytes of this call are no request of its kind; use the same FedMeZO version."
    )


def bind_server(
    listen: str,
    tls: tuple[Path, Path] | LiveTls | None,
    private: str | None = None,
    connections_max: int = SESSIONS_MAX + CONNECTIONS_BESIDE,
    options: Sequence[tuple[str, int]] = (),
) -> tuple[Server, int]:
    """Bind a server to `listen` (host:port) and return it with its port.

    `tls` is a certificate file and a key file, or credentials. `private` is a second address, a
    Unix socket for the replica. More than `connections_max` connections at an address are closed as
    soon as they come, whatever they have sent. Port 0 lets the system choose a port. `options` go
    before those in `SERVER_OPTIONS`. Callers that connect wait until `start_server`. Raises
    `ConfigError` for an address or TLS files that cannot be used.
    """
    live = LiveTls(TlsFiles(*tls)) if isinstance(tls, tuple) else tls
    with reading_all_wakeups():
        server = grpc.aio.server(
            options=tuple(
                {
                    **dict(SERVER_OPTIONS),
                    **dict(options),
                    "grpc.max_allowed_incoming_connections": connections_max,
                }.items()
            )
        )
    if private is not None:
        server.add_insecure_port(private)
    try:
        if live is None:
            return server, server.add_insecure_port(listen)
        return server, server.add_secure_port(listen, live.credentials)
    except RuntimeError:
        raise ConfigError(
            f"Cannot listen on {listen}: another process uses the address, or it is not this "
            "machine's; stop the other process, or choose another --listen."
        ) from None


async def start_server(
    server: Server,
    what: str = "coordinator",
    fleet: Fleet | None = None,
    caller_limits: CallerLimits | None = None,
    watch: ConnectionWatch | None = None,
    *,
    reflection: bool = False,
) -> CoordinatorServicer:
    """Let a bound server answer calls: that `what` is starting, until the servicer's `begin`.

    With a `fleet` every call but the replica's must show a member's certificate. With `reflection`
    the server describes its services.
    """
    caller_limits = caller_limits or CallerLimits(CALLER_CALLS_PER_S)
    watch = watch or ConnectionWatch(CALLER_CONNECTIONS_MAX)
    servicer = CoordinatorServicer(what, caller_limits, watch, fleet)
    edge = _Edge(
        servicer.caller_of,
        caller_limits,
        watch,
        can_revoke=fleet is not None,
        worker_of=servicer.worker_of,
    )
    members = _FleetServicer(fleet, servicer.caller_of)
    _serve_service(server, edge, "CoordinatorService", wire.DESCRIPTOR, servicer.handler)
    for service in ("MembershipService", "AdminService"):
        _serve_service(
            server,
            edge,
            service,
            admin.DESCRIPTOR,
            lambda name: (servicer if name in OF_THE_RUN else members).handler(name),
        )
    _serve_service(
        server,
        edge,
        "RunService",
        runs.DESCRIPTOR,
        lambda name: (
            servicer.ReadRunFile
            if name == "ReadRunFile"
            else functools.partial(servicer.answer_about_runs, name)
        ),
    )
    _serve_health(server, edge, servicer.is_served_or_run)
    if reflection:
        _serve_reflection(server, edge)
    await server.start()
    return servicer


def _nobody_knows(_context: Context) -> Caller:
    return Caller.ANYONE


async def start_enrolment(
    server: Server, fleet: Fleet, is_served: Callable[[str], bool | None]
) -> ConnectionWatch:
    """Let a bound server answer those who have no certificate yet: enrolment, and health.

    `is_served` is as for `Health`. Returns the watch over its connections, which somebody has to
    run.
    """
    limits = CallerLimits(ENROLMENTS_PER_S)
    watch = ConnectionWatch(ENROLMENT_CALLER_CONNECTIONS_MAX)
    edge = _Edge(_nobody_knows, limits, watch, can_revoke=False)
    handler = _FleetServicer(fleet, _nobody_knows).handler
    _serve_service(server, edge, "EnrollmentService", admin.DESCRIPTOR, handler)
    _serve_health(server, edge, is_served)
    await server.start()
    return watch


async def start_health(server: Server, is_served: Callable[[str], bool | None]) -> None:
    """Let a bound server answer probes, and nothing else; `is_served` is as for `Health`."""
    limits, watch = CallerLimits(HEALTH_CALLS_PER_S), ConnectionWatch(HEALTH_CONNECTIONS_MAX)
    _serve_health(server, _Edge(_nobody_knows, limits, watch, can_revoke=False), is_served)
    await server.start()


def _serve_health(server: Server, edge: _Edge, is_served: Callable[[str], bool | None]) -> None:
    handler = _HealthServicer(Health(is_served)).handler
    _serve_service(server, edge, "Health", health_service.SERVICE_FILE, handler)


def _serve_reflection(server: Server, edge: _Edge) -> None:
    """Describe the services of the main port to those who may call them."""
    # Imported here: few servers do it, and it takes the generic reader of every .proto file.
    from fedmezo_coordinator.introspection import reflection

    own = "grpc.reflection.v1alpha.ServerReflection"
    described = reflection.Reflection([*_FULL_NAMES, "grpc.health.v1.Health", own])

    async def reflect(_requests: Any, context: RawContext) -> None:
        async def received() -> AsyncIterator[bytes]:
            while (serialized := await context.read()) is not grpc.aio.EOF:
                yield serialized

        try:
            async for answer in described.answers(received()):
                await context.write(answer)
        except DecodeError:
            await abort(context, _unreadable())

    _serve_service(server, edge, "ServerReflection", reflection.SERVICE_FILE, lambda _: reflect)


_FULL_NAMES = tuple(f"fedmezo.v1.{name}" for name in SERVICES)


def _serve_service(
    server: Server,
    edge: _Edge,
    name: str,
    file: FileDescriptor,
    handler_of: Callable[[str], Callable[..., Any]],
) -> None:
    """Register the handlers of a service, each behind the check of rights.

    Not the generated handlers. Session has no serializers: a message to thousands of workers is
    serialised once, and its bytes are counted without serialising it again.
    """
    service = file.services_by_name[name]
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        path = f"/{service.full_name}/{method.name}"
        if method.client_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                edge.guarded(path, handler_of(method.name), streams=False, is_session=True)
            )
            continue
        streams = method.server_streaming
        kind = (
            grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = kind(
            edge.guarded(path, handler_of(method.name), streams=streams),
            request_deserializer=_reader(GetMessageClass(method.input_type)),
            response_serializer=_serialized,
        )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )
    server.add_registered_method_handlers(service.full_name, handlers)
