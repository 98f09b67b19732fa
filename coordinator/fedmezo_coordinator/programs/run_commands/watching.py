"""The status of a run, once or again and again until it is over."""

from __future__ import annotations

import asyncio
import logging
import time

from rich.console import Console
from rich.live import Live

from fedmezo_coordinator.programs.connecting import Link
from fedmezo_coordinator.programs.view import Pace, run_line, run_view
from fedmezo_core.errors import StartingError
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.command")


async def status_of(link: Link) -> wire.GetStatusResponse:
    """The status of the run that `link` means."""
    async with link.client() as client:
        return await client.get_status(link.run_id)


async def watch_run(link: Link, every_s: float) -> None:
    """Show the run that `link` means until it is finished and evaluated."""
    console = Console()
    async with link.client() as client:
        answer = await first_status(client, link.run_id)
        pace = Pace()
        shown = ""
        with Live(console=console, auto_refresh=False) as live:
            while True:
                left = pace.seconds_left(answer, time.monotonic())
                if console.is_terminal:
                    live.update(run_view(answer, seconds_left=left), refresh=True)
                elif run_line(answer) != shown:
                    shown = run_line(answer)
                    print(shown, flush=True)
                if answer.phase == wire.PHASE_FINISHED and not answer.evaluation_due:
                    return
                await asyncio.sleep(every_s)
                # By its name: another run may be the only one by then.
                answer = await client.get_status(answer.config.run_id)


async def first_status(client: CoordinatorClient, run_id: str = "") -> wire.GetStatusResponse:
    """The status of a run, once its coordinator has started."""
    reconnecting = Reconnecting(log)
    while True:
        try:
            return await client.get_status(run_id)
        except StartingError as error:
            await reconnecting.wait_after(error)
