"""`fedmezo-coordinator`: open the journal, serve the run, stop cleanly."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from fedmezo_coordinator.coordinator_settings import ENVIRONMENT_PREFIX, CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.replica.supervisor import ReplicaSupervisor, describe_base
from fedmezo_coordinator.serving.hosting import first_of, host, sessions_that_fit, stop_signal
from fedmezo_coordinator.serving.service import bind_server
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.location import journal_shown, path_beside
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.config import RunConfig, parse_run
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.signed_heads import open_signer
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.program import run_program

PROGRAM = "fedmezo-coordinator"

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
    stop, give_up = stop_signal(), threading.Event()
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        # A private socket for the replica: it needs no TLS and no address that others can reach.
        private = f"unix:{Path(folder) / 'replica.sock'}"
        # Port and journal are taken first: nobody should wait for a model to load to be told that
        # either is another process's. A standby takes no port before it serves: workers would connect
        # to it, and wait.
        bound = None if settings.standby else bind_server(settings.listen, settings.tls, private)
        journal = await _open(settings, stop, give_up)
        if journal is None:
            return
        server, port = bound or bind_server(settings.listen, settings.tls, private)
        starting = asyncio.create_task(_prepare(settings, journal))
        if not await first_of(starting, stop):
            return
        daemon = starting.result()
        log.info("checkpoints are signed with key %s", daemon.checkpoint_key.hex())
        replica = _keep_replica(settings, daemon, private)
        await host(settings, server, port, daemon, stop, beside=replica, at_stop=give_up.set)


async def _open(
    settings: CoordinatorSettings, stop: asyncio.Event, give_up: threading.Event
) -> Journal | None:
    """Open the journal in a thread, because a standby may wait for days; None if `stop` came first."""
    opening = asyncio.create_task(
        asyncio.to_thread(open_store, settings.journal, standby=settings.standby, give_up=give_up)
    )
    if await first_of(opening, stop):
        return Journal(opening.result())
    give_up.set()
    return None


async def _prepare(settings: CoordinatorSettings, journal: Journal) -> Daemon:
    """Begin the run if the journal is new, load it, and see that the settings mean the same run."""
    where = "the [run] settings"
    if journal.is_empty:
        config = settings.run_config(where)
        check_compaction(settings, config)
        log.info("new run %s: loading %s to name its base", config.run_id, config.model)
        genesis = await describe_base(settings, config)
        journal.append(encode_records([genesis]))
    session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
    signer = open_signer(settings.signing_key or path_beside(settings.journal, ".key"))
    daemon = Daemon(
        journal, session_limit, signer, settings.snapshots_folder, settings.compact_after_records
    )
    await daemon.load()
    _check_same_run(settings, daemon.genesis.config)
    check_compaction(settings, daemon.genesis.config)
    tell_if_no_loss_is_seen(settings, daemon.genesis.config)
    if settings.resume:
        await daemon.resume(settings.resume_rate_factor)
    elif daemon.pause_reason:
        log.error("the run is paused: %s; start with --resume to go on", daemon.pause_reason)
    return daemon


def check_compaction(settings: CoordinatorSettings, config: RunConfig) -> None:
    """Records go only where something takes their place."""
    has_snapshots = settings.has_replica and settings.snapshot_every_rounds
    if settings.compact_after_records and not has_snapshots and config.seed_policy != "pool":
        raise ConfigError(
            f"compact_after_records = {settings.compact_after_records} needs snapshots, which workers begin "
            "from then; set snapshot_every_rounds, model and replica too, or leave it out."
        )


def tell_if_no_loss_is_seen(settings: CoordinatorSettings, config: RunConfig) -> None:
    """A run that diverges pauses, if somebody says so."""
    is_evaluated = settings.has_replica and settings.heldout is not None
    if config.pause_rounds and not config.report_losses and not is_evaluated:
        log.warning(
            "no loss is seen here, so a learning rate that is too large goes unnoticed until nobody can "
            "measure; give model and heldout, or let workers report theirs (report_losses in a new run)"
        )


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
