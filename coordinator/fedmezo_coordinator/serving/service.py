"""The gRPC servicer and server: translate, map errors, bound everything. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from fedmezo_coordinator.serving.grpc_wakeups import drained
from fedmezo_coordinator.serving.hello import choose_version
from fedmezo_coordinator.serving.loop import HalfClosedError, ServingLoop
from fedmezo_coordinator.serving.loop import Session as WorkerSession
from fedmezo_coordinator.serving.poll_sessions import PolledSessions
from fedmezo_coordinator.serving.session_limit import SessionPermit
from fedmezo_coordinator.serving.write_pacing import WritePacing
from fedmezo_core.config import MESSAGE_BYTES_MAX
from fedmezo_core.errors import ConfigError, FedMezoError, ProtocolError
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc

log = logging.getLogger("fedmezo.coordinator")

HELLO_TIMEOUT_S = 20.0
"""A stream that does not introduce itself by then is closed."""
WRITES_A_TURN = 4
"""Messages that go down in one turn of the loop; that few, because a new stream takes three turns to be
accepted, one stream after the other."""

SERVER_OPTIONS = (
    # Without this a second coordinator binds the same port and silently takes half the workers.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", 16),
    # After a restart thousands of handshakes share one core, a millisecond and more each.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A small compressed message can unpack to a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Workers ask every minute; this is for those that don't. Ten thousand pings a minute are 4 % of a core.
    ("grpc.keepalive_time_ms", 150_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A ping after every message that comes, to measure the bandwidth and widen the window: for messages
    # that fit into any window it is a third of what a submission costs, at both ends.
    ("grpc.http2.bdp_probe", 0),
    # As in the client: without this, gRPC's own minute counts.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    # On a machine that is too busy pings arrive in bunches, which is no reason to break off.
    ("grpc.http2.max_ping_strikes", 0),
)

Server = grpc.aio.Server

RawContext = grpc.aio.ServicerContext[Any, bytes]
"""Of a handler without serializers: what it reads is bytes, or `grpc.aio.EOF`."""

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: FedMezoError) -> NoReturn:
    """End a call with the error's status, reason and sentence."""
    metadata = [(REASON_KEY, type(error).__name__)]
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, str(int(1000 * error.retry_after_s))))
    await context.abort(
        getattr(grpc.StatusCode, error.status), str(error), trailing_metadata=tuple(metadata)
    )


