"""A headless Chromium, and what a page is checked for in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium and playwright are installed here; `make test-page` installs both"

CONTRASTS = """
() => {
  const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r / 255, g / 255, b / 255, a];
  };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3]));
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      layers.push(parse(getComputedStyle(one).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1]);
  };
  const poor = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const element = texts.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (!text || box.width < 2 || element.closest("noscript")) continue;
    const isDrawn = element.namespaceURI.endsWith("svg");
    const ink = parse(isDrawn ? style.fill : style.color);
    const behind = ground(isDrawn ? element.closest("svg") : element);
    const [a, b] = [light(over(ink, behind)), light(behind)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) poor.push(`${text}: ${ratio.toFixed(2)}`);
  }
  return poor;
}
"""
"""Texts whose contrast with what is behind them is less than WCAG's level AA asks for."""


def chromium() -> str | None:
    """Path of the system's Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def skip_without_browser() -> None:
    """Skip the module that calls it where no browser can be driven, unless one is asked for."""
    try:
        import playwright.async_api
    except ImportError:
        found = False
    else:
        found = bool(playwright.async_api) and chromium() is not None
    if not found and os.environ.get("FEDMEZO_TEST_BROWSER") != "required":
        pytest.skip(MISSING, allow_module_level=True)


@asynccontextmanager
async def headless() -> AsyncIterator[Browser]:
    """A headless Chromium."""
    from playwright.async_api import async_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium(), args=root)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def tab_of(browser: Browser, *, may_lose: bool = False, **looks: Any) -> AsyncIterator[Page]:
    """A tab; in the end nothing may have gone wrong in it, and nothing been asked of others.

    `may_lose`: the connection may have been lost.
    """
    context = await browser.new_context(**looks)
    tab = await context.new_page()
    complaints: list[str] = []
    asked: set[str] = set()

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and not (may_lose and "ERR_" in message.text):
            complaints.append(message.text)

    tab.on("console", note)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.add(request.method + " " + request.url.split("/")[2]))
    yield tab
    assert not complaints
    assert len(asked) == 1, asked
    assert next(iter(asked)).startswith("GET ")
    await context.close()
