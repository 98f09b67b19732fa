"""`fedmezo-coordinator`: open the journal, serve the run, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, InitSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs.many_runs import opened_runs
from fedmezo_coordinator.runs.preparing import begun, keep_replica, loaded, offered_files
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.hosting import fronted, host, sessions_that_fit
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.location import is_url, journal_shown
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_coordinator.telemetry.round_spans import tracing
from fedmezo_coordinator.web.opening_page import paged
from fedmezo_core.journal.journal import Journal
from fedmezo_core.layered_settings import OutputFormat, load_settings
from fedmezo_core.program import first_of, run_daemon, run_program, stop_signal
from fedmezo_core.service.service_manager import service_manager

log = logging.getLogger("fedmezo.coordinator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-coordinator`, its `init` or its `preflight`; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["init"]:
        return run_program("fedmezo-coordinator init", lambda: init(given[1:]))
    if given[:1] == ["preflight"]:
        from fedmezo_coordinator.programs.preflight.coordinator_preflight import main as preflight

        return preflight(given[1:])
    return run_daemon("fedmezo-coordinator", CoordinatorSettings, run, arguments)


def init(arguments: Sequence[str]) -> None:
    """Make a state folder, and say what to do next."""
    settings = load_settings(InitSettings, arguments, program="fedmezo-coordinator init")
    made = make_state(settings.state, settings.name, settings.own_ca)
    if settings.format is OutputFormat.JSON:
        from fedmezo_coordinator.programs.plain_values import json_line

        hosts = open_state(settings.state).hosts
        print(json_line({"state": str(settings.state), "made": made, "hosts": hosts}))
    elif made:
        _say_what_next(settings)
    else:
        print(
            f"{settings.state} is a state folder already; nothing was changed. For other host "
            "names remove server.pem from it and run init again; members stay."
        )


def _say_what_next(settings: InitSettings) -> None:
    print(
        f"{settings.state} holds the CA, the coordinator's certificate and the operator's identity."
        f"\nServe with:     fedmezo-coordinator --state {settings.state} ...\n"
        f"Let workers in: fedmezo token create --state {settings.state} --name NAME"
    )
    if not settings.name:
        print(
            "The certificate names this machine alone; for other machines, remove server.pem from "
            "the folder and run init again with --name HOST."
        )


async def run(settings: CoordinatorSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; raises the error that stopped the coordinator otherwise."""
    with tracing() if settings.otel else contextlib.nullcontext():
        if settings.runs is not None:
            await _serve_many(settings, settings.runs)
        else:
            await _serve_one(settings)


async def _serve_one(settings: CoordinatorSettings) -> None:
    """Serve the run of one journal."""
    if settings.standby and settings.state is not None:
        open_state(settings.state)  # Now, rather than at the moment when it has to take over.
    if settings.standby:
        service_manager().ready(f"stands by for {journal_shown(settings.journal)}")
    stop, give_up = stop_signal(), threading.Event()
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmezo-"))
        # The replica gets a private socket, which needs no TLS and which others cannot reach.
        private = f"unix:{Path(folder) / 'replica.sock'}"
        # The port and the journal come first: if another process has one of them, a person should
        # know before a model is loaded. A standby takes no port before it serves, because workers
        # would connect to it and wait.
        fronting = fronted(settings, "coordinator", private)
        early = None if settings.standby else await stack.enter_async_context(fronting)
        new_files = _files_to_make(settings)
        journal = await _open(settings, stop, give_up)
        if journal is None:
            return
        try:
            front = await stack.enter_async_context(fronting) if early is None else early
            page = await stack.enter_async_context(paged(settings, front.servicer, front.fleet))
            starting = asyncio.create_task(_prepare(settings, journal))
            if not await first_of(starting, stop):
                return
            daemon = starting.result()
        finally:
            if new_files and journal.is_empty:
                # While the file is still locked: nobody else can have begun a run in it.
                for path in new_files:
                    path.unlink(missing_ok=True)
                if settings.adapter_rows is not None and settings.begins_from is not None:
                    shutil.rmtree(settings.begins_from, ignore_errors=True)
                journal.close()
        log.info("checkpoints are signed with key %s", daemon.checkpoint_key.hex())
        runs = Runs.of(
            daemon,
            files=await asyncio.to_thread(offered_files, settings),
            alongside=keep_replica(settings, daemon, private),
        )
        what = f"run {daemon.genesis.config.run_id} is"
        if page is not None:
            page.show(runs)
        await host(settings, front, runs, stop, what, at_stop=give_up.set)


async def _serve_many(settings: CoordinatorSettings, folder: Path) -> None:
    """Serve the runs in a folder, and those that are created meanwhile."""
    stop = stop_signal()
    async with contextlib.AsyncExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmezo-"))
        private = f"unix:{Path(sockets) / 'replica.sock'}"
        front = await stack.enter_async_context(fronted(settings, "coordinator", private))
        page = await stack.enter_async_context(paged(settings, front.servicer, front.fleet))
        session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
        runs = stack.enter_context(opened_runs(settings, folder, session_limit, private))
        count = len(runs.hosted())
        what = f"{folder}, with {count} run{'' if count == 1 else 's'}, is"
        if page is not None:
            page.show(runs)
        await host(settings, front, runs, stop, what)


def _files_to_make(settings: CoordinatorSettings) -> list[Path]:
    """Files that opening the journal will make; empty if it is there or in a database."""
    if is_url(settings.journal) or Path(settings.journal).exists():
        return []
    return [Path(settings.journal), Path(f"{settings.journal}-wal")]


async def _open(
    settings: CoordinatorSettings, stop: asyncio.Event, give_up: threading.Event
) -> Journal | None:
    """Open the journal; returns None if `stop` came first.

    This runs in a thread, because a standby may wait for days.
    """
    opening = asyncio.create_task(
        asyncio.to_thread(open_store, settings.journal, standby=settings.standby, give_up=give_up)
    )
    if await first_of(opening, stop):
        return Journal(opening.result())
    give_up.set()
    return None


async def _prepare(settings: CoordinatorSettings, journal: Journal) -> Daemon:
    """Begin the run if the journal is new, load it, and resume it if it should be."""
    companions = await begun(settings, journal)
    session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
    daemon = await loaded(settings, journal, companions, session_limit)
    if settings.resume:
        await daemon.resume(settings.resume_rate_factor)
    elif daemon.pause_reason:
        log.error(
            "the run is paused: %s; to continue all the same: fedmezo run resume %s, or start with "
            "--resume",
            daemon.pause_reason,
            daemon.genesis.config.run_id,
        )
    return daemon
