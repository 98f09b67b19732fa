"""Hosting a serving loop in a process: from a bound port to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from fedmezo_coordinator.admission.fleet import Fleet
from fedmezo_coordinator.admission.state_folder import StateFolder, open_state
from fedmezo_coordinator.admission.tls_files import TlsFiles
from fedmezo_coordinator.coordinator_settings import (
    RUNS_MAX,
    CoordinatorSettings,
    ServingSettings,
)
from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.serving.run_directory import RunDirectory
from fedmezo_coordinator.serving.service import (
    CONNECTIONS_BESIDE,
    ENROLMENT_CONNECTIONS_MAX,
    ENROLMENT_OPTIONS,
    HEALTH_CONNECTIONS_MAX,
    HEALTH_OPTIONS,
    CoordinatorServicer,
    LiveTls,
    Server,
    bind_server,
    start_enrolment,
    start_health,
    start_server,
)
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.program import on_reload
from fedmezo_core.service.service_manager import service_manager

DRAIN_S = 1.0
"""Time in which what has arrived is written when the program stops, before sessions are ended."""
LOOK_READY_EVERY_S = 0.1
"""Period in which a start that goes on is looked at."""
STOP_GRACE_S = 2.0
"""Time that open calls get to end when the program stops."""
LOOK_AT_CERTIFICATES_EVERY_S = 5.0
"""Period in which a server looks whether its certificate's file has changed."""
RENEW_EVERY_S = 3600.0
"""Period in which a coordinator looks whether its own certificate is near its end."""
FILES_RESERVED = 320
"""Open files that are not a session's connection: other connections, the page's, the journal,
snapshots."""
FILES_A_RUN = 8
"""Open files of each run where there are many: those of its journal, and what is read of them."""

COLLECT_AFTER = (20_000, 10, 50)
"""Thresholds of Python's garbage collector, as for `gc.set_threshold`."""

log = logging.getLogger("fedmezo.coordinator")


@dataclass(frozen=True, slots=True)
class Front:
    """A server that answers calls, for now by saying that its program is starting."""

    server: Server
    servicer: CoordinatorServicer
    port: int
    fleet: Fleet | None
    """The members; None: everybody may call."""


@contextlib.asynccontextmanager
async def fronted(
    settings: ServingSettings, what: str, private: str | None = None
) -> AsyncIterator[Front]:
    """Listen, and tell every caller that `what` is starting, until `host` serves with it.

    `private` is as for `bind_server`. Raises `ConfigError` for an address that cannot be used.
    """
    check_listen(settings)
    connections_max = connections_that_fit(settings)
    async with contextlib.AsyncExitStack() as stack:
        if settings.state is None:
            fleet = None
            tls = [] if settings.tls_files is None else [LiveTls(TlsFiles(*settings.tls_files))]
        else:
            fleet = stack.enter_context(_opened_fleet(settings))
            tls = [_fleet_tls(settings, fleet, of_members=True)]
        server, port = bind_server(
            settings.listen, tls[0] if tls else None, private, connections_max
        )
        stack.push_async_callback(server.stop, None)
        limits = CallerLimits(settings.caller_calls_per_s)
        watch = ConnectionWatch(settings.caller_connections_max)
        servicer = await start_server(
            server, what, fleet, limits, watch, reflection=settings.reflection
        )
        if fleet is not None:
            tls.append(_fleet_tls(settings, fleet, of_members=False))
            fleet.join_address = settings.join_address or _named_address(fleet.state, port)
            await _start_enrolment(settings, fleet, servicer, port, tls[1], stack)
            fleet.state.tell_operator(_operators_address(settings, fleet, port), fleet.server_ca)
        refreshing = asyncio.create_task(_refresh(tls, None if settings.tls_files else fleet))
        stack.callback(refreshing.cancel)

        def look_at_certificates() -> None:
            for one in tls:
                one.refresh()

        on_reload(look_at_certificates)
        if settings.health_listen:
            await _start_health(settings.health_listen, servicer, stack)
        yield Front(server, servicer, port, fleet)


