"""Signs of life for a service manager such as systemd, which started this process (`sd_notify`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

TELL_EVERY_S = 10.0
"""Longest time between two signs of life."""
EXTEND_S = 60
"""A start that is under way asks for this much more time, again and again."""


class ServiceManager:
    """Who started this process and wants to hear how it does; often that is nobody."""

    def __init__(self) -> None:
        # Taken out: processes that this one starts must not speak for it.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        watched = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        self._every_s = TELL_EVERY_S
        self._is_watched = watchdog_us.isdecimal() and watched == str(os.getpid())
        if self._is_watched:
            self._every_s = min(self._every_s, int(watchdog_us) / 1e6 / 2)
        self._is_ready = False

    def ready(self, status: str) -> None:
        """Tell that the start is over; `status` is what the program does from now on."""
        self._is_ready = True
        self._tell("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Tell in one line what the program does."""
        self._tell(f"STATUS={status}")

    def stopping(self) -> None:
        """Tell that the program ends, because it was asked to."""
        self._tell("STOPPING=1", "STATUS=stopping")

    async def keep_told(self, step: Callable[[], str]) -> None:
        """Give signs of life until cancelled; they stop if the event loop does.

        `step` is how far a long start is; empty if there is nothing to say.
        """
        while self._address:
            lines = ["WATCHDOG=1"] if self._is_watched else []
            if not self._is_ready:
                lines += [f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}", f"STATUS={step()}"]
            self._tell(*lines)
            await asyncio.sleep(self._every_s)

    def _tell(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        # A name that begins with @ is in Linux's abstract namespace.
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        # A manager that is gone, or that is slow to read, is no reason to stop or to wait.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there,
        ):
            there.setblocking(False)
            there.connect(address)
            there.send("\n".join(line.replace("\n", " ") for line in lines).encode())


_manager: ServiceManager | None = None


def service_manager() -> ServiceManager:
    """The service manager of this process."""
    global _manager
    if _manager is None:
        _manager = ServiceManager()
    return _manager
