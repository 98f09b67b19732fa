"""What watching costs a worker: its CPU time for a round, and the rounds of a second.

One run of real programs: a coordinator with its page, and a worker with a small model. Short phases
with and without watchers take turns, so that whatever else the machine does falls on both. Other
programs can only add to the CPU time of a phase, so the cheaper phases say the most.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.integrations.rounds_over import save_subject
from benchmarks.serving.measured_coordinator import cpu_s_of
from tests.integration.support.harness import PATIENCE_S, Program, Programs, run_values, toml_of

BROWSERS = 4
SCRAPE_EVERY_S = 1.0
LOOK_EVERY_S = 0.001
ROUND_LINE = re.compile(r"round (\d+) measured")
TAIL_BYTES = 4096
"""Enough of the end of a log to hold a line about a round."""
GOAL = "at most 1"
ALL, NOBODY = "all of these", "nobody"

Watching = Callable[[], AbstractAsyncContextManager[None]]
"""Watches the run in one way until the end of a block."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a phase took."""

    cpu_ms: float
    """CPU time of the worker's process for a round, in milliseconds."""
    rounds_per_s: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A run that is under way."""

    worker: Program
    settings: Path
    """The worker's TOML file."""
    settings_text: str
    watcher: Program
    """`fedmezo watch`, which stands still but for its own phases."""
    page_port: int

    async def at_a_round(self) -> int:
        """The number of a round, at the moment when the worker has measured it."""
        path, before, end_s = self.worker.log_path, None, time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                found = ROUND_LINE.findall(file.read().decode(errors="replace"))
            newest = int(found[-1]) if found else None
            if before is not None and newest != before:
                assert newest is not None
                return newest
            before = newest
            await asyncio.sleep(LOOK_EVERY_S)
        raise TimeoutError(f"the worker measures no more:\n{self.worker.said[-1000:]}")

    async def phase(self, seconds: float) -> Spent:
        """What the rounds of about `seconds` take."""
        first, begun_s, cpu_s = await self.at_a_round(), time.monotonic(), self._cpu_s()
        await asyncio.sleep(seconds)
        last, ended_s, spent_s = await self.at_a_round(), time.monotonic(), self._cpu_s()
        rounds = last - first
        return Spent(1000 * (spent_s - cpu_s) / rounds, rounds / (ended_s - begun_s))

    def _cpu_s(self) -> float:
        return cpu_s_of(self.worker.process.pid)

    @asynccontextmanager
    async def page(self) -> AsyncIterator[None]:
        """The page in several browsers."""
        links = [socket.create_connection(("127.0.0.1", self.page_port)) for _ in range(BROWSERS)]
        for link in links:
            link.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            threading.Thread(target=_read, args=(link,), daemon=True).start()
        try:
            yield
        finally:
            for link in links:
                link.shutdown(socket.SHUT_RDWR)

    @asynccontextmanager
    async def terminal(self) -> AsyncIterator[None]:
        """`fedmezo watch`."""
        self.watcher.send(signal.SIGCONT)
        try:
            yield
        finally:
            self.watcher.send(signal.SIGSTOP)

    @asynccontextmanager
    async def metrics(self) -> AsyncIterator[None]:
        """A scraper of the metrics."""
        over = threading.Event()

        def scrape() -> None:
            while not over.is_set():
                with urllib.request.urlopen(f"http://127.0.0.1:{self.page_port}/metrics") as answer:
                    answer.read()
                over.wait(SCRAPE_EVERY_S)

        scraping = asyncio.create_task(asyncio.to_thread(scrape))
        try:
            yield
        finally:
            over.set()
            await scraping

    @asynccontextmanager
    async def json_logs(self) -> AsyncIterator[None]:
        """The worker's log as JSON, which it changes to when it reads its settings again."""
        await self._reload('log_format = "json"\n')
        try:
            yield
        finally:
            await self._reload("")

    async def _reload(self, more: str) -> None:
        self.settings.write_text(more + self.settings_text)
        self.worker.send(signal.SIGHUP)
        await self.at_a_round()
        await self.at_a_round()

    @asynccontextmanager
    async def all_of_it(self) -> AsyncIterator[None]:
        """All of these at once."""
        async with self.page(), self.terminal(), self.metrics(), self.json_logs():
            yield