def check_listen(settings: ServingSettings) -> None:
    """Refuse to serve everybody on an address that other machines reach, unless told to.

    Raises `ConfigError`, which says what that would mean.
    """
    if (
        settings.is_loopback
        or settings.insecure
        or settings.tls_files
        or settings.state is not None
    ):
        return
    raise ConfigError(
        f"listen = {settings.listen} lets other machines connect, and without identities whoever "
        "connects can join and read the run, and whoever is on the way can read and change it. "
        "Make identities (fedmezo-coordinator init) and set state; or listen on 127.0.0.1; or say "
        "--insecure if the network is yours alone."
    )


@contextlib.contextmanager
def _opened_fleet(settings: ServingSettings) -> Iterator[Fleet]:
    assert settings.state is not None
    state = open_state(settings.state)
    if not state.server_files[0].exists():
        raise ConfigError(
            f"{state.server_files[0]} is not there; make it anew with: fedmezo-coordinator init "
            f"--state {state.path} --name HOST"
        )
    if settings.tls_files is None:
        state.renew_server()
    fleet = Fleet(
        state,
        server_ca=settings.tls_cert_ca,
        has_own_certificate=settings.tls_files is not None,
        certificate_life_s=settings.certificate_life_s,
    )
    try:
        yield fleet
    finally:
        fleet.close()


def _fleet_tls(settings: ServingSettings, fleet: Fleet, *, of_members: bool) -> LiveTls:
    """Credentials of a port: for members, whose certificates are checked, or for new ones."""
    certificate, key = settings.tls_files or fleet.state.server_files
    client_ca = fleet.state.authority.certificate if of_members else b""
    # New members look for the CA of their join string in what the server sends.
    return LiveTls(TlsFiles(certificate, key, client_ca, chain_end=fleet.server_ca))


def _named_address(state: StateFolder, port: int) -> str:
    host = state.hosts[0]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _operators_address(settings: ServingSettings, fleet: Fleet, port: int) -> str:
    """Where the operator on this machine reaches the coordinator."""
    host = settings.listen.rpartition(":")[0]
    if settings.tls_files is not None:
        return fleet.join_address  # Which alone its certificate has to name.
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else f"{host}:{port}"


def enrolment_address(settings: ServingSettings, port: int) -> str:
    """Where new members join a coordinator that listens on `port`."""
    where, _, chosen = settings.listen.rpartition(":")
    return settings.enroll_listen or f"{where}:{port + 1 if int(chosen) else 0}"


async def _start_enrolment(
    settings: ServingSettings,
    fleet: Fleet,
    servicer: CoordinatorServicer,
    port: int,
    tls: LiveTls,
    stack: contextlib.AsyncExitStack,
) -> None:
    listen = enrolment_address(settings, port)
    server, fleet.enrol_port = bind_server(
        listen, tls, None, ENROLMENT_CONNECTIONS_MAX, ENROLMENT_OPTIONS
    )
    stack.push_async_callback(server.stop, None)
    watch = await start_enrolment(server, fleet, servicer.is_served)
    watching = asyncio.create_task(watch.watch(fleet.enrol_port))
    stack.callback(watching.cancel)
    if not settings.is_loopback and fleet.join_address.startswith("localhost:"):
        log.warning(
            "join strings name %s, which no other machine reaches; remove server.pem from %s and "
            "run fedmezo-coordinator init again with --name, or set tls_cert and join_address",
            fleet.join_address,
            fleet.state.path,
        )
    log.info("new members join at %s:%d", listen.rpartition(":")[0], fleet.enrol_port)


async def _start_health(
    listen: str, servicer: CoordinatorServicer, stack: contextlib.AsyncExitStack
) -> None:
    server, port = bind_server(listen, None, None, HEALTH_CONNECTIONS_MAX, HEALTH_OPTIONS)
    stack.push_async_callback(server.stop, None)
    await start_health(server, servicer.is_served)
    log.info("health is answered at %s:%d", listen.rpartition(":")[0], port)


