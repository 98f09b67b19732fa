"""A worker without a model: the product's agent over real gRPC, with an oracle as engine.

    python -m tests.faults.light_worker HOST:PORT NAME

Its weights are a hash of the commits, and its measurements a hash of weights, seeds and name: so a
run ends with the same head whatever happened to the connections, or something is wrong.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Genesis, Scalars, digest64_of
from fedmezo_core.wire import client
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.sim.checker import BASE_WEIGHTS, measure, rows_of, weights_after

MEASURING_S: Final = 0.02
KEEPALIVE_MS: Final = 1500
"""Of pings and of the wait for an answer; the product's are a minute and 20 s, too long for a
test."""


class LightEngine:
    """Stands in for `Engine`."""

    base_form = ""

    def __init__(self) -> None:
        self.name = ""
        self.weights = BASE_WEIGHTS

    async def load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        self.name = settings.name

    async def apply(self, commits: Sequence[Committed]) -> None:
        for commit in commits:
            self.weights = weights_after(self.weights, commit)

    async def digest(self) -> bytes:
        return self.weights

    async def measure(self, order: Measure) -> Measured:
        grads, loss = measure(self.name, order.work.seeds, self.weights)
        digest64 = digest64_of(self.weights) if order.work.want_digest else None
        await asyncio.sleep(MEASURING_S)
        return Measured(order.ticket, Scalars(grads, loss, digest64, rows_of(self.name)))

    def set_deadline(self, deadline_s: float) -> None:
        """A measurement is always in time."""

    def cut_short(self) -> None:
        """It is short."""

    def cut_evaluation_short(self) -> None:
        """There is none."""


async def work_lightly(address: str, name: str, engine: LightEngine | None = None) -> None:
    """Take part in a whole run."""
    settings = WorkerSettings(coordinator=address, name=name, data=Path(__file__))
    await work(settings, cast("Engine", engine or LightEngine()))


def with_quick_keepalive(options: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """gRPC options with which a silent link is noticed in a second or two."""
    quick = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    # Only what the product sets is made quicker: with an option too few, a test takes minutes.
    return tuple((name, KEEPALIVE_MS if name in quick else value) for name, value in options)


if __name__ == "__main__":
    quick_options = with_quick_keepalive(client.CHANNEL_OPTIONS)
    client.CHANNEL_OPTIONS = quick_options  # type: ignore[assignment]
    asyncio.run(work_lightly(sys.argv[1], sys.argv[2]))
