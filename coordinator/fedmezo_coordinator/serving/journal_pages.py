"""Reading the journal for others: pages of records, and the commits that a joining worker lacks.

Reads have a thread of their own, so that no append waits for one. A page that nobody takes off the
connection stays in gRPC's memory until the call's deadline, and no handler can take it back. So the
pages that are under way have places: one for each connection, and so many altogether.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fedmezo_core.errors import (
    ForbiddenError,
    JournalCompactedError,
    NotReadyError,
    ProtocolError,
    UnavailableError,
)
from fedmezo_core.journal.journal import ZERO_HASH, Journal, Row
from fedmezo_core.journal.sealed import StoredState
from fedmezo_core.wire.admission import CATCH_UP_ROUNDS_MAX
from fedmezo_core.wire.commit_index import CommitIndex
from fedmezo_core.wire.messages import commit_to_pb
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
PLACES = 64
"""Most pages that are under way at a time; each takes a little more than twice its bytes."""
ENDLESS_PLACES = 32
"""How many of them calls may have whose deadline is further away than `DEADLINE_MAX_S`, or that
have none: gRPC keeps their pages for as long as the connection lasts."""
DEADLINE_MAX_S = 120.0
PLACE_WAIT_S = 15.0
"""Longest wait for a place; then the caller is asked to come back."""
PLACES_AWAITED_MAX = 1024
"""Most calls that wait for a place."""

Result = TypeVar("Result")


class PagePlaces:
    """Places of the pages that are under way: one for each connection, and so many altogether.

    A page has its place from before it is read until gRPC has sent it, or has dropped it.
    """

    def __init__(self) -> None:
        self._endless: dict[str, bool] = {}
        """Connections that have a place, and whether the page in it may stay for ever."""
        self._endless_count = 0
        self._waiting: list[_Waiting] = []

    async def take(self, connection: str, deadline_s: float | None) -> None:
        """Wait for the connection's place; the caller gives it back with `leave`.

        `deadline_s` is the time until the call ends by itself; None: it never does. Raises
        `NotReadyError` if too many others wait, or if this takes longer than `PLACE_WAIT_S`.
        """
        if len(self._waiting) >= PLACES_AWAITED_MAX:
            raise _no_place()
        endless = deadline_s is None or deadline_s > DEADLINE_MAX_S
        waiting = _Waiting(connection, endless, asyncio.get_running_loop().create_future())
        # Nothing has changed for those that wait, so only this one can have room.
        if self._has_room(waiting):
            self._give(waiting)
        else:
            self._waiting.append(waiting)
        try:
            async with asyncio.timeout(PLACE_WAIT_S):
                await waiting.admitted
        except BaseException as error:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.admitted.cancelled():
                self.leave(connection)  # It was admitted at the same moment.
            if isinstance(error, TimeoutError):
                raise _no_place() from None
            raise

    def leave(self, connection: str) -> None:
        """Give the connection's place to whoever waits for it."""
        self._endless_count -= self._endless.pop(connection)
        self._admit()

    def _admit(self) -> None:
        """Admit whoever there is room for, in the order in which they came."""
        if len(self._endless) >= PLACES:
            return
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if self._has_room(one):
                self._give(one)
            elif not one.admitted.done():
                self._waiting.append(one)

    def _give(self, one: _Waiting) -> None:
        self._endless[one.connection] = one.endless
        self._endless_count += one.endless
        one.admitted.set_result(None)

    def _has_room(self, one: _Waiting) -> bool:
        if one.admitted.done() or one.connection in self._endless or len(self._endless) >= PLACES:
            return False
        return not one.endless or self._endless_count < ENDLESS_PLACES


@dataclass(eq=False, slots=True)
class _Waiting:
    """A call that waits for its place."""

    connection: str
    endless: bool
    admitted: asyncio.Future[None]


