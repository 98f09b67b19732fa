"""The page's server, by real HTTP: who may read what, and what nobody can do."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from benchmarks.operation.made_run import MadeRun
from fedmezo_coordinator.web import page_connections, page_server
from fedmezo_coordinator.web.page_access import PageAccess
from fedmezo_coordinator.web.page_server import COOKIE, PageServer, PageSettings, page_served
from fedmezo_coordinator.web.page_socket import page_socket
from fedmezo_coordinator.web.runs_in_view import RunsInView
from fedmezo_core.errors import ConfigError, RevokedError
from fedmezo_core.trust.authorisation import Caller, Role
from tests.integration.support.harness import until

pytestmark = pytest.mark.slow

OLGA = Caller(Role.OBSERVER, "olga", b"olga's key")
PATHS = ("/", "/page.css", "/page.js", "/charts.js", "/icon.svg", "/live", "/workers", "/metrics")


class Members:
    """Olga, until she is revoked."""

    def __init__(self) -> None:
        self.revoked = False

    def caller(self, fingerprint: bytes) -> Caller:
        if self.revoked or fingerprint != OLGA.fingerprint:
            raise RevokedError("She was revoked.")
        return OLGA


class Site:
    """A page under test, and a browser of one's own."""

    def __init__(self, page: PageServer, session: aiohttp.ClientSession) -> None:
        self.page = page
        self.base = f"http://127.0.0.1:{page.port}"
        self.session = session

    async def get(self, path: str, **more: Any) -> tuple[int, str, Any]:
        async with self.session.get(f"{self.base}{path}", **more) as answer:
            return answer.status, await answer.text(), answer.headers


@asynccontextmanager
async def site(*runs: MadeRun, **settings: Any) -> AsyncIterator[Site]:
    jar = aiohttp.CookieJar(unsafe=True)  # Cookies of addresses, as browsers keep them.
    async with (
        page_served(PageSettings(**settings), page_socket("127.0.0.1:0")) as page,
        aiohttp.ClientSession(cookie_jar=jar) as session,
    ):
        if runs:
            page.show(RunsInView(lambda: runs))
        yield Site(page, session)


async def _is(holds: bool) -> bool:
    return holds


async def events(answer: aiohttp.ClientResponse, *names: str) -> dict[str, Any]:
    """The first events of these names in a live stream."""
    found: dict[str, Any] = {}
    name = ""
    async for line in answer.content:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            found[name] = json.loads(text.removeprefix("data: "))
            if found.keys() >= set(names):
                return found
    raise AssertionError(f"the stream ended with {sorted(found)} alone")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_whatever_could_change_something_is_refused(method: str) -> None:
    async with site(MadeRun()) as at:
        for path in [*PATHS, "/nothing", "/enter/x"]:
            answer = await at.session.request(method, f"{at.base}{path}", data=b"{}")
            assert answer.status == 405, path
            assert answer.headers["Allow"] == "GET, HEAD"


async def test_every_answer_carries_the_headers() -> None:
    async with site(MadeRun()) as at:
        for path in [*PATHS, "/nothing"]:
            async with at.session.head(f"{at.base}{path}") as answer:
                for name, value in page_server.HEADERS.items():
                    assert answer.headers[name] == value, path
                assert "'unsafe" not in answer.headers["Content-Security-Policy"]
                assert await answer.read() == b""


async def test_the_page_names_nothing_outside_and_holds_no_code() -> None:
    async with site(MadeRun()) as at:
        for path in ("/", "/page.css", "/page.js", "/charts.js"):
            status, text, _ = await at.get(path)
            assert status == 200
            assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), path
        _, page, _ = await at.get("/")
        for forbidden in ("<style", " style=", "onclick", "<script>", "javascript:"):
            assert forbidden not in page


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:7480", 200),
        ("[::1]:7480", 200),
        ("10.1.2.3:1", 200),
        ("fleet.example.org", 200),
        ("FLEET.example.org:7480", 200),
        ("evil.example.org", 421),
        ("fleet.example.org.evil.org", 421),
        ("localhost.evil.org", 421),
        ("", 421),
    ],
)
async def test_a_name_that_leads_here_by_a_trick_is_refused(host: str, status: int) -> None:
    async with site(MadeRun(), hosts={"fleet.example.org"}) as at:
        found, _, _ = await at.get("/", headers={"Host": host})
        assert found == status