async def _refresh(tls: list[LiveTls], fleet: Fleet | None) -> None:
    """Take certificates that change on the disk; renew that of a fleet which made its own."""
    renewed_s = time.monotonic()
    while tls:
        await asyncio.sleep(LOOK_AT_CERTIFICATES_EVERY_S)
        try:
            if fleet is not None and time.monotonic() - renewed_s >= RENEW_EVERY_S:
                renewed_s = time.monotonic()
                await asyncio.to_thread(fleet.state.renew_server)
        except (OSError, FedMezoError) as error:
            log.warning("the server's certificate cannot be renewed: %s", error)
        for one in tls:
            await asyncio.to_thread(one.refresh)


async def host(
    settings: ServingSettings,
    front: Front,
    runs: RunDirectory,
    stop: asyncio.Event,
    what: str,
    *,
    at_stop: Callable[[], None] = lambda: None,
) -> None:
    """Let `front` answer calls with `runs` until `stop` is set.

    `what` says in the log what is served. `at_stop` is called before anything is closed. Raises the
    error that ended the serving, such as `JournalError`.
    """
    _collect_seldom()
    _return_freed_memory()
    front.servicer.begin(runs)
    where = settings.listen.rpartition(":")[0]
    if settings.state is None and not settings.is_loopback:
        log.warning(
            "listening on %s:%d %s: anyone on that network can %s; make identities "
            "(fedmezo-coordinator init) and set state",
            where,
            front.port,
            "WITHOUT IDENTITIES" if settings.tls_files else "WITHOUT TLS",
            "join the run and read it"
            if settings.tls_files
            else "read this run's traffic and join it",
        )
    log.info("%s served at %s:%d", what, where, front.port)
    telling = asyncio.create_task(_tell_ready(front, f"{what} served at {where}:{front.port}"))
    watching = front.servicer.watch.watch(front.port)
    tasks = [asyncio.create_task(runs.serve()), asyncio.create_task(watching)]
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({tasks[0], stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if tasks[0].done():
            tasks[0].result()
        log.info("stopping")
    finally:
        at_stop()
        front.servicer.refuse_from_now_on()
        telling.cancel()
        if not tasks[0].done():
            settling = asyncio.create_task(_settled(runs))
            await asyncio.wait(
                {settling, tasks[0]}, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED
            )
            settling.cancel()
        runs.begin_stop()
        tasks[1].cancel()
        await front.server.stop(STOP_GRACE_S)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runs.close()


async def _settled(runs: RunDirectory) -> None:
    await asyncio.gather(*(loop.settle() for loop in runs.loops()))


async def _tell_ready(front: Front, what: str) -> None:
    """Tell the service manager as soon as everything is served."""
    while not front.servicer.is_served(""):  # noqa: ASYNC110 - runs tell nobody
        await asyncio.sleep(LOOK_READY_EVERY_S)
    service_manager().ready(what)


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


def _reserved(settings: ServingSettings) -> int:
    """Open files that are kept for other things than sessions."""
    has_many = isinstance(settings, CoordinatorSettings) and settings.runs is not None
    return FILES_RESERVED + (FILES_A_RUN * RUNS_MAX if has_many else 0)


def sessions_that_fit(settings: ServingSettings) -> int:
    """The most sessions that this process can keep open: `sessions_max`, or fewer.

    Raises the process's limit of open files as far as needed and allowed.
    """
    reserved = _reserved(settings)
    most = _files_up_to(settings.sessions_max + reserved)
    sessions = max(1, most - reserved)
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
    reserved = _reserved(settings)
    sessions = max(1, _files_up_to(settings.sessions_max + reserved) - reserved)
    host = settings.listen.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []  # Binding says what is wrong with it.
    addresses = max(1, len({address for *_, address in found}))
    others = reserved - CONNECTIONS_BESIDE
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
