"""Checks of signatures, with the help of a process on another core where many come at a time.

A check takes a third as long as everything else that a coordinator does for an answer. A thread
would not help: it waits for Python's global lock after each check. The process gets them over a
pipe, some at a time, and answers with a byte for each; more are on their way meanwhile. If it
cannot keep up, whoever waits for it checks some of what it has not been sent. A few signatures are
all checked here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from fedmezo_core.records import SIGNATURE_BYTES
from fedmezo_core.trust.answer_signatures import KEY_BYTES, is_signed

log = logging.getLogger("fedmezo.coordinator")

MANY = 8
"""Fewest signatures that are worth the way to the other process."""
BATCH_MAX = 32
"""Most signatures that go there at a time."""
AWAY_MAX = 128
"""Most signatures that the other process has not answered for. It checks them in 6 ms."""
PATIENCE_S = 10.0
"""Longest wait for the other process's answer."""
READY = b"\x02"
"""What the other process says first."""
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<I")

Signed = tuple[bytes, bytes, bytes]
"""A public key, a text, and what may be the key's signature of it."""


@dataclass(slots=True, eq=False)
class Check:
    """A signature that is to be checked, and the verdict once there is one."""

    signed: Signed
    good: bool | None = None
    is_away: bool = False
    """Whether the other process has it."""


class SignatureChecker:
    """Has signatures checked in the order in which they come, here and in the other process."""

    def __init__(self) -> None:
        self._waiting: deque[Check] = deque()
        """What has not been sent, oldest first."""
        self._away: deque[Check] = deque()
        """What has been sent, in the order of the answers that will come."""
        self._news = asyncio.Event()
        """Set whenever answers have come, or will not come any more."""
        self._settled: Check | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None
        """Starts the other process, and takes its answers."""
        self._is_of_use = _cores() > 1

    def begin(self, signed: Signed) -> Check:
        """Note a signature that will have to be checked; the other process may do it meanwhile."""
        check = Check(signed)
        if self._is_of_use and len(signed[2]) == SIGNATURE_BYTES:
            self._waiting.append(check)
            if len(self._waiting) % MANY == 0:
                # Not at once: what else comes in this turn of the event loop goes along.
                asyncio.get_running_loop().call_soon(self._send)
        return check

    async def settle(self, check: Check) -> None:
        """Return as soon as there is a verdict, which `is_signed` then gives."""
        if not check.is_away:
            self._send()
        while check.good is None and check.is_away:
            if len(self._waiting) >= MANY:  # More than the other process can take.
                _check_here(self._waiting.popleft())
                await asyncio.sleep(0)
            else:
                await self._answers()
        _check_here(check)
        self._settled = check

    def is_signed(self, key: bytes, text: bytes, signature: bytes) -> bool:
        """Whether `signature` is the key's for `text`; at once for what was settled last."""
        settled = self._settled
        if settled is None or settled.good is None or settled.signed != (key, text, signature):
            return is_signed(key, text, signature)
        return settled.good

    def _send(self) -> None:
        """Send what waits to the other process, which the first call starts, if it is enough."""
        if not self._is_of_use or len(self._waiting) < MANY:
            return
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        if self._process is None or self._process.stdin is None:
            self._waiting.clear()
            return
        while len(self._waiting) >= MANY and len(self._away) + BATCH_MAX <= AWAY_MAX:
            batch: list[Check] = []
            while self._waiting and len(batch) < BATCH_MAX:
                check = self._waiting.popleft()
                if check.good is None:
                    check.is_away = True
                    batch.append(check)
            if batch:
                self._away += batch
                self._process.stdin.write(_request([check.signed for check in batch]))

    async def _answers(self) -> None:
        """Wait for answers of the other process, but not for ever."""
        self._news.clear()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._news.wait()
        except TimeoutError:
            self._go_on_alone("it does not answer")

    async def _run(self) -> None:
        """Start the other process, and take its answers until it ends."""
        try:
            process = self._process = await _started()
            assert process.stdout is not None
            while verdicts := await process.stdout.read(AWAY_MAX):
                for good in verdicts:
                    check = self._away.popleft()
                    check.good = bool(good)
                self._news.set()
                self._send()
            self._go_on_alone("it has ended")
        except (OSError, EOFError) as error:
            self._go_on_alone(repr(error))

    def _go_on_alone(self, why: str) -> None:
        """Check everything here from now on."""
        if self._is_of_use:
            log.warning("signatures are checked in this process from now on (%s)", why)
        self._is_of_use = False
        for check in self._away:
            check.is_away = False
        self._away.clear()
        self._waiting.clear()
        self._news.set()

    async def close(self) -> None:
        """End the process."""
        self._is_of_use = False
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _check_here(check: Check) -> None:
    if check.good is None:
        check.good = is_signed(*check.signed)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


async def _started() -> asyncio.subprocess.Process:
    """The other process, once it is ready. It ends with this one, whose pipe it reads."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C at a terminal is for this process, which ends the other one.
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        await process.stdout.readexactly(len(READY))
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    return process


def _request(batch: Sequence[Signed]) -> bytes:
    parts = [_COUNT.pack(len(batch))]
    for key, text, signature in batch:
        parts += (key, signature, _LENGTH.pack(len(text)), text)
    return b"".join(parts)


def answer_requests(requests: BinaryIO, answers: BinaryIO) -> None:
    """Check batches until there are no more: what the other process does."""
    answers.write(READY)
    answers.flush()
    while head := requests.read(_COUNT.size):
        found = bytearray()
        for _ in range(_COUNT.unpack(head)[0]):
            key, signature = requests.read(KEY_BYTES), requests.read(SIGNATURE_BYTES)
            text = requests.read(_LENGTH.unpack(requests.read(_LENGTH.size))[0])
            found.append(is_signed(key, text, signature))
        answers.write(found)
        answers.flush()


if __name__ == "__main__":
    answer_requests(sys.stdin.buffer, sys.stdout.buffer)
