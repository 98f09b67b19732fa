"""What the server sends to each site and makes of its replies; knows nothing of NVFlare.

A task holds `down`, and a reply holds `up`: one exchange of `fedmezo.Coordinator`. Each is complete
in itself, so a task or a reply that is lost, repeated or late does no harm. Until a site has
greeted, its tasks hold the run's `genesis` too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fedmezo import Coordinator
from fedmezo_core.errors import ConfigError, FedMezoError, ProtocolError

log = logging.getLogger("fedmezo.nvflare")

GENESIS, DOWN = "genesis", "down"
"""Keys of what a task holds."""
UP, CLIP, LEFT = "up", "projected_grad_abs_max", "left"
"""Keys of what a reply holds: either the first two, or that the site leaves the job."""

WORKER_CHARS_MAX = 64


def worker_name(site: str) -> str:
    """The name that a site's worker has in the run: a-z, 0-9 and - alone, at most 64 of them."""
    return re.sub("[^a-z0-9]", "-", site.lower()).lstrip("-")[:WORKER_CHARS_MAX] or "site"


class SiteExchanges:
    """One run's exchanges with the sites of a job."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._sites: dict[str, str] = {}  # worker -> site
        self._refusals: dict[str, bytes] = {}

    def has_news(self, site: str) -> bool:
        """Whether the site must be sent a task: it has not greeted, or something waits for it."""
        worker = worker_name(site)
        return (
            worker in self._refusals
            or worker not in self._coordinator.workers
            or self._coordinator.has_news(worker)
        )

    def task(self, site: str) -> dict[str, bytes]:
        """What the site is to be sent now.

        Raises `ConfigError` if another site's worker has the same name.
        """
        worker = worker_name(site)
        holder = self._sites.setdefault(worker, site)
        if holder != site:
            raise ConfigError(
                f"The sites {holder} and {site} are both called {worker} in the run, where names "
                "have a-z, 0-9 and - only; rename one of them."
            )
        if worker in self._refusals:
            return {DOWN: self._refusals.pop(worker)}
        if worker not in self._coordinator.workers:
            return {GENESIS: self._coordinator.genesis_bytes, DOWN: b""}
        return {DOWN: self._coordinator.down_for(worker)}

    def reply(self, site: str, reply: Mapping[str, Any]) -> None:
        """Take what a site sent back; the site is told why if that is of no use."""
        up, worker = reply.get(UP), worker_name(site)
        if up == b"":
            # A script that does not know the run yet, because it was started again.
            self._coordinator.disconnect(worker)
            return
        try:
            if not isinstance(up, bytes):
                raise ProtocolError(f"Site {site} sent a reply that is none of FedMeZO's.")
            self._coordinator.take(up, worker=worker)
        except FedMezoError as error:
            log.warning("site %s: %s", site, error)
            if isinstance(up, bytes):
                self._refusals[worker] = self._coordinator.refusal(up, error)
