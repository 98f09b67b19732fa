"""Where a journal is: a file's path, or the URL of a PostgreSQL database.

What is shown of a URL never holds the password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from fedmezo_core.errors import ConfigError

SCHEMES = ("postgresql", "postgres")
DEFAULT_NAME = "journal"
_NAME = re.compile(r"[a-z0-9-]{1,48}")
_SHOWN_OPTIONS = ("host", "port")
"""Options of a URL that say where the server is. Others may hold secrets and are not shown."""


@dataclass(frozen=True, slots=True)
class DatabaseLocation:
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
    """Whether the journal's setting names a database, not a file."""
    return "://" in journal


def journal_shown(journal: str) -> str:
    """The journal's setting as it may be printed, without a password."""
    return parse_url(journal).shown if is_url(journal) else journal


def path_beside(journal: str, ending: str) -> Path:
    """Where a companion of a journal is kept, such as its key, if the settings do not say.

    The path is the journal file's, or for a database the journal's name in the working folder, plus
    `ending`.
    """
    return Path((parse_url(journal).name if is_url(journal) else journal) + ending).expanduser()


def parse_url(url: str) -> DatabaseLocation:
    """The database that a URL names; a `ConfigError` never repeats the URL."""
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
    return DatabaseLocation(
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