def _read(link: socket.socket) -> None:
    with link, contextlib.suppress(OSError):
        while link.recv(1 << 16):
            pass


def figures(small: bool) -> Iterator[Figure]:
    """CPU time of a worker's round and rounds in a second, with and without watchers."""
    yield from asyncio.run(_figures(*((2, 0.2) if small else (15, 0.5))))


async def _figures(turns: int, seconds: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        programs = Programs(Path(name))
        try:
            scene = await _scene(programs)
            ways: dict[str, Watching] = {
                f"the page in {BROWSERS} browsers": scene.page,
                "fedmezo watch": scene.terminal,
                "a scrape of the metrics each second": scene.metrics,
                "JSON logs": scene.json_logs,
                ALL: scene.all_of_it,
            }
            return await _compared(scene, ways, turns, seconds)
        finally:
            programs.end()


async def _scene(programs: Programs) -> Scene:
    folder = programs.folder
    model = save_subject(folder)
    run = run_values(
        model="model",
        rounds=100_000,
        local_steps=1,
        workers_min=1,
        quorum=1,
        learning_rate=1e-7,  # Far more rounds than such a model lasts at a rate that teaches it.
    )
    coordinator, address = await programs.coordinator(
        folder / "journal.db",
        run,
        *("--model", model, "--no-replica", "--page", "127.0.0.1:0"),
    )
    page = await coordinator.says(r"the page is at http://127\.0\.0\.1:(\d+)")
    settings, text = folder / "worker.toml", toml_of({"threads": 1})
    settings.write_text(text)
    flags = ("--config", settings, "--coordinator", address, "--name", "w1")
    worker = programs.start(
        "fedmezo_worker", *flags, "--data", folder / "w1.jsonl", "--model", model
    )
    await worker.says("round 20 measured")  # The first ones compile kernels.
    watcher = programs.start_script("fedmezo", "watch", "--coordinator", address)
    await watcher.says("round")
    watcher.send(signal.SIGSTOP)
    return Scene(worker, settings, text, watcher, int(page[1]))


async def _compared(
    scene: Scene, ways: dict[str, Watching], turns: int, seconds: float
) -> list[Figure]:
    """Phases of each way beside those in which nobody watches, which are as many as all others."""
    phases: dict[str, list[Spent]] = {way: [] for way in (*ways, NOBODY)}
    for _ in range(turns):
        for way, watching in ways.items():
            phases[NOBODY].append(await scene.phase(seconds))
            async with watching():
                phases[way].append(await scene.phase(seconds))
    alone_ms = _cheap_ms(phases[NOBODY])
    found = [Figure("watching: CPU time of a worker's round, nobody watches", alone_ms, "ms")]
    for way in ways:
        name = f"watching: CPU time of a worker's round that is added by {way}"
        found.append(Figure(name, 100 * (_cheap_ms(phases[way]) / alone_ms - 1), "%", GOAL))
    even, odd = (_cheap_ms(phases[NOBODY][first::2]) for first in (0, 1))
    what = "watching: half of the phases in which nobody watches beside the other half"
    found.append(Figure(what, 100 * (even / odd - 1), "%"))
    for way in (NOBODY, ALL):
        rate = statistics.median(one.rounds_per_s for one in phases[way])
        found.append(Figure(f"watching: rounds in a second, watched by {way}", rate, "1/s"))
    return found


def _cheap_ms(phases: list[Spent]) -> float:
    """The CPU time of a round in the cheapest quarter of the phases, at its upper end."""
    return sorted(one.cpu_ms for one in phases)[len(phases) // 4]
