"""`fedmezo run create | list | status | watch | pause | resume | stop | delete`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from fedmezo_coordinator.programs.connecting import (
    Coordinator,
    EveryS,
    State,
    Tls,
    TlsCa,
    link_to,
    user_path,
)
from fedmezo_coordinator.programs.plain_values import (
    Format,
    finite,
    json_line,
    message_values,
    say,
    status_values,
)
from fedmezo_coordinator.programs.run_commands.creating_run import (
    files_of,
    serves,
    taken_up,
    upload,
)
from fedmezo_coordinator.programs.run_commands.watching import decline_lines, watch_run
from fedmezo_coordinator.programs.view import counted, run_view
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_proto.v1.coordinator_pb2 import GetStatusResponse

run_app = typer.Typer(help="Create, watch and end the runs of a coordinator.", no_args_is_help=True)


Run = Annotated[str, typer.Argument(metavar="RUN", help="the run's name")]
Reason = Annotated[str, typer.Option(help="why, for the record; at most 400 characters")]
Result = TypeVar("Result")

_WORDS = {
    wire.RUN_PHASE_CREATING: "creating",
    wire.RUN_PHASE_RUNNING: "running",
    wire.RUN_PHASE_PAUSED: "PAUSED",
    wire.RUN_PHASE_FINISHED: "finished",
    wire.RUN_PHASE_FAILED: "FAILED",
}


@run_app.command()
def create(
    config: Annotated[
        Path, typer.Argument(callback=user_path, help="the run's settings, a TOML file")
    ],
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait",
            min=0,
            callback=finite,
            help="seconds to wait for a worker that takes part; 0: do not wait",
        ),
    ] = 0.0,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Create a run and wait until it serves workers; the same again changes nothing.

    The files that heldout, probe_rows and adapter name are sent; the model is the coordinator's.
    """
    text, files = files_of(config)

    async def work(client: CoordinatorClient) -> wire.RunSummary:
        sent = [await upload(client, name, path) for name, path in files.items()]
        run_id = await client.create_run(wire.CreateRunRequest(settings_toml=text, files=sent))
        run = await serves(client, run_id)
        return await taken_up(client, run_id, wait_s) if wait_s else run

    run = _asked(work, coordinator, tls_ca, tls, state)
    say(
        format_,
        f"run {run.run_id} is {_WORDS.get(run.phase, run.phase)}; see it with: fedmezo run watch "
        f"{run.run_id}",
        message_values(run),
    )


@run_app.command("list")
def list_(
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """List the runs of a coordinator, the newest first."""
    runs = _asked(lambda client: client.list_runs(), coordinator, tls_ca, tls, state)
    if format_ is OutputFormat.JSON:
        for run in runs:
            print(json_line(message_values(run)))
        return
    table = Table("run", "phase", "round", "workers", "loss", "model", "created (UTC)")
    for run in runs:
        table.add_row(
            run.run_id,
            _WORDS.get(run.phase, str(run.phase)),
            f"{run.round}/{run.rounds}" if run.rounds else "-",
            str(run.workers),
            f"{run.loss:.4f}" if run.HasField("loss") else "-",
            run.model or "-",
            _when(run.created_ms),
        )
    Console().print(table)
    for run in runs:
        for note in _notes(run):
            print(f"{run.run_id}: {note}")


@run_app.command()
def status(
    run: Run,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Show a run: what it is doing, its workers, and which workers do not take part and why."""

    async def work(client: CoordinatorClient) -> tuple[wire.RunSummary, GetStatusResponse | None]:
        [summary] = await client.list_runs(run)
        is_served = summary.phase not in (wire.RUN_PHASE_CREATING, wire.RUN_PHASE_FAILED)
        return summary, await client.get_status(run) if is_served else None

    summary, found = _asked(work, coordinator, tls_ca, tls, state)
    if format_ is OutputFormat.JSON:
        of_run = status_values(found) if found is not None else None
        print(json_line({**message_values(summary), "status": of_run}))
        return
    if found is None:
        print(f"run {run} is {_WORDS.get(summary.phase, summary.phase)}: {summary.reason}")
        return
    Console().print(run_view(found))
    for line in decline_lines(summary):
        print(line)


@run_app.command()
def watch(
    run: Run,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    every_s: EveryS = 1.0,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Show a run until it is finished and evaluated; Ctrl-C stops the display, not the run."""
    asyncio.run(watch_run(link_to(coordinator, tls_ca, tls, state, run), every_s, format_))


@run_app.command()
def pause(
    run: Run,
    reason: Reason = "",
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Hold a run, on the record: no round opens or closes until it is resumed."""
    _asked(lambda client: client.pause_run(run, reason), coordinator, tls_ca, tls, state)
    say(
        format_,
        f"run {run} is paused; `fedmezo run resume {run}` lets it go on.",
        {"run_id": run, "order": "pause"},
    )


@run_app.command()
def resume(
    run: Run,
    rate_factor: Annotated[
        float | None,
        typer.Option(callback=finite, help="factor on the learning rates; default: 1"),
    ] = None,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Let a paused run go on, on the record; a failed one is loaded again."""
    _asked(lambda client: client.resume_run(run, rate_factor), coordinator, tls_ca, tls, state)
    say(format_, f"run {run} goes on.", {"run_id": run, "order": "resume"})


@run_app.command()
def stop(
    run: Run,
    reason: Reason = "",
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """End a run with the rounds that it has, on the record; its journal can still be read."""
    _asked(lambda client: client.stop_run(run, reason), coordinator, tls_ca, tls, state)
    say(
        format_,
        f"run {run} is over; `fedmezo run delete {run}` deletes it with its journal.",
        {"run_id": run, "order": "stop"},
    )


@run_app.command()
def delete(
    run: Run,
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Delete a run that is over or still being created, with its journal and snapshots."""
    _asked(lambda client: client.delete_run(run), coordinator, tls_ca, tls, state)
    say(format_, f"run {run} is deleted.", {"run_id": run, "order": "delete"})


def _asked(
    work: Callable[[CoordinatorClient], Awaitable[Result]],
    coordinator: str | None,
    tls_ca: Path | None,
    tls: bool,
    state: Path | None,
) -> Result:
    """What comes of `work` with a client of that coordinator."""
    link = link_to(coordinator, tls_ca, tls, state)

    async def with_client() -> Result:
        async with link.client() as client:
            return await work(client)

    return asyncio.run(with_client())


def _notes(run: wire.RunSummary) -> Iterator[str]:
    if run.reason:
        yield run.reason
    if run.declined:
        yield f"{counted(len(run.declined), 'worker')} declined; fedmezo run status says why"


def _when(created_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(created_ms / 1000)) if created_ms else "-"
