"""`grpc.health.v1` and reflection, by real calls to every port that answers them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.hosting import fronted, host
from fedmezo_core.errors import StartingError, UnavailableError, WrongRunError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Answered
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import admin_pb2, coordinator_pb2, runs_pb2
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.home.conftest import invoked
from tests.integration.support.fleets import served_fleet
from tests.integration.support.harness import (
    config_of,
    free_port,
    genesis_of,
    records_of,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=2, local_steps=1, workers_min=2, quorum=2))
RUN = GENESIS.config.run_id
CHECK = "/grpc.health.v1.Health/Check"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


def daemon_at(path: Path) -> Daemon:
    journal = Journal(SqliteStore(path))
    journal.append(encode_records([GENESIS]))
    return Daemon(journal)


@asynccontextmanager
async def plain(address: str) -> AsyncIterator[health_pb2_grpc.HealthAsyncStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def test_it_serves_once_its_journal_is_read_and_until_it_stops(tmp_path: Path) -> None:
    at = f"127.0.0.1:{free_port()}"
    settings = CoordinatorSettings(listen="127.0.0.1:0", health_listen=at)
    daemon, stop = daemon_at(tmp_path / "j.db"), asyncio.Event()
    async with fronted(settings, "coordinator") as front, plain(at) as health:
        main = f"127.0.0.1:{front.port}"
        seen: list[int] = []

        async def watch() -> None:
            statuses = health.Watch(health_pb2.HealthCheckRequest())
            while True:
                seen.append((await statuses.read()).status)

        watching = asyncio.create_task(watch())
        async with CoordinatorClient(main) as client:
            assert not await client.is_served()
            with pytest.raises(WrongRunError):
                await client.is_served(RUN)
            with pytest.raises(StartingError):
                await client.get_run()
            with pytest.raises(StartingError, match="does not serve yet, or no more"):
                await asyncio.to_thread(invoked, "health", "--coordinator", main)
            await daemon.load()
            hosting = asyncio.create_task(
                host(settings, front, Runs.of(daemon), stop, "the run is")
            )

            async def serves() -> bool:
                return await client.is_served()

            await until(serves, "the process to serve")
            assert await client.is_served(RUN)
            assert await client.is_served("fedmezo.v1.CoordinatorService")
            assert await client.is_served("fedmezo.v1.RunService")
        async with CoordinatorClient(at) as probe:
            assert await probe.is_served()
            # Whoever reaches the port of probes learns no names of runs.
            with pytest.raises(WrongRunError):
                await probe.is_served(RUN)

        async def saw_it() -> bool:
            return seen == [NOT_SERVING, SERVING]

        await until(saw_it, "the watcher to see it serve")
        stop.set()
        await hosting
        # The port of probes outlives the others, so that a probe sees the end.
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_nothing_else_is_served_to_probes(tmp_path: Path) -> None:
    at = f"127.0.0.1:{free_port()}"
    settings = CoordinatorSettings(listen="127.0.0.1:0", health_listen=at, reflection=True)
    async with fronted(settings, "coordinator"), grpc.aio.insecure_channel(at) as channel:
        for path in ("/fedmezo.v1.CoordinatorService/GetStatus", "/grpc.health.v1.Health/List"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(path, bytes, bytes)(b"")
            assert caught.value.code() in (
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.PERMISSION_DENIED,
            )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(CHECK, bytes, bytes)(b"\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_fleet_answers_probes_without_an_identity_where_members_join(
    tmp_path: Path,
) -> None:
    async with served_fleet(tmp_path, GENESIS) as at:
        where = parse_join_string(await at.join_string()).enrol_address
        async with CoordinatorClient(where, at.state / "ca.pem") as probe:
            assert await probe.is_served()
        async with CoordinatorClient(at.address, at.state / "ca.pem") as stranger:
            with pytest.raises(UnavailableError):
                await stranger.is_served()
        async with at.client(await at.member("w1")) as member:
            assert await member.is_served(RUN)


async def test_answers_that_have_arrived_are_written_before_the_end(tmp_path: Path) -> None:
    settings = CoordinatorSettings(listen="127.0.0.1:0")
    daemon, stop = daemon_at(tmp_path / "j.db"), asyncio.Event()
    async with fronted(settings, "coordinator") as front:
        await daemon.load()
        hosting = asyncio.create_task(host(settings, front, Runs.of(daemon), stop, "the run is"))
        async with scripted_workers(f"127.0.0.1:{front.port}", GENESIS, "w1", "w2") as both:
            for hand in both:
                await hand.open()
            assigned = [await hand.assigned() for hand in both]
            receive, arrived = daemon.receive, asyncio.Event()

            async def received(session: object, message: wire.SessionRequest) -> None:
                await receive(session, message)  # type: ignore[arg-type]
                # In the queue, and nothing has taken it yet.
                stop.set()
                front.servicer.refuse_from_now_on()
                arrived.set()

            daemon.receive = received  # type: ignore[method-assign]
            await both[0].answer(assigned[0])
            await arrived.wait()
            async with CoordinatorClient(f"127.0.0.1:{front.port}") as late:
                with pytest.raises(UnavailableError) as caught:
                    await late.get_run()
            await hosting
            assert caught.value.retry_after_s is None or caught.value.retry_after_s > 0
    answers = [one for one in records_of(tmp_path / "j.db") if isinstance(one, Answered)]
    assert [(one.round, one.slot) for one in answers] == [(1, assigned[0].ticket.slot)]


async def test_services_are_described_where_that_is_asked_for(tmp_path: Path) -> None:
    settings = CoordinatorSettings(listen="127.0.0.1:0", reflection=True)
    ask = reflection_pb2.ServerReflectionRequest
    async with (
        fronted(settings, "coordinator") as front,
        grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel,
    ):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(ask(list_services=""))
        listed = (await call.read()).list_services_response.service
        own = {
            service.full_name
            for file in (coordinator_pb2, admin_pb2, runs_pb2)
            for service in file.DESCRIPTOR.services_by_name.values()
        }
        assert {one.name for one in listed} >= own - {"fedmezo.v1.EnrollmentService"}
        for service in listed:
            await call.write(ask(file_containing_symbol=service.name))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        grpc.aio.insecure_channel(at.address) as channel,
    ):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
