"""Every RPC, called for real by every kind of caller: the tests come from the table of rights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fedmezo_core.trust import certificates
from fedmezo_core.trust.authorisation import MEMBER_ROLES, RIGHTS, Role
from fedmezo_core.trust.identity import Identity
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.grpc_status import REASON_KEY
from fedmezo_proto.v1 import admin_pb2, admin_pb2_grpc, coordinator_pb2, runs_pb2
from tests.integration.support.fleets import ServedFleet, served_fleet
from tests.integration.support.harness import config_of, genesis_of, served

GENESIS = genesis_of(config_of(rounds=2, local_steps=1, workers_min=2, quorum=2))
NOW_S = int(time.time())
ENROLL = "/fedmezo.v1.EnrollmentService/Enroll"

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (coordinator_pb2, admin_pb2, runs_pb2, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.full_name != "grpc.health.v1.Health.List"  # In newer versions; nobody may call it.
}
HEALTH = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
OF_A_RUN = sorted(
    path
    for path, method in METHODS.items()
    if "run_id" in method.input_type.fields_by_name or path.endswith("/Session")
)

DENIED = "ForbiddenError"
NO_CONNECTION = "UNAVAILABLE"
NOT_SERVED = "UNIMPLEMENTED"
TOO_LARGE = "RESOURCE_EXHAUSTED"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state folder for all cells, because making one takes a while."""
    return tmp_path_factory.mktemp("fleet")


