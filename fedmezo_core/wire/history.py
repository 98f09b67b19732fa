"""The run's history as a party receives it: checked against the coordinator's key, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from fedmezo_core.errors import DivergedError, MismatchError
from fedmezo_core.journal.journal import Entry, Journal
from fedmezo_core.journal.party_copy import JournalCopy
from fedmezo_core.journal.signed_heads import Witness
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import SignedHead
from fedmezo_core.wire.client import RunDescription
from fedmezo_proto.v1 import coordinator_pb2 as wire

PAGE_COMMITS = 1024
"""Most commits in one page of a copy."""

Result = TypeVar("Result")


class History:
    """Checks what the coordinator signs; keeps commits in a file, if the party has one for them."""

    def __init__(
        self, path: Path | None, key: bytes | None, thread: ThreadPoolExecutor | None = None
    ) -> None:
        """`path` of the copy, or None for no copy; `key` that must sign, or None for any key.

        `thread` is the one that touches the file, if others read it too.
        """
        self._path = path
        self._wanted_key = key
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="journal-copy")
        self._witness: Witness | None = None
        self._copy: JournalCopy | None = None
        self.journal: Journal | None = None
        """The journal of the copy, once it is open."""
        self._welcome = wire.Welcome()

    @property
    def keeps(self) -> bool:
        """Whether there is a copy, to which every commit is added."""
        return self._path is not None

    async def open(self, description: RunDescription) -> AsyncIterator[Sequence[Entry]]:
        """Open or begin the copy; yields its commits in pages.

        Raises `MismatchError` if the coordinator's key is not the wanted one, and as
        `JournalCopy.begin`.
        """
        key = description.checkpoint_key
        if self._wanted_key is not None and key != self._wanted_key:
            raise MismatchError(
                f"The coordinator signs with key {key.hex() or '(none)'}, not with "
                f"{self._wanted_key.hex()}; check the address, or the worker's checkpoint_key."
            )
        config = description.genesis.config
        self._witness = Witness(config.run_id, key) if key else None
        path = self._path
        if path is None:
            return
        self.journal = await self._on_disk(lambda: Journal(SqliteStore(path)))
        copy = JournalCopy(self.journal)
        entries = copy.begin(description.genesis_body, description.epoch, key)
        while page := await self._on_disk(lambda: list(islice(entries, PAGE_COMMITS))):
            yield page
        self._copy = copy

    async def add(self, bodies: Sequence[bytes]) -> Sequence[Entry]:
        """Keep commits that were read from the coordinator; returns their entries in the copy."""
        copy = self._copy
        if copy is None or not bodies:
            return ()
        return await self._on_disk(lambda: copy.add(bodies))

    def expect(self, welcome: wire.Welcome) -> None:
        """Check the signed head that the next commits lead to; raises as `welcomed`."""
        self._welcome = welcome
        self._check(welcome.round, welcome.head, welcome.signature)

    async def welcomed(self, welcome: wire.Welcome, round_: int) -> None:
        """Check the welcome's signed head; `round_` is the round that this party holds.

        Raises `DivergedError` if the run's key did not sign it.
        """
        self.expect(welcome)
        if round_ == welcome.round:
            await self._keep((), welcome.round, welcome.head, welcome.signature)

    async def committed(
        self, notice: wire.CommitNotice, round_: int, head: bytes
    ) -> Sequence[Entry]:
        """Check and keep a commit from the stream; `round_` and `head` are those after it.

        Raises `DivergedError` if the run's key did not sign them.
        """
        signature = self.signature_of(notice, round_)
        if round_ >= self._welcome.round:
            self._check(round_, head, signature)
        return await self._keep((notice.record,), round_, head, signature)

    def signature_of(self, notice: wire.CommitNotice, round_: int) -> bytes:
        """The coordinator's signature of a commit's head; empty before the welcome's round."""
        return self._welcome.signature if round_ == self._welcome.round else notice.signature

    async def close(self) -> None:
        """Close the copy's file."""
        if self._copy is not None:
            await self._on_disk(self._copy.close)
        self._thread.shutdown()

    def _check(self, round_: int, head: bytes, signature: bytes) -> None:
        if self._witness is not None:
            self._witness.check(round_, head, signature)
        elif signature:
            raise DivergedError(
                f"The coordinator signs round {round_}, but named no key when this party asked "
                "for the run; restart it."
            )

    async def _keep(
        self, bodies: Sequence[bytes], round_: int, head: bytes, signature: bytes
    ) -> Sequence[Entry]:
        copy = self._copy
        if copy is None:
            return ()
        signed: SignedHead | None = None
        if signature and self._witness is not None:
            signed = SignedHead(self._welcome.epoch, round_, head, self._witness.key, signature)
        return await self._on_disk(lambda: copy.add(bodies, signed))

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
