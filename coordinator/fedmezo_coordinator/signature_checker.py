"""Checks of signatures by a process on another core, where many come at a time.

A check takes a quarter as long as everything else that a coordinator does for an answer. A thread
would not help: it waits for Python's global lock after each check. The process gets them over a
pipe and answers with a byte for each. Nobody waits for it here: what is being checked stays in the
loop's queue until there is a verdict, and the loop does other work meanwhile. Whatever the process
has not been given is checked by the loop, when its turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from fedmezo_core.records import SIGNATURE_BYTES
from fedmezo_core.trust.answer_signatures import KEY_BYTES, is_signed

if TYPE_CHECKING:  # Not in the process, which needs little memory without it.
    from fedmezo_core.wire.admission import SignedAnswer

log = logging.getLogger("fedmezo.coordinator")

MANY = 8
"""Fewest signatures in one turn of the event loop that are worth the start of the process."""
BATCH_MIN = 16
"""Fewest that go there at a time while it has others; fewer wait until it has answered."""
BATCH_MAX = 32
"""Most that it answers for at a time. It checks them in 2 ms."""
AWAY_MAX = 512
"""Most that are there or wait to go there. It checks them in 25 ms."""
PATIENCE_S = 10.0
"""Longest wait for an answer of the process."""
READY = b"\x02"
"""What the process says first."""
_SIZES = struct.Struct("<II")
"""Before a batch: the count of its signatures, and of its bytes."""
_LENGTH = struct.Struct("<I")


class SignatureChecker(asyncio.SubprocessProtocol):
    """Has signatures checked in the order in which they come, as far as the process keeps up."""

    def __init__(self, on_verdicts: Callable[[], None]) -> None:
        """`on_verdicts` is called when something that was awaited is awaited no more."""
        self._on_verdicts = on_verdicts
        self._waiting: list[SignedAnswer] = []
        """What came in this turn of the event loop, or waits for the process's next answer."""
        self._will_send = False
        self._away: deque[SignedAnswer] = deque()
        """What has been sent, in the order of the verdicts that will come."""
        self._verdicts = 0
        """Count of verdicts that have come."""
        self._patience: asyncio.TimerHandle | None = None
        self._starting: asyncio.Task[None] | None = None
        """Starts the process."""
        self._process: asyncio.SubprocessTransport | None = None
        self._is_ready = False
        """Whether the process has said that it is there."""
        self._exited = asyncio.Event()
        self._is_of_use = _cores() > 1

    def begin(self, signed: SignedAnswer) -> None:
        """Have a signature checked, which is awaited from now on if the process does it."""
        if (
            not self._is_of_use
            or len(self._away) + len(self._waiting) >= AWAY_MAX
            or len(signed.signature) != SIGNATURE_BYTES
        ):
            return
        signed.is_awaited = True
        self._waiting.append(signed)
        if not self._will_send:
            # Not at once: what else comes in this turn of the event loop goes along.
            self._will_send = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        """Send what waits, if the process is there; start it, if that is worth it."""
        self._will_send = False
        if not self._is_ready or self._process is None:
            if len(self._waiting) >= MANY and self._starting is None and self._is_of_use:
                self._starting = asyncio.create_task(self._start())
            self._give_up(self._waiting)
            return
        if not self._waiting or (self._away and len(self._waiting) < BATCH_MIN):
            return
        stdin = self._process.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        batches = range(0, len(self._waiting), BATCH_MAX)
        stdin.write(b"".join(_request(self._waiting[at : at + BATCH_MAX]) for at in batches))
        self._away += self._waiting
        self._waiting.clear()
        if self._patience is None:
            self._be_patient()

    def _give_up(self, checks: list[SignedAnswer] | deque[SignedAnswer]) -> None:
        """Leave these checks to the loop."""
        for signed in checks:
            signed.is_awaited = False
        checks.clear()
        self._on_verdicts()

    # ------------------------------------------------------------ the process

    async def _start(self) -> None:
        try:
            await asyncio.get_running_loop().subprocess_exec(
                lambda: self,
                *(sys.executable, "-m", __name__),
                stderr=None,
                # Ctrl-C at a terminal is for this process, which ends the other one.
                start_new_session=True,
            )
        except OSError as error:
            self._go_on_alone(repr(error))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the process, which has started."""
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._process = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take verdicts; the first byte says that the process is ready."""
        if not self._is_ready:
            self._is_ready, data = True, data[len(READY) :]
        for verdict in data[: len(self._away)]:
            signed = self._away.popleft()
            signed.good, signed.is_awaited = bool(verdict), False
        self._verdicts += len(data)
        self._on_verdicts()
        self._send()

    def process_exited(self) -> None:
        """Note that the process has ended."""
        self._exited.set()
        self._go_on_alone("it has ended")

    def _be_patient(self) -> None:
        """Wait for verdicts, but not for ever."""
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(PATIENCE_S, self._lose_patience, self._verdicts)

    def _lose_patience(self, verdicts: int) -> None:
        self._patience = None
        if not self._away:
            return
        if self._verdicts != verdicts:
            self._be_patient()
        else:
            self._go_on_alone("it does not answer")

    def _go_on_alone(self, why: str) -> None:
        """Check everything here from now on."""
        if self._is_of_use:
            log.warning("signatures are checked in this process from now on (%s)", why)
        self._is_of_use = self._is_ready = False
        self._give_up(self._away)
        self._give_up(self._waiting)
        self._end()

    def _end(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """End the process."""
        self._is_of_use = False
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        self._end()
        if self._process is not None:
            await self._exited.wait()
            self._process.close()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _request(batch: Sequence[SignedAnswer]) -> bytes:
    parts: list[bytes] = []
    for signed in batch:
        parts += (signed.key, signed.signature, _LENGTH.pack(len(signed.text)), signed.text)
    body = b"".join(parts)
    return _SIZES.pack(len(batch), len(body)) + body


def answer_requests(requests: BinaryIO, answers: BinaryIO) -> None:
    """Check batches until there are no more: what the process does."""
    answers.write(READY)
    answers.flush()
    signature_at, length_at = KEY_BYTES, KEY_BYTES + SIGNATURE_BYTES
    text_at = length_at + _LENGTH.size
    while head := requests.read(_SIZES.size):
        count, size = _SIZES.unpack(head)
        left, found = requests.read(size), bytearray()
        for _ in range(count):
            end = text_at + _LENGTH.unpack_from(left, length_at)[0]
            key, signature = left[:signature_at], left[signature_at:length_at]
            found.append(is_signed(key, left[text_at:end], signature))
            left = left[end:]
        answers.write(found)
        answers.flush()


if __name__ == "__main__":
    answer_requests(sys.stdin.buffer, sys.stdout.buffer)