class JournalPages:
    """Pages of the journal.

    Everything here runs on the event loop, except reads of the journal, which run in their thread.
    """

    journal: Journal
    """Set as soon as the journal is open; nothing can be read earlier."""

    def __init__(self, index: CommitIndex, way_past_dropped: Callable[[], str]) -> None:
        """`way_past_dropped` says what a reader can do who asked for records that were dropped."""
        self._index = index
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._way_past_dropped = way_past_dropped
        self._recent: deque[Row] = deque()
        self._recent_bytes = 0
        # Seqno of a recent commit -> the message with it, which is made once for all workers.
        self._messages: dict[int, bytes] = {}
        self._news = asyncio.Event()
        self.length = 0
        """How many records readers may see: none of those that are being appended."""

    async def close(self) -> None:
        """Wait for the reads that were asked for; then the journal may be closed.

        None is cancelled: its caller would see that as a cancellation of its own, and gRPC would
        never answer the call.
        """
        await asyncio.to_thread(self._thread.shutdown)

    def announce(self) -> None:
        """Show every record so far, all of which the index must know, and wake who waits."""
        self.length = len(self.journal)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def remember(self, row: Row) -> None:
        """Keep a commit in memory for workers that come back, in place of the oldest ones."""
        self._recent.append(row)
        self._recent_bytes += len(row.body)
        while self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > CATCH_UP_ROUNDS_MAX:
            oldest = self._recent.popleft()
            self._recent_bytes -= len(oldest.body)
            self._messages.pop(oldest.seqno, None)

    @property
    def rounds_in_memory(self) -> int:
        """How many of the newest commits are in memory."""
        return len(self._recent)

    def commits_after(self, round_: int) -> list[bytes]:
        """Messages with the commits after a round, at most the newest `rounds_in_memory`."""
        missing = min(self._index.round - round_, len(self._recent))
        return [self._message(self._recent[-number]) for number in range(missing, 0, -1)]

    def _message(self, row: Row) -> bytes:
        if row.seqno not in self._messages:
            self._messages[row.seqno] = commit_to_pb(row).SerializeToString()
        return self._messages[row.seqno]

    async def rows_from(self, seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` of the records that readers may see, from `seqno` on.

        Dropped ones are passed over. The rows have at most `PAGE_BYTES_MAX`, unless it is one.
        """
        seqnos = range(max(seqno, self.journal.begins), min(seqno + rows_max, self.length))
        if not seqnos:
            return ()
        return await self._on_disk(lambda: self.journal.read_beside(seqnos, PAGE_BYTES_MAX))

    async def read(
        self,
        request: wire.ReadJournalRequest,
        is_finished: Callable[[], bool],
        enter: Callable[[], Awaitable[None]],
        *,
        sees_everyone: bool = True,
    ) -> bytes:
        """The page that was asked for, a serialized `ReadJournalResponse`.

        A reader that does not see everyone gets genesis and commits alone, without the chain over
        the records in between, from which a guess at one of them could be checked.

        `is_finished` says whether nothing will follow the records that are shown now. Waits for a
        first record for as long as the request allows, and for the page's place, which `enter`
        takes. Raises `ProtocolError` for a request that makes no sense and `JournalCompactedError`
        for records that were dropped, `ForbiddenError` for records that the reader may not see.
        """
        _check_request(request)
        if not (sees_everyone or request.commits_only):
            raise ForbiddenError(
                "In this run only observers and operators read all records; use an observer's "
                "identity (`fedmezo token create --role observer`), or read a worker's own "
                "`journal_copy`."
            )
        deadline_s = time.monotonic() + request.wait_ms / 1000
        origin = None
        if request.from_origin:
            await enter()
            origin = await self._on_disk(self._sendable_origin)
        from_seqno = request.from_seqno if origin is None else origin.seqno
        while True:
            news = self._news
            seqnos, next_seqno, head_before = self._wanted(request, from_seqno)
            remaining_s = deadline_s - time.monotonic()
            if seqnos or remaining_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), remaining_s)
        page = wire.ReadJournalResponse(
            next_seqno=next_seqno,
            head_before=head_before,
            origin=b"" if origin is None else origin.sealed,
            finished=next_seqno >= self.length and is_finished(),
        )
        if not seqnos:
            return page.SerializeToString()
        if not request.from_origin:
            await enter()
        return await self._on_disk(lambda: self._filled(page, seqnos, shows_chain=sees_everyone))

    def _filled(
        self, page: wire.ReadJournalResponse, seqnos: Sequence[int], *, shows_chain: bool
    ) -> bytes:
        """The serialized page with these records, or as many as fit; runs in the thread."""
        rows = self.journal.read_beside(seqnos, PAGE_BYTES_MAX)
        if not rows or rows[0].seqno != seqnos[0]:
            raise self._compacted()
        for row in rows:
            chain = row.chain if shows_chain else ZERO_HASH
            page.entries.add(seqno=row.seqno, record=row.body, chain=chain)
        if len(rows) < len(seqnos):
            page.next_seqno, page.finished = rows[-1].seqno + 1, False
        return page.SerializeToString()

    def _wanted(
        self, request: wire.ReadJournalRequest, start: int
    ) -> tuple[Sequence[int], int, bytes]:
        """What to read if it fits into a page: seqnos, and the seqno that follows them.

        Then the head before a base commit that comes first.
        """
        count_max = request.records_max or PAGE_RECORDS_DEFAULT
        length, head_before = self.length, b""
        if request.from_round:
            start = self._index.seqno_of(request.from_round, length)
            if request.from_round <= self._index.begins:
                start = 0
        if start >= length:
            return (), start, b""
        if not request.commits_only:
            self._check_not_dropped(start)
            end = min(start + count_max, length)
            return range(start, end), end, b""
        base_round = self._index.newest_base_round
        base_seqno = self._index.seqno_of(base_round, 0)
        if request.from_newest_base and base_round and base_seqno >= start:
            start = base_seqno
            head_before = self._index.head_at(base_round - 1)
        self._check_not_dropped(start)
        seqnos = self._index.seqnos_from(start, count_max)
        is_last = len(seqnos) < count_max
        return seqnos, length if is_last else seqnos[-1] + 1, head_before

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
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError:  # Its thread has ended.
            raise UnavailableError("The run's journal is being closed; ask again later.") from None
        return await reading


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


def _no_place() -> NotReadyError:
    error = NotReadyError(
        f"{PLACES} pages of the journal are under way, the most at a time, or this connection has "
        "yet to read its last one; read that, or try later."
    )
    error.retry_after_s = PLACE_WAIT_S
    return error
