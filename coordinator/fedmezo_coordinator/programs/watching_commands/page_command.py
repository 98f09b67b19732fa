"""`fedmezo page`: a link to the coordinator's page."""

from __future__ import annotations

import asyncio
import ipaddress
import webbrowser
from typing import Annotated

import typer

from fedmezo_coordinator.programs.connecting import Coordinator, State, Tls, TlsCa, link_to
from fedmezo_coordinator.programs.plain_values import Format, say
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_proto.v1 import runs_pb2 as wire


def page(
    coordinator: Coordinator = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    state: State = None,
    browse: Annotated[
        bool, typer.Option("--open", help="open it in this machine's browser, too")
    ] = False,
    format_: Format = OutputFormat.TEXT,
) -> None:
    """Print a link to the coordinator's page; in a fleet it works once, within five minutes."""
    link = link_to(coordinator, tls_ca, tls, state)

    async def work() -> wire.OpenPageResponse:
        async with link.client() as client:
            return await client.open_page()

    address = page_link(asyncio.run(work()), link.address)
    say(format_, address, {"link": address})
    if browse:
        webbrowser.open(address)


def page_link(parts: wire.OpenPageResponse, coordinator: str) -> str:
    """The link for a browser on this machine, which reaches `coordinator` (host:port)."""
    host, _, port = parts.listen.rpartition(":")
    try:
        if ipaddress.ip_address(host.strip("[]")).is_unspecified:
            host = coordinator.rpartition(":")[0]
    except ValueError:
        pass
    return f"{'https' if parts.tls else 'http'}://{host}:{port}{parts.path}"
