"""The gRPC service and server: it translates, maps errors and sets limits, and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fedmezo_coordinator.coordinator_settings import (
    CALLER_CALLS_PER_S,
    CALLER_CONNECTIONS_MAX,
    SESSIONS_MAX,
)
from fedmezo_coordinator.limits.caller_limits import (
    WAIT_MAX_S,
    CallerLimits,
    address_of,
    worker_caller,
)
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.limits.said_seldom import SaidSeldom
from fedmezo_coordinator.serving.grpc_wakeups import reading_all_wakeups
from fedmezo_coordinator.serving.journal_pages import PagePlaces
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.poll_sessions import PollSessions
from fedmezo_coordinator.serving.session_limit import SessionPermit
from fedmezo_coordinator.serving.worker_session import HalfClosedError, WorkerSession
from fedmezo_coordinator.serving.write_pacing import WritePacing
from fedmezo_core.config import MESSAGE_BYTES_MAX
from fedmezo_core.errors import ConfigError, FedMezoError, ProtocolError, StartingError
from fedmezo_core.program import current_step
from fedmezo_core.wire.admission import choose_version
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc

log = logging.getLogger("fedmezo.coordinator")

HELLO_TIMEOUT_S = 20.0
"""Longest time from the start of a stream to its hello; then the stream is closed."""
START_RETRY_MIN_S = 1.0
START_RETRY_MAX_S = 10.0
"""Callers of a program that is starting are asked to come back within half the time that the start
has taken so far, but not sooner or later than these."""
WRITES_A_TURN = 4
"""Messages that are sent in one turn of the event loop. They are few, because gRPC accepts one new
stream after the other, and each takes three turns."""

CONNECTIONS_BESIDE = 128
"""Connections beside those of the most sessions: of readers, of idle clients."""

SERVER_OPTIONS = (
    # Otherwise a second coordinator can bind the same port and silently takes half the workers.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", 16),
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
    """Hold a caller of a unary handler to its limits, and turn a `FedMezoError` into a status.

    What is wrapped returns the serialized response.
    """

    @functools.wraps(handler)
    async def wrapper(self: Any, request: Any, context: Any) -> Any:
        try:
            caller = await self.admit(context, request)
            self.check_readable(request)
            self.check_started()
            response = _serialized(await handler(self, request, context))
            self.caller_limits.charge(caller, len(response))
            return response
        except FedMezoError as error:
            await abort(context, error)

    return wrapper  # type: ignore[return-value]


class CoordinatorServicer(rpc.CoordinatorServiceServicer):
    """`fedmezo.v1.CoordinatorService`, answered by a serving loop once there is one."""

    _daemon: ServingLoop[Any]
    _poll_sessions: PollSessions

    def __init__(self, what: str, caller_limits: CallerLimits, watch: ConnectionWatch) -> None:
        """`what` is the program, for callers that come while it starts: `coordinator`, `relay`."""
        self._what = what
        self.caller_limits = caller_limits
        self.watch = watch
        self._is_started = False
        self._created_s = time.monotonic()
        self._places = PagePlaces()
        self._pacing = WritePacing(WRITES_A_TURN)
        self._garbage = SaidSeldom(log)

    def begin(self, daemon: ServingLoop[Any]) -> None:
        """Let `daemon`, which is loaded, answer calls from now on."""
        self._daemon = daemon
        self._poll_sessions = PollSessions(daemon)
        self._is_started = True

    async def admit(self, context: Context, request: Any = None) -> str:
        """Note who calls, and hold the call back as `caller_limits` say; returns the caller.

        A caller is an address, or the worker whose session the call names by its token. Raises
        `NotReadyError` for a call that comes too soon.
        """
        peer = context.peer()
        if peer.startswith("unix:"):
            return ""  # The replica, which this process has started.
        caller = address_of(peer)
        self.watch.called(peer, caller)
        if isinstance(request, wire.PollSessionRequest) and self._is_started:
            caller = self._poll_sessions.worker_of(request.token) or caller
        await self.caller_limits.admit(caller)
        return caller

    def check_started(self) -> None:
        """Tell a caller that comes before `begin` to wait, and what for."""
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
        raise ProtocolError(
            "The bytes of this call are no request of its kind; use the same FedMeZO version."
        )

    @_mapped
    async def GetRun(  # noqa: N802 - the name in the .proto file
        self, request: wire.GetRunRequest, context: Context
    ) -> wire.GetRunResponse:
        """Describe the run."""
        version = choose_version(list(request.protocol_versions))
        return self._daemon.describe(version, request.run_id, request.round)

    @_mapped
    async def PollSession(  # noqa: N802
        self, request: wire.PollSessionRequest, context: Context
    ) -> wire.PollSessionResponse:
        """Serve one call of a session without a stream."""
        return await self._poll_sessions.poll(request, lambda: self._enter(context))

    @_mapped
    async def read_journal(self, request: wire.ReadJournalRequest, context: Context) -> bytes:
        """Read a page of the journal; returns the serialized response.

        gRPC would keep the message beside its bytes for as long as nobody reads them.
        """
        return await self._daemon.read_journal(request, lambda: self._enter(context))

    ReadJournal = read_journal  # type: ignore[assignment]

    @_mapped
    async def GetStatus(  # noqa: N802
        self, request: wire.GetStatusRequest, context: Context
    ) -> wire.GetStatusResponse:
        """Report the status of the run."""
        if self._daemon.status_is_large:
            await self._enter(context)
        return self._daemon.status(request.run_id)

    @_mapped
    async def ReportReplica(  # noqa: N802
        self, request: wire.ReportReplicaRequest, context: Context
    ) -> wire.ReportReplicaResponse:
        """Take a digest, evaluation or snapshot that the replica reports."""
        await self._daemon.report_replica(request)
        return wire.ReportReplicaResponse()

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
            await self.admit(context)
            self.check_readable(request)
            self.check_started()
            async with contextlib.aclosing(self._daemon.read_snapshot(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except FedMezoError as error:
            await abort(context, error)

    async def session(self, _requests: Any, context: RawContext) -> None:
        """Serve a worker's stream; a second task reads it while this one writes."""
        try:
            await self.admit(context)
            self.check_started()
            with self._daemon.session_limit.session() as permit:
                await self._open_session(context, permit)
        except HalfClosedError:
            return
        except FedMezoError as error:
            await abort(context, error)

    # The generated base class wants this name; `start_server` registers it without serializers.
    Session = session  # type: ignore[assignment]

    async def _open_session(self, context: RawContext, permit: SessionPermit) -> None:
        """Serve a session until it ends; raises the error that ended it."""
        session: WorkerSession | None = None
        reader: asyncio.Task[None] | None = None
        try:
            hello = await self._hello(context)
            session = await self._daemon.join(hello)
            self._daemon.session_limit.joined(permit)
            reader = asyncio.create_task(self._read(context, session))
            while True:
                message = await session.outbox.get()
                if isinstance(message, FedMezoError):
                    raise message
                await self._pacing.next_write()
                await context.write(self._daemon.sent(session, message))
        finally:
            if reader is not None:
                reader.cancel()
                # gather tells a cancellation of this handler from the reader's. A handler that
                # swallows its own cancellation leaks memory in grpc.
                await asyncio.gather(reader, return_exceptions=True)
            if session is not None:
                await self._daemon.leave(session)

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

    async def _read(self, context: RawContext, session: WorkerSession) -> None:
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
            await self._daemon.receive(session, message)
        # The worker has closed its side; its messages are in the queue ahead of this.
        await self._daemon.leave(session)


