"""Hosting a serving loop in a process: from a bound port to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fedmezo_coordinator.coordinator_settings import ServingSettings
from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.service import (
    CONNECTIONS_BESIDE,
    CoordinatorServicer,
    Server,
    bind_server,
    start_server,
)
from fedmezo_core.errors import FedMezoError

STOP_GRACE_S = 2.0
"""Time that open calls get to end when the program stops."""
CHECK_JOURNAL_EVERY_S = 5.0
"""Period in which an idle coordinator checks that no other has taken over its journal."""
FILES_RESERVED = 256
"""Open files that are not a session's connection: other connections, the journal, snapshots."""

COLLECT_AFTER = (20_000, 10, 50)
"""Thresholds of Python's garbage collector, as for `gc.set_threshold`."""

log = logging.getLogger("fedmezo.coordinator")


@dataclass(frozen=True, slots=True)
class Front:
    """A server that answers calls, for now by saying that its program is starting."""

    server: Server
    servicer: CoordinatorServicer
    port: int


@contextlib.asynccontextmanager
async def fronted(
    settings: ServingSettings, what: str, private: str | None = None
) -> AsyncIterator[Front]:
    """Listen, and tell every caller that `what` is starting, until `host` serves with it.

    `private` is as for `bind_server`. Raises `ConfigError` for an address that cannot be used.
    """
    connections_max = connections_that_fit(settings)
    server, port = bind_server(settings.listen, settings.tls, private, connections_max)
    limits = CallerLimits(settings.caller_calls_per_s)
    watch = ConnectionWatch(settings.caller_connections_max)
    try:
        yield Front(server, await start_server(server, what, limits, watch), port)
    finally:
        await server.stop(None)


async def host(
    settings: ServingSettings,
    front: Front,
    loop: ServingLoop[Any],
    stop: asyncio.Event,
    *,
    alongside: Coroutine[Any, Any, None] | None = None,
    at_stop: Callable[[], None] = lambda: None,
) -> None:
    """Let `front` answer calls with `loop`, which is loaded, until `stop` is set.

    `alongside` runs for the same time. `at_stop` is called before anything is closed. Raises the
    error that ended the loop, such as `JournalError`.
    """
    _collect_seldom()
    _return_freed_memory()
    front.servicer.begin(loop)
    where = settings.listen.rpartition(":")[0]
    if settings.tls is None and not settings.is_loopback:
        log.warning(
            "listening on %s:%d WITHOUT TLS: anyone on that network can read this run's traffic "
            "and join the run; set tls_cert and tls_key, or listen on 127.0.0.1",
            where,
            front.port,
        )
    log.info("run %s is served at %s:%d", loop.genesis.config.run_id, where, front.port)
    watching = front.servicer.watch.watch(front.port)
    tasks = [asyncio.create_task(_serve(loop)), asyncio.create_task(watching)]
    if alongside is not None:
        tasks.append(asyncio.create_task(alongside))
    try:
        if await first_of(tasks[0], stop):
            tasks[0].result()
        log.info("stopping")
    finally:
        at_stop()
        loop.end_sessions()
        for task in tasks[1:]:
            task.cancel()
        await front.server.stop(STOP_GRACE_S)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.close()


def _collect_seldom() -> None:
    """Make Python look for garbage in cycles less often, and never among the objects of the start.

    Sessions and messages leave no cycles behind. With Python's own thresholds and a thousand
    workers, a full collection stopped everything for a tenth of a second, several times a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def _return_freed_memory() -> None:
    """Return the memory that the start has freed to the system, if the C library can do that.

    After a start on 200 commits of 1 MiB that is 15 of 147 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def _serve(loop: ServingLoop[Any]) -> None:
    """Serve until the journal fails, even if it fails while there is nothing to write."""
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
    """The most sessions that this process can keep open: `sessions_max`, or fewer.

    Raises the process's limit of open files as far as needed and allowed.
    """
    most = _files_up_to(settings.sessions_max + FILES_RESERVED)
    sessions = max(1, most - FILES_RESERVED)
    if sessions < settings.sessions_max and "sessions_max" in settings.model_fields_set:
        log.warning(
            "sessions_max is %d, but this process may open only %d files, enough for %d sessions; "
            "raise the limit (ulimit -Hn), or lower sessions_max",
            settings.sessions_max,
            most,
            sessions,
        )
    return sessions


def connections_that_fit(settings: ServingSettings) -> int:
    """The most connections that this process can keep open at each address that it listens on.

    They are those of all sessions and `CONNECTIONS_BESIDE` more. So connections that never open a
    session cannot use up the files that this process may open, whose limit is raised as needed.
    """
    sessions = max(1, _files_up_to(settings.sessions_max + FILES_RESERVED) - FILES_RESERVED)
    host = settings.listen.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []  # Binding says what is wrong with it.
    addresses = max(1, len({address for *_, address in found}))
    others = FILES_RESERVED - CONNECTIONS_BESIDE
    connections = sessions + CONNECTIONS_BESIDE
    most = _files_up_to(addresses * connections + others)
    return max(1, min(connections, (most - others) // addresses))


def _files_up_to(wanted: int) -> int:
    """Let the process open `wanted` files; returns that number, or the one that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


async def first_of(task: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Wait for `task` or `stop`; returns False, with the task cancelled, if `stop` came first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, FedMezoError):
        await task
    return False
