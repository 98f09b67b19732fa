"""A worker in one run, from its start to the end of the run: it joins, takes part, reconnects."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from fedmezo_core.errors import (
    JournalBehindError,
    JournalCompactedError,
    NotReadyError,
    ReplacedError,
    UnavailableError,
)
from fedmezo_core.records import Genesis
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.identity import Identity
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.history import History
from fedmezo_core.wire.messages import commit_of
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_worker.adapter_files import OfferedFile, adapter_in, downloaded_adapter
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
        self,
        settings: WorkerSettings,
        engine: EngineThread,
        client: CoordinatorClient,
        identity: Identity | None = None,
        *,
        run_id: str = "",
        files: Sequence[OfferedFile] = (),
        may_go_on: Callable[[], bool] = lambda: True,
        sum_memory: SumMemory | None = None,
    ) -> None:
        """`engine` does the numerical work; the caller closes it.

        `identity` signs the answers; None: nothing is signed. `run_id` names the run; empty: the
        only one. `files` are what the coordinator offers for it. Once `may_go_on` says no, the
        agent ends instead of reconnecting. `sum_memory` is what all runs of this process know of
        sums that hide their terms; None: this is its only run.
        """
        self._settings = settings
        self._engine = engine
        self._client = client
        self._identity = identity
        self._run_id = run_id
        self._files = files
        self._may_go_on = may_go_on
        # It outlives the members: each loads the weights anew, and measures the same again.
        self._sum_memory = SumMemory() if sum_memory is None else sum_memory
        self._history: History | None = None
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
        try:
            while True:
                try:
                    if member is None or member.has_lost_weights:
                        member = await self.join()
                    if await member.take_part(self._client):
                        break
                except (
                    UnavailableError,
                    NotReadyError,
                    JournalCompactedError,
                    JournalBehindError,
                    ReplacedError,
                ) as error:
                    if not self._may_go_on():
                        return
                    await self._reconnecting.wait_after(error)
        finally:
            if member is not None:
                await member.end_work()
            if self._history is not None:
                await self._history.close()
        await member.evaluate_the_end()

    async def join(self) -> Member:
        """Learn what the run is, and load model and data for it; refuses a base that differs."""
        description = await self._client.get_run(self._run_id)
        self._reconnecting.reached()
        # Before anything that the contract says is even logged.
        settings = self._settings.for_run(description.genesis)
        config = description.genesis.config
        log_with(run=config.run_id)
        log.info("run %s of model %s", config.run_id, settings.model or config.model)
        evaluations = Evaluations(
            0 if settings.heldout is None else settings.evaluate_every_rounds,
            config.rounds,
            settings.evaluations,
        )
        async with self._with_adapter(settings, description.genesis) as loaded:
            await self._engine.load(loaded, description.genesis)
        log.info("%d trainable elements", description.genesis.trainable_elements)
        if self._history is None:
            wanted = bytes.fromhex(settings.checkpoint_key) if settings.checkpoint_key else None
            self._history = History(settings.journal_copy, wanted)
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
            self._sum_memory,
        )
        async for page in self._history.open(description):
            await member.take_commits([commit_of(entry.row.body, config) for entry in page])
        # Now, because a late worker leaves the base as soon as it catches up.
        await member.evaluate()
        return member

    @contextlib.asynccontextmanager
    async def _with_adapter(
        self, settings: WorkerSettings, genesis: Genesis
    ) -> AsyncIterator[WorkerSettings]:
        """The settings with the adapter that the coordinator offers, if they name none.

        It is there for as long as the block, in which it is read.
        """
        offered = adapter_in(self._files) if genesis.config.lora is not None else {}
        if not offered or settings.adapter is not None or settings.base_form is not None:
            yield settings
            return
        async with downloaded_adapter(
            self._client,
            genesis.config.run_id,
            offered,
            disk_max_bytes=settings.policy.disk_max,
            give_up_after_s=settings.give_up_after_s,
            may_go_on=self._may_go_on,
        ) as folder:
            yield settings.model_copy(update={"adapter": folder})
