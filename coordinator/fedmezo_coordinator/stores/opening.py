"""Where a journal is, a file's path or a PostgreSQL URL, and how it is opened.

The one place that knows both kinds. What it shows of a URL never holds the password.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.journal import JournalStore
from fedmezo_core.journal.sqlite import SqliteStore

SCHEMES = ("postgresql", "postgres")
DEFAULT_NAME = "journal"
_NAME = re.compile(r"[a-z0-9-]{1,48}")
_SHOWN_OPTIONS = ("host", "port")
"""Options of a URL that say where the server is; others may hold secrets and are not shown."""


@dataclass(frozen=True, slots=True)
class DatabasePlace:
    """A journal in a PostgreSQL database: a URL, and in it `journal=NAME` for one of several."""

    dsn: str = field(repr=False)
    """What asyncpg takes: the URL without `journal`, with the password if it has one."""

    secret: str = field(repr=False)
    """The URL's password; empty if it has none."""

    name: str
    """The journal's name: a-z, 0-9 and -."""

    shown: str
    """The URL without its password, for messages."""

    @property
    def schema(self) -> str:
        """The PostgreSQL schema that holds the journal; a valid identifier as it is."""
        return "fedmezo_" + self.name.replace("-", "_")

    def clean(self, text: str) -> str:
        """`text` without the password, should a library ever repeat it."""
        return text.replace(self.secret, "***") if self.secret else text


def is_url(journal: str) -> bool:
    """Whether the setting names a database, not a file."""
    return "://" in journal


def journal_shown(journal: str) -> str:
    """The setting as it may be printed."""
    return parse_url(journal).shown if is_url(journal) else journal


def path_beside(journal: str, ending: str) -> Path:
    """Where something that belongs to a journal is kept, if the settings do not say.

    Beside a file; for a database in the working folder, under the journal's name.
    """
    return Path((parse_url(journal).name if is_url(journal) else journal) + ending)


def open_store(
    journal: str,
    *,
    read_only: bool = False,
    standby: bool = False,
    give_up: threading.Event | None = None,
) -> JournalStore:
    """Open the journal that the setting names; only one process can hold it for writing.

    `read_only` looks at a journal that must exist; one in PostgreSQL may be in use meanwhile.
    `standby` waits for as long as another coordinator holds it; `give_up` ends such a wait with a
    `JournalLockedError`. Raises `ConfigError` for a setting that is wrong and `JournalError` and its
    kinds for a journal that cannot be opened.
    """
    if not is_url(journal):
        if standby:
            raise ConfigError(
                f"standby needs a journal that two machines can reach, not the file {journal}; "
                "set journal to a postgresql:// URL, or leave standby out."
            )
        return SqliteStore(Path(journal), create=not read_only)
    place = parse_url(journal)
    try:
        from fedmezo_coordinator.stores.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"A journal in PostgreSQL needs the package {error.name}; install it with "
            "`pip install fedmezo[postgres]`."
        ) from None
    return PostgresStore(place, read_only=read_only, standby=standby, give_up=give_up)


def parse_url(url: str) -> DatabasePlace:
    """Take a URL apart; `ConfigError` says what is wrong with it without repeating it."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"A journal is a file's path or a postgresql:// URL, and {scheme}:// is neither; "
            "write postgresql://user@host/database."
        )
    try:
        parts = urlsplit(url)
        password = unquote(parts.password or "")
        _ = parts.port
    except ValueError:
        _refuse_secret_characters()
    credentials, _, server = parts.netloc.rpartition("@")
    if "@" in parts.path + parts.query or parts.fragment or "@" in credentials:
        _refuse_secret_characters()
    options = parse_qsl(parts.query, keep_blank_values=True)
    names = [value for key, value in options if key == "journal"]
    name = names[-1] if names else DEFAULT_NAME
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"journal={name} in the journal's URL is not allowed; use 1 to 48 of a-z, 0-9 and -."
        )
    rest = [(key, value) for key, value in options if key != "journal"]
    secret = password or next((value for key, value in rest if key == "password"), "")
    user = credentials.partition(":")[0]
    return DatabasePlace(
        dsn=_joined(parts, parts.netloc, rest),
        secret=secret,
        name=name,
        shown=_joined(
            parts,
            f"{user}@{server}" if user else server,
            [(key, value) for key, value in rest if key in _SHOWN_OPTIONS] + [("journal", name)],
        ),
    )


def _joined(parts: SplitResult, netloc: str, options: list[tuple[str, str]]) -> str:
    # Not urlunsplit: without a host it drops the slashes that asyncpg wants.
    query = f"?{urlencode(options, safe='/')}" if options else ""
    return f"{parts.scheme}://{netloc}{parts.path}{query}"


def _refuse_secret_characters() -> NoReturn:
    raise ConfigError(
        "The journal's URL cannot be read (it is not repeated here: it may hold a password); write "
        "postgresql://user:password@host:port/database, with @ : / ? # % in the password "
        "percent-encoded, or give the password in PGPASSWORD or ~/.pgpass."
    )
