"""A worker's connection to its coordinator, and what it does there: one run, or all that come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fedmezo_core.errors import (
    FedMezoError,
    ForbiddenError,
    NotReadyError,
    UnavailableError,
    VersionError,
)
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import keep_renewed
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.agent import Agent
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.offers.offered_runs import OfferedRuns
from fedmezo_worker.offers.told_to_others import reason_to_decline
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")


async def work(
    settings: WorkerSettings, engine: EngineThread, identity: Identity | None = None
) -> None:
    """Take part in the coordinator's run until it is over, or in all that it offers.

    A worker whose settings name a run, or whose coordinator will have no other, ends with it, and
    `engine` still holds its weights. Several runs have engines of the same kind on its thread. The
    caller closes it. `identity` is shown to the coordinator, signs the answers and is renewed in
    time; None: the coordinator knows nobody, and nothing is signed. Raises as `Agent.run` and
    `OfferedRuns.run`.
    """
    log.info("connecting to %s", settings.coordinator)
    async with _connected(settings, identity) as client:
        offers = await _first_offers(client, settings)
        if offers.more_may_come and not settings.run_id:
            log.info("the coordinator offers runs; this worker stays for those that come")
            await OfferedRuns(settings, engine, client, identity).run(offers)
            return
        found = [one for one in offers.offers if settings.run_id in ("", one.run_id)]
        try:
            await Agent(
                settings,
                engine,
                client,
                identity,
                run_id=settings.run_id,
                files=found[0].files if found else (),
            ).run()
        except FedMezoError as error:
            if found and not isinstance(error, (UnavailableError, NotReadyError)):
                reason = reason_to_decline(error, settings.name)
                with contextlib.suppress(FedMezoError):
                    await client.decline_run(settings.name, found[0].run_id, reason)
            raise


@contextlib.asynccontextmanager
async def _connected(
    settings: WorkerSettings, identity: Identity | None
) -> AsyncIterator[CoordinatorClient]:
    async with CoordinatorClient(
        settings.coordinator, settings.tls_ca, tls=settings.tls, identity=identity
    ) as client:
        renewing = None
        if identity is not None:
            renewing = asyncio.create_task(keep_renewed(client, identity))
        try:
            yield client
        finally:
            if renewing is not None:
                renewing.cancel()


async def _first_offers(
    client: CoordinatorClient, settings: WorkerSettings
) -> wire.OfferRunsResponse:
    """What the coordinator offers; nothing if it is of a version that offers no runs."""
    reconnecting = Reconnecting(log, give_up_after_s=settings.give_up_after_s)
    while True:
        try:
            return await client.offered_runs(settings.name)
        except (VersionError, ForbiddenError):
            return wire.OfferRunsResponse()
        except (UnavailableError, NotReadyError) as error:
            await reconnecting.wait_after(error)
