"""What lies beside a journal: the key that signs its heads, and its high-water mark.

Together they tell a journal that lost its newest records from one that is whole, and a lost journal
from a new one. A journal from before there were marks gets one at its next start. One in a database
has none, because several databases may share a working folder.
"""

from __future__ import annotations

from pathlib import Path

from fedmezo_coordinator.stores.location import is_url, journal_shown, path_beside
from fedmezo_core.errors import ConfigError, JournalBehindError
from fedmezo_core.journal.high_water import HighWaterMark, Mark, read_mark
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.signed_heads import Signer, open_signer


class Companions:
    """The key and the mark of one journal, as they were found."""

    def __init__(self, journal: str, signing_key: Path | None = None) -> None:
        """`journal` is the setting; `signing_key` is None for the key beside the journal.

        Raises `JournalError` if there is a mark that cannot be read.
        """
        self._journal = journal_shown(journal)
        self._is_file = not is_url(journal)
        self._has_own_key = signing_key is None
        self._key_path = signing_key or path_beside(journal, ".key")
        self._mark_path = path_beside(journal, ".mark")
        self._mark = read_mark(self._mark_path) if self._is_file else None

    def check(self, journal: Journal) -> None:
        """Raise `JournalBehindError` if the journal lacks records that it had; needs no `load`."""
        mark = self._mark
        if journal.is_empty:
            self._check_is_new()
        elif mark is not None and not journal.reaches(mark.records, mark.chain):
            raise JournalBehindError(
                f"The journal {self._journal} lacks record {mark.records - 1}, which "
                f"{self._mark_path} says was on the disk: it was cut short, or is an older copy or "
                "another journal. Put the newest journal back, with its -wal file if there is one; "
                f"or move {self._mark_path} away to continue without the records that are missing."
            )

    def _check_is_new(self) -> None:
        if self._mark is not None:
            raise JournalBehindError(
                f"The journal {self._journal} is empty or new, but {self._mark_path} says that it "
                f"had {self._mark.records} records. Put the newest copy of the journal back, or "
                f"move {self._mark_path} and {self._key_path} away to begin a new run."
            )
        if self._is_file and self._has_own_key and self._key_path.exists():
            raise JournalBehindError(
                f"The journal {self._journal} is empty or new, but it had the key "
                f"{self._key_path}, so there was a run. Put the newest copy of the journal back; "
                "to begin a new run, move the key away, or name it as signing_key."
            )

    def signer(self) -> Signer:
        """The key, which is made if the journal never had one.

        Raises `ConfigError` if it is not the key that signed the mark.
        """
        mark = self._mark
        if mark is not None and not self._key_path.exists():
            self._refuse_key(mark, "is gone")
        signer = open_signer(self._key_path)
        if mark is not None and signer.public_key != mark.key:
            self._refuse_key(mark, "was replaced by another")
        return signer

    def _refuse_key(self, mark: Mark, what: str) -> None:
        raise ConfigError(
            f"The key {self._key_path} of the journal {self._journal} {what}: {self._mark_path} is "
            f"signed by {mark.key.hex()}. Put that key back. Without it, move {self._mark_path} "
            "away to continue with another key, which workers that know the first one refuse."
        )

    def keep_mark(self, journal: Journal, signer: Signer) -> None:
        """Let the mark follow a journal that is loaded."""
        if self._is_file:
            journal.keep_mark(HighWaterMark(self._mark_path, signer))
