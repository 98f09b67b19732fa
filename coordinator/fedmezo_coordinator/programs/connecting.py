"""How the commands of `fedmezo` reach a coordinator or a journal: their options, what they open."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedmezo_coordinator.programs.plain_values import finite
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.errors import (
    ConfigError,
    IdentityError,
    JournalCorruptError,
    UnavailableError,
)
from fedmezo_core.folders import state_home
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import Journal, MemoryStore, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.layered_settings import check_address, expanded
from fedmezo_core.program import long_step
from fedmezo_core.records import Genesis, SignedHead
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.admission import check_run_id
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import identity_in, renewed

log = logging.getLogger("fedmezo.command")

DEFAULT_ADDRESS = "127.0.0.1:7465"
JOINED = "identity"
"""Folder, in the user's state folder, that `fedmezo join` makes unless told otherwise."""
LOOK_S = 5.0
"""Longest wait for an answer from this machine about whether it serves TLS."""


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


def check_data(path: Path) -> None:
    """Refuse a path of rows at which nothing is; raises `ConfigError`.

    Commands look before they load what computes, which takes seconds.
    """
    if not path.exists():
        raise ConfigError(f"There is no data file or folder {path}; check the path.")


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
        help="folder of an identity to show: from fedmezo join, or a coordinator's state folder; "
        "default: your own for that coordinator, if it lies where both programs put it",
    ),
]


RunId = Annotated[
    str,
    typer.Option(
        "--run-id",
        help="run to ask about; default: the only one that is not over, or the only one there is",
    ),
]
EveryS = Annotated[
    float, typer.Option(min=0.1, callback=finite, help="seconds between two updates")
]
JournalArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="JOURNAL",
        help="journal of a stopped coordinator, a file or a postgresql:// URL; "
        "default: read it from --coordinator",
    ),
]
JournalOption = Annotated[
    str | None,
    typer.Option(
        help="journal of a stopped coordinator, a file or a postgresql:// URL; "
        "default: read it from --coordinator"
    ),
]


@dataclass(frozen=True, slots=True)
class Link:
    """Where a coordinator is, what makes a client of it, and which of its runs is meant."""

    address: str
    client: Callable[[], CoordinatorClient]
    run_id: str = ""


def own_folders() -> list[Path]:
    """Where the identities of this user are, if there are any: the coordinator's, then who joined.

    These are the folders that `fedmezo-coordinator init` and `fedmezo join` make by default.
    """
    return [state_home() / folder for folder in ("coordinator", JOINED)]


def link_to(
    coordinator: str | None,
    tls_ca: Path | None,
    tls: bool,
    state: Path | None,
    run_id: str = "",
) -> Link:
    """The link that these options name; raises `IdentityError` if `state` holds no identity.

    Without `state`, an identity of one's own for that coordinator is shown, if there is one.
    """
    identity: Identity | None = None
    if state is not None:
        if tls or tls_ca is not None:
            raise ConfigError(
                "--tls and --tls-ca have no meaning with --state, whose identity says what to "
                "trust; leave them out."
            )
        identity = identity_in(state)
    elif not tls and tls_ca is None:
        identity = _own_identity(coordinator)
    if identity is not None and identity.renew_at_s < time.time():
        asyncio.run(_renew(coordinator or identity.address, identity))
        identity = identity_in(identity.folder)
    address = coordinator or (identity.address if identity is not None else DEFAULT_ADDRESS)
    return Link(
        address, lambda: CoordinatorClient(address, tls_ca, tls=tls, identity=identity), run_id
    )


def _own_identity(coordinator: str | None) -> Identity | None:
    """The identity in one's own folders for that coordinator; None: the first that is there.

    None too if a coordinator without identities has that address on this machine now.
    """
    for folder in own_folders():
        # One that cannot be used must not hinder a coordinator that wants none. `--state` says why.
        with contextlib.suppress(IdentityError, OSError):
            identity = identity_in(folder)
            if coordinator is None or _with_number(coordinator) == _with_number(identity.address):
                return None if _is_plain_here(identity.address) else identity
    return None


def _with_number(address: str) -> str:
    """The address with `localhost` replaced, so that both ways to write it are the same."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host == "localhost" else address


def _is_plain_here(address: str) -> bool:
    """Whether something on this machine answers at that address, and not with TLS.

    No other machine is asked: whoever is in between could say so.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            return False
    except ValueError:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # Nothing is sent, and the link itself checks.
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), LOOK_S) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return False
    except ssl.SSLError as error:
        return error.reason == "WRONG_VERSION_NUMBER"
    except OSError:
        return False


async def _renew(address: str, identity: Identity) -> None:
    """Renew an identity that only commands use, and that nothing else renews."""
    try:
        async with CoordinatorClient(address, identity=identity) as client:
            await renewed(client, identity)
    except UnavailableError as error:
        log.warning("the certificate of %s cannot be renewed now: %s", identity.name, error)


@contextlib.contextmanager
def opened_journal(
    journal: str | None, link: Callable[[], Link] | None, run_id: str = ""
) -> Iterator[Journal]:
    """Open a journal, or a copy of the one that a coordinator sends; one of the two is given.

    Raises `ConfigError` for a journal without a name, `WrongRunError` for one of another run than
    `run_id`, if that is given.
    """
    if journal == "":
        raise ConfigError("The journal's name is empty; name its file, or leave it out.")
    if journal:
        store = open_store(journal, read_only=True)
    else:
        assert link is not None
        store = asyncio.run(_fetched(link()))
    try:
        source = Journal(store)
        if journal and run_id:
            check_run_id(run_id, genesis_in(source).config.run_id)
        yield source
    finally:
        store.close()


def genesis_in(journal: Journal) -> Genesis:
    """Record 0 of a journal; raises `JournalCorruptError` if it begins with something else."""
    origin = journal.origin()
    if origin is not None:
        return origin.genesis
    rows = journal.read(0, 1)
    record = decode_record(rows[0].body) if rows else None
    if not isinstance(record, Genesis):
        raise JournalCorruptError("The journal does not begin with a genesis; give another one.")
    return record


async def _fetched(link: Link) -> MemoryStore:
    store = MemoryStore()
    async with link.client() as client:
        with long_step(f"fetching the journal of {link.address}", unit="records") as step:
            async for page in client.journal_pages(link.run_id):
                if page.origin:
                    store.drop_before(StoredState.received(page.origin))
                store.append([Row(e.seqno, e.record, e.chain) for e in page.entries])
                step.advance(len(page.entries))
    return store


def signed_head_from(link: Link) -> SignedHead | None:
    """The newest head that a running coordinator signs; None if it vouches for none."""

    async def work() -> SignedHead | None:
        async with link.client() as client:
            run = await client.get_run(link.run_id)
        if not run.signature:
            return None
        return SignedHead(run.epoch, run.round, run.round_head, run.checkpoint_key, run.signature)

    return asyncio.run(work())
