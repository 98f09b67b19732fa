"""Reconnecting: how long it waits, what resets the delay, when it gives up, and what it logs."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest

from fedmezo_core.errors import JournalBehindError, NotReadyError, StartingError, UnavailableError
from fedmezo_core.wire import reconnecting as module
from fedmezo_core.wire.reconnecting import Reconnecting

LOG = logging.getLogger("fedmezo.test")


class Clock:
    """Stands in for the module's time, sleep and random numbers: nothing waits."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds

    def random(self) -> float:
        return 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for name in ("time", "asyncio", "random"):
        monkeypatch.setattr(module, name, clock)
    return clock


async def test_the_delay_doubles_until_the_peer_is_reached(clock: Clock) -> None:
    reconnecting = Reconnecting(LOG)
    for _ in range(8):
        await reconnecting.wait_after(UnavailableError("gone."))
    assert clock.slept_s == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    reconnecting.reached()
    await reconnecting.wait_after(UnavailableError("gone."))
    assert clock.slept_s[-1] == 0.125


async def test_a_hint_of_the_peer_is_followed(clock: Clock) -> None:
    error = NotReadyError("full.")
    error.retry_after_s = 30.0
    await Reconnecting(LOG).wait_after(error)
    assert clock.slept_s == [15.0]


async def test_it_gives_up_with_the_error_itself(clock: Clock) -> None:
    reconnecting = Reconnecting(LOG, give_up_after_s=10.0)
    error = UnavailableError("gone.")
    clock.now_s += 10.0
    await reconnecting.wait_after(error)
    with pytest.raises(UnavailableError) as caught:
        await reconnecting.wait_after(error)
    assert caught.value is error
    reconnecting.reached()
    await reconnecting.wait_after(error)


async def test_without_a_time_to_give_up_it_never_does(clock: Clock) -> None:
    reconnecting = Reconnecting(LOG)
    clock.now_s = math.inf
    await reconnecting.wait_after(UnavailableError("gone."))


async def test_some_failures_are_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    reconnecting = Reconnecting(LOG)
    for number in range(1, 41):
        message = f"failure {number}" if number > 1 else ""
        await reconnecting.wait_after(UnavailableError("No 100 % answer."), message)
    said = ["No 100 % answer. Trying again.", "failure 5", "failure 20", "failure 40"]
    assert caplog.messages == said


async def test_another_kind_of_failure_is_logged_at_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    reconnecting = Reconnecting(LOG)
    kinds = [UnavailableError("gone."), JournalBehindError("old."), UnavailableError("gone.")]
    for error in kinds:
        await reconnecting.wait_after(error)
    assert caplog.messages == ["gone. Trying again.", "old. Trying again."]
    reconnecting.reached()
    await reconnecting.wait_after(kinds[1])
    assert caplog.messages[2:] == ["old. Trying again."]


async def test_a_wait_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "delay_s", lambda *_, **__: 60.0)
    waiting = asyncio.create_task(Reconnecting(LOG).wait_after(UnavailableError("gone.")))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_peer_that_is_starting_is_waited_for_with_one_line(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG.name)
    reconnecting = Reconnecting(LOG, give_up_after_s=10.0)
    for so_far_s in range(30):
        error = StartingError(f"It is starting ({so_far_s} s so far).")
        error.retry_after_s = 2.0
        await reconnecting.wait_after(error)
    assert caplog.messages == ["It is starting (0 s so far). Waiting until then."]
    assert set(clock.slept_s) == {1.0}
    # It went away: that is another matter, and so is the next start.
    await reconnecting.wait_after(UnavailableError("gone."))
    await reconnecting.wait_after(error)
    assert len(caplog.messages) == 3
