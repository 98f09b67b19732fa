"""`fedmezo-coordinator`: open the journal, serve the run, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.service import bind_server, start_server
from fedmezo_coordinator.settings import ENVIRONMENT_PREFIX, CoordinatorSettings
from fedmezo_coordinator.store import SqliteStore
from fedmezo_coordinator.supervisor import ReplicaSupervisor, describe_base
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.journal import Journal
from fedmezo_core.program import run_program
from fedmezo_core.settings import load_settings

PROGRAM = "fedmezo-coordinator"
STOP_GRACE_S = 2.0

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
    stop = asyncio.Event()
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
        # either is another process's.
        server, port = bind_server(settings.listen, tls, private)
        journal = Journal(SqliteStore(settings.journal))
        starting = asyncio.create_task(_prepare(settings, journal))
        if not await _first_of(starting, stop):
            return
        daemon = starting.result()
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
        serving = asyncio.create_task(daemon.serve())
        replica = asyncio.create_task(_keep_replica(settings, daemon, private))
        try:
            if await _first_of(serving, stop):
                serving.result()
            log.info("stopping")
        finally:
            daemon.end_sessions()
            replica.cancel()
            await server.stop(STOP_GRACE_S)
            serving.cancel()
            await asyncio.gather(replica, serving, return_exceptions=True)
            await daemon.close()


async def _prepare(settings: CoordinatorSettings, journal: Journal) -> Daemon:
    """Begin the run if the journal is new, load it, and see that the settings mean the same run."""
    where = "the [run] settings"
    if journal.is_empty:
        config = settings.run_config(where)
        log.info("new run %s: loading %s to name its base", config.run_id, config.model)
        genesis = await describe_base(settings, config)
        journal.append([genesis])
    daemon = Daemon(journal, snapshots=settings.snapshots_folder)
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
                f"The journal {settings.journal} belongs to a run with {key} = {written[key]!r}, the "
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


async def _first_of(task: asyncio.Task[Daemon] | asyncio.Task[None], stop: asyncio.Event) -> bool:
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
