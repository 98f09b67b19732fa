"""A coordinator's server whose answers a script decides, over streams and polls alike."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc

from fedmezo_coordinator.serving.poll_sessions import LEASE_S
from fedmezo_coordinator.serving.service import abort, bind_server
from fedmezo_core.errors import FedMezoError, SnapshotError, UnknownWorkerError
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc

Result = TypeVar("Result")

HELLO_WAIT_S = 2.0
"""Longest wait of a poll that says hello, whatever it asks for."""
GOODBYE_S = 1.0
"""Time that open calls get at the end."""


class Line:
    """One session of a worker, as the script sees it."""

    def __init__(self) -> None:
        self._up: asyncio.Queue[wire.SessionRequest | None] = asyncio.Queue()
        self._down: asyncio.Queue[wire.SessionResponse | FedMezoError | None] = asyncio.Queue()
        self.is_over = False
        """Whether the worker, or the script, has ended the session."""

    async def receive(self, patience_s: float) -> wire.SessionRequest | None:
        """The next message; None if the session is over, or if the worker has ended its side.

        Raises `TimeoutError` if none comes.
        """
        async with asyncio.timeout(patience_s):
            message = await self._up.get()
        if message is None:
            self.is_over = True
        return message

    def send(self, *messages: wire.SessionResponse) -> None:
        """Send messages, in order."""
        for message in messages:
            self._down.put_nowait(message)

    def end(self, error: FedMezoError | None = None) -> None:
        """End the session after what was sent: with an error, or with status OK."""
        self.is_over = True
        self._down.put_nowait(error)

    def put(self, message: wire.SessionRequest | None) -> None:
        """Take a message from the worker; None: there are no more."""
        self._up.put_nowait(message)

    async def take(self) -> wire.SessionResponse | FedMezoError | None:
        """The next message to the worker, or how the session ends."""
        return await self._down.get()

    @property
    def waits(self) -> bool:
        """Whether a message to the worker waits."""
        return not self._down.empty()


class ScriptedServer(rpc.CoordinatorServiceServicer):
    """Answers calls as the script says; each new session is a line in `lines`."""

    def __init__(
        self,
        describe: Callable[[wire.GetRunRequest], wire.GetRunResponse],
        page: Callable[[wire.ReadJournalRequest], wire.ReadJournalResponse],
    ) -> None:
        """`describe` and `page` answer `GetRun` and `ReadJournal`, or raise what ends the call."""
        self._describe = describe
        self._page = page
        self.lines: asyncio.Queue[Line] = asyncio.Queue()
        self.refusal: FedMezoError | None = None
        """What every call is answered with, if it is set."""
        self.described: list[wire.GetRunRequest] = []
        self.refusals: asyncio.Queue[FedMezoError] = asyncio.Queue()
        """The calls that were answered with `refusal`."""
        self._polled: dict[bytes, Line] = {}
        self._newest = Line()

    async def GetRun(  # noqa: N802 - the name in the .proto file
        self, request: wire.GetRunRequest, context: Any
    ) -> wire.GetRunResponse:
        """Describe the run."""
        self.described.append(request)
        return await self._answered(context, lambda: self._describe(request))

    async def ReadJournal(  # noqa: N802
        self, request: wire.ReadJournalRequest, context: Any
    ) -> wire.ReadJournalResponse:
        """Give a page of commits."""
        return await self._answered(context, lambda: self._page(request))

    async def ReadSnapshot(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[wire.ReadSnapshotResponse]:
        """There is none."""
        await abort(context, SnapshotError("No snapshots are kept here; read the journal instead."))
        yield wire.ReadSnapshotResponse()

    async def GetStatus(  # noqa: N802
        self, request: Any, context: Any
    ) -> wire.GetStatusResponse:
        """No worker needs it."""
        return wire.GetStatusResponse()

    async def ReportReplica(  # noqa: N802
        self, request: Any, context: Any
    ) -> wire.ReportReplicaResponse:
        """There is no replica."""
        await abort(context, UnknownWorkerError("No replica reports here."))

    async def session(self, _requests: Any, context: Any) -> None:
        """Carry the messages of a line."""
        await self._answered(context, _nothing)
        line = self._opened()
        reader = asyncio.create_task(self._read(line, context))
        try:
            while (message := await line.take()) is not None:
                if isinstance(message, FedMezoError):
                    await abort(context, message)
                await context.write(message)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            line.put(None)

    # The generated base class wants this name.
    Session = session  # type: ignore[assignment]

    async def _read(self, line: Line, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            line.put(message)
        line.put(None)

    async def PollSession(  # noqa: N802
        self, request: wire.PollSessionRequest, context: Any
    ) -> wire.PollSessionResponse:
        """Carry the messages of a line, call by call."""
        await self._answered(context, _nothing)
        token = request.token or secrets.token_bytes(16)
        if not request.token:
            self._polled[token] = self._opened()
        line = self._polled.get(token)
        if line is None:
            error = UnknownWorkerError("No session has this token; say hello again.")
            await abort(context, error)
        for message in request.messages:
            line.put(message)
        if request.leave:
            line.put(None)
        down: list[wire.SessionResponse] = []
        # A session of a single call must get what the script has to say to its hello.
        wait_s = max(request.wait_ms / 1000, 0.0 if request.token else HELLO_WAIT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                item = await line.take()
                while item is not None:
                    if isinstance(item, FedMezoError):
                        if down:
                            line.end(item)
                            break
                        del self._polled[token]
                        await abort(context, item)
                    down.append(item)
                    if not line.waits:
                        break
                    item = await line.take()
        return wire.PollSessionResponse(
            token=token, messages=down, lease_ms=int(1000 * LEASE_S), nonce=request.nonce
        )

    def _opened(self) -> Line:
        """A new line, which takes the place of the one before."""
        self._newest.put(None)
        self._newest = Line()
        self.lines.put_nowait(self._newest)
        return self._newest

    async def _answered(self, context: Any, answer: Callable[[], Result]) -> Result:
        try:
            if self.refusal is not None:
                self.refusals.put_nowait(self.refusal)
                raise self.refusal
            return answer()
        except FedMezoError as error:
            await abort(context, error)


def _nothing() -> None:
    """The call itself is all that there is to answer."""


@asynccontextmanager
async def scripted(server: ScriptedServer, listen: str) -> AsyncIterator[str]:
    """Serve at `listen` (host:port; port 0 lets the system choose); gives the address."""
    grpc_server, port = bind_server(listen, None)
    rpc.add_CoordinatorServiceServicer_to_server(server, grpc_server)
    await grpc_server.start()
    try:
        yield f"{listen.rpartition(':')[0]}:{port}"
    finally:
        await grpc_server.stop(GOODBYE_S)
