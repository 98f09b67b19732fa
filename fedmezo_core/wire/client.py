"""The gRPC client of a coordinator, for workers, the replica and the command line.

Every `grpc` error leaves it as one of ours.
"""

from __future__ import annotations

import asyncio
import ssl
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2

from fedmezo_core.config import PROTOCOL_VERSION
from fedmezo_core.errors import (
    ConfigError,
    ProtocolError,
    SnapshotError,
    UnavailableError,
    VersionError,
)
from fedmezo_core.journal.codec import decode_record, digest_in, evaluated_to_pb
from fedmezo_core.journal.journal import ZERO_HASH, head_after
from fedmezo_core.records import Evaluated, Genesis
from fedmezo_core.service.proxies import proxy_for
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY, error_from
from fedmezo_core.wire.messages import snapshot_from_pb
from fedmezo_core.wire.snapshots import Snapshot, SnapshotOffer, Suffix
from fedmezo_proto.v1 import admin_pb2 as admin
from fedmezo_proto.v1 import admin_pb2_grpc as admin_rpc
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from fedmezo_proto.v1 import runs_pb2 as runs
from fedmezo_proto.v1 import runs_pb2_grpc as runs_rpc

CALL_TIMEOUT_S = 20.0
SNAPSHOT_SILENCE_S = 300.0
"""Longest time between two messages of a snapshot; a slow link takes less for one."""
RECEIVE_BYTES_MAX = 8 * 1024 * 1024
"""Above the largest commit (`COMMIT_PAIRS_MAX` coefficients) and the largest journal page."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Without this a silent link is given up after gRPC's own minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnecting is ours (full jitter); gRPC's own delay would add to it.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Workers on one machine must not share a connection: the server bounds streams a connection.
    ("grpc.use_local_subchannel_pool", 1),
)


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """Options of a channel to `address`; a proxy is never on the way to this machine."""
    return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(bool(proxy_for(address)))))


_NOBODY_THERE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # What a connection that breaks in mid-call can look like.
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Statuses that gRPC itself gives when a coordinator goes away; a retry may help."""
_NOT_REACHED = (
    "Connection refused",
    "Domain name not found",
    "DNS resolution failed",
    "No route to host",
    "Network is unreachable",
)
"""What gRPC's details hold if nothing has answered at all, so that TLS cannot be the cause."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What a coordinator says of its run, in answer to `GetRun`."""

    protocol_version: int
    genesis: Genesis
    head: bytes
    """Head after genesis, which names the base; 32 bytes."""
    round: int
    epoch: int
    missing: Suffix
    """The commits that the caller would have to apply."""
    snapshot: SnapshotOffer | None
    """The newest snapshot, if it is of a later round than the caller's."""
    needs_snapshot: bool = False
    """Whether the journal has dropped commits that the caller lacks."""
    genesis_body: bytes = b""
    """Record 0 as it was written."""
    checkpoint_key: bytes = b""
    """Public key of the coordinator, 32 bytes; empty if it signs nothing."""
    round_head: bytes = b""
    """Head after `round`, 32 bytes; empty if the coordinator could not vouch for it."""
    signature: bytes = b""
    """Signature of `round` and `round_head`, 64 bytes; empty without a key."""
    unix_ms: int = 0
    """The coordinator's clock, in milliseconds since 1970; 0 if it does not say."""


