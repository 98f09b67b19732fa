"""Opening a journal that a setting names: a file, or a PostgreSQL database."""

from __future__ import annotations

import threading
from pathlib import Path

from fedmezo_coordinator.stores.location import is_url, parse_url
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.journal import JournalStore
from fedmezo_core.journal.sqlite import SqliteStore


def open_store(
    journal: str,
    *,
    read_only: bool = False,
    standby: bool = False,
    give_up: threading.Event | None = None,
) -> JournalStore:
    """Open the journal that the setting names; only one process can hold it for writing.

    With `read_only` the journal must exist. Others may read it at the same time, and one in
    PostgreSQL may be in use meanwhile. With
    `standby` this waits for as long as another coordinator holds the journal; `give_up` ends the
    wait with a `JournalLockedError`. Raises `ConfigError` for a wrong setting, and `JournalError`
    or one of its kinds for a journal that cannot be opened.
    """
    if not is_url(journal):
        if standby:
            raise ConfigError(
                f"standby needs a journal that two machines can reach, not the file {journal}; "
                "set journal to a postgresql:// URL, or leave standby out."
            )
        return SqliteStore(Path(journal).expanduser(), read_only=read_only)
    location = parse_url(journal)
    try:
        from fedmezo_coordinator.stores.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"A journal in PostgreSQL needs the package {error.name}; install it with "
            "`pip install fedmezo[postgres]`."
        ) from None
    return PostgresStore(location, read_only=read_only, standby=standby, give_up=give_up)
