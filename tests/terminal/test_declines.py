"""Why a device does not take part is told wherever a person looks at the run."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import aiohttp
import pytest

from fedmezo_coordinator.programs import fedmezo_command
from tests.coordinator.runs.hosting_runs import hosted

WHY = "The run's rounds = 3 is more than the 2 that this worker allows"


async def test_a_policy_that_refuses_a_run_is_told_everywhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, logger="fedmezo")
    said = f"device-7 does not take part: {WHY}"
    async with hosted(tmp_path / "runs", monkeypatch, page="127.0.0.1:0") as at:
        await at.create("one")
        async with at.client() as client:
            await client.decline_run("device-7", "one", WHY)

        async def fedmezo(*arguments: str) -> int:
            call = [*arguments, "--coordinator", at.address]
            return await asyncio.to_thread(fedmezo_command.main, call)

        assert await fedmezo("run", "status", "one") == 0
        assert said in capsys.readouterr().out
        found = re.search(r"the page is at (http://127\.0\.0\.1:\d+)", caplog.text)
        assert found
        async with (
            asyncio.timeout(30),
            aiohttp.ClientSession(found[1]) as browser,
            browser.get("/live?run=one") as answer,
        ):
            async for line in answer.content:
                if said.encode() in line:
                    break
        watching = asyncio.create_task(fedmezo("run", "watch", "one", "--every-s", "0.1"))
        async with asyncio.timeout(30):
            while said not in (shown := capsys.readouterr().out):
                assert not watching.done(), shown
                await asyncio.sleep(0.05)
            assert await fedmezo("run", "stop", "one") == 0
            assert await watching == 0
