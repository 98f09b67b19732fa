"""`fedmezo-coordinator`: open the journal, serve the run, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    InitSettings,
    check_same_run,
)
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.replica.supervisor import ReplicaSupervisor, describe_base
from fedmezo_coordinator.serving.hosting import fronted, host, sessions_that_fit
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import is_url, journal_shown
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_coordinator.web.opening_page import paged
from fedmezo_coordinator.web.watching import ServedRun
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.program import first_of, long_step, run_daemon, run_program, stop_signal

log = logging.getLogger("fedmezo.coordinator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-coordinator`, or its `init`; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["init"]:
        return run_program("fedmezo-coordinator init", lambda: init(given[1:]))
    return run_daemon("fedmezo-coordinator", CoordinatorSettings, run, arguments)


def init(arguments: Sequence[str]) -> None:
    """Make a state folder, and say what to do next."""
    settings = load_settings(InitSettings, arguments, program="fedmezo-coordinator init")
    if not make_state(settings.state, settings.name, settings.own_ca):
        print(
            f"{settings.state} is a state folder already; nothing was changed. For other host "
            "names remove server.pem from it and run init again; members stay."
        )
        return
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
    if settings.standby and settings.state is not None:
        open_state(settings.state)  # Now, rather than at the moment when it has to take over.
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
            page = await stack.enter_async_context(paged(settings, front.fleet))
            starting = asyncio.create_task(_prepare(settings, journal))
            if not await first_of(starting, stop):
                return
            daemon = starting.result()
        finally:
            if new_files and journal.is_empty:
                # While the file is still locked: nobody else can have begun a run in it.
                for path in new_files:
                    path.unlink(missing_ok=True)
                journal.close()
        log.info("checkpoints are signed with key %s", daemon.checkpoint_key.hex())
        replica = _keep_replica(settings, daemon, private)
        watched = [ServedRun(daemon)]
        if page is not None:
            page.show(lambda: watched)

        def at_stop() -> None:
            give_up.set()
            if page is not None:
                page.rest()

        await host(settings, front, daemon, stop, alongside=replica, at_stop=at_stop)


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
    """Begin the run if the journal is new, load it, and check that the settings mean this run."""
    where = "the [run] settings"
    companions = Companions(settings.journal, settings.signing_key)
    companions.check(journal)
    if journal.is_empty:
        config = settings.run_config(where)
        check_compaction(settings, config)
        log.info("new run %s: loading %s to digest its base", config.run_id, config.model)
        if settings.probe_rows is None and "learning_rate" not in settings.run:
            log.info(
                "no learning_rate is set: it is %g, with normalised steps (docs/choosing.md)",
                config.learning_rate,
            )
        with long_step(f"loading {config.model} to digest its base"):
            genesis = await describe_base(settings, config)
        journal.append(encode_records([genesis]))
    session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
    signer = companions.signer()
    daemon = Daemon(
        journal,
        session_limit,
        signer,
        settings.snapshots_folder,
        settings.compact_after_records,
        has_replica=settings.has_replica,
    )
    await daemon.load()
    await asyncio.to_thread(companions.keep_mark, journal, signer)
    check_same_run(
        journal_shown(settings.journal), daemon.genesis.config, settings.run, "the [run] settings"
    )
    check_compaction(settings, daemon.genesis.config)
    warn_if_no_loss_is_seen(settings, daemon.genesis.config)
    if settings.resume:
        await daemon.resume(settings.resume_rate_factor)
    elif daemon.pause_reason:
        log.error(
            "the run is paused: %s; to continue all the same, start with --resume",
            daemon.pause_reason,
        )
    return daemon


def check_compaction(settings: CoordinatorSettings, config: RunConfig) -> None:
    """Refuse to drop records of a run in which nothing takes their place."""
    has_snapshots = settings.has_replica and settings.snapshot_every_rounds
    if settings.compact_after_records and not has_snapshots and config.seed_policy != "pool":
        raise ConfigError(
            f"compact_after_records = {settings.compact_after_records} needs snapshots, from which "
            "workers begin instead; set snapshot_every_rounds, model and replica too, or leave it "
            "out."
        )


def warn_if_no_loss_is_seen(settings: CoordinatorSettings, config: RunConfig) -> None:
    """Warn if nobody reports a loss, because then a run that diverges does not pause."""
    is_evaluated = settings.has_replica and settings.heldout is not None
    if config.pause_rounds and not config.report_losses and not is_evaluated:
        log.warning(
            "nobody reports a loss, so a learning rate that is too large goes unnoticed until no "
            "worker can measure, or nothing but 0; set model and heldout, or report_losses in a "
            "new run"
        )


async def _keep_replica(settings: CoordinatorSettings, daemon: Daemon, address: str) -> None:
    if not settings.replica:
        return
    if not settings.model:
        log.warning("no model is set, so there is no replica and nothing is evaluated here")
        return
    supervisor = ReplicaSupervisor(
        settings, address, daemon.genesis.config.run_id, daemon.replica_secret, daemon.replica
    )
    await supervisor.keep()
    daemon.lose_replica()
