"""The HTTP server of the page: it reads, and nothing that comes to it changes anything.

aiohttp serves it in the coordinator's own event loop. A watcher gets the newest state and misses
those in between if it reads slowly, so nothing queues for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import html
import ipaddress
import json
import socket
import ssl
import string
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

from aiohttp import web

from fedmezo_coordinator.web.metrics import Metrics
from fedmezo_coordinator.web.page_access import PageAccess
from fedmezo_coordinator.web.page_connections import PageConnections
from fedmezo_coordinator.web.run_json import (
    CurvesSent,
    WorkersQuery,
    run_events,
    run_head,
    run_line,
    workers_page,
)
from fedmezo_coordinator.web.runs_in_view import RunInView, RunsInView
from fedmezo_core.errors import ConfigError, FedMezoError, ForbiddenError, TokenError
from fedmezo_core.program import current_step

WATCHERS_MAX = 32
"""Most live streams at a time."""
PING_EVERY_S = 15.0
"""Longest silence of a live stream; a connection that is gone is noticed by it."""
WRITE_S = 20.0
"""Longest time that a watcher may leave a message unread; then its stream ends."""
LINE_BYTES_MAX = 2048
"""Longest request line and longest header."""
COOKIE, SECURE_COOKIE = "fedmezo-page", "__Host-fedmezo-page"
"""The session's cookie, without TLS and with it."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "Server": "FedMeZO",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every response."""
FILES = {
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> file and type of what anybody may read, who reaches the port."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class PageSettings:
    """By which names browsers reach the page, and for whom it is."""

    hosts: Collection[str] = ()
    """Names of this machine, as browsers may write them; addresses need not be among them."""
    access: PageAccess | None = None
    """Whose the links are; None: whoever reaches the port may look."""
    metrics_token: str = ""
    """What a scraper has to show; empty: nothing."""
    tls: ssl.SSLContext | None = None
    certificate_ends_s: Callable[[], int | None] = lambda: None
    """When the server's certificate expires, in seconds since 1970; None without one."""


class PageServer:
    """Serves the page of one coordinator."""

    def __init__(self, settings: PageSettings) -> None:
        self._settings = settings
        self._connections: PageConnections
        self._runs: RunsInView | None = None
        self._metrics: Metrics | None = None
        self._following: asyncio.Task[None] | None = None
        self._shared: dict[str, tuple[int, dict[str, bytes]]] = {}
        self.watchers = 0
        """Live streams that are open."""

    @property
    def port(self) -> int:
        """Port that it listens on, once it does."""
        return self._connections.port

    def _application(self) -> web.Application:
        """The application of aiohttp that answers requests with this page."""
        app = web.Application(middlewares=[self.guard], client_max_size=1024)
        app.on_response_prepare.append(_with_headers)
        app.router.add_get("/", self.page)
        app.router.add_get("/enter/{secret}", self.enter)
        app.router.add_get("/live", self.live)
        app.router.add_get("/workers", self.workers)
        app.router.add_get("/metrics", self.metrics)
        for path in FILES:
            app.router.add_get(path, self.file)
        return app

    def runner(self) -> web.AppRunner:
        """What answers the requests of connections with this page."""
        return web.AppRunner(
            self._application(),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=15.0,
            lingering_time=0.0,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            shutdown_timeout=0.1,
        )

    def accept(self, listening: socket.socket, server: web.Server) -> None:
        """Accept connections at a socket from now on; `server` serves them."""
        self._connections = PageConnections(listening, server, self._settings.tls)

    def show(self, runs: RunsInView) -> None:
        """Show these runs from now on; until then the page says what the start is doing."""
        self._runs = runs
        self._metrics = Metrics(runs, self._settings.certificate_ends_s, lambda: self.watchers)
        self._following = asyncio.create_task(runs.watch())

    async def close(self) -> None:
        """Accept no more, and follow nothing any more."""
        await self._connections.close()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    # ------------------------------------------------------------ what every request passes

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what is no reading request to this host, and turn errors into sentences."""
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "This page can only be read.", {"Allow": "GET, HEAD"})
        has_token = request.path == "/metrics" and self._settings.metrics_token
        if not (has_token or self._is_own_host(request.host)):
            return _refusal(421, "Open this page by the machine's address or its own name.")
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return _refusal(404, "There is nothing here.")
        except TokenError as error:
            return _door(str(error))
        except ForbiddenError as error:
            return _door(str(error)) if request.path == "/" else _refusal(403, str(error))
        except ConfigError as error:
            return _refusal(400, str(error))
        except FedMezoError as error:
            return _refusal(503, str(error))

    def _is_own_host(self, host: str) -> bool:
        """Whether a request names this machine, and not a name that leads here by a trick (DNS
        rebinding), which would let another page read this one."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        if name in self._settings.hosts or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check(self, request: web.Request) -> None:
        """Raise `ForbiddenError` unless whoever asks may look."""
        access = self._settings.access
        if access is not None:
            access.check(request.cookies.get(self._cookie, ""))

    @property
    def _cookie(self) -> str:
        return COOKIE if self._settings.tls is None else SECURE_COOKIE

    # ------------------------------------------------------------ the page

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The page itself, for whoever may look."""
        self._check(request)
        return web.Response(body=_file("page.html"), content_type="text/html", charset="utf-8")

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A script or style of the page."""
        name, kind = FILES[request.path]
        return web.Response(body=_file(name), content_type=kind, charset="utf-8")

    async def enter(self, request: web.Request) -> web.StreamResponse:
        """Exchange the secret of a link for a session.

        The page that comes back leads on by itself. A redirect would not do: a browser that came
        from another site would leave the new cookie out.
        """
        access = self._settings.access
        if access is None or request.method == "HEAD":  # Previews of links must not use them up.
            raise web.HTTPNotFound
        secret = access.enter(request.match_info["secret"])
        response = _html("Come in", "You can look at the runs now.", leads_on=True)
        response.set_cookie(
            self._cookie,
            secret,
            httponly=True,
            samesite="Strict",
            secure=self._settings.tls is not None,
            path="/",
        )
        return response

    async def workers(self, request: web.Request) -> web.StreamResponse:
        """A page of a run's workers."""
        self._check(request)
        view = self._view(request)
        given = request.query
        try:
            page = int(given.get("page", "0"))
        except ValueError:
            raise ConfigError("page is a number.") from None
        query = WorkersQuery(
            given.get("sort", "worker"),
            given.get("order") == "down",
            given.get("state", ""),
            given.get("name", ""),
            page,
        )
        query.check()
        return _json(workers_page(view, query))

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Metrics for Prometheus."""
        token = self._settings.metrics_token
        shown = request.headers.get("Authorization", "").encode(errors="replace")
        if token and not hmac.compare_digest(shown, f"Bearer {token}".encode()):
            return _refusal(
                401,
                "Metrics are for whoever shows the token in the state folder's metrics.token.",
                {"WWW-Authenticate": "Bearer"},
            )
        if self._metrics is None:
            return _refusal(503, "The coordinator is starting.")
        return web.Response(body=self._metrics.text(), headers={"Content-Type": Metrics.TYPE})

    # ------------------------------------------------------------ what is live

    async def live(self, request: web.Request) -> web.StreamResponse:
        """A stream of events: the runs, and one of them with its curves, whenever they change."""
        self._check(request)
        if self.watchers >= WATCHERS_MAX:
            return _refusal(
                503, f"{WATCHERS_MAX} others are watching; try later.", {"Retry-After": "30"}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.force_close()
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        self.watchers += 1
        self._connections.streaming.add(request.protocol)
        try:
            await response.prepare(request)
            await self._stream(request, response)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._connections.streaming.discard(request.protocol)
            self.watchers -= 1
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse) -> None:
        clock = asyncio.get_running_loop().time
        watcher, wrote_s = _Watcher(request.query.get("run", "")), clock()
        while True:
            try:
                self._check(request)
            except ForbiddenError:
                await _write(response, _event("over", b"{}"))
                return
            if self._runs is not None and not watcher.run_id:
                watcher.run_id = self._runs.first_id()
            news = watcher.news(self._parts(watcher.run_id))
            if self._runs is not None and (view := self._runs.find(watcher.run_id)):
                news += watcher.curves(view)
            if news or clock() - wrote_s > PING_EVERY_S:
                await _write(response, news or b": still here\n\n")
                wrote_s = clock()
            if self._runs is None:
                await asyncio.sleep(1.0)
            else:
                await self._runs.next_look()

    def _parts(self, run_id: str) -> dict[str, bytes]:
        """What a watcher of a run should know, as JSON by the name of the event, but the curves.

        It is made once for all who watch the same.
        """
        if self._runs is None:
            return {"starting": _dumped({"step": current_step()})}
        view = self._runs.find(run_id)
        looks, parts = self._shared.get(run_id, (-1, {}))
        if looks == self._runs.looks:
            return parts
        lines = [run_line(one) for one in self._runs.all()]
        parts = {"runs": _dumped(lines)}
        if view is not None:
            parts["run"], parts["events"] = _dumped(run_head(view)), _dumped(run_events(view))
        if len(self._shared) > WATCHERS_MAX:
            self._shared.clear()
        self._shared[run_id] = (self._runs.looks, parts)
        return parts

    def _view(self, request: web.Request) -> RunInView:
        view = self._runs and self._runs.find(request.query.get("run", ""))
        if not view:
            raise web.HTTPNotFound
        return view


class _Watcher:
    """What one live stream has been sent."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        """The run to show; empty until there is one, if the browser named none."""
        self._last: dict[str, bytes] = {}
        self._curves = CurvesSent()
        self._view: RunInView | None = None

    def news(self, parts: dict[str, bytes]) -> bytes:
        """The events of those parts that have changed."""
        news = {name: data for name, data in parts.items() if self._last.get(name) != data}
        self._last.update(news)
        return b"".join(_event(name, data) for name, data in news.items())

    def curves(self, view: RunInView) -> bytes:
        """The event of what is new in the run's curves; empty if nothing is."""
        if view is not self._view:  # The run was begun anew under its name.
            self._view, self._curves = view, CurvesSent()
        found = self._curves.news(view.series)
        return _event("curves", _dumped(found)) if found else b""


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Send `data`; raises `TimeoutError` if nobody reads it."""
    async with asyncio.timeout(WRITE_S):
        await response.write(data)


def _event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


def _dumped(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def _json(values: Any) -> web.Response:
    return web.Response(body=_dumped(values), content_type="application/json")


@functools.cache
def _file(name: str) -> bytes:
    return (resources.files(__package__) / "files" / name).read_bytes()


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=f"{sentence}\n", headers=headers)


def _html(title: str, sentence: str, *, status: int = 200, leads_on: bool = False) -> web.Response:
    """A small page with one sentence, which may lead on to the runs by itself."""
    text = string.Template(_file("door.html").decode()).substitute(
        title=html.escape(title),
        sentence=html.escape(sentence),
        refresh='<meta http-equiv="refresh" content="0; url=/">' if leads_on else "",
        link='<p><a href="/">To the runs</a></p>' if leads_on else "",
    )
    return web.Response(status=status, text=text, content_type="text/html")


def _door(sentence: str) -> web.Response:
    return _html("Not open to you", sentence, status=403)


async def _with_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


@contextlib.asynccontextmanager
async def page_served(
    settings: PageSettings, listening: socket.socket
) -> AsyncIterator[PageServer]:
    """Serve browsers that connect to a socket until the end of the block, which closes it.

    `PageServer.show` gives them runs to see.
    """
    page = PageServer(settings)
    runner = page.runner()
    await runner.setup()
    try:
        assert runner.server is not None
        page.accept(listening, runner.server)
        try:
            yield page
        finally:
            await page.close()
    finally:
        await runner.cleanup()
