"""The page in a real browser: a run that is live, at every size, with a mouse and with keys."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.web.page_server import PageSettings, page_served
from fedmezo_coordinator.web.page_socket import page_socket
from fedmezo_coordinator.web.runs_in_view import RunsInView
from fedmezo_core.records import Diverged, Excluded, Paused
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as runs
from tests.coordinator.web.browser import CONTRASTS, headless, skip_without_browser, tab_of
from tests.faults.light_worker import work_lightly
from tests.integration.support.harness import (
    Programs,
    config_of,
    genesis_of,
    run_values,
    write_genesis,
)

if TYPE_CHECKING:
    from playwright.async_api import Page, Route

skip_without_browser()

pytestmark = pytest.mark.slow

PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}
DESKTOP: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
LIVE: dict[str, Any] = {
    "rounds": 20_000, "local_steps": 1, "workers_min": 3, "quorum": 3, "report_losses": True,
    "digest_every_rounds": 10,
}  # fmt: skip
WAIT_MS = 60_000


@asynccontextmanager
async def made(*watched: MadeRun) -> AsyncIterator[str]:
    """A page that shows made runs; its address."""
    async with page_served(PageSettings(), page_socket("127.0.0.1:0")) as page:
        page.show(RunsInView(lambda: watched))
        yield f"http://127.0.0.1:{page.port}/"


def in_trouble() -> MadeRun:
    """A paused run with an alarm of many kinds."""
    run = MadeRun("reviews", 42, 12, planned=100)
    run.run_phase, run.phase_reason = runs.RUN_PHASE_PAUSED, "the loss is 3 times its first value"
    run.append([Diverged(40, "device-0003", 1, 2), Excluded(41, "device-0007", "repeats itself")])
    run.append([Paused(42, run.phase_reason)])
    run.told.diverged_parties.append("device-0003")
    run.told.workers[3].diverged = True
    run.told.workers[5].suspicion = "its answers are 12 times as large as usual"
    run.told.workers[2].answered_after_ms = 19_000
    run.told.workers[6].connected = False
    run.told.replica_complaint = "the replica process ended"
    return run


async def looks_right(tab: Page) -> None:
    """Nothing overflows sideways, every text can be read, everything to press is large enough."""
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not await tab.evaluate(wide)
    assert await tab.evaluate(CONTRASTS) == []
    small = """[...document.querySelectorAll("button, input, select, .runs a")]
        .filter((one) => one.offsetHeight && one.offsetHeight < 24)
        .map((one) => one.outerHTML)"""
    assert await tab.evaluate(small) == []


async def says(tab: Page, selector: str, text: str) -> None:
    """Wait until an element says something."""
    await tab.locator(selector, has_text=re.compile(text)).first.wait_for(timeout=WAIT_MS)


async def test_a_person_clicks_through_a_live_run(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    write_genesis(tmp_path / "j.db", genesis_of(config_of(**LIVE)))
    agents: list[asyncio.Task[Any]] = []
    try:
        program, address = await programs.coordinator(
            tmp_path / "j.db", run_values(**LIVE), "--page", "127.0.0.1:0"
        )
        url = re.search(r"the page is at (http://\S+)", program.said)
        assert url
        async with headless() as browser, tab_of(browser, may_lose=True, **DESKTOP) as tab:
            await tab.goto(url[1])
            await says(tab, "#run-name", "tiny-run")
            await says(tab, "#about", "waiting for workers: 0 of 3")
            await says(tab, "#states", "No worker has joined")
            names = ("alpha", "beta", "gamma")
            agents += [asyncio.create_task(work_lightly(address, name)) for name in names]
            await says(tab, "#states", r"3 (ready|measuring)|1 (ready|measuring)")
            await says(tab, "#workers", "gamma")
            before = await tab.locator("#progress").get_attribute("value")
            await tab.wait_for_function(
                "(before) => Number(document.getElementById('progress').value) > before + 5",
                arg=float(before or 0),
                timeout=WAIT_MS,
            )
            await says(tab, "#chart-loss output", r"round \d+: training \d")
            await _use_the_table(tab)
            await _walk_with_keys(tab)
            async with CoordinatorClient(address) as client:
                await client.pause_run("tiny-run", "somebody wants to look")
                await says(tab, "#phase", "paused")
                await says(tab, "#alarms .urgent", "Paused.*somebody wants to look")
                await says(tab, ".runs .urgent", "1 urgent")
                assert (await tab.title()).startswith("(1) tiny-run")
                await looks_right(tab)
                await client.resume_run("tiny-run")
            await says(tab, "#phase", "running")
            await says(tab, "#events", "resumed")
            program.end()
            await says(tab, "#link", "No connection")
    finally:
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        programs.end()


async def _use_the_table(tab: Page) -> None:
    await tab.get_by_role("button", name="Worker").click()
    # A function: the page's policy forbids an expression, which is evaluated again at each look.
    await tab.wait_for_function(
        "() => document.querySelector('#workers th').textContent === 'gamma'", timeout=WAIT_MS
    )
    heading = tab.locator("#worker-heads th[aria-sort]")
    assert await heading.get_attribute("aria-sort") == "descending"
    await tab.locator("#query-name").fill("BET")
    await says(tab, "#pager-text", "1 worker, page 1 of 1")
    await tab.locator("#query-name").fill("")
    await tab.locator("#query-state").select_option("diverged")
    await says(tab, "#pager-text", "0 workers")
    await tab.locator("#query-state").select_option("")
    await says(tab, "#pager-text", "3 workers")


async def _walk_with_keys(tab: Page) -> None:
    """Everything can be reached and used without a mouse."""
    await tab.locator("body").press("Tab")
    seen = []
    for _ in range(30):
        await tab.keyboard.press("Tab")
        where = "document.activeElement.id || document.activeElement.tagName"
        seen.append(await tab.evaluate(where))
    assert {"query-name", "query-state"} <= set(seen)
    chart = tab.locator("#chart-loss svg[role=slider]")
    await chart.focus()
    await chart.press("Home")
    assert await chart.get_attribute("aria-valuenow") == "0"
    assert "round 1:" in (await chart.get_attribute("aria-valuetext") or "")
    await chart.press("ArrowRight")
    assert await chart.get_attribute("aria-valuenow") == "1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("looks", [PHONE, DESKTOP], ids=["phone", "desktop"])
async def test_it_can_be_read_at_every_size(looks: dict[str, Any], scheme: str) -> None:
    other = MadeRun("topics", 50, 4)
    other.run_phase = runs.RUN_PHASE_FINISHED
    lost = MadeRun("lost", 12, 3)
    lost.run_phase, lost.phase_reason, lost.is_served = (
        runs.RUN_PHASE_FAILED, "no space left on the device", False
    )  # fmt: skip
    scenes = {
        "empty": [MadeRun("new", 0, 0, planned=9)],
        "none": [],
        "lost": [lost],
        "trouble": [in_trouble()],
    }
    async with headless() as browser:
        for name, watched in scenes.items():
            async with (
                made(*watched, *([other] if name == "trouble" else [])) as url,
                tab_of(browser, **looks, color_scheme=scheme) as tab,
            ):
                await tab.goto(url)
                await says(tab, "#link", "Live")
                await says(tab, "main", "no run yet" if not watched else watched[0].run_id)
                if name == "trouble":
                    await says(tab, "#alarms", "Digest mismatch")
                    await says(tab, "#workers", "device-0011")
                    await looks_right(tab)
                    await tab.locator(".runs a", has_text="topics").click()
                    await says(tab, "#run-name", "topics")
                    await says(tab, "#phase", "finished")
                await looks_right(tab)


async def test_ten_thousand_rounds_and_a_thousand_workers_stay_usable() -> None:
    run = MadeRun("large", 10_000, 1000, planned=12_000)
    async with headless() as browser, made(run) as url, tab_of(browser, **PHONE) as tab:
        await tab.goto(url)
        await says(tab, "#progress-text", "10,000 of 12,000")
        await says(tab, "#chart-loss output", "round 10,000")
        await says(tab, "#pager-text", "1,000 workers, page 1 of 20")
        await tab.get_by_role("button", name="Next").click()
        await says(tab, "#workers", "device-0050")
        assert await tab.locator("#workers tr").count() == 50
        parts = await tab.evaluate("document.getElementsByTagName('*').length")
        assert parts < 3000
        run.commit()
        await says(tab, "#progress-text", "10,001 of 12,000")
        await looks_right(tab)


async def test_an_answer_that_comes_late_undoes_no_click() -> None:
    """Neither another page nor another run is lost while the table loads."""
    first, second = MadeRun("first", 10, 120), MadeRun("second", 10, 3)
    held, may_go_on = asyncio.Event(), asyncio.Event()
    may_go_on.set()

    async def pass_on(route: Route) -> None:
        answer = await route.fetch()
        held.set()
        await may_go_on.wait()
        await route.fulfill(response=answer)

    async def hold() -> None:
        may_go_on.clear()
        held.clear()
        await held.wait()

    async with headless() as browser, made(first, second) as url, tab_of(browser, **DESKTOP) as tab:
        await tab.route("**/workers?*", pass_on)
        await tab.goto(url + "#run=first")
        await says(tab, "#pager-text", "120 workers, page 1 of 3")
        await hold()
        await tab.get_by_role("button", name="Next").click()
        may_go_on.set()
        await says(tab, "#pager-text", "120 workers, page 2 of 3")
        await hold()
        await tab.locator(".runs a", has_text="second").click()
        await says(tab, "#run-name", "second")
        may_go_on.set()
        await says(tab, "#pager-text", "3 workers, page 1 of 1")


async def test_a_text_of_the_run_is_never_code(tmp_path: Path) -> None:
    run = in_trouble()
    evil = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    run.phase_reason = evil
    run.told.workers[0].suspicion = run.told.workers[1].complaint = evil
    run.told.config.model = evil
    run.append([Paused(42, evil)])
    async with headless() as browser, made(run) as url, tab_of(browser, **DESKTOP) as tab:
        await tab.goto(url)
        await says(tab, "#about", "onerror")
        await says(tab, "#alarms", "onerror")
        await says(tab, "#events", "onerror")
        await says(tab, "#workers", "onerror")
        assert await tab.locator("main img, main script").count() == 0
        assert "reviews" in await tab.title()
