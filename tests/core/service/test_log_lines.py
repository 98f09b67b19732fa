"""One JSON object a line, with what is known of where the line is from."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from fedmezo_core.service.log_lines import JsonLines, log_with


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    before = caplog.handler.formatter
    caplog.handler.setFormatter(JsonLines())
    caplog.set_level(logging.INFO, "fedmezo")
    yield caplog
    caplog.handler.setFormatter(before)  # It is the same handler in the tests that follow.


log = logging.getLogger("fedmezo.test")


def said(lines: pytest.LogCaptureFixture) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in lines.text.splitlines()]


def test_a_line_is_one_object_whatever_its_message(lines: pytest.LogCaptureFixture) -> None:
    log.warning('two\nlines of "%s" and \x00', "ü")
    [line] = said(lines)
    assert line["message"] == 'two\nlines of "ü" and \x00'
    assert (line["level"], line["logger"]) == ("warning", "fedmezo.test")
    assert datetime.fromisoformat(str(line["time"])).tzinfo is not None
    assert not line.keys() & {"run", "round", "worker"}


async def test_tasks_say_what_is_theirs_and_what_they_began_with(
    lines: pytest.LogCaptureFixture,
) -> None:
    async def session(worker: str) -> None:
        log_with(worker=worker)
        await asyncio.sleep(0)
        log_with(round=3)
        log.info("measured")

    async def run() -> None:
        log_with(run="reviews")
        await asyncio.gather(session("w1"), session("w2"))
        log.info("over", extra={"worker": "w9"})

    await asyncio.create_task(run())
    facts = [(line["run"], line.get("round"), line["worker"]) for line in said(lines)]
    assert facts == [("reviews", 3, "w1"), ("reviews", 3, "w2"), ("reviews", None, "w9")]


def test_a_traceback_stays_in_its_line(lines: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    [line] = said(lines)
    assert "ValueError: no" in str(line["error"])
