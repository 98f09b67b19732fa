"""Checks of signatures, with the help of a process on another core where many come at a time.

A check takes about half as long as everything else that a coordinator does for an answer, and holds
Python's global lock meanwhile, so that a thread would not help. The process gets a batch over a
pipe and answers with a byte for each. Whoever waits for it checks what comes behind the batch
meanwhile, so that both cores work. A few signatures are all checked here.
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
"""Most signatures that go there at a time: nothing behind them is taken meanwhile."""
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


class SignatureChecker:
    """Has signatures checked in the order in which they come, here and in the other process."""

    def __init__(self) -> None:
        self._waiting: deque[Check] = deque()
        self._sent: asyncio.Task[None] | None = None
        """The exchange with the other process that is under way."""
        self._batch: Sequence[Check] = ()
        """What it is about."""
        self._settled: Check | None = None
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._is_of_use = _cores() > 1

    def begin(self, signed: Signed) -> Check:
        """Note a signature that will have to be checked; the other process may do it meanwhile."""
        check = Check(signed)
        if self._is_of_use and len(signed[2]) == SIGNATURE_BYTES:
            self._waiting.append(check)
            if len(self._waiting) >= MANY and self._sent is None:
                self._send()
        return check

    async def settle(self, check: Check) -> None:
        """Return as soon as there is a verdict, which `is_signed` then gives.

        While the other process has it, this one checks what waits behind it.
        """
        while check.good is None and check in self._batch and self._sent is not None:
            if self._waiting:
                _check_here(self._waiting.popleft())
                await asyncio.sleep(0)
            else:
                await asyncio.wait({self._sent})
        _check_here(check)
        self._settled = check

    def is_signed(self, key: bytes, text: bytes, signature: bytes) -> bool:
        """Whether `signature` is the key's for `text`; at once for what was settled last."""
        settled = self._settled
        if settled is None or settled.good is None or settled.signed != (key, text, signature):
            return is_signed(key, text, signature)
        return settled.good

    def _send(self) -> None:
        """Send what waits to the other process, which the first call starts."""
        if self._starting is None:
            self._starting = asyncio.create_task(_started())
        if not self._starting.done():
            self._waiting.clear()
            return
        batch: list[Check] = []
        while self._waiting and len(batch) < BATCH_MAX:
            check = self._waiting.popleft()
            if check.good is None:
                batch.append(check)
        if batch:
            self._batch = batch
            self._sent = asyncio.create_task(self._exchange(batch, self._starting))

    async def _exchange(
        self, batch: Sequence[Check], starting: asyncio.Task[asyncio.subprocess.Process]
    ) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await _answers_to([check.signed for check in batch], starting.result())
            for check, good in zip(batch, found, strict=True):
                check.good = bool(good)
        except (OSError, EOFError) as error:
            log.warning("signatures are checked in this process from now on (%r)", error)
            self._is_of_use = False
            self._waiting.clear()
        finally:
            self._sent, self._batch = None, ()
        if len(self._waiting) >= MANY:
            self._send()

    async def close(self) -> None:
        """End the process."""
        self._is_of_use = False
        starting, self._starting = self._starting, None
        if self._sent is not None:
            self._sent.cancel()
        if starting is None:
            return
        with suppress(OSError, EOFError):
            process = await starting
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
    await process.stdout.readexactly(len(READY))
    return process


async def _answers_to(batch: Sequence[Signed], process: asyncio.subprocess.Process) -> bytes:
    to, back = process.stdin, process.stdout
    assert to is not None
    assert back is not None
    to.write(_request(batch))  # What the pipe does not take at once waits in this process.
    return await back.readexactly(len(batch))


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
