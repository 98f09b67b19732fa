"""The gRPC client of a coordinator, for workers, the replica and the command line.

The only core module that imports grpc. Every `grpc` error leaves it as one of ours.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

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
from fedmezo_core.wire.grpc_status import REASON_KEY, RETRY_AFTER_KEY, error_from
from fedmezo_core.wire.messages import snapshot_from_pb
from fedmezo_core.wire.snapshots import Snapshot, SnapshotOffer, Suffix
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc

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
    ("grpc.enable_http_proxy", 0),
)


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


class CoordinatorClient:
    """One channel to one coordinator; use it as an async context manager."""

    def __init__(self, address: str, tls_ca: Path | None = None) -> None:
        """`address` is host:port; `tls_ca` a PEM file to trust, or None for plain TCP."""
        self.address = address
        self._hint = (
            "whether it serves TLS (then set tls_ca)"
            if tls_ca is None
            else "that it serves TLS, and whether its certificate is of that CA and names that host"
        )
        if tls_ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            try:
                roots = tls_ca.read_bytes()
                # gRPC would say nothing about a file that holds no certificate.
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(tls_ca)
            except OSError as error:  # SSLError is one
                reason = (
                    "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
                )
                raise ConfigError(
                    f"tls_ca {tls_ca} cannot be read ({reason}); give the CA's PEM file."
                ) from None
            self._channel = grpc.aio.secure_channel(
                address, grpc.ssl_channel_credentials(roots), options=CHANNEL_OPTIONS
            )
        self._stub = rpc.CoordinatorServiceStub(self._channel)

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
        await self._channel.close()

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
        return SessionStream(self._stub.Session(), self)

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            metadata = dict(tuple(error.trailing_metadata() or ()))  # by pairs in every version
            reason = str(metadata.get(REASON_KEY, ""))
            details = error.details() or "no details"
            if not reason and error.code() in _NOBODY_THERE:
                raise UnavailableError(
                    f"No coordinator answers at {self.address} ({details}); check the address, "
                    f"that it is running, and {self._hint}."
                ) from None
            if not reason and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise VersionError(
                    f"What answers at {self.address} is no FedMeZO coordinator of this version; "
                    "check the address, or upgrade the older of the two."
                ) from None
            hint = str(metadata.get(RETRY_AFTER_KEY, ""))
            raise error_from(error.code().name, reason, details, hint) from None


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
    ) -> None:
        self._call = call
        self._client = client

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
