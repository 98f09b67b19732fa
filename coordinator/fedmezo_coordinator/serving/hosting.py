"""What the programs that serve workers have in common: from a bound port to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from fedmezo_coordinator.coordinator_settings import ServingSettings
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.service import Server, start_server
from fedmezo_core.errors import FedMezoError

STOP_GRACE_S = 2.0
CHECK_JOURNAL_EVERY_S = 5.0
"""A coordinator with nothing to write learns so soon that another has taken its journal over."""
FILES_BESIDE_SESSIONS = 256
"""Open files that are no worker's connection: the journal, the log, readers of the status."""

COLLECT_AFTER = (20_000, 10, 50)
"""Objects made and not freed before the youngest generation is looked at, and turns of the others."""

log = logging.getLogger("fedmezo.coordinator")


def stop_signal() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def host(
    settings: ServingSettings,
    server: Server,
    port: int,
    loop: ServingLoop[Any],
    stop: asyncio.Event,
    *,
    beside: Coroutine[Any, Any, None] | None = None,
    at_stop: Callable[[], None] = lambda: None,
) -> None:
    """Let a bound server answer for `loop` until `stop`; raises what ended it otherwise.

    `beside` runs as long as that; `at_stop` is called before anything is closed.
    """
    _collect_seldom()
    await start_server(server, loop)
    where = settings.listen.rpartition(":")[0]
    if settings.tls is None and not settings.is_loopback:
        log.warning(
            "listening on %s:%d WITHOUT TLS: anyone on that network can read this run's traffic "
            "and join it; set tls_cert and tls_key, or listen on 127.0.0.1",
            where,
            port,
        )
    log.info("run %s is served at %s:%d", loop.genesis.config.run_id, where, port)
    tasks = [asyncio.create_task(_serve(loop))]
    if beside is not None:
        tasks.append(asyncio.create_task(beside))
    try:
        if await first_of(tasks[0], stop):
            tasks[0].result()
        log.info("stopping")
    finally:
        at_stop()
        loop.end_sessions()
        for task in tasks[1:]:
            task.cancel()
        await server.stop(STOP_GRACE_S)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.close()


def _collect_seldom() -> None:
    """Look for garbage in cycles seldom, and never among what the start has made.

    A session or a message leaves none behind. With Python's own thresholds a full collection under a
    thousand workers came several times a second, and stopped everything for a tenth of one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def _serve(loop: ServingLoop[Any]) -> None:
    """Serve until the journal fails, also if it fails while there is nothing to write."""
    serving = asyncio.create_task(loop.serve())
    checking = asyncio.create_task(_check_journal(loop))
    try:
        done, _ = await asyncio.wait({serving, checking}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (serving, checking):
            task.cancel()
        await asyncio.gather(serving, checking, return_exceptions=True)


async def _check_journal(loop: ServingLoop[Any]) -> None:
    while True:
        await asyncio.sleep(CHECK_JOURNAL_EVERY_S)
        await loop.check_journal()


def sessions_that_fit(settings: ServingSettings) -> int:
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


async def first_of(task: asyncio.Task[Any], stop: asyncio.Event) -> bool:
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
