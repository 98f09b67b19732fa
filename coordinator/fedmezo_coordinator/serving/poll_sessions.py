"""Sessions of callers that cannot keep a stream open: each call carries messages both ways.

Such a session has the outbox, limits and rules of a stream's session. A lease takes the place of
the stream: a session ends when nobody polls it for `LEASE_S`. Nothing is sent twice: a caller that
misses the response to a call says hello again, gets its assignment again, and its answer is
acknowledged again.

Calls that have a nonce and no token are exchanges, as the library makes them. Each says hello, and
goes on from the worker's last one: what it carries is taken first, and what comes down is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fedmezo_coordinator.limits.caller_limits import worker_caller
from fedmezo_coordinator.serving.callers import check_worker_name
from fedmezo_coordinator.serving.journal_pages import WAIT_MS_MAX
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.worker_session import WorkerSession
from fedmezo_core.errors import FedMezoError, ProtocolError, UnknownWorkerError
from fedmezo_core.trust.authorisation import Caller
from fedmezo_core.wire.admission import check_nonce
from fedmezo_proto.v1 import coordinator_pb2 as wire

LEASE_S = 90.0
"""Time from the last call of a session to its end; three times the longest wait of a call."""
ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Size at which a response is full, in bytes; the next call brings the rest."""
LARGE_BYTES = 64 * 1024
"""A response with more bytes of commits needs a place, as a page of the journal does."""
TOKEN_BYTES = 16


@dataclass(eq=False, slots=True)
class _PollSession:
    token: bytes
    loop: ServingLoop[Any]
    """The loop of its run."""
    session: WorkerSession
    permit: contextlib.ExitStack
    """Gives the session's permit back when it is closed."""
    lease: asyncio.TimerHandle
    ends_at_s: float
    """End of the lease on the loop's clock. The lease's timer checks it when it fires, because a
    new timer for every call would leave thousands of cancelled ones behind."""
    is_busy: bool = False


