"""Checks of many signatures at once, in a process of their own on another core.

A check takes about half as long as everything else that a coordinator does for an answer, and holds
Python's global lock meanwhile, so that a thread would not help. The process gets what is to be
checked over a pipe and answers with a byte for each. A few are checked here: the way there and back
takes longer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

from fedmezo_core.trust.answer_signatures import KEY_BYTES, SIGNATURE_BYTES, is_signed

log = logging.getLogger("fedmezo.coordinator")

MANY = 8
"""Fewest signatures that are worth the way to the other process."""
PATIENCE_S = 10.0
"""Longest wait for the other process's answer."""
READY = b"\x02"
"""What the other process says first."""
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<I")

Signed = tuple[bytes, bytes, bytes]
"""A public key, a text, and what may be the key's signature of it."""


class SignatureChecker:
    """Remembers of the newest batch which signatures are right."""

    def __init__(self) -> None:
        self._good: frozenset[Signed] = frozenset()
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._is_of_use = _cores() > 1

    def is_signed(self, key: bytes, text: bytes, signature: bytes) -> bool:
        """Whether `signature` is the key's for `text`; takes no time if `look_at` looked at it."""
        return (key, text, signature) in self._good or is_signed(key, text, signature)

    async def look_at(self, batch: Sequence[Signed]) -> None:
        """Check a batch in the other process if it is large; else `is_signed` will do it.

        One caller at a time. The first large batch starts the process. Until it is there, and if it
        cannot be used, everything is checked here.
        """
        self._good = frozenset()
        batch = [one for one in batch if len(one[2]) == SIGNATURE_BYTES]
        if len(batch) < MANY or not self._is_of_use:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(_started())
        if not self._starting.done():
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await _answers_to(batch, self._starting.result())
        except (OSError, EOFError) as error:
            log.warning("signatures are checked in this process from now on (%r)", error)
            self._is_of_use = False
            await self.close()
            return
        self._good = frozenset(one for one, good in zip(batch, found, strict=True) if good)

    async def close(self) -> None:
        """End the process."""
        starting, self._starting = self._starting, None
        if starting is None:
            return
        with suppress(OSError, EOFError):
            process = await starting
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


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
