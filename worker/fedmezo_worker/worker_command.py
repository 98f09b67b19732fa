"""`fedmezo-worker`: join a run, measure, leave when it is finished."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fedmezo_core.errors import DataError, ModelError
from fedmezo_core.program import run_daemon, stop_signal, worker_packages
from fedmezo_worker.engine_thread import EngineThread
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
    if settings.base_form is not None and not settings.base_form.is_dir():
        raise ModelError(f"There is no folder {settings.base_form}; check base_form.")
    if settings.adapter is not None and not settings.adapter.is_dir():
        raise ModelError(f"There is no adapter folder {settings.adapter}; check adapter.")


def open_engine_thread(settings: WorkerSettings) -> EngineThread:
    """The engine for these settings; imports what it computes with."""
    if settings.base_form is not None:
        from fedmezo_worker.form_engine import FormEngine

        return FormEngine()
    from fedmezo_worker.engine import Engine

    return Engine()


async def run(settings: WorkerSettings) -> None:
    """Work until the run is finished, or until SIGTERM or Ctrl-C.

    Raises whatever else stopped the worker.
    """
    check_paths(settings)
    # First: a signal during the imports below must end the worker cleanly too.
    stop = stop_signal()
    log.info("worker %s of the coordinator at %s is starting", settings.name, settings.coordinator)
    # Imported here: torch takes seconds, and a wrong flag or path should not.
    with worker_packages("work on a run"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        from fedmezo_worker.agent import Agent

        engine = open_engine_thread(settings)
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
