"""`fedmezo-worker`: join a run, measure, leave when it is finished."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from fedmezo_core.layered_settings import load_settings
from fedmezo_core.program import run_program
from fedmezo_worker.worker_settings import ENVIRONMENT_PREFIX, WorkerSettings

PROGRAM = "fedmezo-worker"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s"
    )
    logging.getLogger("fedmezo").setLevel(logging.INFO)

    def work() -> None:
        settings = load_settings(
            WorkerSettings,
            sys.argv[1:] if arguments is None else arguments,
            program=PROGRAM,
            environment_prefix=ENVIRONMENT_PREFIX,
        )
        asyncio.run(run(settings))

    return run_program(PROGRAM, work)


async def run(settings: WorkerSettings) -> None:
    """Work until the run is finished, or until SIGTERM or Ctrl-C.

    Raises whatever else stopped the worker.
    """
    # First: a signal during the imports below must end the worker cleanly too.
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Imported here: torch takes seconds, and a wrong flag should not.
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
