"""A worker from its start to the end of the run: it joins, takes part, and reconnects."""

from __future__ import annotations

import asyncio
import logging

from fedmezo_core.errors import (
    JournalBehindError,
    JournalCompactedError,
    NotReadyError,
    ReplacedError,
    UnavailableError,
)
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.identity import Identity
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import keep_renewed
from fedmezo_core.wire.history import History
from fedmezo_core.wire.messages import commit_of
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.evaluations import Evaluations
from fedmezo_worker.member import Member
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")


class Agent:
    """Takes part in one run until it is finished.

    Until the model is loaded there is only the agent; from then on a `Member` does the work.
    """

    def __init__(
        self, settings: WorkerSettings, engine: EngineThread, identity: Identity | None = None
    ) -> None:
        """`engine` does the numerical work; the caller closes it.

        `identity` is shown to the coordinator, signs the answers and is renewed in time; None: the
        coordinator knows nobody, and nothing is signed.
        """
        self._settings = settings
        self._identity = identity
        self._engine = engine
        wanted = bytes.fromhex(settings.checkpoint_key) if settings.checkpoint_key else None
        self._history = History(settings.journal_copy, wanted)
        self._reconnecting = Reconnecting(log, give_up_after_s=settings.give_up_after_s)
        # A snapshot that turned out to be bad is not tried again, even after loading anew.
        self._bad_snapshots: set[Snapshot] = set()

    async def run(self) -> None:
        """Join, follow and measure until the run is finished; reconnects by itself.

        Also waits for the right journal if the coordinator serves an older one, and comes back
        after a while if another process took its place. Raises the error
        that no retry can help, or the newest of the others after `give_up_after_s`.
        """
        member: Member | None = None
        settings, identity = self._settings, self._identity
        log.info("connecting to %s", settings.coordinator)
        async with CoordinatorClient(
            settings.coordinator, settings.tls_ca, tls=settings.tls, identity=identity
        ) as client:
            renewing = None
            if identity is not None:
                renewing = asyncio.create_task(keep_renewed(client, identity))
            try:
                while True:
                    try:
                        if member is None or member.has_lost_weights:
                            member = await self.join(client)
                        if await member.take_part(client):
                            break
                    except (
                        UnavailableError,
                        NotReadyError,
                        JournalCompactedError,
                        JournalBehindError,
                        ReplacedError,
                    ) as error:
                        await self._reconnecting.wait_after(error)
            finally:
                if renewing is not None:
                    renewing.cancel()
                if member is not None:
                    await member.end_work()
                await self._history.close()
        await member.evaluate_the_end()

    async def join(self, client: CoordinatorClient) -> Member:
        """Learn what the run is, and load model and data for it; refuses a base that differs."""
        settings = self._settings
        description = await client.get_run(settings.run_id)
        self._reconnecting.reached()
        # Before anything that the contract says is even logged.
        settings.check_run(description.genesis)
        config = description.genesis.config
        log.info("run %s of model %s", config.run_id, settings.model or config.model)
        evaluations = Evaluations(
            0 if settings.heldout is None else settings.evaluate_every_rounds,
            config.rounds,
            settings.evaluations,
        )
        await self._engine.load(settings, description.genesis)
        log.info("%d trainable elements", description.genesis.trainable_elements)
        member = Member(
            settings,
            self._engine,
            self._history,
            self._reconnecting,
            description,
            evaluations,
            self._bad_snapshots,
            None
            if self._identity is None
            else AnswerSigner(self._identity.keys.signing_key, description.head),
        )
        async for page in self._history.open(description):
            await member.take_commits([commit_of(entry.row.body, config) for entry in page])
        # Now, because a late worker leaves the base as soon as it catches up.
        await member.evaluate()
        return member
