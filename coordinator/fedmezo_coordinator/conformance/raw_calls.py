"""Calls of a coordinator as they are: any bytes up, and every status, reason and sentence down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from fedmezo_coordinator.conformance.report import CheckFailedError
from fedmezo_core.errors import ConfigError
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.client import channel_options, credentials_of
from fedmezo_core.wire.grpc_status import REASON_KEY
from fedmezo_proto.v1 import coordinator_pb2 as wire

SERVICE = "/fedmezo.v1.CoordinatorService"

Response = TypeVar("Response", bound=Message)


class CallEndedError(Exception):
    """How a call ended: `OK`, or an error's status, reason and sentence."""

    def __init__(self, status: str, reason: str = "", sentence: str = "") -> None:
        super().__init__(status, reason, sentence)
        self.status = status
        self.reason = reason
        """The trailing metadata's `fedmezo-reason`; empty: none."""
        self.sentence = sentence

    def __str__(self) -> str:
        return f"{self.status} {self.reason or '(no reason)'}: {self.sentence[:120]}"


class RawCoordinator:
    """One connection to a coordinator; use it as an async context manager."""

    def __init__(
        self,
        address: str,
        tls_ca: Path | None,
        patience_s: float,
        identity: Identity | None = None,
    ) -> None:
        """`tls_ca` is a PEM file to trust; None: no TLS. `patience_s` bounds each wait.

        An `identity` is shown, and says itself what to trust. Raises `IdentityError` if it is not
        valid now.
        """
        self._address = address
        self._patience_s = patience_s
        self._credentials: grpc.ChannelCredentials | None = None
        if identity is not None:
            self._credentials = credentials_of(identity)
        elif tls_ca is not None:
            try:
                self._credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes())
            except OSError as error:
                raise ConfigError(
                    f"tls_ca {tls_ca} cannot be read ({error.strerror}); give the CA's PEM file."
                ) from None
        self._channel: Any = None

    async def __aenter__(self) -> Self:
        # A channel belongs to the event loop that it is made in.
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(
                self._address, options=channel_options(self._address)
            )
        else:
            self._channel = grpc.aio.secure_channel(
                self._address, self._credentials, options=channel_options(self._address)
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def call(self, method: str, request: Message | bytes, kind: type[Response]) -> Response:
        """The response to a unary call; raises `CallEndedError`."""
        sent = request if isinstance(request, bytes) else request.SerializeToString()
        unary = self._channel.unary_unary(f"{SERVICE}/{method}")
        with _ended():
            answer: Any = await unary(sent, timeout=self._patience_s)
            return _read(kind, answer)

    async def first_piece(self, request: wire.ReadSnapshotRequest) -> wire.ReadSnapshotResponse:
        """The first message of a snapshot; raises `CallEndedError`."""
        pieces = self._channel.unary_stream(f"{SERVICE}/ReadSnapshot")
        call: Any = pieces(request.SerializeToString(), timeout=self._patience_s)
        with _ended():
            return _read(wire.ReadSnapshotResponse, await call.read())

    def session(self) -> RawStream:
        """A session's stream."""
        return RawStream(self._channel.stream_stream(f"{SERVICE}/Session")(), self._patience_s)


class RawStream:
    """Both directions of a session."""

    def __init__(self, call: Any, patience_s: float) -> None:
        self._call = call
        self._patience_s = patience_s

    async def send(self, message: wire.SessionRequest | bytes) -> None:
        """Send a message, or any bytes; a stream that has ended takes them, and `receive` tells."""
        sent = message if isinstance(message, bytes) else message.SerializeToString()
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.write(sent)

    async def receive(self, patience_s: float | None = None) -> wire.SessionResponse:
        """The next message; raises `CallEndedError` at the end of the stream.

        Raises `CheckFailedError` if nothing comes in time.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        with _ended():
            try:
                serialized = await asyncio.wait_for(self._call.read(), patience_s)
            except TimeoutError:
                raise CheckFailedError(f"nothing came for {patience_s:g} s") from None
            if serialized is grpc.aio.EOF:
                raise CallEndedError((await self._call.code()).name)
            return _read(wire.SessionResponse, serialized)

    async def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.done_writing()

    def cancel(self) -> None:
        """Break the stream off, as a lost connection does."""
        self._call.cancel()


def _read(kind: type[Response], serialized: Any) -> Response:
    if not isinstance(serialized, bytes):
        raise CheckFailedError("the call ended without a message")
    try:
        return kind.FromString(serialized)
    except DecodeError:
        raise CheckFailedError(f"bytes came that are no {kind.DESCRIPTOR.name}") from None


@contextmanager
def _ended() -> Iterator[None]:
    """Turn gRPC's error into a `CallEndedError`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        metadata: dict[Any, Any] = dict(tuple(error.trailing_metadata() or ()))
        reason = str(metadata.get(REASON_KEY, ""))
        raise CallEndedError(error.code().name, reason, error.details() or "") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CallEndedError("CANCELLED", "", "this side broke the stream off") from None