class CoordinatorClient:
    """One channel to one coordinator; use it as an async context manager."""

    def __init__(
        self,
        address: str,
        tls_ca: Path | None = None,
        *,
        tls: bool = False,
        identity: Identity | None = None,
    ) -> None:
        """`address` is host:port; `tls_ca` a PEM file to trust, or None for plain TCP.

        With `tls` and no `tls_ca` the system's CAs are trusted. An `identity` says itself what to
        trust, and is shown to the coordinator. Raises `ConfigError` for a file that cannot be used,
        and `IdentityError` for an identity that is not valid now.
        """
        self.address = address
        self._retired: list[grpc.aio.Channel] = []
        self._sessions: weakref.WeakSet[SessionStream] = weakref.WeakSet()
        self._shows_identity = identity is not None
        if identity is not None:
            self._hint = (
                "that both clocks are right (certificates are valid from one time to another, and "
                "a clock that is a day off is a usual cause), and that this identity is of that "
                "coordinator"
            )
            self._channel = _channel_of(address, identity)
        elif tls_ca is None and not tls:
            self._hint = (
                "whether it wants an identity (then join with the operator's join string: a worker "
                "with --join STRING, a person with fedmezo join STRING; or name the folder of "
                "your identity with --state), or only TLS (then set tls or tls_ca)"
            )
            self._channel = grpc.aio.insecure_channel(address, options=channel_options(address))
        else:
            self._hint = (
                "that it serves TLS, whether its certificate is of that CA and names that host, "
                "and whether it wants an identity (then leave out tls and tls_ca, and join with "
                "the operator's join string: a worker with --join STRING, a person with fedmezo "
                "join STRING; or name the folder of yours with --state)"
            )
            roots = system_roots() if tls_ca is None else _roots_in(tls_ca)
            self._channel = grpc.aio.secure_channel(
                address, grpc.ssl_channel_credentials(roots), options=channel_options(address)
            )
        self._make_stubs()

    def _make_stubs(self) -> None:
        self._stub = rpc.CoordinatorServiceStub(self._channel)
        self._membership = admin_rpc.MembershipServiceStub(self._channel)
        self._admin = admin_rpc.AdminServiceStub(self._channel)
        self._runs = runs_rpc.RunServiceStub(self._channel)

    async def show(self, identity: Identity) -> None:
        """Show a renewed identity from now on. A stream that is open goes on."""
        channel = _channel_of(self.address, identity)
        # Calls may still be under way on the newest one, and a session lives as long as it likes.
        kept = {self._channel, *(stream.channel for stream in self._sessions)}
        closing = [retired for retired in self._retired if retired not in kept]
        self._retired = [retired for retired in self._retired if retired in kept]
        self._retired.append(self._channel)
        self._channel = channel
        self._make_stubs()
        for retired in closing:
            await retired.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel and every stream on it."""
        for channel in (self._channel, *self._retired):
            await channel.close()

    async def get_run(self, run_id: str = "", round_: int = 0) -> RunDescription:
        """What the run is, to a party that holds the weights after `round_`."""
        with self._errors_mapped():
            answer = await self._stub.GetRun(
                wire.GetRunRequest(
                    protocol_versions=[PROTOCOL_VERSION], run_id=run_id, round=round_
                ),
                timeout=CALL_TIMEOUT_S,
            )
        genesis = decode_record(answer.genesis)
        if not isinstance(genesis, Genesis):
            raise ProtocolError(
                f"The coordinator at {self.address} described its run by a "
                f"{type(genesis).__name__} record; it is no FedMeZO coordinator of this version."
            )
        return RunDescription(
            protocol_version=answer.protocol_version,
            genesis=genesis,
            head=head_after(ZERO_HASH, answer.genesis),
            round=answer.round,
            epoch=answer.epoch,
            genesis_body=answer.genesis,
            checkpoint_key=_digest_or_empty(answer.checkpoint_key, "checkpoint_key"),
            round_head=_digest_or_empty(answer.head, "head"),
            signature=answer.signature,
            unix_ms=answer.unix_ms,
            missing=_suffix_of(answer.missing),
            snapshot=_offer_of(answer.snapshot) if answer.HasField("snapshot") else None,
            needs_snapshot=answer.needs_snapshot,
        )

    async def read_journal(
        self,
        from_seqno: int = 0,
        *,
        run_id: str = "",
        commits_only: bool = False,
        wait_ms: int = 0,
        records_max: int = 0,
        from_newest_base: bool = False,
        from_round: int = 0,
        from_origin: bool = False,
    ) -> wire.ReadJournalResponse:
        """One page of the journal; the fields of `ReadJournalRequest` say which."""
        with self._errors_mapped():
            return await self._stub.ReadJournal(
                wire.ReadJournalRequest(
                    run_id=run_id,
                    from_seqno=from_seqno,
                    commits_only=commits_only,
                    wait_ms=wait_ms,
                    records_max=records_max,
                    from_newest_base=from_newest_base,
                    from_round=from_round,
                    from_origin=from_origin,
                ),
                timeout=CALL_TIMEOUT_S + wait_ms / 1000,
            )

    async def journal_pages(self, run_id: str = "") -> AsyncIterator[wire.ReadJournalResponse]:
        """All pages of the journal so far; the first one names its origin, if it has one.

        Raises `ProtocolError` for a page after which the same one would come.
        """
        seqno = 0
        while True:
            page = await self.read_journal(seqno, run_id=run_id, from_origin=seqno == 0)
            yield page
            if not page.entries:
                return
            if page.next_seqno <= seqno:
                raise ProtocolError(
                    f"The coordinator at {self.address} sent records from {seqno} on, and said that"
                    f" record {page.next_seqno} comes next; check which coordinator that is."
                )
            seqno = page.next_seqno

    async def read_snapshot(
        self, run_id: str, round_: int, offset: int
    ) -> AsyncGenerator[Snapshot | bytes, None]:
        """The description of a snapshot, then the bytes of its file from `offset` on.

        A stream that breaks, or from which nothing comes for `SNAPSHOT_SILENCE_S`, is an
        `UnavailableError`: ask again from where it broke. Any other `SnapshotError` means that it
        cannot be had.
        """
        call = self._stub.ReadSnapshot(
            wire.ReadSnapshotRequest(run_id=run_id, round=round_, offset=offset)
        )
        described = False
        try:
            with self._errors_mapped():
                while True:
                    message = await asyncio.wait_for(call.read(), SNAPSHOT_SILENCE_S)
                    if not isinstance(message, wire.ReadSnapshotResponse):
                        return  # the end
                    if not described:
                        described = True
                        yield snapshot_from_pb(message.snapshot)
                    elif message.data:
                        yield message.data
                    else:
                        raise SnapshotError(
                            f"The coordinator at {self.address} sent a piece of a snapshot without "
                            "bytes; check which coordinator that is."
                        )
        except TimeoutError:
            raise UnavailableError(
                f"Nothing of the snapshot came for {SNAPSHOT_SILENCE_S:g} s."
            ) from None
        finally:
            call.cancel()

    async def get_status(self, run_id: str = "") -> wire.GetStatusResponse:
        """The status of the run and of its workers."""
        with self._errors_mapped():
            return await self._stub.GetStatus(
                wire.GetStatusRequest(run_id=run_id), timeout=CALL_TIMEOUT_S
            )

    async def is_served(self, service: str = "") -> bool:
        """Whether the process, or a service or run that is named, is served now.

        Raises `WrongRunError` for a name that nothing has.
        """
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        with self._errors_mapped():
            answer = await check(
                health_pb2.HealthCheckRequest(service=service), timeout=CALL_TIMEOUT_S
            )
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def report_replica(
        self,
        run_id: str,
        secret: bytes,
        round_: int,
        weights_digest: bytes,
        evaluation: Evaluated | None,
        snapshot: wire.SnapshotReport | None = None,
    ) -> None:
        """Report the replica's digest, and an evaluation or a snapshot if there is one."""
        with self._errors_mapped():
            await self._stub.ReportReplica(
                wire.ReportReplicaRequest(
                    run_id=run_id,
                    secret=secret,
                    round=round_,
                    weights_digest=weights_digest,
                    evaluation=None if evaluation is None else evaluated_to_pb(evaluation),
                    snapshot=snapshot,
                ),
                timeout=CALL_TIMEOUT_S,
            )

    async def poll_session(
        self,
        token: bytes,
        *messages: wire.SessionRequest,
        wait_ms: int = 0,
        leave: bool = False,
    ) -> wire.PollSessionResponse:
        """One call of a session without a stream; the first has no token and a hello."""
        with self._errors_mapped():
            return await self._stub.PollSession(
                wire.PollSessionRequest(
                    token=token, messages=messages, wait_ms=wait_ms, leave=leave
                ),
                timeout=CALL_TIMEOUT_S + wait_ms / 1000,
            )

    def session(self) -> SessionStream:
        """A worker's stream; the first message sent must be the hello."""
        stream = SessionStream(self._stub.Session(), self, self._channel)
        self._sessions.add(stream)
        return stream

    async def renew(self) -> admin.RenewResponse:
        """A newer certificate for the key of this client's identity."""
        with self._errors_mapped():
            return await self._membership.Renew(admin.RenewRequest(), timeout=CALL_TIMEOUT_S)

    async def create_tokens(self, request: admin.CreateTokensRequest) -> admin.CreateTokensResponse:
        """Make tokens, as an operator."""
        with self._errors_mapped():
            return await self._admin.CreateTokens(request, timeout=CALL_TIMEOUT_S)

    async def members(self) -> AsyncIterator[admin.MemberStatus]:
        """All members, sorted by name, as an operator sees them."""
        after = ""
        while True:
            with self._errors_mapped():
                page = await self._admin.ListMembers(
                    admin.ListMembersRequest(after=after), timeout=CALL_TIMEOUT_S
                )
            for member in page.members:
                yield member
            if not page.members or page.members[-1].name <= after:
                return
            after = page.members[-1].name

    async def revoke_member(self, name: str) -> None:
        """Take a member's rights away, as an operator."""
        with self._errors_mapped():
            await self._admin.RevokeMember(
                admin.RevokeMemberRequest(name=name), timeout=CALL_TIMEOUT_S
            )

    async def rotate_member(self, name: str, life_s: int) -> admin.RotateMemberResponse:
        """Take a member's key away, as an operator; returns the token for a new one."""
        with self._errors_mapped():
            return await self._admin.RotateMember(
                admin.RotateMemberRequest(name=name, life_s=life_s), timeout=CALL_TIMEOUT_S
            )

    async def exclude_worker(self, worker: str, reason: str, run_id: str = "") -> None:
        """Take a worker out of the run, as an operator."""
        request = admin.ExcludeWorkerRequest(worker=worker, reason=reason, run_id=run_id)
        with self._errors_mapped():
            await self._admin.ExcludeWorker(request, timeout=CALL_TIMEOUT_S)

    async def readmit_worker(self, worker: str, run_id: str = "") -> None:
        """Let an excluded worker take part again, as an operator."""
        request = admin.ReadmitWorkerRequest(worker=worker, run_id=run_id)
        with self._errors_mapped():
            await self._admin.ReadmitWorker(request, timeout=CALL_TIMEOUT_S)

    async def upload_file(self, request: runs.UploadFileRequest) -> int:
        """Send a piece of a file, as an operator; returns where the next one begins."""
        with self._errors_mapped():
            return (await self._runs.UploadFile(request, timeout=CALL_TIMEOUT_S)).next_offset

    async def create_run(self, request: runs.CreateRunRequest) -> str:
        """Create a run, as an operator; returns its name."""
        with self._errors_mapped():
            return (await self._runs.CreateRun(request, timeout=CALL_TIMEOUT_S)).run_id

    async def list_runs(self, run_id: str = "") -> list[runs.RunSummary]:
        """The runs, the newest first; with `run_id` that one alone."""
        request = runs.ListRunsRequest(run_id=run_id)
        with self._errors_mapped():
            return list((await self._runs.ListRuns(request, timeout=CALL_TIMEOUT_S)).runs)

    async def pause_run(self, run_id: str, reason: str = "") -> None:
        """Hold a run, as an operator."""
        request = runs.PauseRunRequest(run_id=run_id, reason=reason)
        with self._errors_mapped():
            await self._runs.PauseRun(request, timeout=CALL_TIMEOUT_S)

    async def resume_run(self, run_id: str, rate_factor: float | None = None) -> None:
        """Let a paused run go on, as an operator."""
        request = runs.ResumeRunRequest(run_id=run_id, rate_factor=rate_factor)
        with self._errors_mapped():
            await self._runs.ResumeRun(request, timeout=CALL_TIMEOUT_S)

    async def stop_run(self, run_id: str, reason: str = "") -> None:
        """End a run, as an operator."""
        request = runs.StopRunRequest(run_id=run_id, reason=reason)
        with self._errors_mapped():
            await self._runs.StopRun(request, timeout=CALL_TIMEOUT_S)

    async def delete_run(self, run_id: str) -> None:
        """Delete a run that is over, as an operator."""
        with self._errors_mapped():
            await self._runs.DeleteRun(runs.DeleteRunRequest(run_id=run_id), timeout=CALL_TIMEOUT_S)

    async def offered_runs(
        self, worker: str, revision: int = 0, wait_s: float = 0.0
    ) -> runs.OfferRunsResponse:
        """The runs that `worker` may take part in; waits for a newer revision if there is none.

        An answer with the same `revision` has no offers: they are as they were.

        Raises `VersionError` or `ForbiddenError` if the coordinator offers no runs.
        """
        request = runs.OfferRunsRequest(
            worker=worker, revision=revision, wait_ms=int(1000 * wait_s)
        )
        with self._errors_mapped():
            return await self._runs.OfferRuns(request, timeout=CALL_TIMEOUT_S + wait_s)

    async def decline_run(self, worker: str, run_id: str, reason: str) -> None:
        """Say that `worker` does not take part in a run, and why."""
        request = runs.DeclineRunRequest(worker=worker, run_id=run_id, reason=reason)
        with self._errors_mapped():
            await self._runs.DeclineRun(request, timeout=CALL_TIMEOUT_S)

    async def open_page(self) -> runs.OpenPageResponse:
        """The parts of a link to the coordinator's page, as an observer or operator."""
        with self._errors_mapped():
            return await self._runs.OpenPage(runs.OpenPageRequest(), timeout=CALL_TIMEOUT_S)

    async def read_run_file(
        self, run_id: str, name: str, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a file that a run offers, from `offset` on, in pieces.

        A stream that breaks, or from which nothing comes for a while, is an `UnavailableError`:
        ask again from where it broke.
        """
        request = runs.ReadRunFileRequest(run_id=run_id, name=name, offset=offset)
        with self._errors_mapped():
            call = self._runs.ReadRunFile(request)
            try:
                while True:
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        piece = await call.read()
                    if not isinstance(piece, runs.ReadRunFileResponse):
                        return  # the end
                    if not piece.data:
                        raise ProtocolError(
                            f"The coordinator at {self.address} sent a piece of {name} without "
                            "bytes; check which coordinator that is."
                        )
                    yield piece.data
            except TimeoutError:
                raise UnavailableError(
                    f"No piece of {name} has come from {self.address} for {CALL_TIMEOUT_S:.0f} s."
                ) from None
            finally:
                call.cancel()

    def _errors_mapped(self) -> AbstractContextManager[None]:
        return errors_mapped(self.address, self._hint, shows_identity=self._shows_identity)


@contextmanager
def errors_mapped(address: str, hint: str, *, shows_identity: bool = False) -> Iterator[None]:
    """Turn errors of gRPC in this block into ours.

    `hint` ends a sentence that begins "check", if something has answered.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata = dict(tuple(error.trailing_metadata() or ()))  # by pairs in every version
        reason = str(metadata.get(REASON_KEY, ""))
        details = error.details() or "no details"
        if not reason and error.code() in _NOBODY_THERE:
            if words := next((words for words in _NOT_REACHED if words in details), ""):
                raise UnavailableError(
                    f"No coordinator answers at {address} ({words}); check the address, and that "
                    "it is running."
                ) from None
            if shows_identity and _is_of_another_ca(details):
                raise UnavailableError(
                    f"What answers at {address} shows a certificate that this identity does not "
                    "trust: it is another coordinator, or has a new state folder. Check the "
                    "address; if it is right, ask the operator for a new join string."
                ) from None
            raise UnavailableError(
                f"No coordinator answers at {address} ({details}); check the address, "
                f"that it is running, and {hint}."
            ) from None
        if not reason and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise VersionError(
                f"What answers at {address} is no FedMeZO coordinator of this version; "
                "check the address, or upgrade the older of the two."
            ) from None
        retry = str(metadata.get(RETRY_AFTER_KEY, ""))
        raise error_from(error.code().name, reason, details, retry) from None


def _is_of_another_ca(details: str) -> bool:
    """Whether TLS failed by the server's certificate, and not by its dates."""
    by_dates = "has expired" in details or "not yet valid" in details
    return "CERTIFICATE_VERIFY_FAILED" in details and not by_dates


def system_roots() -> bytes | None:
    """The CAs that this system trusts, in PEM; None: those that come with gRPC."""
    found = ssl.get_default_verify_paths().cafile
    return Path(found).read_bytes() if found is not None else None


def credentials_of(identity: Identity) -> grpc.ChannelCredentials:
    """What shows a member's identity; raises `IdentityError` if it is not valid now."""
    identity.check_time()
    return grpc.ssl_channel_credentials(
        identity.server_ca or system_roots(), identity.keys.key, identity.certificate
    )


def _channel_of(address: str, identity: Identity) -> grpc.aio.Channel:
    credentials = credentials_of(identity)
    return grpc.aio.secure_channel(address, credentials, options=channel_options(address))


def _roots_in(tls_ca: Path) -> bytes:
    try:
        roots = tls_ca.read_bytes()
        # gRPC would say nothing about a file that holds no certificate.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(tls_ca)
    except OSError as error:  # SSLError is one
        reason = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"tls_ca {tls_ca} cannot be read ({reason}); give the CA's PEM file."
        ) from None
    return roots


