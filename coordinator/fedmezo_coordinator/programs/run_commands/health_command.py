"""`fedmezo health`: the exit status says whether a coordinator or relay serves."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from fedmezo_coordinator.programs.connecting import (
    Coordinator,
    Link,
    State,
    Tls,
    TlsCa,
    link_to,
)
from fedmezo_coordinator.programs.plain_values import Format, say
from fedmezo_core.errors import StartingError
from fedmezo_core.layered_settings import OutputFormat


def add_health_to(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command()
    def health(
        coordinator: Coordinator = None,
        tls_ca: TlsCa = None,
        tls: Tls = False,
        state: State = None,
        service: Annotated[
            str, typer.Option(help="a service's full name, or a run's ID; none: the process")
        ] = "",
        format_: Format = OutputFormat.TEXT,
    ) -> None:
        """Ask a coordinator or relay whether it serves; for probes: exit status 0 if it does."""
        link = link_to(coordinator, tls_ca, tls, state)
        asyncio.run(_check(link, service))
        values = {"address": link.address, "service": service, "served": True}
        say(format_, f"{service or link.address} is served", values)


async def _check(link: Link, service: str) -> None:
    async with link.client() as client:
        if not await client.is_served(service):
            raise StartingError(
                f"{service or 'The process'} at {link.address} does not serve yet, or no more."
            )