async def test_a_stream_tells_the_run_and_then_only_what_is_new() -> None:
    run = MadeRun("reviews", 30, 5)
    async with site(run) as at, at.session.get(f"{at.base}/live") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        first = await events(answer, "run", "runs", "curves", "events")
        assert first["run"]["run_id"] == "reviews"
        assert first["run"]["connected"] == 5
        assert first["runs"][0]["round"] == 30
        assert first["curves"]["losses"]["at"] == 0
        assert len(first["curves"]["losses"]["points"]) == 30
        run.commit()
        news = await events(answer, "curves")
        assert news["curves"]["losses"]["at"] == 29
        assert [point[0] for point in news["curves"]["losses"]["points"]] == [30, 31]
        while (await events(answer, "run"))["run"]["round"] < 31:
            pass


async def test_before_there_is_a_run_the_page_says_what_happens() -> None:
    async with site() as at, at.session.get(f"{at.base}/live") as answer:
        assert "step" in (await events(answer, "starting"))["starting"]
    async with site() as at:
        assert (await at.get("/metrics"))[0] == 503


async def test_workers_come_in_pages_sorted_and_chosen() -> None:
    async with site(MadeRun("reviews", 3, 1000)) as at:
        _, text, _ = await at.get("/workers?run=reviews&sort=loss&order=down&page=1")
        found = json.loads(text)
        assert (found["total"], found["found"], found["pages"], found["page"]) == (
            1000,
            1000,
            20,
            1,
        )
        losses = [row["loss"] for row in found["rows"]]
        assert len(losses) == 50
        assert losses == sorted(losses, reverse=True)
        _, text, _ = await at.get("/workers?run=reviews&state=away&name=device-00&page=99")
        assert {row["worker"] for row in json.loads(text)["rows"]} == {
            f"device-00{number:02}" for number in range(16, 100, 17)
        }


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("run=other", 404),
        ("", 404),
        ("run=reviews&sort=password", 400),
        ("run=reviews&page=x", 400),
        ("run=reviews&page=-1", 400),
        ("run=reviews&state=nowhere", 400),
        (f"run=reviews&name={'x' * 65}", 400),
    ],
)
async def test_a_query_that_makes_no_sense_gets_a_sentence(query: str, status: int) -> None:
    async with site(MadeRun()) as at:
        found, text, _ = await at.get(f"/workers?{query}")
        assert found == status
        assert text.endswith(".\n")


async def test_a_link_is_exchanged_for_a_cookie_that_no_script_reads() -> None:
    access = PageAccess(Members().caller)
    async with site(MadeRun(), access=access) as at:
        for path in ("/", "/live", "/workers?run=reviews"):
            assert (await at.get(path))[0] == 403, path
        link = f"/enter/{access.new_link(OLGA)}"
        async with at.session.head(f"{at.base}{link}") as answer:  # As previews of links do.
            assert answer.status == 404
        status, text, headers = await at.get(link)
        assert status == 200
        assert 'http-equiv="refresh"' in text
        cookie = headers["Set-Cookie"]
        assert cookie.startswith(f"{COOKIE}=")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert (await at.get("/"))[0] == 200
        assert (await at.get("/workers?run=reviews"))[0] == 200
        status, text, _ = await at.get(link)
        assert status == 403
        assert "fedmezo page" in text


async def test_who_is_revoked_loses_the_stream_at_once() -> None:
    members = Members()
    access = PageAccess(members.caller)
    async with site(MadeRun(), access=access) as at:
        await at.get(f"/enter/{access.new_link(OLGA)}")
        async with at.session.get(f"{at.base}/live") as answer:
            await events(answer, "run")
            members.revoked = True
            async with asyncio.timeout(5):
                await events(answer, "over")
                assert (await answer.content.read()).strip() == b""
        assert (await at.get("/"))[0] == 403


