"""A coordinator that says what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import Committed, Genesis, Record, SeedRange
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc


class Liar(rpc.CoordinatorServiceServicer):
    """A coordinator that answers as a test wants; its sessions end at once."""

    def __init__(self, genesis: Genesis, **said: Any) -> None:
        self.description: dict[str, Any] = {"protocol_version": 1, "epoch": 1, "round": 5} | said
        self.description["genesis"] = encode_record(genesis)
        self.page: Callable[[wire.ReadJournalRequest], wire.ReadJournalResponse] = lambda _: (
            wire.ReadJournalResponse()
        )
        self.pieces: Callable[[], AsyncIterator[wire.ReadSnapshotResponse]] | None = None
        self.asked = 0
        self.delay_s = 0.0
        """How long every answer takes."""

    async def GetRun(self, request: Any, context: Any) -> wire.GetRunResponse:
        await asyncio.sleep(self.delay_s)
        return wire.GetRunResponse(**self.description)

    async def ReadJournal(
        self, request: wire.ReadJournalRequest, context: Any
    ) -> wire.ReadJournalResponse:
        self.asked += 1
        await asyncio.sleep(self.delay_s)
        return self.page(request)

    async def ReadSnapshot(
        self, request: Any, context: Any
    ) -> AsyncIterator[wire.ReadSnapshotResponse]:
        assert self.pieces is not None
        async for piece in self.pieces():
            yield piece

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        yield

    async def _never_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    GetStatus = PollSession = ReportReplica = _never_asked


@asynccontextmanager
async def serving(liar: Liar) -> AsyncIterator[str]:
    server = grpc.aio.server()
    rpc.add_CoordinatorServiceServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def commit(config: RunConfig, round_: int = 1, **changes: Any) -> Committed:
    """What an honest coordinator commits, with changes."""
    pairs = SeedRange(65_536 * round_, (0.5,) * config.pairs_per_answer)
    return replace(Committed(round_, (pairs,), 1), **changes)


def page_of(*records: Record, **others: Any) -> wire.ReadJournalResponse:
    entries = [wire.JournalEntry(record=encode_record(record)) for record in records]
    return wire.ReadJournalResponse(entries=entries, **others)
