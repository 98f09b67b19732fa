"""`fedmezo-worker`: join a run, measure, leave when it is finished."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from fedmezo_core.program import run_daemon, worker_packages
from fedmezo_worker.worker_settings import WorkerSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-worker`; returns the exit status."""
    return run_daemon("fedmezo-worker", WorkerSettings, run, arguments)


async def run(settings: WorkerSettings) -> None:
    """Work until the run is finished, or until SIGTERM or Ctrl-C.

    Raises whatever else stopped the worker.
    """
    # First: a signal during the imports below must end the worker cleanly too.
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Imported here: torch takes seconds, and a wrong flag should not.
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