async def test_metrics_want_the_token() -> None:
    async with site(MadeRun(), metrics_token="right") as at:
        # Whoever has the token may come by any name, such as a container's.
        named = {"Host": "coordinator:7480", "Authorization": "Bearer right"}
        assert (await at.get("/metrics", headers=named))[0] == 200
        assert (await at.get("/", headers=named))[0] == 421
        for shown in ("", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer right2"):
            status, text, _ = await at.get("/metrics", headers={"Authorization": shown})
            assert status == 401
            assert "metrics.token" in text
        status, text, _ = await at.get("/metrics", headers={"Authorization": "Bearer right"})
        assert status == 200
        assert 'fedmezo_round{run="reviews"} 100.0' in text


async def test_a_page_without_members_needs_no_link() -> None:
    async with site(MadeRun()) as at:
        assert (await at.get("/enter/anything"))[0] == 404
        assert (await at.get("/"))[0] == 200


async def test_watchers_are_bounded_and_their_places_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_server, "WATCHERS_MAX", 2)
    async with site(MadeRun()) as at:
        first = await at.session.get(f"{at.base}/live")
        async with at.session.get(f"{at.base}/live"):
            status, _, headers = await at.get("/live")
            assert status == 503
            assert "Retry-After" in headers
        first.close()
        await until(lambda: _is(at.page.watchers == 0), "the places")


async def test_who_reads_nothing_is_cut_off_and_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its buffers fill; then its stream ends, and the others' go on."""
    monkeypatch.setattr(page_server, "WRITE_S", 0.5)
    run = MadeRun("reviews", 10, 5)
    async with site(run) as at:
        slow = socket.create_connection(("127.0.0.1", at.page.port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.sendall(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await until(lambda: _is(at.page.watchers == 1), "the stream")
        monkeypatch.setattr(page_server, "run_head", lambda _: {"fill": "x" * 10_000_000})
        await until(lambda: _is(at.page.watchers == 0), "its end")
        slow.close()
        assert (await at.get("/"))[0] == 200


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_connections, "CONNECTIONS_MAX", 3)
    async with site(MadeRun()) as at:
        held = [socket.create_connection(("127.0.0.1", at.page.port)) for _ in range(3)]
        await asyncio.sleep(0.2)
        with pytest.raises(aiohttp.ClientError):
            await at.get("/")
        for connection in held:
            connection.close()
        await asyncio.sleep(0.2)
        assert (await at.get("/"))[0] == 200


async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_connections, "CONNECTION_LIFE_S", 0.3)
    monkeypatch.setattr(page_connections, "LAST_REQUEST_S", 0.1)
    async with site(MadeRun()) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.page.port)
        writer.write(b"GET / HTTP/1.1\r\n")  # And no more.
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()
        async with at.session.get(f"{at.base}/live") as answer:  # A stream lives longer.
            await events(answer, "run")
            await asyncio.sleep(0.8)
            assert at.page.watchers == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"\r\n" * 1000,
    ],
)
async def test_what_is_no_request_gets_no_page(request_bytes: bytes) -> None:
    async with site(MadeRun()) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.page.port)
        writer.write(request_bytes)
        writer.write_eof()
        async with asyncio.timeout(10):
            answer = await reader.read(100)
        assert b" 200 " not in answer
        writer.close()
        assert (await at.get("/"))[0] == 200


async def test_an_address_that_is_taken_gets_a_sentence() -> None:
    async with site() as at:
        with pytest.raises(ConfigError, match="Cannot listen on page = "):
            page_socket(f"127.0.0.1:{at.page.port}")


async def test_a_run_whose_journal_cannot_be_read_leaves_the_others_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, sound = MadeRun("broken", 3, 2), MadeRun("sound", 3, 2)

    async def fails(_seqno: int, _rows_max: int) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(broken, "rows_from", fails)
    async with site(broken, sound) as at, at.session.get(f"{at.base}/live?run=sound") as answer:
        found = await events(answer, "curves")
        assert len(found["curves"]["losses"]["points"]) == 3
        await asyncio.sleep(2.5)
        told = [line for line in caplog.messages if "the disk is gone" in line]
        assert len(told) == 1
