"""`fedmezo-coordinator`: open the journal, serve the run, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.door import Door
from fedmezo_coordinator.journal_place import journal_shown, open_store, path_beside
from fedmezo_coordinator.service import bind_server, start_server
from fedmezo_coordinator.settings import ENVIRONMENT_PREFIX, CoordinatorSettings
from fedmezo_coordinator.supervisor import ReplicaSupervisor, describe_base
from fedmezo_core.checkpoints import open_signer
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.journal import Journal
from fedmezo_core.program import run_program
from fedmezo_core.settings import load_settings

PROGRAM = "fedmezo-coordinator"
STOP_GRACE_S = 2.0
CHECK_JOURNAL_EVERY_S = 5.0
"""A coordinator with nothing to write learns so soon that another has taken its journal over."""
FILES_BESIDE_SESSIONS = 256
"""Open files that are no worker's connection: the journal, the log, readers of the status."""
COLLECT_AFTER = (20_000, 10, 50)
"""Objects made and not freed before the youngest generation is looked at, and turns of the others."""

log = logging.getLogger("fedmezo.coordinator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s"
    )

    def work() -> None:
        settings = load_settings(
            CoordinatorSettings,
            sys.argv[1:] if arguments is None else arguments,
            program=PROGRAM,
            environment_prefix=ENVIRONMENT_PREFIX,
        )
        asyncio.run(run(settings))

    return run_program(PROGRAM, work)


async def run(settings: CoordinatorSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; raises what stopped it otherwise."""
    stop, give_up = asyncio.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        # A private socket for the replica: it needs no TLS and no address that others can reach.
        private = f"unix:{Path(folder) / 'replica.sock'}"
        tls = (
            (settings.tls_cert, settings.tls_key)
            if settings.tls_cert and settings.tls_key
            else None
        )
        # Port and journal are taken first: nobody should wait for a model to load to be told that
        # either is another process's. A standby takes no port before it serves: workers would connect
        # to it, and wait.
        bound = None if settings.standby else bind_server(settings.listen, tls, private)
        journal = await _open(settings, stop, give_up)
        if journal is None:
            return
        server, port = bound or bind_server(settings.listen, tls, private)
        starting = asyncio.create_task(_prepare(settings, journal))
        if not await _first_of(starting, stop):
            return
        daemon = starting.result()
        collect_seldom()
        await start_server(server, daemon)
        host = settings.listen.rpartition(":")[0]
        if tls is None and not settings.is_loopback:
            log.warning(
                "listening on %s:%d WITHOUT TLS: anyone on that network can read this run's traffic "
                "and join it; set tls_cert and tls_key, or listen on 127.0.0.1",
                host,
                port,
            )
        log.info("run %s is served at %s:%d", daemon.genesis.config.run_id, host, port)
        log.info("checkpoints are signed with key %s", daemon.checkpoint_key.hex())
        serving = asyncio.create_task(_serve(daemon))
        replica = asyncio.create_task(_keep_replica(settings, daemon, private))
        try:
            if await _first_of(serving, stop):
                serving.result()
            log.info("stopping")
        finally:
            give_up.set()
            daemon.end_sessions()
            replica.cancel()
            await server.stop(STOP_GRACE_S)
            serving.cancel()
            await asyncio.gather(replica, serving, return_exceptions=True)
            await daemon.close()


def collect_seldom() -> None:
    """Look for garbage in cycles seldom, and never among what the start has made.

    A session or a message leaves none behind. With Python's own thresholds a full collection under a
    thousand workers came several times a second, and stopped everything for a tenth of one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def _open(
    settings: CoordinatorSettings, stop: asyncio.Event, give_up: threading.Event
) -> Journal | None:
    """Open the journal in a thread, because a standby may wait for days; None if `stop` came first."""
    opening = asyncio.create_task(
        asyncio.to_thread(open_store, settings.journal, standby=settings.standby, give_up=give_up)
    )
    if await _first_of(opening, stop):
        return Journal(opening.result())
    give_up.set()
    return None


async def _serve(daemon: Daemon) -> None:
    """Serve until the journal fails, also if it fails while there is nothing to write."""
    serving = asyncio.create_task(daemon.serve())
    checking = asyncio.create_task(_check_journal(daemon))
    try:
        done, _ = await asyncio.wait({serving, checking}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (serving, checking):
            task.cancel()
        await asyncio.gather(serving, checking, return_exceptions=True)


async def _check_journal(daemon: Daemon) -> None:
    while True:
        await asyncio.sleep(CHECK_JOURNAL_EVERY_S)
        await daemon.check_journal()


def sessions_that_fit(settings: CoordinatorSettings) -> int:
    """`sessions_max`, or fewer if the system allows this process fewer open files, which it raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.sessions_max + FILES_BESIDE_SESSIONS
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    sessions = max(1, most - FILES_BESIDE_SESSIONS)
    if sessions < settings.sessions_max and "sessions_max" in settings.model_fields_set:
        log.warning(
            "sessions_max is %d, but this process may open %d files only, enough for %d sessions; "
            "raise the limit (ulimit -Hn), or lower sessions_max",
            settings.sessions_max,
            most,
            sessions,
        )
    return sessions


async def _prepare(settings: CoordinatorSettings, journal: Journal) -> Daemon:
    """Begin the run if the journal is new, load it, and see that the settings mean the same run."""
    where = "the [run] settings"
    if journal.is_empty:
        config = settings.run_config(where)
        log.info("new run %s: loading %s to name its base", config.run_id, config.model)
        genesis = await describe_base(settings, config)
        journal.append([genesis])
    door = Door(sessions_that_fit(settings), settings.joins_at_a_time)
    signer = open_signer(settings.signing_key or path_beside(settings.journal, ".key"))
    daemon = Daemon(journal, door, signer, settings.snapshots_folder)
    await daemon.load()
    _check_same_run(settings, daemon.genesis.config)
    if settings.resume:
        await daemon.resume(settings.resume_rate_factor)
    elif daemon.pause_reason:
        log.error("the run is paused: %s; start with --resume true to go on", daemon.pause_reason)
    return daemon


def _check_same_run(settings: CoordinatorSettings, fixed: RunConfig) -> None:
    """The journal fixes the contract; settings that say otherwise are a mistake, not an update."""
    written = fixed.model_dump()
    asked = parse_run({**written, **settings.run}, "the [run] settings").model_dump()
    for key, value in asked.items():
        if value != written[key]:
            raise ConfigError(
                f"The journal {journal_shown(settings.journal)} belongs to a run with {key} = {written[key]!r}, the "
                f"settings say {value!r}; take the setting back, or give the new run another --journal."
            )


async def _keep_replica(settings: CoordinatorSettings, daemon: Daemon, address: str) -> None:
    if not settings.replica:
        return
    if not settings.model:
        log.warning("no model is set, so there is no replica: nothing is evaluated here")
        return
    supervisor = ReplicaSupervisor(
        settings, address, daemon.genesis.config.run_id, daemon.replica_secret
    )
    await supervisor.keep()


async def _first_of(task: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Wait for the task or for the signal; False if the signal came first (the task is cancelled)."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, FedMezoError):
        await task
    return False