def _mapped(handler: Handler) -> Handler:
    """Let our errors leave a unary handler as statuses."""

    @functools.wraps(handler)
    async def wrapper(self: Any, request: Any, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except FedMezoError as error:
            await abort(context, error)

    return wrapper  # type: ignore[return-value]


class CoordinatorServicer(rpc.CoordinatorServiceServicer):
    """`fedmezo.v1.CoordinatorService` over a serving loop."""

    def __init__(self, daemon: ServingLoop[Any]) -> None:
        self._daemon = daemon
        self._polled = PolledSessions(daemon)
        self._turnstile = WritePacing(WRITES_A_TURN)

    @_mapped
    async def GetRun(  # noqa: N802 - the service's name for it
        self,
        request: wire.GetRunRequest,
        context: grpc.aio.ServicerContext[wire.GetRunRequest, wire.GetRunResponse],
    ) -> wire.GetRunResponse:
        """What the run is."""
        version = choose_version(list(request.protocol_versions))
        return self._daemon.describe(version, request.run_id, request.round)

    @_mapped
    async def PollSession(  # noqa: N802
        self,
        request: wire.PollSessionRequest,
        context: grpc.aio.ServicerContext[wire.PollSessionRequest, wire.PollSessionResponse],
    ) -> wire.PollSessionResponse:
        """A session without a stream, call by call."""
        return await self._polled.poll(request)

    @_mapped
    async def ReadJournal(  # noqa: N802
        self,
        request: wire.ReadJournalRequest,
        context: grpc.aio.ServicerContext[wire.ReadJournalRequest, wire.ReadJournalResponse],
    ) -> wire.ReadJournalResponse:
        """A page of the journal."""
        return await self._daemon.read_journal(request)

    @_mapped
    async def GetStatus(  # noqa: N802
        self,
        request: wire.GetStatusRequest,
        context: grpc.aio.ServicerContext[wire.GetStatusRequest, wire.GetStatusResponse],
    ) -> wire.GetStatusResponse:
        """The whole picture."""
        return self._daemon.status(request.run_id)

    @_mapped
    async def ReportReplica(  # noqa: N802
        self,
        request: wire.ReportReplicaRequest,
        context: grpc.aio.ServicerContext[wire.ReportReplicaRequest, wire.ReportReplicaResponse],
    ) -> wire.ReportReplicaResponse:
        """The replica's digest and evaluation."""
        await self._daemon.report_replica(request)
        return wire.ReportReplicaResponse()

    async def ReadSnapshot(  # noqa: N802
        self,
        request: wire.ReadSnapshotRequest,
        context: grpc.aio.ServicerContext[wire.ReadSnapshotRequest, wire.ReadSnapshotResponse],
    ) -> AsyncIterator[wire.ReadSnapshotResponse]:
        """A snapshot's file; a slow reader holds up only itself, with one chunk in memory."""
        try:
            async with contextlib.aclosing(self._daemon.read_snapshot(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except FedMezoError as error:
            await abort(context, error)

    async def session(self, _requests: Any, context: RawContext) -> None:
        """A worker's stream: one task reads it, this one writes it."""
        try:
            with self._daemon.session_limit.session() as permit:
                await self._open_session(context, permit)
        except HalfClosedError:
            return
        except FedMezoError as error:
            await abort(context, error)

    # `start_server` registers it without serializers.
    Session = session  # type: ignore[assignment]

    async def _open_session(self, context: RawContext, permit: SessionPermit) -> None:
        """Raises what the session ends with."""
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
                await self._turnstile.through()
                await context.write(self._daemon.sent(session, message))
        finally:
            if reader is not None:
                reader.cancel()
                # gather, because a cancellation of this handler must not be mistaken for the reader's:
                # a handler that swallows its own leaks memory in grpc.
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
        while (serialized := await context.read()) is not grpc.aio.EOF:
            try:
                message = wire.SessionRequest.FromString(serialized)
            except DecodeError:
                session.end(
                    ProtocolError(
                        "A message came that is no SessionRequest; use the same FedMeZO version."
                    )
                )
                return
            await self._daemon.receive(session, message)
        # The worker is done; whatever it sent before is in the queue ahead of this.
        await self._daemon.leave(session)


def bind_server(
    listen: str, tls: tuple[Path, Path] | None, private: str | None = None
) -> tuple[Server, int]:
    """Take the addresses; returns the server and the port, which may have been 0 in `listen`.

    `private` is a second address, a Unix socket, for the replica if there is one. Callers wait until `start_server`.
    Raises `ConfigError` for an address or TLS files that cannot be used.
    """
    credentials = None if tls is None else _credentials(*tls)
    with drained():
        server = grpc.aio.server(options=SERVER_OPTIONS)
    if private is not None:
        server.add_insecure_port(private)
    try:
        if credentials is None:
            return server, server.add_insecure_port(listen)
        return server, server.add_secure_port(listen, credentials)
    except RuntimeError:
        raise ConfigError(
            f"Cannot listen on {listen}: the address is in use by another process or not this "
            "machine's; stop the other process, or choose another --listen."
        ) from None


async def start_server(server: Server, daemon: ServingLoop[Any]) -> None:
    """Let a bound server answer for `daemon`."""
    servicer = CoordinatorServicer(daemon)
    # In the permit of the generated handler, and without its serializers: what goes to thousands of
    # workers is serialised once, and what is counted in bytes need not be measured again.
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Session": grpc.stream_stream_rpc_method_handler(servicer.session)
    }
    name = wire.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
    # Among generic handlers the first one counts, among registered ones the last.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    rpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    server.add_registered_method_handlers(name, handlers)
    await server.start()


def _credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    try:
        pair = (key.read_bytes(), cert.read_bytes())
        # gRPC would only say that it cannot listen. No password: nobody is there to type one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are not a PEM certificate chain and its unencrypted key "
            f"({error.reason or error}); check tls_cert and tls_key."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The TLS file {error.filename} cannot be read ({error.strerror}); check tls_cert and tls_key."
        ) from None
    return grpc.ssl_server_credentials([pair])
