"""Reading the journal for others: pages of records, and the commits that a joining worker lacks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from fedmezo_coordinator.serving.commit_index import CommitIndex
from fedmezo_coordinator.serving.hello import CATCH_UP_ROUNDS_MAX
from fedmezo_core.errors import JournalCompactedError, ProtocolError
from fedmezo_core.journal.journal import Journal, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_proto.v1 import coordinator_pb2 as wire

PAGE_RECORDS_MAX = 4096
"""Most records that one request may ask for."""
PAGE_RECORDS_DEFAULT = 1024
"""Most records in a page if the request does not say."""
PAGE_BYTES_MAX = 1024 * 1024
"""Most bytes in a page of more than one record."""
ORIGIN_BYTES_MAX = 6 * 1024 * 1024
"""Largest sealed state that is sent along with a page; readers take messages of 8 MiB."""
RECENT_BYTES_MAX = 8 * 1024 * 1024
"""Most bytes of the newest commits, which stay in memory for workers that come back."""
WAIT_MS_MAX = 30_000
"""Longest time that a request may wait for news."""

Result = TypeVar("Result")


class JournalPages:
    """Pages of the journal.

    Everything here runs on the event loop, except reads of the journal, which run in its thread.
    """

    journal: Journal
    """Set as soon as the journal is open; nothing can be read earlier."""

    def __init__(
        self, index: CommitIndex, thread: Executor, way_past_dropped: Callable[[], str]
    ) -> None:
        """`thread` is the journal's only thread.

        `way_past_dropped` says what a reader can do who asked for records that were dropped.
        """
        self._index = index
        self._thread = thread
        self._way_past_dropped = way_past_dropped
        self._recent: deque[Row] = deque()
        self._recent_bytes = 0
        self._news = asyncio.Event()

    def announce(self) -> None:
        """Wake every reader that waits for new records."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def remember(self, row: Row) -> None:
        """Keep a commit in memory for workers that come back, in place of the oldest ones."""
        self._recent.append(row)
        self._recent_bytes += len(row.body)
        while self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > CATCH_UP_ROUNDS_MAX:
            self._recent_bytes -= len(self._recent.popleft().body)

    async def commits_after(self, round_: int) -> Sequence[Row]:
        """All commits that a worker at `round_` lacks; most workers that come back lack 0 or 1.

        Raises `JournalCompactedError` if some were dropped in the meantime.
        """
        missing = self._index.after(round_)
        kept = min(len(self._recent), len(missing))
        rows = list(self._recent)[len(self._recent) - kept :]
        older = missing[: len(missing) - kept]
        if older:
            rows[:0] = await self._rows_at(older)
        return rows

    async def read(self, request: wire.ReadJournalRequest) -> wire.ReadJournalResponse:
        """The page that was asked for, all of the response but `finished`.

        Waits for a first record for as long as the request allows. Raises `ProtocolError` for a
        request that makes no sense and `JournalCompactedError` for records that were dropped.
        """
        _check_request(request)
        deadline_s = time.monotonic() + request.wait_ms / 1000
        origin = await self._on_disk(self._sendable_origin) if request.from_origin else None
        from_seqno = request.from_seqno if origin is None else origin.seqno
        while True:
            news = self._news
            rows, next_seqno, head_before = await self._page(request, from_seqno)
            remaining_s = deadline_s - time.monotonic()
            if rows or remaining_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), remaining_s)
        return wire.ReadJournalResponse(
            entries=[
                wire.JournalEntry(seqno=row.seqno, record=row.body, chain=row.chain) for row in rows
            ],
            next_seqno=next_seqno,
            head_before=head_before,
            origin=b"" if origin is None else origin.sealed,
        )

    async def _page(
        self, request: wire.ReadJournalRequest, start: int
    ) -> tuple[Sequence[Row], int, bytes]:
        """Rows, the seqno that follows them, and the head before a base commit that comes first."""
        count_max = request.records_max or PAGE_RECORDS_DEFAULT
        length, head_before = len(self.journal), b""
        if request.from_round:
            start = self._index.seqno_of(request.from_round, length)
            if request.from_round <= self._index.begins:
                start = 0
        if start >= length:
            return (), start, b""
        if request.commits_only:
            base_round = self._index.newest_base_round
            base_seqno = self._index.seqno_of(base_round, 0)
            if request.from_newest_base and base_round and base_seqno >= start:
                start = base_seqno
                head_before = self._index.head_at(base_round - 1)
            self._check_not_dropped(start)
            seqnos = self._index.seqnos_from(start, count_max)
            rows: Sequence[Row] = await self._rows_at(seqnos)
            is_last = len(seqnos) < count_max
        else:
            rows = await self._on_disk(lambda: self.journal.read(start, count_max))
            self._check_not_dropped(start)
            is_last = False
        kept = _within(rows, PAGE_BYTES_MAX)
        if len(kept) == len(rows) and is_last:
            return kept, length, head_before
        return kept, kept[-1].seqno + 1 if kept else length, head_before

    async def _rows_at(self, seqnos: Sequence[int]) -> list[Row]:
        return await self._on_disk(lambda: [self._row_at(seqno) for seqno in seqnos])

    def _row_at(self, seqno: int) -> Row:
        # In the journal's thread: the record may have been dropped since the index was asked.
        [row] = self.journal.read(seqno, 1)
        if row.seqno != seqno:
            raise self._compacted()
        return row

    def _sendable_origin(self) -> StoredState | None:
        stored = self.journal.stored_origin
        if stored is not None and len(stored.sealed) > ORIGIN_BYTES_MAX:
            raise JournalCompactedError(
                f"The state that stands for this journal's dropped records has "
                f"{len(stored.sealed)} bytes, more than the {ORIGIN_BYTES_MAX} that can be sent; "
                "read the journal itself, on the coordinator's machine."
            )
        return stored

    def _check_not_dropped(self, seqno: int) -> None:
        if seqno < self.journal.begins:
            raise self._compacted()

    def _compacted(self) -> JournalCompactedError:
        return JournalCompactedError(
            f"The journal's records before {self.journal.begins}, up to round "
            f"{self._index.begins}, were dropped; {self._way_past_dropped()}."
        )

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _check_request(request: wire.ReadJournalRequest) -> None:
    if request.records_max > PAGE_RECORDS_MAX or request.wait_ms > WAIT_MS_MAX:
        raise ProtocolError(
            f"records_max is at most {PAGE_RECORDS_MAX} and wait_ms at most {WAIT_MS_MAX}; "
            "ask for less."
        )
    if (request.from_newest_base or request.from_round) and not request.commits_only:
        raise ProtocolError(
            "from_newest_base and from_round need commits_only; set that too, or neither."
        )
    if request.from_origin and (request.commits_only or request.from_seqno):
        raise ProtocolError(
            "from_origin needs from_seqno 0 and all records; "
            "leave out commits_only, or from_origin."
        )


def _within(rows: Sequence[Row], bytes_max: int) -> Sequence[Row]:
    """The first rows that fit into `bytes_max`, and at least one."""
    total = 0
    for count, row in enumerate(rows):
        total += len(row.body) + len(row.chain)
        if total > bytes_max and count > 0:
            return rows[:count]
    return rows
