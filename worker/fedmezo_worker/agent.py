"""The one loop of a worker: stream and engine -> session machine -> stream and engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
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
    ReportWeights,
    Restored,
    SendAnswer,
    SendHello,
    SendUnable,
    SessionAction,
    SessionEvent,
    Welcomed,
)
from fedmezo_core.machines.session import SessionMachine, SessionState
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.wire.backoff import delay_after_refusal_s
from fedmezo_core.wire.catch_up import Speeds, takes_snapshot
from fedmezo_core.wire.client import CoordinatorClient, RunDescription, SessionStream
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.history import History
from fedmezo_core.wire.messages import (
    answer_to_pb,
    commit_of,
    event_from_pb,
    hello_to_pb,
    unable_to_pb,
)
from fedmezo_core.wire.snapshots import Snapshot, SnapshotOffer
from fedmezo_core.zo.kept_base import folder_on_a_disk
from fedmezo_core.zo.party import Party
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.evaluations import Evaluations, HeldOutResult
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")

ANSWERED_IDLE_S = 0.1
"""Idle for so long after an answer, a worker was not the last one, and has time to evaluate."""
UNASKED_IDLE_S = 1.0
"""The same without an assignment: it is not in the round's cohort."""


class Agent:
    """Takes part in one run until it is finished."""

    def __init__(self, settings: WorkerSettings, engine: Engine) -> None:
        """`engine` does the numbers; the caller closes it."""
        self._settings = settings
        self._engine = engine
        self._party: Party | None = None
        self._genesis: Genesis | None = None
        self._machine: SessionMachine | None = None
        wanted = bytes.fromhex(settings.checkpoint_key) if settings.checkpoint_key else None
        self._history = History(settings.journal_copy, wanted)
        self._replay_rate: float | None = None
        self._bad_snapshot: Snapshot | None = None
        """It was tried and is not tried again."""
        self._measuring: asyncio.Task[Measured | MeasureFailed] | None = None
        self._evaluations: Evaluations | None = None
        self._evaluating: asyncio.Task[None] | None = None
        self._evaluation_is_cuttable = True
        self._has_answered = False
        """Whether an answer was sent since the last commit: until the next one there is time."""
        self._attempt = 0
        self._is_behind = True
        self._reachable_at_s = time.monotonic()

    async def run(self) -> None:
        """Join, follow and measure until the run is finished; reconnects by itself.

        Raises the error that no retry can help, or `UnavailableError` after `give_up_after_s`.
        """
        async with CoordinatorClient(self._settings.coordinator, self._settings.tls_ca) as client:
            try:
                while not await self._attempt_once(client):
                    pass
            finally:
                await self._drop_work()
                await self._history.close()
        await self._evaluate_the_end()

    async def _attempt_once(self, client: CoordinatorClient) -> bool:
        """One connection, from catching up to its end; whether the run is finished."""
        try:
            if self._machine is None:
                await self._prepare(client)
            if self._is_behind and self._measuring is None:
                await self._catch_up(client)
                self._is_behind = False
            return await self._session(client)
        except (UnavailableError, NotReadyError, JournalCompactedError) as error:
            waited_s = time.monotonic() - self._reachable_at_s
            if waited_s > self._settings.give_up_after_s:
                raise
            # Refused without a time to come back: this worker reads too slowly, must read the journal
            # first, or is behind its beginning by now. With one, there was no place.
            self._is_behind |= (
                not isinstance(error, UnavailableError) and error.retry_after_s is None
            )
            wait_s = delay_after_refusal_s(self._attempt, random.random(), error.retry_after_s)
            self._attempt += 1
            if self._attempt in (1, 5) or self._attempt % 20 == 0:
                log.warning("%s Trying again.", error)
            await asyncio.sleep(wait_s)
            return False

    def _reached(self) -> None:
        self._attempt = 0
        self._reachable_at_s = time.monotonic()

    # ------------------------------------------------------------ before the stream

    async def _prepare(self, client: CoordinatorClient) -> None:
        """Learn what the run is, load model and data for it, and refuse a base that differs."""
        description: RunDescription = await client.get_run(self._settings.run_id)
        self._reached()
        self._genesis = description.genesis
        config = description.genesis.config
        log.info("run %s: loading %s", config.run_id, self._settings.model or config.model)
        settings = self._settings
        evaluations = None
        if settings.heldout is not None:
            evaluations = Evaluations(
                settings.evaluate_every_rounds, config.rounds, settings.evaluations
            )
        self._party = await self._engine.load(settings, description.genesis)
        self._machine = SessionMachine(
            0,
            description.head,
            report_losses=config.report_losses,
            report_rows=config.weighting == "rows",
            staleness_max=config.staleness_max,
        )
        log.info("%d trainable elements", self._party.loaded.manifest.element_count)
        async for page in self._history.open(description):
            events = [commit_of(entry.row.body) for entry in page]
            await self._take_commits([event for event in events if event is not None])
        if evaluations is not None:
            # Now, because a worker that comes late goes on from the base at once.
            self._evaluations = evaluations
            await self._evaluate(self._engine.evaluate())

    async def _catch_up(self, client: CoordinatorClient) -> None:
        """Read the commits that are missing; many are applied in one pass over the weights."""
        assert self._machine is not None
        assert self._genesis is not None
        run_id = self._genesis.config.run_id
        start = self._machine.round
        await self._take_snapshot_if_better(client, run_id)
        while True:
            page = await client.read_journal(
                run_id=run_id,
                commits_only=True,
                from_round=self._machine.round + 1,
                # A copy holds every commit.
                from_newest_base=not self._history.keeps,
            )
            if not page.entries:
                break
            events = [
                commit_of(entry.record, b"" if number else page.head_before)
                for number, entry in enumerate(page.entries)
            ]
            await self._history.add([entry.record for entry in page.entries])
            await self._take_commits([event for event in events if event is not None])
        if self._machine.round > start:
            log.info("caught up from round %d to %d", start, self._machine.round)

    async def _take_commits(self, events: Sequence[CommitReceived]) -> None:
        """Follow commits that did not come down a stream."""
        actions: list[SessionAction] = []
        try:
            for event in events:
                actions += self._step(event)
        finally:
            await self._apply([a.commit for a in actions if isinstance(a, ApplyCommit)])

    async def _take_snapshot_if_better(self, client: CoordinatorClient, run_id: str) -> None:
        """Begin from the newest snapshot, if the journal lacks commits or if that takes less time.

        One that is no good is left, once.
        """
        assert self._machine is not None
        assert self._genesis is not None
        description = await client.get_run(run_id, self._machine.round)
        offer = description.snapshot
        if description.needs_snapshot:
            await self._take_needed_snapshot(client, run_id, offer)
            return
        if self._history.keeps:
            return  # A copy holds every commit.
        if (
            offer is None
            or offer.snapshot == self._bad_snapshot
            or not self._settings.download_rate
        ):
            return
        if self._replay_rate is None:
            self._replay_rate = await self._engine.replay_rate()
        speeds = Speeds(self._replay_rate, float(self._settings.download_rate))
        if not takes_snapshot(description.missing, offer, self._genesis.trainable_elements, speeds):
            return
        try:
            await self._take_snapshot(client, run_id, offer)
        except SnapshotError as error:
            log.warning("%s The journal is read instead.", error)
            self._bad_snapshot = offer.snapshot

    async def _take_needed_snapshot(
        self, client: CoordinatorClient, run_id: str, offer: SnapshotOffer | None
    ) -> None:
        """Begin from a snapshot because nothing else is left; raises what a person must know."""
        assert self._machine is not None
        where = (
            f"this worker is at round {self._machine.round}, and the coordinator's journal does not have "
            "the commits after that any more"
        )
        if self._history.keeps:
            raise ConfigError(
                f"The journal copy {self._settings.journal_copy} cannot go on: {where}; move it away, and "
                "start this worker without journal_copy, to begin from a snapshot."
            )
        if offer is None:
            raise SnapshotError(
                f"No snapshot is on offer: {where}; look at the coordinator's log and its snapshots."
            )
        try:
            await self._take_snapshot(client, run_id, offer)
        except SnapshotError as error:
            # A newer one may come, or its disk be repaired.
            raise UnavailableError(f"{error} The journal is no way out: {where}.") from None

    async def _take_snapshot(
        self, client: CoordinatorClient, run_id: str, offer: SnapshotOffer
    ) -> None:
        assert self._machine is not None
        assert self._genesis is not None
        snapshot, begin_s = offer.snapshot, time.monotonic()
        async with downloaded(
            client,
            run_id,
            snapshot,
            folder=self._settings.offload_folder or folder_on_a_disk(),
            weights_bytes=self._genesis.trainable_bytes,
            give_up_after_s=self._settings.give_up_after_s,
        ) as path:
            self._reached()
            self._has_answered = False
            self._make_way()
            try:
                await self._engine.install(path, snapshot)
            except SnapshotDamagedError as error:
                # The weights are spoilt: everything is loaded anew.
                self._bad_snapshot, self._machine = snapshot, None
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

    # ------------------------------------------------------------ the stream

    async def _session(self, client: CoordinatorClient) -> bool:
        """Keep one session until it ends; whether the run is finished."""
        assert self._machine is not None
        assert self._genesis is not None
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
                    if isinstance(event, Assigned):
                        self._engine.set_deadline(time.monotonic() + event.deadline_ms / 1000)
                    actions = await self._take(event, message)
                    finished = await self._act(actions, stream) or finished
                    if isinstance(event, Welcomed):
                        joined = True
                        self._reached()
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
                self._reachable_at_s = time.monotonic()
            if receiving is not None:
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError, FedMezoError):
                    await receiving
            stream.cancel()
            self._machine.step(Disconnected())

    async def _take(
        self, event: SessionEvent, message: wire.SessionResponse
    ) -> Sequence[SessionAction]:
        """Step, with the coordinator's signatures checked and commits kept before they are acted on."""
        assert self._machine is not None
        before = self._machine.round
        actions = self._step(event)
        if isinstance(event, Welcomed):
            await self._history.welcomed(message.welcome, self._machine.round)
        elif self._machine.round > before:
            await self._history.committed(message.commit, self._machine.round, self._machine.head)
        return actions

    def _step(self, event: SessionEvent) -> Sequence[SessionAction]:
        """One step; an event that the machine does not allow ends this session, and a new one may work."""
        assert self._machine is not None
        try:
            return self._machine.step(event)
        except ProtocolError as error:
            raise UnavailableError(str(error)) from None

    async def _act(self, actions: Sequence[SessionAction], stream: SessionStream) -> bool:
        """Do what the machine wants, in order; whether it wants to leave.

        A stream that breaks in between stops the sending only: the machine counts on every commit
        that it has given out.
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
                    self._measuring = asyncio.create_task(self._measure(action))
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
        self, action: SendHello | SendAnswer | SendUnable | ReportWeights
    ) -> wire.SessionRequest:
        match action:
            case SendHello(round_, head):
                assert self._party is not None
                return hello_to_pb(self._party, self._settings.name, round_, head)
            case SendAnswer():
                return answer_to_pb(action)
            case SendUnable():
                return unable_to_pb(action)
            case ReportWeights(round_):
                self._make_way()
                digest = await self._engine.digest()
                log.info("finished at round %d, weights %s", round_, digest.hex())
                return wire.SessionRequest(
                    weights_report=wire.WeightsReport(round=round_, weights_digest=digest)
                )

    async def _measure(self, order: Measure) -> Measured | MeasureFailed:
        try:
            measured = await self._engine.measure(order)
        except MeasurementError as error:
            log.warning("round %d: %s", order.ticket.round, error)
            return MeasureFailed(order.ticket, str(error))
        log.info("round %d measured", order.ticket.round)
        return measured

    async def _drop_work(self) -> None:
        running = {task for task in (self._measuring, self._evaluating) if task}
        if running:
            self._engine.cut_short()
            self._engine.cut_evaluation_short()
            await asyncio.wait(running)

    # ------------------------------------------------------------ evaluation

    def _idle_s_before_evaluating(self) -> float | None:
        """How long nothing more must come until the weights are evaluated; None: they are not now."""
        assert self._machine is not None
        round_ = self._machine.round
        is_free = self._measuring is None and self._evaluating is None
        if self._evaluations is None or not is_free or not self._evaluations.is_due(round_):
            return None
        assert self._genesis is not None
        must_finish = self._evaluations.must_finish(round_)
        if must_finish and self._genesis.config.buffer_answers:
            return 0.0  # There is never time, and nobody waits for this worker.
        if not self._has_answered:
            return UNASKED_IDLE_S
        return 0.0 if must_finish else ANSWERED_IDLE_S

    def _begin_evaluation(self) -> None:
        assert self._machine is not None
        assert self._evaluations is not None
        round_ = self._machine.round
        self._evaluation_is_cuttable = not self._evaluations.must_finish(round_)
        self._evaluations.begin(round_)
        self._evaluating = asyncio.create_task(self._evaluate(self._engine.evaluate()))

    def _make_way(self) -> None:
        """Let an evaluation end, if it may, because the engine has something else to do."""
        if self._evaluating is not None and self._evaluation_is_cuttable:
            self._engine.cut_evaluation_short()

    async def _evaluate(self, evaluating: Awaitable[HeldOutResult | None]) -> None:
        assert self._evaluations is not None
        try:
            result = await evaluating
        except MeasurementError as error:
            assert self._machine is not None
            log.warning("round %d: %s", self._machine.round, error)
            return
        if result is not None:
            self._evaluations.add(result)

    async def _evaluate_the_end(self) -> None:
        if self._evaluations is None:
            return
        assert self._machine is not None
        last = self._evaluations.last
        if last is None or last.round != self._machine.round:
            await self._evaluate(self._engine.evaluate())
        self._evaluations.log_summary()
