"""The page of the real program: with identities and without."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_coordinator.admission.tls_files import TlsFiles
from fedmezo_coordinator.coordinator_settings import OF_A_RUN, PAGE_PORT, CoordinatorSettings
from fedmezo_coordinator.programs.watching_commands.page_command import page_link
from fedmezo_coordinator.web import opening_page
from fedmezo_coordinator.web.opening_page import METRICS_TOKEN, check_page
from fedmezo_core.errors import ConfigError
from fedmezo_proto.v1 import runs_pb2 as wire
from tests.integration.support.harness import (
    Programs,
    config_of,
    environment,
    genesis_of,
    run_values,
    write_genesis,
)

GENESIS = genesis_of(config_of())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", ""),
        ("127.0.0.1", f"127.0.0.1:{PAGE_PORT}"),
        ("[::1]", f"[::1]:{PAGE_PORT}"),
        ("localhost", f"localhost:{PAGE_PORT}"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("[::1]:80", "[::1]:80"),
    ],
)
def test_an_address_without_a_port_gets_the_pages(given: str, meant: str) -> None:
    assert CoordinatorSettings(page=given).page == meant


def test_a_coordinator_of_many_runs_has_a_page_of_its_own(tmp_path: Path) -> None:
    settings = CoordinatorSettings(runs=tmp_path, page="127.0.0.1")
    assert settings.page == f"127.0.0.1:{PAGE_PORT}"
    assert "page" not in OF_A_RUN


@pytest.mark.parametrize("given", ["http://127.0.0.1", "::1", "127.0.0.1:99999", ":80", 7])
def test_what_is_no_address_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="page"):
        CoordinatorSettings.model_validate({"page": given})


@pytest.mark.parametrize("more", [{}, {"tls_cert": Path("c.pem"), "tls_key": Path("k.pem")}])
def test_without_identities_others_may_look_only_if_that_is_said(more: dict[str, Path]) -> None:
    values = {"page": "0.0.0.0", **more}
    with pytest.raises(ConfigError, match="--insecure if the network is yours alone"):
        check_page(CoordinatorSettings.model_validate(values))
    check_page(CoordinatorSettings.model_validate({**values, "insecure": True}))
    check_page(CoordinatorSettings.model_validate({**values, "page": "127.0.0.1"}))


@pytest.mark.parametrize(
    ("listen", "tls", "link"),
    [
        ("127.0.0.1:7480", False, "http://127.0.0.1:7480/x"),
        ("0.0.0.0:7480", True, "https://fleet.example.org:7480/x"),
        ("[::]:7480", True, "https://fleet.example.org:7480/x"),
        ("pages.example.org:1", True, "https://pages.example.org:1/x"),
    ],
)
def test_a_link_names_a_host_that_can_be_reached(listen: str, tls: bool, link: str) -> None:
    parts = wire.OpenPageResponse(listen=listen, tls=tls, path="/x")
    assert page_link(parts, "fleet.example.org:7465") == link


async def test_a_page_says_what_a_start_does_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening_page, "WAIT_FOR_WORKERS_S", 0.1)
    starting: Any = SimpleNamespace(is_served=lambda _name: False)
    settings = CoordinatorSettings(page="127.0.0.1:0")
    async with opening_page.paged(settings, starting, None) as page:
        assert page is not None
        async with (
            aiohttp.ClientSession(f"http://{page.address}") as browser,
            browser.get("/metrics") as answer,
        ):
            assert answer.status == 503
            assert await answer.text() == "The coordinator is starting.\n"


async def test_nobody_waits_at_a_page_that_cannot_be_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening_page, "_SERVER", "fedmezo_coordinator.web.no_such_server")
    serving: Any = SimpleNamespace(is_served=lambda _name: True)
    async with opening_page.paged(CoordinatorSettings(page="127.0.0.1:0"), serving, None) as page:
        assert page is not None
        async with asyncio.timeout(10):
            while "the page is not served" not in caplog.text:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        host, _, port = page.address.rpartition(":")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))


async def test_a_page_outlives_a_certificate_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        make_state(tmp_path / name, [], None)
    certificate, key = open_state(tmp_path / "old").server_files
    renewed, renewed_key = open_state(tmp_path / "new").server_files
    read, looks = TlsFiles.changed, 0

    def changed(files: TlsFiles) -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            shutil.copy(renewed, certificate)
            shutil.copy(renewed_key, key)
        found = read(files)
        if looks == 1:
            certificate.write_text("The next certificate is just being written.")
        elif looks == 2:
            shutil.copy(renewed, certificate)
        return found

    monkeypatch.setattr(TlsFiles, "changed", changed)
    monkeypatch.setattr(opening_page, "LOOK_AT_CERTIFICATE_EVERY_S", 0.05)
    monkeypatch.setattr(opening_page, "WAIT_FOR_WORKERS_S", 0.1)
    starting: Any = SimpleNamespace(is_served=lambda _name: False)
    settings = CoordinatorSettings(page="127.0.0.1:0", tls_cert=certificate, tls_key=key)
    tls = ssl.create_default_context(cafile=str(tmp_path / "new" / "ca.pem"))
    async with opening_page.paged(settings, starting, None) as page:
        assert page is not None
        async with asyncio.timeout(10):
            while looks < 5:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)
        async with (
            aiohttp.ClientSession(f"https://{page.address}") as browser,
            browser.get("/metrics", ssl=tls) as answer,
        ):
            assert answer.status == 503


def test_workers_do_not_wait_until_the_page_is_loaded() -> None:
    code = (
        "import sys, fedmezo_coordinator.programs.coordinator_command\n"
        "print({'aiohttp', 'prometheus_client'} & sys.modules.keys() or 'none')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "none\n"


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from fedmezo_coordinator.__main__ import fedmezo; fedmezo()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
async def test_an_observer_of_a_fleet_looks_until_revoked(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    state = tmp_path / "state"
    make_state(state, [], None)
    write_genesis(tmp_path / "j.db", GENESIS)
    try:
        program, address = await programs.coordinator(
            tmp_path / "j.db", run_values(), "--state", state, "--page", "127.0.0.1:0"
        )
        here = ("--coordinator", address)
        await program.says(r"the page is at https://127\.0\.0\.1:\d+ \(links: fedmezo page\)")
        token = _command(
            "token", "create", "--name", "olga", "--role", "observer", *here, "--state", state
        )
        joined = _command("join", token.stdout.strip(), "--state", tmp_path / "olga")
        assert joined.returncode == 0, joined.stderr
        worker = _command("token", "create", "--name", "w1", *here, "--state", state)
        refused = _command("join", worker.stdout.strip(), "--state", tmp_path / "w1")
        assert refused.returncode == 0, refused.stderr
        refused = _command("page", *here, "--state", tmp_path / "w1")
        assert refused.returncode == 1
        assert "which is for observer or operator" in refused.stderr

        link = _command("page", *here, "--state", tmp_path / "olga").stdout.strip()
        found = re.fullmatch(r"(https://127\.0\.0\.1:\d+)/enter/[\w-]{43}", link)
        assert found, link
        tls = ssl.create_default_context(cafile=str(state / "ca.pem"))
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(found[1], cookie_jar=jar) as browser:

            async def status_of(path: str, **headers: str) -> int:
                async with browser.get(path, ssl=tls, headers=headers) as answer:
                    return answer.status

            assert await status_of("/") == 403
            async with browser.get(link, ssl=tls) as answer:
                assert "Secure" in answer.headers["Set-Cookie"]
                assert answer.headers["Set-Cookie"].startswith("__Host-")
            assert await status_of("/") == 200
            assert await status_of("/workers?run=tiny-run") == 200
            assert await status_of("/metrics") == 401
            secret = (state / METRICS_TOKEN).read_text().strip()
            assert (state / METRICS_TOKEN).stat().st_mode & 0o077 == 0
            assert await status_of("/metrics", Authorization=f"Bearer {secret}") == 200
            assert _command("revoke", "olga", *here, "--state", state).returncode == 0
            assert await status_of("/") == 403
        program.process.terminate()
        assert await program.wait() == 0
        assert secret not in program.said
        assert "/enter/" not in program.said
    finally:
        programs.end()


@pytest.mark.slow
async def test_a_page_without_identities_is_for_this_machine(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    write_genesis(tmp_path / "j.db", GENESIS)
    try:
        program, address = await programs.coordinator(
            tmp_path / "j.db", run_values(), "--page", "127.0.0.1:0"
        )
        link = _command("page", "--coordinator", address).stdout.strip()
        async with aiohttp.ClientSession() as browser, browser.get(link) as answer:
            assert answer.status == 200
        program.process.terminate()
        assert await asyncio.wait_for(program.wait(), 10) == 0
    finally:
        programs.end()


@pytest.mark.slow
async def test_a_coordinator_without_a_page_says_how_to_have_one(tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    write_genesis(tmp_path / "j.db", GENESIS)
    try:
        _, address = await programs.coordinator(tmp_path / "j.db", run_values())
        found = _command("page", "--coordinator", address)
        assert found.returncode != 0
        assert "start the coordinator with --page 127.0.0.1" in found.stderr
    finally:
        programs.end()
