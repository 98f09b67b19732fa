"""`fedmezo-relay`: coordinate a site as one worker of the coordinator above."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence

from fedmezo_coordinator.coordinator_settings import RelaySettings
from fedmezo_coordinator.relay_daemon import Relay
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.hosting import fronted, host, sessions_that_fit
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.program import first_of, run_daemon, stop_signal
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import become_member, keep_renewed

log = logging.getLogger("fedmezo.relay")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fedmezo-relay`; returns the exit status."""
    return run_daemon("fedmezo-relay", RelaySettings, run, arguments)


async def run(settings: RelaySettings) -> None:
    """Serve until SIGTERM or Ctrl-C; raises the error that stopped the relay otherwise."""
    stop = stop_signal()
    # The port comes first: a person should not wait for the coordinator above to learn that it is
    # in use.
    async with contextlib.AsyncExitStack() as stack:
        front = await stack.enter_async_context(fronted(settings, "relay"))
        identity = None
        if settings.join or settings.join_state is not None:
            becoming = asyncio.create_task(
                become_member(
                    settings.join,
                    settings.join_state,
                    settings.name,
                    frozenset({Role.WORKER}),
                    give_up_after_s=settings.give_up_after_s,
                )
            )
            if not await first_of(becoming, stop):
                return
            identity = becoming.result()
        client = await stack.enter_async_context(
            CoordinatorClient(
                settings.upstream, settings.tls_ca, tls=settings.tls, identity=identity
            )
        )
        if identity is not None:
            renewing = asyncio.create_task(keep_renewed(client, identity))
            stack.callback(renewing.cancel)
        session_limit = SessionLimit(sessions_that_fit(settings), settings.joins_at_a_time)
        signing_key = None if identity is None else identity.keys.signing_key
        relay = Relay(settings, client, session_limit, signing_key)
        if not await first_of(starting := asyncio.create_task(relay.load()), stop):
            return
        starting.result()
        log.info("site %s: relay of %s", settings.name, settings.upstream)
        what = f"run {relay.genesis.config.run_id} is"
        await host(settings, front, Runs.of(relay), stop, what)


if __name__ == "__main__":
    sys.exit(main())
