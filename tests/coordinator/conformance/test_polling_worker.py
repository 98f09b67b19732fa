"""The battery leads a worker without a stream, which is the library's session over polls."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fedmezo import Session
from fedmezo_coordinator.conformance.raw_calls import CallEndedError, RawCoordinator
from fedmezo_coordinator.conformance.report import Report
from fedmezo_coordinator.conformance.scripted_server import scripted
from fedmezo_coordinator.conformance.worker_battery import WorkerBattery, WorkerTest
from fedmezo_coordinator.conformance.worker_endings import ENDINGS
from fedmezo_core.errors import (
    JournalBehindError,
    ProtocolError,
    UnavailableError,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.coordinator.conformance.test_worker_battery import running
from tests.integration.support.harness import PATIENCE_S, config_of, genesis_of
from tests.library.light_engine import LightEngine

RETRY_S = 0.02


async def polls(address: str) -> None:
    """Take part in the run at an address until it is over."""
    async with RawCoordinator(address, None, PATIENCE_S) as coordinator:
        asked = wire.GetRunRequest(protocol_versions=[1])
        run = await coordinator.call("GetRun", asked, wire.GetRunResponse)
        session = Session(run.genesis, "w1", LightEngine("w1"))
        while not session.finished:
            up, token = session.connect(), b""
            with suppress(CallEndedError, ProtocolError, JournalBehindError, UnavailableError):
                while True:
                    request = wire.PollSessionRequest(
                        token=token,
                        messages=[wire.SessionRequest.FromString(message) for message in up],
                        wait_ms=1000,
                        leave=session.finished,
                    )
                    reply = await coordinator.call("PollSession", request, wire.PollSessionResponse)
                    if session.finished:
                        break
                    token, up = reply.token, []
                    for message in reply.messages:
                        up += session.receive(message.SerializeToString())
            session.disconnect()
            await asyncio.sleep(RETRY_S)


async def test_a_worker_that_stops_without_another_poll_has_stopped() -> None:
    config = config_of(rounds=60, probes=4, local_steps=1)
    test = WorkerTest(genesis_of(config), None, patience_s=PATIENCE_S)
    endings = {name: ending for name, _, ending in ENDINGS}
    await endings["stops at a record that is no commit"](test, running(polls))
    await endings["stops at a welcome of another history"](test, running(polls))


async def test_a_worker_that_polls_is_led_through_the_run() -> None:
    config = config_of(rounds=60, probes=4, local_steps=1, report_losses=True)
    report = Report("worker")
    battery = WorkerBattery(WorkerTest(genesis_of(config), None, patience_s=5.0), report)
    async with scripted(battery.server, "127.0.0.1:0") as address:
        polling = asyncio.create_task(polls(address))
        try:
            await battery.run()
            await asyncio.wait_for(polling, PATIENCE_S)
        finally:
            polling.cancel()
    failed = {check.name for check in report.checks if check.outcome == "failed"}
    # This one never reads the journal: it waits until it gets its commits in a session.
    assert failed == {"reads the journal page by page when it is far behind"}
