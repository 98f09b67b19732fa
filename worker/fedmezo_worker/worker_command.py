"""`fedmezo-worker`: join a run, measure, leave when it is finished."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from fedmezo_core.errors import DataError, ModelError
from fedmezo_core.program import run_daemon, stop_signal, worker_packages
from fedmezo_core.wire.admission import check_run_id
from fedmezo_worker.resident import ResidentWorker
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-worker`; returns the exit status."""
    return run_daemon("fedmezo-worker", WorkerSettings, run, arguments)


def check_paths(settings: WorkerSettings) -> None:
    """Refuse settings that name data or an adapter that is not there; it is read later."""
    for path in (settings.data, settings.heldout):
        if path is not None and not path.exists():
            raise DataError(f"There is no data file or folder {path}; check the path.")
    if settings.adapter is not None and not settings.adapter.is_dir():
        raise ModelError(f"There is no adapter folder {settings.adapter}; check adapter.")


async def run(settings: WorkerSettings) -> None:
    """Work until the run is finished, or until SIGTERM or Ctrl-C.

    Raises whatever else stopped the worker.
    """
    check_paths(settings)
    # First: a signal during the imports below must end the worker cleanly too.
    stop = stop_signal()
    if settings.serve is not None:
        await serve(settings, settings.serve, stop)
        return
    log.info("worker %s of the coordinator at %s is starting", settings.name, settings.coordinator)
    # Imported here: torch takes seconds, and a wrong flag or path should not.
    with worker_packages("work on a run"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        from fedmezo_worker.agent import Agent
        from fedmezo_worker.engine import Engine

    engine = Engine()
    working = asyncio.create_task(Agent(settings, engine).run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        engine.cut_short()
        await asyncio.gather(working, stopping, return_exceptions=True)
        await engine.close()


async def serve(settings: WorkerSettings, path: Path, stop: asyncio.Event) -> None:
    """Exchange messages with whoever brings them to the socket at `path`, until `stop` is set."""
    log.info("worker %s is starting", settings.name)
    with worker_packages("work on a run"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        from fedmezo import Session, decode_genesis
        from fedmezo_worker.engine import open_engine

    def open_session(genesis_bytes: bytes) -> Session:
        genesis = decode_genesis(genesis_bytes)
        check_run_id(settings.run_id, genesis.config.run_id)
        log.info("run %s of model %s", genesis.config.run_id, settings.model)
        return Session(genesis_bytes, settings.name, open_engine(settings, genesis))

    async with ResidentWorker(settings.name, open_session).listening_on(path):
        await stop.wait()
