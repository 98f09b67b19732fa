"""What the page costs: its first paint, its data, and each watcher's share of the coordinator."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp

from benchmarks.figures import Figure
from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.web.page_server import PageServer, PageSettings, page_served
from fedmezo_coordinator.web.page_socket import page_socket
from fedmezo_coordinator.web.runs_in_view import RunsInView

ROUNDS, WORKERS = 10_000, 1000
WATCHERS = 20
SECONDS = 20
READER = """
import socket, sys, threading
def read(port):
    link = socket.create_connection(("127.0.0.1", port))
    link.sendall(b"GET /live HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    while link.recv(1 << 16):
        pass
for _ in range(int(sys.argv[2])):
    threading.Thread(target=read, args=(int(sys.argv[1]),), daemon=True).start()
sys.stdin.read()
"""
"""A process of watchers, so that their own work is not the coordinator's."""


def figures(small: bool) -> Iterator[Figure]:
    """Figures of a page of 10,000 rounds and 1,000 workers; fewer if it is to be quick."""
    rounds, workers = (500, 50) if small else (ROUNDS, WORKERS)
    what = f"{rounds:,} rounds, {workers:,} workers"
    run = MadeRun("large", rounds, workers, planned=2 * rounds)
    yield from asyncio.run(_data(run, what))
    yield from asyncio.run(_watching(run, what, 3 if small else SECONDS))
    if shutil.which("chromium"):
        yield from asyncio.run(_painted(run, what, 1 if small else 5))


@asynccontextmanager
async def _shown(run: MadeRun) -> AsyncIterator[PageServer]:
    """A page of the run, whose curves have caught up."""
    async with page_served(PageSettings(), page_socket("127.0.0.1:0")) as page:
        runs = RunsInView(lambda: [run])
        page.show(runs)
        while not runs.all()[0].is_caught_up:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        yield page


async def _data(run: MadeRun, what: str) -> list[Figure]:
    begun_s, cpu_s = time.monotonic(), time.process_time()
    async with _shown(run) as page, aiohttp.ClientSession(f"http://127.0.0.1:{page.port}") as http:
        folded_s, folded_cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
        found = [
            Figure(f"page: curves from the journal, beside the run, {what}", folded_s, "s"),
            Figure(f"page: CPU time of that, {what}", folded_cpu_s, "s"),
        ]
        begun_s = time.monotonic()
        async with http.get("/live") as answer:
            first = b""
            while b"event: curves" not in first or not first.endswith(b"\n\n"):
                first += await answer.content.readany()
        found.append(Figure(f"page: first data, {what}", 1000 * (time.monotonic() - begun_s), "ms"))
        found.append(Figure(f"page: first data, {what}", len(first) / 1000, "kB", "at most 200"))
        for name, path in (
            ("a page of workers, sorted", "/workers?run=large&sort=loss"),
            ("a scrape of the metrics", "/metrics"),
        ):
            took_ms, size = [], 0
            for _ in range(10):
                begun_s = time.monotonic()
                async with http.get(path) as answer:
                    size = len(await answer.read())
                took_ms.append(1000 * (time.monotonic() - begun_s))
            found.append(Figure(f"page: {name}, {what}", statistics.median(took_ms), "ms"))
            found.append(Figure(f"page: {name}, {what}", size / 1000, "kB"))
    return found


async def _watching(run: MadeRun, what: str, seconds: int) -> list[Figure]:
    """CPU time of the coordinator while a round is committed each second."""
    spent = {count: await _spent(run, count, seconds) for count in (0, 1, WATCHERS)}
    each = (spent[WATCHERS] - spent[1]) / (WATCHERS - 1)
    return [
        Figure(f"page: CPU in a second without watchers, {what}", 1000 * spent[0], "ms"),
        Figure(f"page: CPU in a second for the first watcher, {what}",
               1000 * (spent[1] - spent[0]), "ms"),
        Figure(f"page: CPU in a second for each further watcher, {what}",
               1000 * each, "ms", "at most 10"),
    ]  # fmt: skip


async def _spent(run: MadeRun, watchers: int, seconds: int) -> float:
    async with _shown(run) as page:
        command = [sys.executable, "-c", READER, str(page.port), str(watchers)]
        readers = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
        while page.watchers < watchers:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        await asyncio.sleep(2)  # Their first data are another figure.
        committing_s, cpu_s = 0.0, time.process_time()
        for _ in range(seconds):
            begun_s = time.process_time()
            run.commit()
            committing_s += time.process_time() - begun_s
            await asyncio.sleep(1)
        spent_s = time.process_time() - cpu_s - committing_s
        assert readers.stdin is not None
        readers.stdin.close()
        await readers.wait()
        return spent_s / seconds


async def _painted(run: MadeRun, what: str, times: int) -> list[Figure]:
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        return []
    paints: list[float] = []
    shows: list[float] = []
    async with _shown(run) as page, async_playwright() as driver:
        browser = await driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for _ in range(times):
            tab = await (await browser.new_context()).new_page()
            begun_s = time.monotonic()
            await tab.goto(f"http://127.0.0.1:{page.port}/")
            await tab.locator("#chart-loss path.curve[d]").last.wait_for()
            shows.append(time.monotonic() - begun_s)
            paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(float(await tab.evaluate(paint)))
            await tab.close()
        await browser.close()
    return [
        Figure(f"page: first paint, {what}", statistics.median(paints) / 1000, "s", "at most 1"),
        Figure(f"page: curves drawn, {what}", statistics.median(shows), "s"),
    ]
