"""Sessions of callers that cannot hold a stream: each call takes messages up and brings messages down.

Behind it is the session that a stream has, with the same outbox, limits and rules. What takes the place
of a broken stream is a lease: a session that is not polled ends. Nothing is sent twice: a caller that
misses an answer to a call says hello again, is assigned again, and its answer is acknowledged again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from typing import Any

from fedmezo_coordinator.serving.loop import WAIT_MS_MAX, ServingLoop, Session
from fedmezo_core.errors import FedMezoError, ProtocolError, UnknownWorkerError
from fedmezo_proto.v1 import coordinator_pb2 as wire

LEASE_S = 90.0
"""A session ends so long after its last call; three times the longest wait of a call."""
ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Messages down in one call; the next call brings the rest."""
TOKEN_BYTES = 16


@dataclass(eq=False, slots=True)
class _Polled:
    session: Session
    place: contextlib.ExitStack
    """Its place at the session_limit."""
    lease: asyncio.TimerHandle
    ends_at_s: float
    """On the loop's clock. The lease's timer looks here when it fires: a new timer for every call would
    leave thousands of cancelled ones behind."""
    is_busy: bool = False


class PolledSessions:
    """All sessions without a stream, by token."""

    def __init__(self, daemon: ServingLoop[Any]) -> None:
        self._daemon = daemon
        self._polled: dict[bytes, _Polled] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def poll(self, request: wire.PollSessionRequest) -> wire.PollSessionResponse:
        """One call; raises what the session ended with, or what is wrong with the call."""
        if request.wait_ms > WAIT_MS_MAX:
            raise ProtocolError(f"wait_ms is at most {WAIT_MS_MAX}; ask for less.")
        messages, token = list(request.messages), request.token
        if not token:
            token = await self._open(messages)
            del messages[0]
        polled = self._polled.get(token)
        if polled is None:
            raise UnknownWorkerError(
                "No session has this token: it ended, or the coordinator was restarted; "
                "say hello again without a token."
            )
        if polled.is_busy:
            raise ProtocolError("A session is polled by one call at a time; wait for its answer.")
        polled.is_busy = True
        try:
            for message in messages:
                await self._daemon.receive(polled.session, message)
            down = await self._collect(polled.session, request.wait_ms / 1000)
            ends = request.leave
        except FedMezoError:
            ends = True
            raise
        except asyncio.CancelledError:
            ends = False
            raise
        finally:
            polled.is_busy = False
            if ends:
                self._end(token)
            else:
                polled.ends_at_s = asyncio.get_running_loop().time() + LEASE_S
        return wire.PollSessionResponse(token=token, messages=down, lease_ms=int(1000 * LEASE_S))

    async def _open(self, messages: list[wire.SessionRequest]) -> bytes:
        if not messages or messages[0].WhichOneof("kind") != "hello":
            raise ProtocolError("A session begins with a hello; send it first.")
        with contextlib.ExitStack() as place:
            inside = place.enter_context(self._daemon.session_limit.session())
            session = await self._daemon.join(messages[0].hello)
            self._daemon.session_limit.joined(inside)
            token = secrets.token_bytes(TOKEN_BYTES)
            loop = asyncio.get_running_loop()
            lease = loop.call_later(LEASE_S, self._lapse, token)
            self._polled[token] = _Polled(session, place.pop_all(), lease, loop.time() + LEASE_S)
        return token

    async def _collect(self, session: Session, wait_s: float) -> list[wire.SessionResponse]:
        """What waits for the caller, or the first thing that comes; raises what the session ended with."""
        found: list[wire.SessionResponse] = []
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await session.outbox.wait()
        while session.outbox.qsize() and size < ANSWER_BYTES_MAX:
            item = session.outbox.get_nowait()
            if isinstance(item, FedMezoError):
                break
            serialized = self._daemon.sent(session, item)
            size += len(serialized)
            found.append(wire.SessionResponse.FromString(item) if isinstance(item, bytes) else item)
        if session.ended is not None and not found:
            raise session.ended
        return found

    def _lapse(self, token: bytes) -> None:
        """End the session if its lease has run out, or look again when it will have."""
        polled = self._polled.get(token)
        if polled is None:
            return
        loop = asyncio.get_running_loop()
        left_s = LEASE_S if polled.is_busy else polled.ends_at_s - loop.time()
        if left_s > 0:
            polled.lease = loop.call_later(left_s, self._lapse, token)
        else:
            self._end(token)

    def _end(self, token: bytes) -> None:
        polled = self._polled.get(token)
        if polled is None or polled.is_busy:
            return
        del self._polled[token]
        polled.lease.cancel()
        polled.place.close()
        leaving = asyncio.get_running_loop().create_task(self._daemon.leave(polled.session))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
