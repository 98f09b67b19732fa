"""`fedmezo-relay`: coordinate a site as one worker of the coordinator above."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from fedmezo_coordinator.coordinator_settings import RelaySettings
from fedmezo_coordinator.relay_daemon import Relay
from fedmezo_coordinator.serving.hosting import fronted, host, sessions_that_fit
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.program import first_of, run_daemon, stop_signal
from fedmezo_core.wire.client import CoordinatorClient

log = logging.getLogger("fedmezo.relay")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-relay`; returns the exit status."""
    return run_daemon("fedmezo-relay", RelaySettings, run, arguments)


async def run(settings: RelaySettings) -> None:
    """Serve until SIGTERM or Ctrl-C; raises the error that stopped the relay otherwise."""
    stop = stop_signal()
    # The port comes first: a person should not wait for the coordinator above to learn that it is
    # in use.
    async with (
        fronted(settings, "relay") as front,
        CoordinatorClient(settings.upstream, settings.tls_ca) as client,
    ):
        session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
        relay = Relay(settings, client, session_limit)
        if not await first_of(starting := asyncio.create_task(relay.load()), stop):
            return
        starting.result()
        log.info("site %s: relay of %s", settings.name, settings.upstream)
        await host(settings, front, relay, stop)


if __name__ == "__main__":
    sys.exit(main())
