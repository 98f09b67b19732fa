"""Sites of a job without NVFlare and without a model."""

from __future__ import annotations

from fedmezo import Session
from fedmezo_nvflare.model_process import exchanged
from fedmezo_nvflare.site import Site
from fedmezo_nvflare.site_exchanges import worker_name
from tests.integration.support.harness import config_of, genesis_of
from tests.library.light_engine import LightEngine

SITES = ("site-1", "site_2")
ROUNDS = 12
GENESIS = genesis_of(
    config_of(
        workers_min=2, quorum=2, rounds=ROUNDS, report_losses=True, projected_grad_abs_max=9.0
    )
)


class InProcess:
    """A `ModelProcess` that is none."""

    def __init__(
        self, genesis: bytes, worker: str, engine: type[LightEngine] = LightEngine
    ) -> None:
        self._session = Session(genesis, worker, engine(worker))

    def exchange(self, down: bytes) -> bytes:
        return exchanged(self._session, down)

    def close(self) -> None:
        pass


def new_site(name: str, engine: type[LightEngine] = LightEngine) -> Site:
    """A site's script that has just been started."""
    return Site(lambda genesis: InProcess(genesis, worker_name(name), engine))
