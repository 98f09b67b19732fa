"""What callers hear of a coordinator or relay that is still starting, and how a start fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, RelaySettings
from fedmezo_coordinator.programs import coordinator_command, relay_command
from fedmezo_coordinator.programs.run_commands import watching
from fedmezo_coordinator.runs import preparing
from fedmezo_core.errors import (
    ConfigError,
    JournalLockedError,
    ModelError,
    StartingError,
)
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, free_port, genesis_of, run_values

PATIENCE_S = 20.0
GENESIS = genesis_of(config_of(rounds=2, workers_min=1, quorum=1, local_steps=1))


class Starting:
    """A coordinator in this process that loads its base until the test says how that ends."""

    def __init__(self, folder: Path) -> None:
        self.stop = asyncio.Event()
        self.base: asyncio.Future[Genesis] = asyncio.get_running_loop().create_future()
        self.loads = asyncio.Event()
        self.running: asyncio.Task[None] | None = None
        self.address = f"127.0.0.1:{free_port()}"
        self.settings = CoordinatorSettings.model_validate(
            {
                "listen": self.address,
                "journal": str(folder / "journal.db"),
                "run": run_values(rounds=2, workers_min=1, quorum=1, local_steps=1),
                "replica": False,
            }
        )

    async def describe(self, *_: Any) -> Genesis:
        self.loads.set()
        return await self.base


@pytest.fixture
async def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Starting]:
    held = Starting(tmp_path)
    monkeypatch.setattr(preparing, "describe_base", held.describe)
    monkeypatch.setattr(coordinator_command, "stop_signal", lambda: held.stop)
    held.running = running = asyncio.create_task(coordinator_command.run(held.settings))
    await asyncio.wait_for(held.loads.wait(), PATIENCE_S)
    yield held
    held.stop.set()
    await asyncio.gather(running, return_exceptions=True)


async def _session(client: CoordinatorClient) -> None:
    stream = client.session()
    await stream.send(wire.SessionRequest())
    await stream.receive()


async def _snapshot(client: CoordinatorClient) -> None:
    async for _ in client.read_snapshot("", 1, 0):
        pass


CALLS: dict[str, Callable[[CoordinatorClient], Awaitable[Any]]] = {
    "GetRun": lambda client: client.get_run(),
    "GetStatus": lambda client: client.get_status(),
    "ReadJournal": lambda client: client.read_journal(),
    "PollSession": lambda client: client.poll_session(b""),
    "ReportReplica": lambda client: client.report_replica("", b"", 0, b"", None),
    "ReadSnapshot": _snapshot,
    "Session": _session,
}


def test_every_call_is_listed() -> None:
    service = wire.DESCRIPTOR.services_by_name["CoordinatorService"]
    assert {method.name for method in service.methods} == CALLS.keys()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_while_it_loads_every_call_hears_what_it_does(
    starting: Starting, call: Callable[[CoordinatorClient], Awaitable[Any]]
) -> None:
    async with CoordinatorClient(starting.address) as client:
        with pytest.raises(
            StartingError, match=r"coordinator is starting \(loading tiny .*: 0 s so far\); it"
        ) as caught:
            await asyncio.wait_for(call(client), PATIENCE_S)
        assert caught.value.retry_after_s


async def test_it_answers_once_it_has_loaded(starting: Starting) -> None:
    async with CoordinatorClient(starting.address) as client:
        with pytest.raises(StartingError):
            await client.get_run()
        starting.base.set_result(GENESIS)
        status = await asyncio.wait_for(watching.first_status(client), PATIENCE_S)
        assert status.config.run_id == GENESIS.config.run_id


@pytest.mark.parametrize("rate", [None, 0.25])
async def test_a_rate_that_nobody_set_is_told(
    rate: float | None,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    held = Starting(tmp_path)
    run = {key: value for key, value in held.settings.run.items() if key != "learning_rate"}
    run |= {} if rate is None else {"learning_rate": rate}
    settings = held.settings.model_copy(update={"run": run})
    held.base.set_exception(ModelError("There is no model tiny."))
    monkeypatch.setattr(preparing, "describe_base", held.describe)
    monkeypatch.setattr(coordinator_command, "stop_signal", lambda: held.stop)
    with pytest.raises(ModelError):
        await coordinator_command.run(settings)
    own = settings.run_config("the test").learning_rate
    said = (
        f"the learning rate is {own:g}, which was not measured (there are no rows for that; set "
        "probe_rows); it may be far too long or too short for this model (docs/choosing.md)"
    )
    assert (said in caplog.messages) == (rate is None)


async def test_a_base_that_cannot_be_loaded_ends_it_with_that_error(starting: Starting) -> None:
    async with CoordinatorClient(starting.address) as client:
        with pytest.raises(StartingError):
            await client.get_run()
    starting.base.set_exception(ModelError("There is no model tiny."))
    assert starting.running is not None
    with pytest.raises(ModelError, match="There is no model tiny"):
        await asyncio.wait_for(starting.running, PATIENCE_S)


async def test_a_second_one_is_refused_at_once(starting: Starting) -> None:
    with pytest.raises(ConfigError, match="another process uses the address"):
        await coordinator_command.run(starting.settings)
    other = starting.settings.model_copy(update={"listen": "127.0.0.1:0"})
    with pytest.raises(JournalLockedError):
        await coordinator_command.run(other)


async def test_a_relay_says_that_it_waits_for_the_coordinator_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    monkeypatch.setattr(relay_command, "stop_signal", lambda: stop)
    address = f"127.0.0.1:{free_port()}"
    settings = RelaySettings.model_validate(
        {
            "upstream": f"127.0.0.1:{free_port()}",
            "name": "site",
            "listen": address,
            "journal_copy": tmp_path / "copy.db",
        }
    )
    running = asyncio.create_task(relay_command.run(settings))
    async with CoordinatorClient(address) as client:
        await asyncio.sleep(0.5)
        with pytest.raises(StartingError, match=r"The relay is starting \("):
            await client.get_run()
    stop.set()
    await asyncio.wait_for(running, PATIENCE_S)


async def test_watch_waits_with_one_line(
    starting: Starting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmezo.command")
    async with CoordinatorClient(starting.address) as client:
        waiting = asyncio.create_task(watching.first_status(client))
        await asyncio.sleep(2.5)
        assert not waiting.done()
        starting.base.set_result(GENESIS)
        await asyncio.wait_for(waiting, PATIENCE_S)
    [line] = [one.getMessage() for one in caplog.records if one.name == "fedmezo.command"]
    assert line.endswith("it answers when that is done. Waiting until then.")
