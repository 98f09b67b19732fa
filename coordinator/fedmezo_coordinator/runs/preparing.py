"""What lies between a journal that is open and a run that is served, and the run's replica."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from fedmezo.presets import unmeasured_rate
from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    check_compaction,
    check_same_run,
    factors_stay_random,
    no_loss_is_seen,
)
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.replica.supervisor import (
    ReplicaSupervisor,
    describe_base,
)
from fedmezo_coordinator.runs.hosted_run import OfferedFile
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.companions import Companions
from fedmezo_coordinator.stores.location import journal_shown
from fedmezo_coordinator.telemetry.round_spans import follow_rounds
from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.program import LongStep, long_step
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES

log = logging.getLogger("fedmezo.coordinator")


async def begun(
    settings: CoordinatorSettings,
    journal: Journal,
    wait_for: Callable[[LongStep], None] = lambda _: None,
) -> Companions:
    """Begin the run if the journal is new; returns what lies beside the journal.

    `wait_for` is told of the step that takes long, if there is one.
    """
    companions = Companions(settings.journal, settings.signing_key)
    companions.check(journal)
    if not journal.is_empty:
        return companions
    config = settings.run_config("the [run] settings")
    check_compaction(settings, config)
    if factors_stay_random(settings, config):
        log.warning(
            "lora.output_rank trains numbers between two factors, which stay random, because the "
            "run begins from no adapter; set adapter_rows, to which they are fitted, or adapter"
        )
    log.info("new run %s: loading %s to digest its base", config.run_id, config.model)
    if "learning_rate" not in settings.contract and not settings.rate_rows:
        log.warning("%s", unmeasured_rate(config, "there are no rows for that; set probe_rows"))
    with long_step(f"loading {config.model} to digest its base") as step:
        wait_for(step)
        genesis = await describe_base(settings, config, step)
    journal.append(encode_records([genesis]))
    return companions


async def loaded(
    settings: CoordinatorSettings,
    journal: Journal,
    companions: Companions,
    session_limit: SessionLimit,
) -> Daemon:
    """Load a run that has begun, and check that the settings mean this run."""
    signer = companions.signer()
    daemon = Daemon(
        journal,
        session_limit,
        signer,
        settings.snapshots_folder,
        settings.compact_after_records,
    )
    await daemon.load()
    await asyncio.to_thread(companions.keep_mark, journal, signer)
    check_same_run(
        journal_shown(settings.journal), daemon.genesis.config, settings.run, "the [run] settings"
    )
    check_compaction(settings, daemon.genesis.config)
    warn_if_no_loss_is_seen(settings, daemon.genesis.config)
    follow_rounds(daemon, daemon.genesis.config.run_id)
    return daemon


def warn_if_no_loss_is_seen(settings: CoordinatorSettings, config: RunConfig) -> None:
    """Warn if nobody reports a loss, because then a run that diverges does not pause."""
    if no_loss_is_seen(settings, config):
        log.warning(
            "nobody reports a loss, so a learning rate that is too large goes unnoticed until no "
            "worker can measure, or nothing but 0; set model and heldout, or report_losses in a "
            "new run"
        )


async def keep_replica(settings: CoordinatorSettings, daemon: Daemon, address: str) -> None:
    """Keep the run's replica, which connects to `address`, until it has nothing left to do."""
    if not settings.replica:
        return
    if not settings.model:
        log.warning("no model is set, so there is no replica and nothing is evaluated here")
        return
    supervisor = ReplicaSupervisor(
        settings, address, daemon.genesis.config.run_id, daemon.replica_secret, daemon.replica
    )
    daemon.expect_replica()
    await supervisor.keep()
    daemon.lose_replica()


def offered_files(settings: CoordinatorSettings) -> Mapping[str, OfferedFile]:
    """What workers of the run may read: the adapter that it begins from. Reads it, so may wait."""
    folder = settings.begins_from
    if folder is None:
        return {}
    paths = {f"adapter/{name}": folder / name for name in ADAPTER_FILES}
    try:
        return {name: _offered(path) for name, path in paths.items()}
    except OSError as error:
        log.warning("workers cannot have the adapter from here: %s", error)
        return {}


def _offered(path: Path) -> OfferedFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return OfferedFile(path, digest, path.stat().st_size)
