"""Opening the page: what the coordinator's settings mean for it.

What serves the page is loaded once the workers are served, because it takes longer to load than
most of the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_coordinator.admission.fleet import Fleet
from fedmezo_coordinator.admission.state_folder import hosts_of
from fedmezo_coordinator.admission.tls_files import TlsFiles
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, is_loopback
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.service import CoordinatorServicer
from fedmezo_coordinator.web.page_access import PageAccess
from fedmezo_coordinator.web.page_socket import page_socket
from fedmezo_core.errors import ConfigError, IdentityError
from fedmezo_core.folders import write_private
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.certificates import lifetime_s

if TYPE_CHECKING:
    from fedmezo_coordinator.web.page_server import PageServer

METRICS_TOKEN = "metrics.token"
"""File in the state folder with what a scraper of the metrics has to show."""
LOOK_AT_CERTIFICATE_EVERY_S = 5.0
"""Period in which the page looks whether its certificate's file has changed."""
WAIT_FOR_WORKERS_S = 1.0
"""Longest time that the page waits for the workers to be served first."""
LOOK_SERVED_EVERY_S = 0.05
_SERVER = "fedmezo_coordinator.web.page_server"

log = logging.getLogger("fedmezo.coordinator")


class OpenPage:
    """A page that is served now or soon, as the rest of the coordinator knows it."""

    def __init__(self, address: str, *, is_tls: bool, access: PageAccess | None) -> None:
        self.address = address
        """host:port that it listens on."""
        self.is_tls = is_tls
        self._access = access
        self._server: PageServer | None = None
        self._runs: Runs | None = None

    def show(self, runs: Runs) -> None:
        """Show these runs from now on."""
        self._runs = runs
        self._show()

    def served_by(self, server: PageServer) -> None:
        """Let `server` show what is to be shown."""
        self._server = server
        self._show()

    def _show(self) -> None:
        if self._server is None or self._runs is None:
            return
        from fedmezo_coordinator.web.runs_in_view import RunsInView, served_runs

        caller = Caller.ANYONE if self._access is None else Caller(Role.OBSERVER)
        # Without identities, whoever is on another machine may be one of the workers.
        with_declines = self._access is not None or is_loopback(self.address)
        shown = served_runs(self._runs.hosted, caller, with_declines=with_declines)
        self._server.show(RunsInView(shown, self._runs.session_limit, self._runs.lag))

    def path_for(self, caller: Caller) -> str:
        """The path that lets `caller`, who has the right to it, look at the page once."""
        return "/" if self._access is None else f"/enter/{self._access.new_link(caller)}"


@contextlib.asynccontextmanager
async def paged(
    settings: CoordinatorSettings, servicer: CoordinatorServicer, fleet: Fleet | None
) -> AsyncIterator[OpenPage | None]:
    """Serve the page until the end of the block, if the settings say so; else give None.

    Browsers can connect from now on. They are answered once `servicer` serves, or after
    `WAIT_FOR_WORKERS_S` of a longer start. `servicer` gives the page's links to who has the right
    to them. Raises `ConfigError` for an address that cannot be used, or would be open to everybody.
    """
    if not settings.page:
        yield None
        return
    check_page(settings)
    _check_packages()
    files = _tls_files(settings, fleet)
    tls = None if files is None else _Tls(files)
    access = None if fleet is None else PageAccess(lambda key: fleet.members.caller(key))
    token = "" if fleet is None else _metrics_token(fleet.state.path)
    with page_socket(settings.page) as listening:
        address = f"{settings.page.rpartition(':')[0]}:{listening.getsockname()[1]}"
        page = OpenPage(address, is_tls=tls is not None, access=access)

        async def serve() -> None:
            await _workers_served(servicer)
            server = await asyncio.to_thread(importlib.import_module, _SERVER)
            page_settings = server.PageSettings(
                hosts=_own_names(settings, files),
                access=access,
                metrics_token=token,
                tls=None if tls is None else tls.context,
                certificate_ends_s=lambda: None if tls is None else tls.ends_s,
            )
            async with server.page_served(page_settings, listening) as serving:
                page.served_by(serving)
                await _refresh(tls)

        serving = asyncio.create_task(serve())
        serving.add_done_callback(partial(_end, listening))
        servicer.page = page
        scheme = "http" if tls is None else "https"
        way = "" if access is None else " (links: fedmezo page)"
        log.info("the page is at %s://%s%s", scheme, address, way)
        try:
            yield page
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def _workers_served(servicer: CoordinatorServicer) -> None:
    """Wait until the workers are served, but not for ever."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_FOR_WORKERS_S):
            while not servicer.is_served(""):  # noqa: ASYNC110 - runs tell nobody
                await asyncio.sleep(LOOK_SERVED_EVERY_S)


def _end(listening: socket.socket, serving: asyncio.Task[None]) -> None:
    listening.close()  # Browsers would wait there for ever.
    if not serving.cancelled() and (error := serving.exception()) is not None:
        log.error("the page is not served: %s", error)


def _check_packages() -> None:
    """Look whether the page's packages are there; they are loaded later."""
    for package in ("aiohttp", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"The page needs the package {package}, which is not installed; "
                "run: pip install 'fedmezo[page]'"
            )


def check_page(settings: CoordinatorSettings) -> None:
    """Refuse to show the page to everybody on an address that other machines reach.

    Raises `ConfigError`, which says what that would mean.
    """
    if settings.state is None and not settings.insecure and not is_loopback(settings.page):
        raise ConfigError(
            f"page = {settings.page} lets other machines look, and without identities whoever can "
            "connect sees the runs. Make identities (fedmezo-coordinator init) and set state; or "
            "use 127.0.0.1 and an SSH tunnel; or say --insecure if the network is yours alone."
        )


def _tls_files(settings: CoordinatorSettings, fleet: Fleet | None) -> tuple[Path, Path] | None:
    """The certificate and key that the coordinator shows to workers; None without TLS."""
    if settings.tls_files is not None or fleet is None:
        return settings.tls_files
    return fleet.state.server_files


def _own_names(settings: CoordinatorSettings, files: tuple[Path, Path] | None) -> frozenset[str]:
    """Names by which browsers may call this machine."""
    names = {settings.page.rpartition(":")[0].strip("[]"), socket.gethostname()}
    if files is not None:
        with contextlib.suppress(OSError, IdentityError):
            names |= set(hosts_of(files[0].read_bytes()))
    return frozenset(name.lower() for name in names)


def _metrics_token(state: Path) -> str:
    path = state / METRICS_TOKEN
    try:
        if not path.exists():
            write_private(path, f"{secrets.token_urlsafe(32)}\n".encode())
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be used ({error}); remove it or mend it.") from None


class _Tls:
    """The page's certificate, which can change while it serves."""

    def __init__(self, files: tuple[Path, Path]) -> None:
        self._paths, self._files = files, TlsFiles(*files)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.ends_s: int | None = None
        self._take()

    def refresh(self) -> None:
        """Let new connections have the certificate that the files hold now."""
        if self._files.changed():
            # If they change again just now, the next look takes them.
            with contextlib.suppress(OSError):
                self._take()

    def _take(self) -> None:
        certificate, key = self._paths
        self.context.load_cert_chain(certificate, key, password="")
        with contextlib.suppress(IdentityError):
            self.ends_s = lifetime_s(self._files.material.chain)[1]


async def _refresh(tls: _Tls | None) -> None:
    """Look at the certificate again and again, for ever."""
    while True:
        await asyncio.sleep(LOOK_AT_CERTIFICATE_EVERY_S)
        if tls is not None:
            await asyncio.to_thread(tls.refresh)
