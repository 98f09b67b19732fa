"""The coordinator's loop: event -> step -> append -> send. Owns the machine and the journal.

An error from the journal ends the process: nothing is acknowledged after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmezo_coordinator.compaction import Compaction, Seal
from fedmezo_coordinator.serving.loop import Item, ServingLoop
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.serving.status_report import ReplicaView
from fedmezo_coordinator.snapshot_store import SnapshotStore
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    JournalCorruptError,
    ProtocolError,
    SnapshotError,
    UnknownWorkerError,
)
from fedmezo_core.events import Ready, ReplicaEvaluated, WeightsReported
from fedmezo_core.journal.codec import (
    decode_record,
    diverged_to_pb,
    encode_records,
    evaluated_from_pb,
    evaluated_to_pb,
    excluded_to_pb,
)
from fedmezo_core.journal.journal import ANSWERED, MOVES_HEAD, SNAPSHOTTED, Entry, Journal
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.state_codec import STATE_VERSION, state_of, state_to_pb
from fedmezo_core.records import (
    Admitted,
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Excluded,
    Paused,
    Readmitted,
    Record,
    Resumed,
    Snapshotted,
    Stopped,
    Summed,
    digest64_hex,
)
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.wire.admission import check_run_id, check_worker_name
from fedmezo_core.wire.messages import snapshot_to_pb
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

FOLLOWED_WHEN_SEALED = MOVES_HEAD | {SNAPSHOTTED}
"""Kinds of records that a start reads even if a sealed state says what they come to."""


@dataclass(frozen=True, slots=True)
class _FromReplica(Item):
    request: wire.ReportReplicaRequest


@dataclass(frozen=True, slots=True)
class _Ordered(Item):
    """What an operator asks for, between two other events."""

    order: Callable[[RoundMachine], Ready]
    done: asyncio.Future[None]

    def refuse(self, error: FedMezoError) -> None:
        """Let the operator know."""
        if not self.done.done():
            self.done.set_exception(error)


class Daemon(ServingLoop[Ready]):
    """Serves one run from one journal."""

    _machine: RoundMachine

    def __init__(
        self,
        journal: Journal,
        session_limit: SessionLimit | None = None,
        signer: Signer | None = None,
        snapshots: Path | None = None,
        compact_after_records: int = 0,
    ) -> None:
        """`journal` is opened and not yet loaded; it must hold a genesis record.

        Without a `signer` checkpoints are not signed. `snapshots` is the folder that the replica
        writes to; None: there are none. The oldest records are dropped when at least
        `compact_after_records` of them can be; 0: never.
        """
        super().__init__(session_limit)
        self._pages.journal = journal
        self._machine = RoundMachine(slot_secret=secrets.token_bytes(32))
        self._signer = signer
        self._snapshots = SnapshotStore(snapshots)
        self._folds.append(self._fold_snapshots)
        self._compaction = Compaction(compact_after_records)
        self._chosen: Seal | None = None
        self._checking: asyncio.Task[None] | None = None
        self._checked: tuple[Snapshotted, ...] = ()
        self._loading = True
        self._carried_out: list[asyncio.Future[None]] = []
        self.replica_secret = secrets.token_bytes(32)
        self.replica = ReplicaView()

    # ------------------------------------------------------------ life

    async def load(self) -> None:
        """Verify and fold the journal, and make this start's epoch durable."""
        try:
            await self._on_disk(self._fold_journal)
        finally:
            self._loading = False
        if self._genesis is None:
            raise JournalCorruptError(
                "The journal does not begin with a genesis record; restore it from a copy."
            )
        self._snapshots.open(self.genesis.config.run_id)
        await self._on_disk(lambda: self._snapshots.sweep(at_start=True))
        if not self._index.can_follow(0) and not await self._on_disk(self._snapshots.has_newest):
            log.error(
                "no worker can join anew: the journal begins after round %d, and there is no "
                "snapshot to begin from; put the snapshots back",
                self._index.begins,
            )
        await self._flush([self._machine.start(self._now_ms())])
        await self._seal()

    def _fold_journal(self) -> None:
        """Verify all records, and fold those after the newest sealed state, one after the other.

        Runs in the journal's thread; nothing is served yet.
        """
        self._begin_at_origin()
        begin = self._begin_at_seal()
        for entry in self._journal.load(begin, FOLLOWED_WHEN_SEALED):
            row = entry.row
            if row.seqno >= begin:
                self._machine.apply(decode_record(row.body))
                if row.kind == ANSWERED:  # nearly all are
                    continue
            if not self._loading:
                return  # given up
            self._fold(entry)
            if self._compaction.is_due(row.seqno + 1):
                self._add_seal(row.seqno + 1, row.chain, entry.head)
        self._snapshots.drop_before(self._index.begins)
        if self._compaction.seals and self._compaction.seals[-1].seqno > begin:
            self._keep_seals()
        records = len(self._journal)
        log.info("the journal is sound (records: %d, of them folded: %d)", records, records - begin)

    def _begin_at_origin(self) -> None:
        origin = self._journal.origin()
        if origin is None:
            return
        log.info(
            "records 0 to %d, up to round %d, were dropped from the journal earlier",
            origin.seqno - 1,
            origin.round,
        )
        if origin.key != self.checkpoint_key:
            log.warning(
                "what they came to is signed by %s, not by this coordinator's key",
                origin.key.hex() or "nobody",
            )
        self._genesis, self._genesis_body = origin.genesis, origin.genesis_body
        self._machine.restore(state_of(origin))
        self._index.begin(origin)
        self._compaction.begin(origin.seqno)

    def _begin_at_seal(self) -> int:
        """Take the usable sealed states; returns the seqno of the first record to fold."""
        for stored in self._journal.stored_seals():
            if stored.seqno <= self._compaction.begins:
                continue
            try:
                sealed = self._journal.unsealed(stored)
                if sealed.state_version != STATE_VERSION:
                    raise ProtocolError(f"it is of version {sealed.state_version}")
                if sealed.key != self.checkpoint_key:
                    raise ProtocolError("another key signed it")
                self._machine.restore(state_of(sealed))
            except (ProtocolError, JournalCorruptError) as error:
                log.warning(
                    "what records 0 to %d come to was sealed, but cannot be used (%s)",
                    stored.seqno - 1,
                    error,
                )
                continue
            self._snapshots.agreed.update(sealed.agreed)
            self._compaction.add(Seal(sealed.round, stored), round_max=0)
        seals = self._compaction.seals
        return seals[-1].seqno if seals else self._compaction.begins

    def follow(self, fold: Callable[[Entry], None]) -> None:
        """Call `fold` with each further record but answers, once it is durable."""
        self._folds.append(fold)

    async def resume(self, rate_factor: float) -> None:
        """Let a paused run go on; before `serve`. Raises `ConfigError` if it is not paused."""
        await self._flush([self._machine.resume(rate_factor)])

    async def exclude(self, worker: str, reason: str) -> None:
        """Take a worker out of the run, on the record; returns when that is durable.

        Raises `ConfigError` as `RoundMachine.exclude` does.
        """
        check_worker_name(worker, "give the name of a worker, as in `fedmezo status`")
        await self.order(lambda machine: machine.exclude(worker, reason))

    async def readmit(self, worker: str) -> None:
        """Let an excluded worker take part again; raises `ConfigError` if it is not excluded."""
        await self.order(lambda machine: machine.readmit(worker))

    async def order(self, order: Callable[[RoundMachine], Ready]) -> None:
        """Step the machine with an operator's order; returns when that is durable.

        Raises the `ConfigError` with which the machine refuses it.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._enqueue(_Ordered(order, done))
        await done

    @property
    def newest_evaluation(self) -> Evaluated | None:
        """The newest evaluation; None if there is none."""
        evaluations = self._machine.state.evaluations
        return evaluations[-1] if evaluations else None

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the run is finished, and its last round not evaluated."""
        newest = self.newest_evaluation
        is_finished = self._machine.phase is Phase.FINISHED
        return is_finished and (newest is None or newest.round < self._machine.round)

    @property
    def pause_reason(self) -> str:
        """Why the run is paused; empty if it is not."""
        return self._machine.reason if self._machine.phase is Phase.PAUSED else ""

    def expect_replica(self) -> None:
        """The replica's digests come from now on: workers whose weights differ wait for them."""
        self._machine.has_replica = True

    def lose_replica(self) -> None:
        """No digest of the replica comes any more: workers whose weights differ are outvoted."""
        self._machine.has_replica = False

    async def close(self) -> None:
        """Close the journal; nothing is served afterwards."""
        if self._checking is not None:
            await asyncio.gather(self._checking, return_exceptions=True)
        await super().close()

    # ------------------------------------------------------------ the loop

    async def _after_turn(self) -> None:
        """Record the replica's snapshot, seal the state, and drop records that nobody needs."""
        for done in self._carried_out:
            if not done.done():  # The caller may have gone away.
                done.set_result(None)
        self._carried_out.clear()
        await self._record_snapshot()
        await self._seal()
        await self._compact()

    async def _record_snapshot(self) -> None:
        """Append the replica's newest snapshot, once the run has agreed to its weights."""
        snapshotted = self._snapshots.take_agreed()
        if snapshotted is not None:
            self._machine.apply(snapshotted)
            await self._flush([Ready((snapshotted,))])
            # In another thread, because deleting a large file takes long.
            asyncio.get_running_loop().run_in_executor(None, self._snapshots.sweep)

    # ------------------------------------------------------------ sealed states, dropping records

    async def _seal(self) -> None:
        """Seal what all records come to, if enough of them came since the last time."""
        journal = self._journal
        if self._compaction.is_due(len(journal)):
            self._add_seal(len(journal), journal.chain, journal.head)
            await self._on_disk(self._keep_seals)

    def _keep_seals(self) -> None:
        self._journal.keep_seals([seal.stored for seal in self._compaction.seals])

    def _add_seal(self, seqno: int, chain: bytes, head: bytes) -> None:
        """Seal the state, which must be exactly that of the records before `seqno`."""
        state = self._machine.state
        sealed = SealedState(
            seqno,
            chain,
            head,
            self._genesis_body,
            state_to_pb(state),
            STATE_VERSION,
            self._snapshots.agreed,
        )
        stored = seal(sealed, self._signer)
        self._compaction.add(Seal(state.round, stored), self._droppable_round)

    @property
    def _droppable_round(self) -> int:
        """Last round whose commit nobody may ask for.

        Everyone can begin after it, and every acknowledgement names the head of a later round.
        """
        can_begin = max(self._snapshots.oldest_round, self._index.last_base_round - 1)
        return min(can_begin, self._machine.round - self.genesis.config.staleness_max - 2)

    async def _compact(self) -> None:
        """Drop old records, if there are enough of them and what they come to is sound."""
        if self._checking is None:
            self._begin_check()
        if self._checking is None or not self._checking.done():
            return
        checking, chosen, self._checking = self._checking, self._chosen, None
        assert chosen is not None
        try:
            checking.result()
        except SnapshotError as error:
            if tuple(self._snapshots.recorded) == self._checked:
                log.error("no records are dropped from the journal: %s", error)
            return
        begins = self._journal.begins
        await self._on_disk(lambda: self._journal.drop_before(chosen.stored))
        self._index.drop_before(chosen.round, chosen.seqno)
        self._snapshots.drop_before(chosen.round)
        self._compaction.begin(chosen.seqno)
        log.info(
            "records %d to %d, up to round %d, were dropped from the journal",
            begins,
            chosen.seqno - 1,
            chosen.round,
        )

    def _begin_check(self) -> None:
        """Start to read the snapshots that must be sound before records are dropped."""
        self._chosen = self._compaction.chosen(self._droppable_round)
        if self._chosen is None:
            return
        in_commit = self._chosen.round < self._index.last_base_round
        snapshots = () if in_commit else tuple(self._snapshots.recorded)
        if snapshots and snapshots == self._checked:
            return  # They were found damaged; newer ones must come first.
        self._checked = snapshots
        self._checking = asyncio.create_task(asyncio.to_thread(self._snapshots.check, snapshots))

    def _way_past_dropped(self) -> str:
        newest = self._snapshots.newest
        if newest is None:
            return super()._way_past_dropped()
        return f"take the snapshot of round {newest.round}, then read from round {newest.round + 1}"

    # ------------------------------------------------------------ what steps ask for

    async def _flush(self, readies: Sequence[Ready]) -> None:
        records = [record for ready in readies for record in ready.records]
        entries = iter(await self._append(records) if records else ())
        self._take_phase()
        for ready in readies:
            for record in ready.records:
                entry = next(entries)
                if type(record) is Committed:
                    await self._send_commit(entry.row, self._signature(record.round, entry.head))
            await self._send(ready.messages)
            self._warn(ready.warnings)

    async def _append(self, records: Sequence[Record]) -> list[Entry]:
        begun_s = time.monotonic()
        entries = await self._on_disk(lambda: self._journal.append(encode_records(records)))
        self.append_times.add(time.monotonic() - begun_s)
        for entry, record in zip(entries, records, strict=True):
            if type(record) is not Answered:  # nearly all are
                self._fold(entry)
                self._tell(record)
        self._pages.announce()
        return entries

    def _fold_snapshots(self, entry: Entry) -> None:
        self._snapshots.fold(entry)
        self._snapshots.note_agreed(entry, self._machine.state.agreed)

    def _step_other(self, item: Item) -> list[Ready]:
        match item:
            case _FromReplica(request):
                return self._from_replica(request)
            case _Ordered(order, done):
                return self._ordered(order, done)
            case _:
                raise AssertionError("nothing else comes")

    def _ordered(
        self, order: Callable[[RoundMachine], Ready], done: asyncio.Future[None]
    ) -> list[Ready]:
        try:
            ready = order(self._machine)
        except ConfigError as error:
            if not done.done():
                done.set_exception(error)
            return []
        self._carried_out.append(done)
        return [ready]

    def _from_replica(self, request: wire.ReportReplicaRequest) -> list[Ready]:
        self.replica.complaint = ""
        reported = WeightsReported(REPLICA_PARTY, request.round, request.weights_digest)
        readies = [self._machine.step(reported)]
        if request.HasField("evaluation"):
            evaluation = evaluated_from_pb(request.evaluation)
            readies.append(self._machine.step(ReplicaEvaluated(evaluation)))
        if request.HasField("snapshot"):
            self._snapshot_reported(request)
        return readies

    def _snapshot_reported(self, request: wire.ReportReplicaRequest) -> None:
        report = request.snapshot
        self.replica.snapshot_complaint = ""
        if report.complaint:
            self.replica.snapshot_complaint = (
                f"no snapshot of round {request.round}: {report.complaint}"
            )
            log.warning("%s", self.replica.snapshot_complaint)
            return
        self._snapshots.offer(
            Snapshotted(
                request.round, request.weights_digest, report.file_sha256, report.file_bytes
            )
        )

    def _welcome(self, round_: int, head: bytes) -> wire.Welcome:
        return wire.Welcome(
            epoch=self._machine.epoch,
            round=round_,
            head=head,
            signature=self._signature(round_, head),
        )

    def _signature(self, round_: int, head: bytes) -> bytes:
        if self._signer is None:
            return b""
        return self._signer.sign(self.genesis.config.run_id, round_, head)

    def _tell(self, record: Record) -> None:
        match record:
            case Committed():
                log_with(round=record.round)
                log.info("round %d committed, %d pairs", record.round, record.pairs)
                if self._machine.phase is Phase.FINISHED and record.round == self._machine.round:
                    health, config = self._machine.state.health, self.genesis.config
                    wrong = health.gone_wrong(config, record.round)
                    if wrong:
                        log.error("the run is finished, but %s", wrong)
                    else:
                        log.info("the run is finished")
            case Evaluated(round_):
                best = self._machine.state.health.best
                is_last = round_ == self._machine.round
                if is_last and self._machine.phase is Phase.FINISHED and best is not None:
                    log.info(
                        "the last evaluation, of round %d, has loss %.4f, accuracy %.4f; the best "
                        "one, of round %d, has loss %.4f, accuracy %.4f",
                        round_,
                        record.loss,
                        record.accuracy,
                        best.round,
                        best.loss,
                        best.accuracy,
                    )
            case Diverged():
                log.error(
                    "%s diverged: its weights after round %d have digest %s, the run's have %s",
                    record.party,
                    record.round,
                    digest64_hex(record.found_digest64),
                    digest64_hex(record.expected_digest64),
                )
            case Paused(round_, reason):
                log.error("the run is paused after round %d: %s", round_, reason)
            case Excluded(round_, worker, reason):
                line = "worker %s is excluded after round %d: %s"
                log.warning(line, worker, round_, reason, extra={"worker": worker})
            case Readmitted(_, worker):
                log.info("worker %s may take part again", worker, extra={"worker": worker})
            case Resumed(rate_factor):
                log.info("the run is resumed, with learning rates times %g", rate_factor)
            case Admitted(worker, key):
                line = "worker %s signs its answers with key %s"
                log.info(line, worker, key.hex(), extra={"worker": worker})
            case Snapshotted(round_):
                log.info("snapshot of round %d, %d bytes", round_, record.file_bytes)
            case Summed(round_, ()):
                log.warning("round %d has no sum: its step is left out", round_)
            case Stopped(round_, reason):
                log.info("the run ends after round %d: %s", round_, reason)
            case _:
                pass

    # ------------------------------------------------------------ what the service calls

    @property
    def checkpoint_key(self) -> bytes:
        """Public key that checkpoints are signed with; empty if they are not."""
        return b"" if self._signer is None else self._signer.public_key

    def describe(self, version: int, run_id: str, round_: int = 0) -> wire.GetRunResponse:
        """What the run is, and its newest snapshot, if that is of a later round than `round_`."""
        answer = super().describe(version, run_id, round_)
        newest = self._snapshots.newest
        if newest is not None and newest.round > round_:
            answer.snapshot.CopyFrom(
                wire.SnapshotOffer(
                    snapshot=self._snapshot_to_pb(newest),
                    missing=self._missing_after(newest.round),
                )
            )
        return answer

    def _snapshot_to_pb(self, record: Snapshotted) -> wire.Snapshot:
        head = self._index.head_at(record.round)
        return snapshot_to_pb(
            Snapshot(
                record.round, head, record.weights_digest, record.file_sha256, record.file_bytes
            )
        )

    async def read_snapshot(
        self, request: wire.ReadSnapshotRequest
    ) -> AsyncGenerator[wire.ReadSnapshotResponse, None]:
        """A snapshot's file from an offset on, in chunks; the first message says what it is."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        about = self._snapshot_to_pb(self._snapshots.find(request.round))
        yield wire.ReadSnapshotResponse(snapshot=about)
        async with contextlib.aclosing(
            self._snapshots.read(request.round, request.offset)
        ) as chunks:
            async for chunk in chunks:
                yield wire.ReadSnapshotResponse(data=chunk)

    async def report_replica(self, request: wire.ReportReplicaRequest) -> None:
        """Take the replica's report; only the process that the daemon started knows the secret."""
        check_run_id(request.run_id, self.genesis.config.run_id)
        if not hmac.compare_digest(request.secret, self.replica_secret):
            raise UnknownWorkerError(
                "Only the replica process that this coordinator started may report for it."
            )
        if len(request.weights_digest) != 32 or request.round > self._machine.round:
            raise ProtocolError("The replica's report names no committed round or no digest.")
        if request.HasField("evaluation"):
            evaluated_from_pb(request.evaluation)
        written = request.snapshot
        is_whole = len(written.file_sha256) == 32 and written.file_bytes and request.round
        if request.HasField("snapshot") and not (written.complaint or is_whole):
            raise ProtocolError("The replica's snapshot has no digest, no bytes or no round.")
        await self._enqueue(_FromReplica(request))

    def _whole_status(self) -> wire.GetStatusResponse:
        """The status of the run, with its newest evaluations and divergences."""
        answer, state = super()._whole_status(), self._machine.state
        best = state.health.best
        if best is not None and best not in state.evaluations:
            answer.evaluations.append(evaluated_to_pb(best))
        answer.evaluations.extend(evaluated_to_pb(e) for e in state.evaluations)
        answer.excluded.extend(excluded_to_pb(e) for e in state.excluded.values())
        answer.divergences.extend(diverged_to_pb(d) for d in state.divergences)
        answer.replica_complaint = self.replica.complaints
        answer.evaluation_due = self.replica.evaluates and self.evaluation_is_due
        return answer
