"""Sites of a job without NVFlare and without a model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from fedmezo import Session
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed, Scalars, digest64_of
from fedmezo_nvflare.model_process import exchanged
from fedmezo_nvflare.site import Site
from fedmezo_nvflare.site_exchanges import worker_name
from tests.integration.support.harness import config_of, genesis_of

SITES = ("site-1", "site_2")
ROUNDS = 12
GENESIS = genesis_of(
    config_of(
        workers_min=2, quorum=2, rounds=ROUNDS, report_losses=True, projected_grad_abs_max=9.0
    )
)


class FakeEngine:
    """Its weights are the history, and its projected gradients depend on them and on the seed."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._weights = hashlib.sha256(b"base")

    def apply(self, commits: Sequence[Committed]) -> None:
        for commit in commits:
            self._weights.update(repr(commit).encode())

    def measure(self, order: Measure) -> Measured:
        digest = self.digest() if order.work.want_digest else None
        numbers = random.Random(f"{self._worker} {self.digest().hex()} {order.work.seeds}")
        grads = tuple(numbers.uniform(-2, 2) for _ in order.work.seeds)
        digest64 = None if digest is None else digest64_of(digest)
        return Measured(order.ticket, Scalars(grads, 0.5, digest64, 24))

    def digest(self) -> bytes:
        return self._weights.copy().digest()


class InProcess:
    """A `ModelProcess` that is none."""

    def __init__(self, genesis: bytes, worker: str) -> None:
        self._session = Session(genesis, worker, FakeEngine(worker))

    def exchange(self, down: bytes) -> bytes:
        return exchanged(self._session, down)

    def close(self) -> None:
        pass


def new_site(name: str) -> Site:
    """A site's script that has just been started."""
    return Site(lambda genesis: InProcess(genesis, worker_name(name)))
