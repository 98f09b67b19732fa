"""Requests to the page, as bytes that a browser's connection brings."""

from __future__ import annotations

import asyncio
import atexit
import re
from functools import cache
from typing import Any, Final

from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.web.page_access import PageAccess
from fedmezo_coordinator.web.page_server import COOKIE, PageServer, PageSettings
from fedmezo_coordinator.web.runs_in_view import RunsInView
from fedmezo_core.trust.authorisation import Caller, Role
from tests.fuzz.in_process import ChangedStateError

LINK, SESSION = b"<link>", b"<session>"
"""In a request's bytes: the secret of a link that was not used, and that of an open session."""
METRICS_TOKEN: Final = "what a scraper shows"
OLGA: Final = Caller(Role.OBSERVER, "olga", b"olga's key")
TURNS_MAX: Final = 200
"""Turns of the event loop in which a request is answered; a live stream never ends."""


class _Transport(asyncio.Transport):
    """A connection whose other end reads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._is_closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 50123) if name == "peername" else default

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    def abort(self) -> None:
        self._is_closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Connections:
    """Stands for the page's port, whose limits are another test's."""

    def __init__(self) -> None:
        self.streaming: set[Any] = set()

    async def close(self) -> None:
        pass


class _Page:
    """A page of one run, open to one member."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.access = PageAccess(self._member)
        self.run = MadeRun("reviews", 30, 5)
        self.loop.run_until_complete(self._begin())

    @staticmethod
    def _member(_fingerprint: bytes) -> Caller:
        return OLGA

    async def _begin(self) -> None:
        settings = PageSettings(access=self.access, metrics_token=METRICS_TOKEN)
        self.page = PageServer(settings)
        self.page._connections = _Connections()  # type: ignore[assignment]
        self.runner = self.page.runner()
        await self.runner.setup()
        self.page.show(RunsInView(lambda: [self.run]))

    def end(self) -> None:
        """End all tasks."""
        self.loop.run_until_complete(self._end())
        self.loop.close()

    async def _end(self) -> None:
        await self.page.close()
        await self.runner.cleanup()

    @property
    def state(self) -> tuple[object, ...]:
        """What no request may change."""
        return self.run.records_shown, len(self.access._sessions._passes)

    def answer(self, data: bytes) -> bytes:
        """What comes back for these bytes of a connection."""
        return self.loop.run_until_complete(self._answered(data))

    async def _answered(self, data: bytes) -> bytes:
        assert self.runner.server is not None
        transport, protocol = _Transport(), self.runner.server()
        protocol.connection_made(transport)
        protocol.data_received(data)
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)
            if transport.is_closing():
                break
        protocol.connection_lost(None)
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)
            if not self.page.watchers:
                break
        return bytes(transport.written)


@cache
def _page() -> _Page:
    page = _Page()
    atexit.register(page.end)
    return page


def read_page_request(data: bytes) -> None:
    """Requests of one connection: each is answered or refused, and nobody enters without a link."""
    page = _page()
    link, session = page.access.new_link(OLGA), page.access._sessions.new(OLGA)
    before = page.state
    sent = data.replace(LINK, link.encode()).replace(SESSION, session.encode())
    answer = page.answer(sent)
    assert not answer or answer.startswith(b"HTTP/"), answer[:80]
    assert not re.search(rb"HTTP/\d\.\d 500", answer), "the page met a defect"
    assert not page.page.watchers, "a live stream goes on after its connection"
    if page.state != before and LINK not in data:
        raise ChangedStateError("a request changed what it may not change")


def cookie(secret: bytes) -> bytes:
    """The header that shows a session's secret."""
    return b"Cookie: " + COOKIE.encode() + b"=" + secret + b"\r\n"