class PollSessions:
    """All sessions without a stream, by token, of all runs."""

    def __init__(self, loop_of: Callable[[str], ServingLoop[Any]]) -> None:
        """`loop_of` gives the loop of the run that a hello names, or raises a `FedMezoError`."""
        self._loop_of = loop_of
        self._sessions: dict[bytes, _PollSession] = {}
        self._exchanging: dict[tuple[ServingLoop[Any], str], _PollSession] = {}
        """The newest session of each worker that comes by exchanges, by loop and name."""

    def worker_of(self, token: bytes) -> str:
        """The caller whose open session has this token; empty if none has."""
        polling = self._sessions.get(token)
        return "" if polling is None else worker_caller(polling.session.worker)

    async def poll(
        self,
        request: wire.PollSessionRequest,
        enter: Callable[[], Awaitable[None]],
        who: Callable[[], Caller] = lambda: Caller.ANYONE,
    ) -> wire.PollSessionResponse:
        """Serve one call; raises what ended the session or refuses the call.

        `enter` takes the place of a large response. `who` is the caller now, or raises
        `IdentityError`.
        """
        caller = who()
        if request.wait_ms > WAIT_MS_MAX:
            raise ProtocolError(f"wait_ms is at most {WAIT_MS_MAX}; ask for less.")
        check_nonce(request)
        messages, token = list(request.messages), request.token
        if not token:
            token = await self._open(messages, caller, exchanges=bool(request.nonce))
            try:
                who()  # It may have been revoked while it joined.
            except FedMezoError:
                self._end(token)
                raise
        polling = self._sessions.get(token)
        if polling is None or polling.session.worker != (caller.name or polling.session.worker):
            raise UnknownWorkerError(
                "No session has this token: it ended, or the coordinator was restarted; "
                "say hello again without a token."
            )
        if polling.is_busy:
            raise ProtocolError(
                "Only one call at a time may poll a session; wait for its response."
            )
        polling.is_busy = True
        try:
            for message in messages:
                await polling.loop.receive(polling.session, message)
            down = await self._collect(polling, request.wait_ms / 1000, enter)
            ends = request.leave
        except FedMezoError:
            # Without the response to its hello, the caller has no token to come back with.
            ends = polling.session.ended is not None or not request.token
            raise
        except asyncio.CancelledError:
            ends = False
            raise
        finally:
            polling.is_busy = False
            if ends:
                self._end(token)
            else:
                polling.ends_at_s = asyncio.get_running_loop().time() + LEASE_S
        return wire.PollSessionResponse(
            token=token, messages=down, lease_ms=int(1000 * LEASE_S), nonce=request.nonce
        )

    async def _open(
        self, messages: list[wire.SessionRequest], caller: Caller, *, exchanges: bool
    ) -> bytes:
        """Open a session and remove from `messages` what was taken; returns its token."""
        if not messages or messages[0].WhichOneof("kind") != "hello":
            raise ProtocolError("A session begins with a hello; send it first.")
        hello = messages.pop(0).hello
        check_worker_name(caller, hello.worker)
        serving = self._loop_of(hello.run_id)
        place = (serving, hello.worker)
        before = self._exchanging.get(place) if exchanges else None
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            if before is None:
                permit = stack.enter_context(serving.session_limit.session())
                session = await serving.join(hello, caller=caller, exchanges=exchanges)
                serving.session_limit.joined(permit)
            else:
                before.ends_at_s = loop.time() + LEASE_S
                for message in messages:
                    await serving.receive(before.session, message)
                messages.clear()
                try:
                    session = await serving.join(hello, caller=caller, exchanges=True)
                except FedMezoError:
                    if before.session.ended is not None:
                        self._end(before.token)
                    raise
                # Another call may have come first; the newest one holds the permit.
                newest = self._exchanging.get(place)
                if newest is not None:
                    stack.enter_context(newest.permit.pop_all())
                else:
                    self._permit_again(serving, session, stack)
            token = secrets.token_bytes(TOKEN_BYTES)
            lease = loop.call_later(LEASE_S, self._lapse, token)
            ends_at_s = loop.time() + LEASE_S
            opened = _PollSession(token, serving, session, stack.pop_all(), lease, ends_at_s)
            self._sessions[token] = opened
            if exchanges:
                newest = self._exchanging.get(place)
                self._exchanging[place] = opened
                if newest is not None:
                    self._end(newest.token)
        return token

    def _permit_again(
        self, serving: ServingLoop[Any], session: WorkerSession, stack: contextlib.ExitStack
    ) -> None:
        """Give a joined session a permit, because the call that held it has ended meanwhile."""
        try:
            permit = stack.enter_context(serving.session_limit.session())
        except FedMezoError:
            serving.leave(session)
            raise
        serving.session_limit.joined(permit)

    async def _collect(
        self, polling: _PollSession, wait_s: float, enter: Callable[[], Awaitable[None]]
    ) -> list[wire.SessionResponse]:
        """The messages for the caller, after a wait for the first one.

        Raises the error that ended the session if there are none.
        """
        session = polling.session
        found: list[wire.SessionResponse] = []
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await session.outbox.wait()
        if session.outbox.bytes_waiting > LARGE_BYTES:
            await enter()
        while session.outbox.qsize() and size < ANSWER_BYTES_MAX:
            item = session.outbox.get_nowait()
            if isinstance(item, FedMezoError):
                break
            serialized = polling.loop.sent(session, item)
            size += len(serialized)
            found.append(wire.SessionResponse.FromString(item) if isinstance(item, bytes) else item)
        if session.ended is not None and not found:
            raise session.ended
        return found

    def _lapse(self, token: bytes) -> None:
        """End the session if its lease has run out; otherwise set the timer again."""
        polling = self._sessions.get(token)
        if polling is None:
            return
        loop = asyncio.get_running_loop()
        left_s = LEASE_S if polling.is_busy else polling.ends_at_s - loop.time()
        if left_s > 0:
            polling.lease = loop.call_later(left_s, self._lapse, token)
        else:
            self._end(token)

    def _end(self, token: bytes) -> None:
        polling = self._sessions.get(token)
        if polling is None or polling.is_busy:
            return
        del self._sessions[token]
        place = (polling.loop, polling.session.worker)
        if self._exchanging.get(place) is polling:
            del self._exchanging[place]
        polling.lease.cancel()
        polling.permit.close()
        polling.loop.leave(polling.session)
