"""How the commands of `fedmezo` reach a coordinator: their options, and the client they make."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedmezo_core.errors import ConfigError, UnavailableError
from fedmezo_core.layered_settings import check_address, expanded
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import identity_in, renewed

log = logging.getLogger("fedmezo.command")

DEFAULT_ADDRESS = "127.0.0.1:7465"


def _address(given: str | None) -> str | None:
    try:
        return given if given is None else check_address(given)
    except ValueError as error:
        raise ConfigError(f"coordinator = {given!r} is not allowed: {error}.") from None


def user_path(given: Path | None) -> Path | None:
    """A path with `~` replaced; raises `ConfigError` if that is not possible."""
    try:
        return None if given is None else Path(expanded(str(given)))
    except ValueError as error:
        raise ConfigError(f"{given} is not allowed: {error}.") from None


Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar="FEDMEZO_COORDINATOR",
        callback=_address,
        show_default=DEFAULT_ADDRESS,
        help="host:port of the coordinator",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        callback=user_path, help="PEM file of the CA to trust, instead of the system's, with TLS"
    ),
]
Tls = Annotated[
    bool, typer.Option("--tls", help="connect with TLS; without --tls-ca, trust the system's CAs")
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="FEDMEZO_STATE",
        callback=user_path,
        help="folder of an identity to show: from fedmezo join, or a coordinator's state folder",
    ),
]


@dataclass(frozen=True, slots=True)
class Link:
    """Where a coordinator is, and what makes a client of it."""

    address: str
    client: Callable[[], CoordinatorClient]


def link_to(coordinator: str | None, tls_ca: Path | None, tls: bool, state: Path | None) -> Link:
    """The link that these options name; raises `IdentityError` if `state` holds no identity."""
    identity: Identity | None = None
    if state is not None:
        if tls or tls_ca is not None:
            raise ConfigError(
                "--tls and --tls-ca have no meaning with --state, whose identity says what to "
                "trust; leave them out."
            )
        identity = identity_in(state)
    if identity is not None and identity.renew_at_s < time.time():
        asyncio.run(_renew(coordinator or identity.address, identity))
        identity = identity_in(identity.folder)
    address = coordinator or (identity.address if identity is not None else DEFAULT_ADDRESS)
    return Link(address, lambda: CoordinatorClient(address, tls_ca, tls=tls, identity=identity))


async def _renew(address: str, identity: Identity) -> None:
    """Renew an identity that only commands use, and that nothing else renews."""
    try:
        async with CoordinatorClient(address, identity=identity) as client:
            await renewed(client, identity)
    except UnavailableError as error:
        log.warning("the certificate of %s cannot be renewed now: %s", identity.name, error)
