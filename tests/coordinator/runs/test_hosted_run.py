"""One run of a coordinator: how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

from fedmezo_coordinator.runs.hosted_run import HostedRun


class EndlessLoop:
    """Stands in for the loop that serves a run."""

    async def serve(self) -> None:
        await asyncio.Event().wait()

    async def check_journal(self) -> None:
        """It has none."""

    def end_sessions(self) -> None:
        """There are none."""


async def test_a_run_that_ends_waits_for_its_replica() -> None:
    """A second cancellation broke off the wait after which a replica is killed."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def replica() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            ended.set()

    loop: Any = EndlessLoop()
    run = HostedRun("r", loop=loop)
    serving = asyncio.create_task(run.serve(replica()))
    await begun.wait()
    run.begin_stop()
    await asyncio.sleep(0)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert ended.is_set()
