"""`fedmezo-worker`: join runs, measure, leave when they are finished."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_core.errors import ConfigError
from fedmezo_core.program import first_of, run_daemon, stop_signal, worker_packages
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.service.service_manager import service_manager
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.identity import Identity
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.admission import check_run_id
from fedmezo_core.wire.enrolment import become_member
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.resident import ResidentWorker
from fedmezo_worker.worker_settings import WorkerSettings

if TYPE_CHECKING:
    from fedmezo import Engine, Genesis

log = logging.getLogger("fedmezo.worker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-worker`; returns the exit status."""
    return run_daemon("fedmezo-worker", WorkerSettings, run, arguments)


def check_paths(settings: WorkerSettings) -> None:
    """Refuse settings that name data or an adapter that is not there; it is read later."""
    of_tables = [path for one in settings.data_sets.values() for path in (one.path, one.heldout)]
    data = settings.data if isinstance(settings.data, Path) else None
    for path in (data, settings.heldout, *of_tables):
        if path is not None and not path.exists():
            raise ConfigError(f"There is no data file or folder {path}; check the path.")
    for name, folder in settings.models.items():
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {folder}; check models, at {name!r}.")
    if settings.base_form is not None and not settings.base_form.is_dir():
        raise ConfigError(f"There is no folder {settings.base_form}; check base_form.")
    if settings.adapter is not None and not settings.adapter.is_dir():
        raise ConfigError(f"There is no adapter folder {settings.adapter}; check adapter.")


def open_engine_thread(settings: WorkerSettings) -> EngineThread:
    """The engine for these settings; imports what it computes with."""
    if settings.base_form is not None:
        from fedmezo_worker.form_engine import FormEngine

        return FormEngine()
    from fedmezo_worker.engine import Engine

    return Engine()


def computer_opener(settings: WorkerSettings) -> Callable[[WorkerSettings, Genesis], Engine]:
    """What loads a run's engine for these settings; imports what it computes with."""
    if settings.base_form is not None:
        from fedmezo_worker.form_engine import FormComputer

        return FormComputer
    from fedmezo_worker.engine import open_engine

    return open_engine


async def run(settings: WorkerSettings) -> None:
    """Work until the run is finished, or for all that come; until SIGTERM or Ctrl-C.

    Raises whatever else stopped the worker.
    """
    check_paths(settings)
    # First: a signal during the imports below must end the worker cleanly too.
    stop = stop_signal()
    log_with(**({"worker": settings.name} if settings.name else {}))
    # Now: when a coordinator answers is not the service manager's matter.
    service_manager().ready("works")
    if settings.serve is not None:
        await serve(settings, settings.serve, stop)
        return
    identity: Identity | None = None
    if settings.is_member:
        becoming = asyncio.create_task(
            become_member(
                settings.join,
                settings.state,
                settings.name,
                frozenset({Role.WORKER}),
                give_up_after_s=settings.give_up_after_s,
            )
        )
        if not await first_of(becoming, stop):
            return
        identity = becoming.result()
        settings = as_member(settings, identity)
        log_with(worker=settings.name)
    log.info("worker %s of the coordinator at %s is starting", settings.name, settings.coordinator)
    service_manager().status(f"worker {settings.name} of the coordinator at {settings.coordinator}")
    # Imported here: torch takes seconds, and a wrong flag or path should not.
    with worker_packages("work on a run"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        from fedmezo_worker.offers.work import work

        engine = open_engine_thread(settings)
    working = asyncio.create_task(work(settings, engine, identity))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        else:
            log.info("stopping")
    finally:
        for task in (working, stopping):
            task.cancel()
        engine.cut_short()
        await asyncio.gather(working, stopping, return_exceptions=True)
        await engine.close()


def as_member(settings: WorkerSettings, identity: Identity) -> WorkerSettings:
    """The settings with what the identity says: the name, and where the coordinator is.

    Raises `ConfigError` for settings that name another worker.
    """
    if settings.name not in ("", identity.name):
        raise ConfigError(
            f"name = {settings.name!r}, but this member is {identity.name}; leave name out, or "
            "name another state folder."
        )
    changes = {"name": identity.name}
    if "coordinator" not in settings.model_fields_set:
        changes["coordinator"] = identity.address
    return settings.model_copy(update=changes)


async def serve(settings: WorkerSettings, path: Path, stop: asyncio.Event) -> None:
    """Exchange messages with whoever brings them to the socket at `path`, until `stop` is set."""
    log.info("worker %s is starting", settings.name)
    with worker_packages("work on a run"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        from fedmezo import Session, decode_genesis

        open_computer = computer_opener(settings)
    sum_memory = SumMemory()

    def open_session(genesis_bytes: bytes) -> Session:
        genesis = decode_genesis(genesis_bytes)
        check_run_id(settings.run_id, genesis.config.run_id)
        log.info("run %s of model %s", genesis.config.run_id, settings.model or settings.base_form)
        return Session(
            genesis_bytes,
            settings.name,
            open_computer(settings, genesis),
            sum_memory=sum_memory,
        )

    async with ResidentWorker(settings.name, open_session).listening_on(path):
        await stop.wait()
