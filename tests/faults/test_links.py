"""Bad links between a coordinator and agents: the run ends as it would without them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from fedmezo_coordinator.serving import service
from fedmezo_core.wire import client
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.faults.light_worker import with_quick_keepalive, work_lightly
from tests.faults.proxy import Proxy, proxied
from tests.integration.support.harness import (
    PATIENCE_S,
    ROOT,
    Served,
    config_of,
    environment,
    genesis_of,
    served,
    until,
)

NAMES = ("w1", "w2", "w3")
ROUNDS = 10
GENESIS = genesis_of(
    config_of(
        rounds=ROUNDS,
        workers_min=3,
        quorum=3,
        cohort_size_max=3,
        deadline_ms=600_000,
        digest_every_rounds=1,
    )
)


@pytest.fixture(autouse=True)
def _quick_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CHANNEL_OPTIONS", with_quick_keepalive(client.CHANNEL_OPTIONS))
    monkeypatch.setattr(service, "SERVER_OPTIONS", with_quick_keepalive(service.SERVER_OPTIONS))


def head_of(at: Served) -> bytes:
    """Of a run that must be finished, soundly."""
    status = at.daemon.status("")
    assert status.phase == wire.PHASE_FINISHED
    assert (status.round, len(status.divergences)) == (ROUNDS, 0)
    return status.head


async def rounds_of(at: Served) -> AsyncIterator[int]:
    """Every third round, as it is reached."""
    for round_ in range(2, ROUNDS - 1, 3):

        async def reached(round_: int = round_) -> bool:
            return at.daemon.status("").round >= round_

        await until(reached, f"round {round_}")
        yield round_


async def head_through(path: Path, disturb: Callable[[Proxy], None], again: bool) -> bytes:
    """The head of a run of which each worker's link is disturbed, once or again and again."""
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(served(path, GENESIS))
        proxies = [await stack.enter_async_context(proxied(at.address)) for _ in NAMES]
        pairs = zip(proxies, NAMES, strict=True)
        agents = [work_lightly(proxy.address, name) for proxy, name in pairs]
        running = asyncio.gather(*agents)
        if again:
            async for round_ in rounds_of(at):
                disturb(proxies[round_ % len(proxies)])
            await running
            assert sum(proxy.connections for proxy in proxies) > len(NAMES)
        else:
            for proxy in proxies:
                disturb(proxy)
            await running
        return head_of(at)


@pytest.fixture(scope="module")
def undisturbed_head(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed") / "journal.db"
    return asyncio.run(head_through(path, lambda _: None, again=False))


def _delay(proxy: Proxy) -> None:
    proxy.delay_s = 0.05


def _narrow(proxy: Proxy) -> None:
    proxy.bytes_per_s = 4000.0


@pytest.mark.parametrize(
    ("disturb", "again"),
    [(_delay, False), (_narrow, False), (Proxy.reset_all, True), (Proxy.silence_all, True)],
    ids=["delay", "little bandwidth", "resets", "half-open links"],
)
async def test_a_run_over_bad_links_ends_with_the_same_head(
    disturb: Callable[[Proxy], None], again: bool, undisturbed_head: bytes, tmp_path: Path
) -> None:
    assert await head_through(tmp_path / "journal.db", disturb, again) == undisturbed_head


# ---------------------------------------------------------------- a partition


class Island:
    """A network namespace with one cable to here, which can be pulled."""

    HERE, THERE = "10.231.77.1", "10.231.77.2"

    def __init__(self) -> None:
        self.name = f"fedmezo{os.getpid()}"
        self._cable = f"fmz{os.getpid()}"

    def build(self) -> str:
        """Why it cannot be built; empty if it is."""
        if shutil.which("ip") is None:
            return "there is no `ip` command"
        end = f"{self._cable}b"
        for command in (
            f"netns add {self.name}",
            f"link add {self._cable} type veth peer name {end} netns {self.name}",
            f"addr add {self.HERE}/30 dev {self._cable}",
            f"link set {self._cable} up",
            f"-n {self.name} addr add {self.THERE}/30 dev {end}",
            f"-n {self.name} link set {end} up",
        ):
            done = self._ip(command)
            if done.returncode:
                return f"`ip {command}`: {done.stderr.strip()}"
        return ""

    def plug(self, way: str) -> None:
        """Pull the cable (`down`) or plug it in (`up`)."""
        assert self._ip(f"link set {self._cable} {way}").returncode == 0

    @contextmanager
    def worker(self, address: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A light worker on the island, which does not outlive the context."""
        worker = [sys.executable, "-m", "tests.faults.light_worker", address, name]
        command = ["ip", "netns", "exec", self.name, *worker]
        with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
            try:
                yield process
            finally:
                process.kill()

    def remove(self) -> None:
        """Leave no trace."""
        self._ip(f"link del {self._cable}")
        self._ip(f"netns del {self.name}")

    @staticmethod
    def _ip(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)


@pytest.fixture
def island() -> Iterator[Island]:
    island = Island()
    why_not = island.build()
    if why_not:
        island.remove()
        pytest.skip(f"no network namespace can be made here: {why_not}")
    yield island
    island.remove()


@pytest.mark.timeout(2 * PATIENCE_S + 240)
async def test_a_partition_in_mid_run_only_costs_time(
    island: Island, undisturbed_head: bytes, tmp_path: Path
) -> None:
    async with served(tmp_path / "journal.db", GENESIS, listen=f"{island.HERE}:0") as at:
        address = f"{island.HERE}:{at.address.rpartition(':')[2]}"

        async def cut_off_joined() -> bool:
            return bool(at.daemon.status("").workers)

        with island.worker(address, NAMES[0]) as cut_off:
            # It has a Python to start; the others are here.
            await until(cut_off_joined, "the worker on the island", 2 * PATIENCE_S)
            async with asyncio.TaskGroup() as here:
                for name in NAMES[1:]:
                    here.create_task(work_lightly(address, name))
                async for _ in rounds_of(at):
                    island.plug("down")
                    before = at.daemon.status("").round
                    await asyncio.sleep(1.0)
                    # What was on its way may have closed one round.
                    assert at.daemon.status("").round <= before + 1
                    island.plug("up")
            assert await asyncio.to_thread(cut_off.wait, PATIENCE_S) == 0
        assert head_of(at) == undisturbed_head