def _digest_or_empty(value: bytes, field: str) -> bytes:
    return digest_in(value, field) if value else b""


def _suffix_of(message: wire.Suffix) -> Suffix:
    return Suffix(message.pairs, message.bytes)


def _offer_of(message: wire.SnapshotOffer) -> SnapshotOffer:
    return SnapshotOffer(snapshot_from_pb(message.snapshot), _suffix_of(message.missing))


class SessionStream:
    """Both directions of one session."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[wire.SessionRequest, wire.SessionResponse],
        client: CoordinatorClient,
        channel: grpc.aio.Channel,
    ) -> None:
        self._call = call
        self._client = client
        self.channel = channel
        """What carries the session."""

    async def send(self, message: wire.SessionRequest) -> None:
        """Send one message to the coordinator."""
        with self._client._errors_mapped():
            try:
                await self._call.write(message)
            except asyncio.InvalidStateError:
                # The stream has ended; reading says with which status.
                await self._call.read()
                raise UnavailableError("The coordinator ended the session.") from None

    async def receive(self) -> wire.SessionResponse | None:
        """The next message from the coordinator, or None when it has ended the session."""
        with self._client._errors_mapped():
            message = await self._call.read()
        if isinstance(message, wire.SessionResponse):
            return message
        return None

    async def end(self) -> None:
        """Tell the coordinator that nothing more will be sent."""
        with self._client._errors_mapped():
            await self._call.done_writing()

    def cancel(self) -> None:
        """Break the session off."""
        self._call.cancel()