@asynccontextmanager
async def channel_to(
    at: ServedFleet, who: str, folder: Path, *, to: str = ""
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of a kind of caller, to the main port unless `to` is another address."""
    if who == "replica":
        async with grpc.aio.insecure_channel(f"unix:{folder}/replica.sock") as channel:
            yield channel
        return
    if who == "plain":
        async with grpc.aio.insecure_channel(to or at.address) as channel:
            yield channel
        return
    shown = await certificate_of(at, who)
    ca = (at.state / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, *shown)
    async with grpc.aio.secure_channel(to or at.address, credentials) as channel:
        yield channel


async def certificate_of(at: ServedFleet, who: str) -> tuple[bytes, bytes] | tuple[()]:
    """The key and certificate that a kind of caller shows; none for `anonymous`."""
    if who == "anonymous":
        return ()
    if who in ("wrong CA", "expired", "not valid yet"):
        key = certificates.new_key()
        public = certificates.key_of_request(certificates.new_request(key))
        ours = certificates.Authority(
            (at.state / "ca.pem").read_bytes(), (at.state / "ca.key").read_bytes()
        )
        authority = certificates.new_authority(NOW_S) if who == "wrong CA" else ours
        day_s = {"wrong CA": 0, "expired": -86_400, "not valid yet": 86_400}[who]
        issued = certificates.issue_member(authority, public, "w1", NOW_S + day_s, 3600)
        return key, issued
    identity = await member(at, who)
    return identity.keys.key, identity.certificate


async def member(at: ServedFleet, who: str) -> Identity:
    """A member whose name is its role, which joins if it is not there yet."""
    if who == "operator":
        return at.operator
    role = Role.WORKER if who == "revoked" else Role(who)
    known = {one.name: one async for one in _members(at)}
    if who in known:
        return await at.joined(_joined_with[at.folder, who], who)
    join = _joined_with[at.folder, who] = await at.join_string(who, role)
    identity = await at.joined(join, who)
    if who == "revoked":
        async with at.client(at.operator) as client:
            await client.revoke_member(who)
    return identity


_joined_with: dict[tuple[Path, str], str] = {}


async def _members(at: ServedFleet) -> AsyncIterator[Any]:
    async with at.client(at.operator) as client:
        async for one in client.members():
            yield one


async def outcome(channel: grpc.aio.Channel, path: str, run_id: str | None = None) -> str:
    """What comes of a call with an almost empty request: OK, the reason, or gRPC's own status."""
    method = METHODS[path]
    request = GetMessageClass(method.input_type)()
    if run_id is not None and not method.client_streaming:
        request.run_id = run_id  # type: ignore[attr-defined]
    if path.endswith("/GetRun"):
        request.protocol_versions.append(1)  # type: ignore[attr-defined]
    if method.client_streaming and run_id is not None:
        request.hello.run_id, request.hello.worker = run_id, "worker"  # type: ignore[attr-defined]
        request.hello.protocol_version = 1  # type: ignore[attr-defined]
    read = GetMessageClass(method.output_type).FromString
    write = GetMessageClass(method.input_type).SerializeToString
    try:
        if method.client_streaming:
            stream = channel.stream_stream(path, write, read)(timeout=10)
            await stream.write(request)
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
            await stream.code()
        elif method.server_streaming:
            async for _ in channel.unary_stream(path, write, read)(request, timeout=10):
                if path in HEALTH:
                    break  # A watcher is told of every change.
        else:
            await channel.unary_unary(path, write, read)(request, timeout=10)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        if isinstance(error, asyncio.InvalidStateError) or method.client_streaming:
            # The stream may have ended before it was written to.
            code, found = await stream.code(), await stream.trailing_metadata()
        else:
            code, found = error.code(), error.trailing_metadata()
        return str(dict(tuple(found or ())).get(REASON_KEY, code.name))
    return "OK"


def expected(path: str, who: str) -> str:
    """What the table says of a cell: an exact refusal, or `allowed`."""
    if who in ("plain", "anonymous", "wrong CA", "expired", "not valid yet"):
        return NO_CONNECTION
    if path == ENROLL:
        return NOT_SERVED
    if who == "revoked":
        return "RevokedError"
    return "allowed" if Role(who) in RIGHTS[path] else DENIED


CALLERS = (
    "plain", "anonymous", "wrong CA", "expired", "not valid yet", "revoked", "worker", "observer",
    "operator", "replica",
)  # fmt: skip


def test_the_kinds_of_callers_are_all_there_are() -> None:
    assert set(CALLERS) >= {str(role) for role in MEMBER_ROLES | {Role.REPLICA}}
    assert set(METHODS) == set(RIGHTS)


@pytest.mark.parametrize("path", sorted(RIGHTS))
async def test_who_may_call(path: str, folder: Path) -> None:
    async with served_fleet(folder, GENESIS, reflection=True) as at:
        for role in ("worker", "observer", "revoked"):
            await member(at, role)
        files = (at.state / "members.jsonl", folder / "journal.db")
        for who in CALLERS:
            before = [file.read_bytes() for file in files]
            async with channel_to(at, who, folder) as channel:
                came = await outcome(channel, path)
            if expected(path, who) == "allowed":
                assert came not in (DENIED, "IdentityError", "RevokedError", NOT_SERVED, "INTERNAL")
                assert came not in (NO_CONNECTION, "UNKNOWN"), (who, came)
            else:
                assert came == expected(path, who), who
                assert [file.read_bytes() for file in files] == before, who


@pytest.mark.parametrize("path", OF_A_RUN)
async def test_a_call_for_another_run_is_refused(path: str, folder: Path) -> None:
    callers = ("worker", "replica", "operator")
    who = next(who for who in callers if Role(who) in RIGHTS[path])
    async with served_fleet(folder, GENESIS) as at, channel_to(at, who, folder) as channel:
        assert await outcome(channel, path, "another-run") == "WrongRunError"


async def test_the_enrolment_port_serves_one_call_and_probes(folder: Path) -> None:
    async with served_fleet(folder, GENESIS) as at:
        where = parse_join_string(await at.join_string(uses=2)).enrol_address
        for who in ("anonymous", "wrong CA", "revoked", "operator"):
            async with channel_to(at, who, folder, to=where) as channel:
                for path in sorted(RIGHTS):
                    wanted = "ProtocolError" if path == ENROLL else NOT_SERVED
                    wanted = "OK" if path in HEALTH else wanted
                    assert await outcome(channel, path) == wanted, (who, path)


@pytest.mark.parametrize(("name", "came"), [("x" * 7000, "ProtocolError"), ("x" * 8192, TOO_LARGE)])
async def test_a_call_to_the_enrolment_port_is_small(folder: Path, name: str, came: str) -> None:
    async with served_fleet(folder, GENESIS) as at:
        where = parse_join_string(await at.join_string(uses=2)).enrol_address
        async with channel_to(at, "anonymous", folder, to=where) as channel:
            enroll = admin_pb2_grpc.EnrollmentServiceStub(channel).Enroll
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await enroll(admin_pb2.EnrollRequest(name=name))
        metadata = dict(tuple(caught.value.trailing_metadata() or ()))
        assert metadata.get(REASON_KEY, caught.value.code().name) == came


async def test_everybody_may_do_the_same_without_a_state_folder(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        grpc.aio.insecure_channel(at.address) as channel,
    ):
        for path, roles in RIGHTS.items():
            came = await outcome(channel, path)
            if path in (ENROLL, REFLECTION):
                assert came == NOT_SERVED
            elif Role.ANYONE in roles:
                assert came not in (DENIED, "IdentityError", NOT_SERVED, "UNKNOWN"), path
            else:
                assert came == DENIED, path
