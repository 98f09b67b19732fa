"""The status of a run, once or again and again until it is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from rich.console import Console
from rich.live import Live

from fedmezo_coordinator.programs.connecting import Link
from fedmezo_coordinator.programs.plain_values import OutputFormat, say, status_values
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


async def watch_run(link: Link, every_s: float, format_: OutputFormat) -> None:
    """Show the run that `link` means until it is finished and evaluated."""
    console = Console()
    live: Live | None = None
    if console.is_terminal and format_ is OutputFormat.TEXT:
        live = Live(console=console, auto_refresh=False)
    async with link.client() as client:
        answer = await first_status(client, link.run_id)
        pace = Pace()
        shown = ""
        with live or contextlib.nullcontext():
            while True:
                left = pace.seconds_left(answer, time.monotonic())
                if live is not None:
                    live.update(run_view(answer, seconds_left=left), refresh=True)
                elif run_line(answer) != shown:
                    shown = run_line(answer)
                    say(format_, shown, status_values(answer))
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
