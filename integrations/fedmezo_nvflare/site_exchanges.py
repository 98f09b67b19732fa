"""What the server sends to each site and makes of its replies; knows nothing of NVFlare.

A task holds `down`, and a reply holds `up`: one exchange of `fedmezo.Coordinator`. Each is complete
in itself, so a task or a reply that is lost, repeated or late does no harm. Until a site has
greeted, its tasks hold the run's `genesis` too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from fedmezo import Coordinator
from fedmezo.library_peers import Peers
from fedmezo_core.errors import ConfigError

log = logging.getLogger("fedmezo.nvflare")

GENESIS, DOWN = "genesis", "down"
"""Keys of what a task holds."""
UP, CLIP, LEFT = "up", "projected_grad_abs_max", "left"
"""Keys of what a reply holds: either the first two, or that the site leaves the job."""

WORKER_CHARS_MAX = 64


def worker_name(site: str) -> str:
    """The name that a site's worker has in the run: a-z, 0-9 and - alone, at most 64 of them."""
    return re.sub("[^a-z0-9]", "-", site.lower()).lstrip("-")[:WORKER_CHARS_MAX] or "site"


class SiteExchanges(Peers[str]):
    """One run's exchanges with the sites of a job, by the sites' names."""

    def __init__(
        self, coordinator: Coordinator, again_after_s: float, resend_after_s: float = math.inf
    ) -> None:
        """The times are those of `Peers`; NVFlare says which tasks are lost."""
        super().__init__(
            coordinator,
            named=lambda site: f"site {site}",
            log=log,
            again_after_s=again_after_s,
            resend_after_s=resend_after_s,
        )
        self._genesis = coordinator.genesis_bytes

    def see(self, peers: Iterable[str]) -> None:
        """Take note of which sites are there; `ConfigError` for two that are called the same."""
        sites = list(peers)
        holders: dict[str, str] = {}
        for site in sites:
            holder = holders.setdefault(worker_name(site), site)
            if holder != site:
                raise ConfigError(
                    f"The sites {holder} and {site} are both called {worker_name(site)} in the "
                    "run, where names have a-z, 0-9 and - only; rename one of them."
                )
        super().see(sites)

    def task(self, site: str, now_s: float) -> dict[str, bytes] | None:
        """What the site is to be sent now; None for nothing."""
        down = self.due(site, now_s)
        if down is None:
            return None
        return {DOWN: down} if down else {GENESIS: self._genesis, DOWN: down}

    def reply(
        self, site: str, task: Hashable | None, reply: Mapping[str, Any], now_s: float
    ) -> None:
        """Take what a site sent back for a task; the site is told why if that is of no use."""
        up = reply.get(UP)
        if up == b"":
            # A script that does not know the run yet, because it was started again.
            self.begin_again(site, task)
        elif isinstance(up, bytes):
            self.take(site, task, worker_name(site), up, now_s)
        else:
            self.fail(site, task, "its reply is none of FedMeZO's", now_s)