def bind_server(
    listen: str,
    tls: tuple[Path, Path] | None,
    private: str | None = None,
    connections_max: int = SESSIONS_MAX + CONNECTIONS_BESIDE,
) -> tuple[Server, int]:
    """Bind a server to `listen` (host:port) and return it with its port.

    `tls` is a certificate file and a key file. `private` is a second address, a Unix socket for the
    replica. More than `connections_max` connections at an address are closed as soon as they come,
    whatever they have sent. Port 0 lets the system choose a port. Callers that connect wait until
    `start_server`. Raises `ConfigError` for an address or TLS files that cannot be used.
    """
    credentials = None if tls is None else _credentials(*tls)
    with reading_all_wakeups():
        server = grpc.aio.server(
            options=(*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections_max))
        )
    if private is not None:
        server.add_insecure_port(private)
    try:
        if credentials is None:
            return server, server.add_insecure_port(listen)
        return server, server.add_secure_port(listen, credentials)
    except RuntimeError:
        raise ConfigError(
            f"Cannot listen on {listen}: another process uses the address, or it is not this "
            "machine's; stop the other process, or choose another --listen."
        ) from None


async def start_server(
    server: Server,
    what: str = "coordinator",
    caller_limits: CallerLimits | None = None,
    watch: ConnectionWatch | None = None,
) -> CoordinatorServicer:
    """Let a bound server answer calls: that `what` is starting, until the servicer's `begin`."""
    servicer = CoordinatorServicer(
        what,
        caller_limits or CallerLimits(CALLER_CALLS_PER_S),
        watch or ConnectionWatch(CALLER_CONNECTIONS_MAX),
    )
    service = wire.DESCRIPTOR.services_by_name["CoordinatorService"]
    # Not the generated handlers. Session has no serializers: a message to thousands of workers is
    # serialised once, and its bytes are counted without serialising it again.
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Session": grpc.stream_stream_rpc_method_handler(servicer.session)
    }
    for method in service.methods:
        if method.name not in handlers:
            handler = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = handler(
                getattr(servicer, method.name),
                request_deserializer=_reader(GetMessageClass(method.input_type)),
                response_serializer=_serialized,
            )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )
    server.add_registered_method_handlers(service.full_name, handlers)
    await server.start()
    return servicer


def _credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    try:
        pair = (key.read_bytes(), cert.read_bytes())
        # gRPC would only say that it cannot listen. The empty password avoids a prompt.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are not a PEM certificate chain and its unencrypted key "
            f"({error.reason or error}); check tls_cert and tls_key."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The TLS file {error.filename} cannot be read ({error.strerror}); "
            "check tls_cert and tls_key."
        ) from None
    return grpc.ssl_server_credentials([pair])
