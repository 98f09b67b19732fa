"""The client: what it makes of peers that are not what they should be."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from fedmezo_core.errors import (
    FedMezoError,
    JournalCorruptError,
    ProtocolError,
    UnavailableError,
    VersionError,
)
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import Started
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire

SERVICE = "fedmezo.v1.CoordinatorService"


@asynccontextmanager
async def client_of(
    get_run: Callable[[Any], Awaitable[wire.GetRunResponse]] | None,
) -> AsyncIterator[CoordinatorClient]:
    """A client of a real gRPC server whose GetRun, if it has one, does what a test wants."""
    server = grpc.aio.server()
    if get_run is not None:

        async def handle(_: wire.GetRunRequest, context: Any) -> wire.GetRunResponse:
            return await get_run(context)

        handler = grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=wire.GetRunRequest.FromString,
            response_serializer=wire.GetRunResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {"GetRun": handler})]
        )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with CoordinatorClient(f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(None)


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound and not listening: nobody else gets it either.
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with CoordinatorClient(address) as client:
            with pytest.raises(UnavailableError) as caught:
                await client.get_run()
            assert f"No coordinator answers at {address}" in str(caught.value)
            with pytest.raises(UnavailableError):
                await client.session().receive()


async def test_another_grpc_service_is_no_coordinator() -> None:
    async with client_of(None) as client:
        with pytest.raises(VersionError, match=r"is no FedMeZO coordinator of this version"):
            await client.get_run()


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        ("NOT_FOUND", "WrongRunError", "WrongRunError"),
        ("INVALID_ARGUMENT", "OfALaterVersionError", "ProtocolError"),
        ("INTERNAL", "JournalError", "JournalError"),
        ("UNAVAILABLE", "UnavailableError", "UnavailableError"),
        ("UNKNOWN", "", "UnavailableError"),
        ("ABORTED", "", "FedMezoError"),
    ],
)
async def test_a_status_comes_out_as_our_error(code: str, reason: str, kind: str) -> None:
    async def get_run(context: Any) -> wire.GetRunResponse:
        metadata = (("fedmezo-reason", reason),) if reason else ()
        await context.abort(getattr(grpc.StatusCode, code), "the sentence", metadata)
        raise AssertionError("abort raises")

    async with client_of(get_run) as client:
        with pytest.raises(FedMezoError, match="the sentence") as caught:
            await client.get_run()
    assert type(caught.value).__name__ == kind


async def test_a_run_described_by_garbage_is_refused() -> None:
    async def get_run(_: Any) -> wire.GetRunResponse:
        return wire.GetRunResponse(protocol_version=1, genesis=b"garbage")

    async with client_of(get_run) as client:
        with pytest.raises(JournalCorruptError, match="cannot be read"):
            await client.get_run()


async def test_a_run_described_by_another_record_is_refused() -> None:
    async def get_run(_: Any) -> wire.GetRunResponse:
        return wire.GetRunResponse(protocol_version=1, genesis=encode_record(Started(1)))

    async with client_of(get_run) as client:
        with pytest.raises(ProtocolError, match="described its run by a Started record"):
            await client.get_run()


async def test_a_session_that_is_refused_says_why() -> None:
    async with client_of(None) as client:
        stream = client.session()
        with pytest.raises(VersionError, match="is no FedMeZO coordinator of this version"):
            await stream.receive()
        with pytest.raises(VersionError, match="is no FedMeZO coordinator of this version"):
            await stream.send(wire.SessionRequest())
