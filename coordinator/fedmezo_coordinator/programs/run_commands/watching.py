"""The status of a run, once or again and again until it is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedmezo_coordinator.programs.connecting import Link
from fedmezo_coordinator.programs.plain_values import say, status_values
from fedmezo_coordinator.programs.view import Pace, run_line, run_view
from fedmezo_core.errors import ForbiddenError, ProtocolError, StartingError, UnavailableError
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

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
        told: list[str] = []
        with live or contextlib.nullcontext():
            while True:
                left = pace.seconds_left(answer, time.monotonic())
                # By its name: another run may be the only one by then.
                run_id = answer.config.run_id
                declined = await declines(client, run_id) if format_ is OutputFormat.TEXT else []
                if live is not None:
                    view = Group(run_view(answer, seconds_left=left), *map(Text, declined))
                    live.update(view, refresh=True)
                for line in declined if live is None else ():
                    if line not in told:
                        told.append(line)
                        print(line, flush=True)
                if live is None and run_line(answer) != shown:
                    shown = run_line(answer)
                    say(format_, shown, status_values(answer))
                if answer.phase == wire.PHASE_FINISHED and not answer.evaluation_due:
                    return
                await asyncio.sleep(every_s)
                answer = await client.get_status(run_id)


async def declines(client: CoordinatorClient, run_id: str) -> list[str]:
    """A line for each worker that does not take part, if its words may be read here and now."""
    try:
        [run] = await client.list_runs(run_id)
    except (ForbiddenError, ProtocolError):  # Not for this caller, or of an older coordinator.
        return []
    except UnavailableError:  # It may have ended with the run, whose last status is there.
        return []
    return decline_lines(run)


def decline_lines(run: runs.RunSummary) -> list[str]:
    """A line for each worker that does not take part in a run, with its reason."""
    return [f"{one.worker} does not take part: {one.reason}" for one in run.declined]


async def first_status(client: CoordinatorClient, run_id: str = "") -> wire.GetStatusResponse:
    """The status of a run, once its coordinator has started."""
    reconnecting = Reconnecting(log)
    while True:
        try:
            return await client.get_status(run_id)
        except StartingError as error:
            await reconnecting.wait_after(error)
