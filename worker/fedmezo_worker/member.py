"""A member of a run: it holds the run's model, follows its commits and measures in its sessions."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import secrets
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from fedmezo_core.errors import (
    ConfigError,
    JournalCompactedError,
    MeasurementError,
    NotReadyError,
    ProtocolError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.events import (
    ApplyCommit,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    RefusedByCoordinator,
    ReportWeights,
    Restored,
    SendAnswer,
    SendHello,
    SendSumStep,
    SendUnable,
    SessionAction,
    SessionEvent,
    SumAsked,
    Welcomed,
)
from fedmezo_core.folders import folder_on_a_disk
from fedmezo_core.machines.session import SessionMachine, SessionState
from fedmezo_core.program import LongStep, long_step
from fedmezo_core.records import Committed
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.secure_aggregation.masking import ENTROPY_BYTES
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.catch_up import Speeds, takes_snapshot
from fedmezo_core.wire.client import CoordinatorClient, RunDescription, SessionStream
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.history import History
from fedmezo_core.wire.messages import (
    answer_to_pb,
    commits_in,
    event_from_pb,
    hello_to_pb,
    unable_to_pb,
)
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.wire.snapshots import Snapshot, SnapshotOffer
from fedmezo_core.wire.sum_messages import sum_step_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.evaluations import Evaluations, HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")

IDLE_AFTER_ANSWER_S = 0.1
"""Once its answer is sent, a worker that hears nothing for this long was not the last to answer,
and has time to evaluate."""
IDLE_UNASSIGNED_S = 1.0
"""A worker that was assigned nothing and hears nothing for this long is not in the round's cohort,
and has time to evaluate."""


class Member:
    """A worker whose model is loaded, in one session after another until the run is finished."""

    def __init__(
        self,
        settings: WorkerSettings,
        engine: EngineThread,
        history: History,
        reconnecting: Reconnecting,
        description: RunDescription,
        evaluations: Evaluations,
        bad_snapshots: set[Snapshot],
        signer: AnswerSigner | None = None,
        sum_memory: SumMemory | None = None,
    ) -> None:
        """`engine` holds the base of the run that `description` describes.

        Without a `signer` the answers are not signed. `sum_memory` is what this process knows of
        sums that hide their terms; None: nothing yet.
        """
        self._signer = signer
        self._settings = settings
        self._engine = engine
        self._history = history
        self._reconnecting = reconnecting
        self._genesis = description.genesis
        self._machine = SessionMachine.of_worker(
            self._genesis,
            description.head,
            settings.name,
            b"" if signer is None else signer.public_key,
            sum_memory,
        )
        self._is_behind = True
        self._replay_rate: float | None = None
        self._bad_snapshots = bad_snapshots
        self.has_lost_weights = False
        """Whether a bad snapshot overwrote the weights: everything must be loaded anew."""
        self._measuring: asyncio.Task[Measured | MeasureFailed] | None = None
        self._evaluations = evaluations
        self._evaluating: asyncio.Task[None] | None = None
        self._evaluation_is_cuttable = True
        # Whether an answer was sent since the last commit: until the next one there is time.
        self._has_answered = False

    async def take_part(self, client: CoordinatorClient) -> bool:
        """Catch up and keep one session until it ends; returns whether the run is finished.

        Raises `UnavailableError`, `NotReadyError`, `JournalCompactedError` or `JournalBehindError`
        where another try may help.
        """
        if self._is_behind and self._measuring is None:
            await self.catch_up(client)
        try:
            return await self._session(client)
        except (NotReadyError, JournalCompactedError) as error:
            # With a time to come back, all sessions were taken. Without one, this worker reads too
            # slowly, or must read the journal first, or is behind the journal's beginning by now.
            self._is_behind |= error.retry_after_s is None
            raise

    async def end_work(self) -> None:
        """Cut short what the engine does for this member, and wait for it."""
        running = {task for task in (self._measuring, self._evaluating) if task}
        if running:
            self._engine.cut_short()
            self._engine.cut_evaluation_short()
            await asyncio.wait(running)

    # ------------------------------------------------------------ before a session

    async def catch_up(self, client: CoordinatorClient) -> None:
        """Read the missing commits; many are applied in one pass over the weights."""
        run_id = self._genesis.config.run_id
        start = self._machine.round
        description = await client.get_run(run_id, start)
        await self._take_snapshot_if_better(client, description)
        missing = max(description.round - self._machine.round, 0)
        with long_step("catching up", missing, "rounds") as step:
            await self._read_commits(client, step)
        if self._machine.round > start:
            log.info("caught up from round %d to %d", start, self._machine.round)
        self._is_behind = False

    async def _read_commits(self, client: CoordinatorClient, step: LongStep) -> None:
        """Read the journal to its end, and apply its commits page by page."""
        # A copy holds every commit.
        from_newest_base = not self._history.keeps
        while True:
            before = self._machine.round
            page = await client.read_journal(
                run_id=self._genesis.config.run_id,
                commits_only=True,
                from_round=self._machine.round + 1,
                from_newest_base=from_newest_base,
            )
            events = commits_in(
                page,
                self._genesis.config,
                self._machine.round,
                from_newest_base=from_newest_base,
            )
            if not events:
                return
            await self._history.add([event.record_bytes for event in events])
            await self.take_commits(events)
            step.advance(self._machine.round - before)

    async def take_commits(self, events: Sequence[CommitReceived]) -> None:
        """Follow commits that were read from a journal."""
        actions: list[SessionAction] = []
        try:
            for event in events:
                actions += self._step(event)
        finally:
            await self._apply([a.commit for a in actions if isinstance(a, ApplyCommit)])

    async def _take_snapshot_if_better(
        self, client: CoordinatorClient, description: RunDescription
    ) -> None:
        """Begin from the newest snapshot if the journal lacks commits, or if that takes less time.

        A bad snapshot is not tried again.
        """
        run_id, offer = self._genesis.config.run_id, description.snapshot
        if description.needs_snapshot:
            await self._take_needed_snapshot(client, run_id, offer)
            return
        if self._history.keeps:
            return  # A copy holds every commit.
        if offer is None or offer.snapshot in self._bad_snapshots:
            return
        if not self._settings.download_rate:
            return
        if self._replay_rate is None:
            self._replay_rate = await self._engine.replay_rate()
        speeds = Speeds(self._replay_rate, float(self._settings.download_rate))
        if not takes_snapshot(description.missing, offer, self._genesis.trainable_elements, speeds):
            return
        try:
            self._settings.policy.check_snapshot(offer.snapshot.file_bytes)
            await self._take_snapshot(client, run_id, offer.snapshot)
        except SnapshotError as error:
            log.warning("%s The journal is read instead.", error)
            self._bad_snapshots.add(offer.snapshot)

    async def _take_needed_snapshot(
        self, client: CoordinatorClient, run_id: str, offer: SnapshotOffer | None
    ) -> None:
        """Begin from a snapshot because the journal lacks commits; errors say what to do."""
        where = (
            f"this worker is at round {self._machine.round}, and the coordinator's journal no "
            "longer has the commits after that"
        )
        if self._history.keeps:
            raise ConfigError(
                f"The journal copy {self._settings.journal_copy} cannot go on: {where}; move it "
                "away, and start this worker without journal_copy, to begin from a snapshot."
            )
        if offer is None:
            raise SnapshotError(
                f"No snapshot is on offer: {where}; look at the coordinator's log and its "
                "snapshots."
            )
        self._settings.policy.check_snapshot(offer.snapshot.file_bytes)
        try:
            await self._take_snapshot(client, run_id, offer.snapshot)
        except SnapshotError as error:
            # A newer one may come, or its disk be repaired.
            raise UnavailableError(
                f"{error} The journal cannot be read instead: {where}."
            ) from None

    async def _take_snapshot(
        self, client: CoordinatorClient, run_id: str, snapshot: Snapshot
    ) -> None:
        begin_s = time.monotonic()
        async with downloaded(
            client,
            run_id,
            snapshot,
            folder=self._settings.offload_folder or folder_on_a_disk(),
            weights_bytes=self._engine.weights_bytes,
            give_up_after_s=self._settings.give_up_after_s,
        ) as path:
            self._reconnecting.reached()
            self._has_answered = False
            self._make_way()
            try:
                await self._engine.install(path, snapshot)
            except SnapshotDamagedError as error:
                self._bad_snapshots.add(snapshot)
                self.has_lost_weights = True
                await self.end_work()
                raise UnavailableError(str(error)) from None
        self._machine.step(Restored(snapshot.round, snapshot.head))
        log.info(
            "took the snapshot of round %d: %d bytes in %.1f s",
            snapshot.round,
            snapshot.file_bytes,
            time.monotonic() - begin_s,
        )

    async def _apply(self, commits: Sequence[Committed]) -> None:
        if commits:
            self._has_answered = False
            self._make_way()
            await self._engine.apply(commits)

    # ------------------------------------------------------------ a session

    async def _session(self, client: CoordinatorClient) -> bool:
        """Keep one session until it ends; returns whether the run is finished."""
        stream = client.session()
        receiving: asyncio.Task[wire.SessionResponse | None] | None = None
        joined = False
        try:
            finished = await self._act(self._step(Connected()), stream)
            while not finished:
                if receiving is None:
                    receiving = asyncio.create_task(stream.receive())
                idle_s = self._idle_s_before_evaluating()
                if idle_s == 0:
                    self._begin_evaluation()
                    idle_s = None
                waiting: set[asyncio.Task[Any]] = {receiving}
                waiting |= {task for task in (self._measuring, self._evaluating) if task}
                done, _ = await asyncio.wait(
                    waiting, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self._begin_evaluation()
                    continue
                if self._evaluating is not None and self._evaluating.done():
                    evaluated, self._evaluating = self._evaluating, None
                    evaluated.result()
                if self._measuring is not None and self._measuring.done():
                    # Before the message: that may end the session, and the machine must know.
                    measured, self._measuring = self._measuring, None
                    finished = await self._act(self._step(measured.result()), stream)
                if receiving.done():
                    message, receiving = receiving.result(), None
                    if message is None:
                        raise UnavailableError("The coordinator ended the session.")
                    event = event_from_pb(message, self._genesis.config)
                    if isinstance(event, SumAsked):
                        entropy = secrets.token_bytes(ENTROPY_BYTES)
                        event = dataclasses.replace(event, entropy=entropy)
                    if isinstance(event, Assigned):
                        self._engine.set_deadline(time.monotonic() + event.deadline_ms / 1000)
                    actions = await self._receive(event, message)
                    finished = await self._act(actions, stream) or finished
                    if isinstance(event, Welcomed):
                        joined = True
                        self._reconnecting.reached()
                        log.info("joined at round %d of epoch %d", event.round, event.epoch)
                if self._machine.measuring_in_vain:
                    self._engine.cut_short()
            await stream.end()
            # Until the coordinator closes too: breaking off now could lose what was just sent.
            while await stream.receive() is not None:
                pass
            return True
        except UnavailableError:
            if self._machine.state is not SessionState.LEFT:
                raise
            log.warning("the coordinator went away before it took the last digest")
            return True
        finally:
            if joined:
                self._reconnecting.reached()
            if receiving is not None:
                receiving.cancel()
                # gather tells a cancellation of this task from that of `receiving`.
                await asyncio.gather(receiving, return_exceptions=True)
            stream.cancel()
            self._machine.step(Disconnected())

    async def _receive(
        self, event: SessionEvent, message: wire.SessionResponse
    ) -> Sequence[SessionAction]:
        """Step; signatures are checked, and commits kept, before any action is returned."""
        before = self._machine.round
        actions = self._step(event)
        if isinstance(event, RefusedByCoordinator) and event == self._machine.refusal:
            log.warning("round %d: the answer was refused: %s", event.ticket.round, event.message)
        if isinstance(event, Welcomed):
            await self._history.welcomed(message.welcome, self._machine.round)
        elif self._machine.round > before:
            log_with(round=self._machine.round)
            await self._history.committed(message.commit, self._machine.round, self._machine.head)
        return actions

    def _step(self, event: SessionEvent) -> Sequence[SessionAction]:
        """Step the machine; an event that it does not allow ends this session only."""
        try:
            return self._machine.step(event)
        except ProtocolError as error:
            raise UnavailableError(str(error)) from None

    async def _act(self, actions: Sequence[SessionAction], stream: SessionStream) -> bool:
        """Do what the machine wants, in order; returns whether it wants to leave.

        If the stream breaks, sending stops but all commits are still applied: the machine counts
        on every commit that it has given out.
        """
        commits: list[Committed] = []
        broken: UnavailableError | None = None
        leaves = False
        for action in actions:
            if isinstance(action, ApplyCommit):
                commits.append(action.commit)
                continue
            await self._apply(commits)
            commits = []
            match action:
                case Measure():
                    self._make_way()
                    self._measuring = self._begin_measuring(action)
                case Leave():
                    leaves = True
                case _ if broken is None:
                    try:
                        await stream.send(await self._message(action))
                        self._has_answered |= isinstance(action, (SendAnswer, SendUnable))
                    except UnavailableError as error:
                        broken = error
        await self._apply(commits)
        if broken is not None:
            raise broken
        return leaves

    async def _message(
        self, action: SendHello | SendAnswer | SendSumStep | SendUnable | ReportWeights
    ) -> wire.SessionRequest:
        match action:
            case SendHello(round_, head):
                return hello_to_pb(
                    self._genesis,
                    self._settings.name,
                    round_,
                    head,
                    base_form=self._engine.base_form,
                    signer=self._signer,
                )
            case SendAnswer():
                return answer_to_pb(action, self._signer)
            case SendSumStep():
                return sum_step_to_pb(action, self._signer)
            case SendUnable():
                return unable_to_pb(action)
            case ReportWeights(round_):
                self._make_way()
                digest = await self._engine.digest()
                log.info("finished at round %d, weights %s", round_, digest.hex())
                return wire.SessionRequest(
                    weights_report=wire.WeightsReport(round=round_, weights_digest=digest)
                )

    def _begin_measuring(self, order: Measure) -> asyncio.Task[Measured | MeasureFailed]:
        context = contextvars.copy_context()
        context.run(log_with, round=order.ticket.round)
        # The engine is asked here, not in the task: what comes next may cut it short.
        measuring = context.run(self._engine.measure, order)
        return asyncio.create_task(self._measured(order, measuring), context=context)

    async def _measured(
        self, order: Measure, measuring: Awaitable[Measured]
    ) -> Measured | MeasureFailed:
        try:
            measured = await measuring
        except MeasurementError as error:
            log.warning("round %d: %s", order.ticket.round, error)
            return MeasureFailed(order.ticket, str(error))
        log.info("round %d measured", order.ticket.round)
        return measured

    # ------------------------------------------------------------ evaluation

    async def evaluate(self) -> None:
        """Evaluate the weights now, if there are held-out rows."""
        if self._settings.heldout is not None:
            await self._add_result(self._engine.evaluate())

    async def evaluate_the_end(self) -> None:
        """Evaluate the last weights unless that was done, and log how the run went."""
        last = self._evaluations.last
        if last is None or last.round != self._machine.round:
            await self.evaluate()
        self._evaluations.log_summary()

    def _idle_s_before_evaluating(self) -> float | None:
        """Seconds of silence after which to evaluate; None if nothing is to be evaluated now."""
        round_ = self._machine.round
        is_free = self._measuring is None and self._evaluating is None
        if not is_free or not self._evaluations.is_due(round_):
            return None
        must_finish = self._evaluations.must_finish(round_)
        if must_finish and self._genesis.config.buffer_answers:
            return 0.0  # There is never time, and nobody waits for this worker.
        if not self._has_answered:
            return IDLE_UNASSIGNED_S
        return 0.0 if must_finish else IDLE_AFTER_ANSWER_S

    def _begin_evaluation(self) -> None:
        round_ = self._machine.round
        self._evaluation_is_cuttable = not self._evaluations.must_finish(round_)
        self._evaluations.begin(round_)
        # The engine is asked here, not in the task: its work is done in the order of the calls.
        self._evaluating = asyncio.create_task(self._add_result(self._engine.evaluate()))

    def _make_way(self) -> None:
        """End a running evaluation, if it may be cut short, because the engine has other work."""
        if self._evaluating is not None and self._evaluation_is_cuttable:
            self._engine.cut_evaluation_short()

    async def _add_result(self, evaluating: Awaitable[HeldOutResult | None]) -> None:
        try:
            result = await evaluating
        except MeasurementError as error:
            log.warning("round %d: %s", self._machine.round, error)
            return
        if result is not None:
            self._evaluations.add(result)
