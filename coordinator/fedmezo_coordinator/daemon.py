"""The coordinator's loop: event -> step -> append -> send. Owns the machine and the journal.

An error from the journal ends the process: nothing is acknowledged after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmezo_coordinator.admission import check_run_id
from fedmezo_coordinator.door import Door
from fedmezo_coordinator.serving import Item, ServingLoop
from fedmezo_coordinator.snapshots import SnapshotShelf
from fedmezo_core.checkpoints import Signer
from fedmezo_core.codec import (
    diverged_to_pb,
    evaluated_from_pb,
    evaluated_to_pb,
    snapshot_to_pb,
)
from fedmezo_core.cohort import REPLICA_PARTY
from fedmezo_core.digests import PartyDigest
from fedmezo_core.errors import JournalCorruptError, ProtocolError, UnknownWorkerError
from fedmezo_core.events import Ready, ReplicaDigest, ReplicaEvaluated
from fedmezo_core.journal import Entry, Journal
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Paused,
    Record,
    Resumed,
    Snapshotted,
    Stopped,
    digest64_of,
)
from fedmezo_core.rounds import Phase, RoundMachine
from fedmezo_core.snapshots import Snapshot
from fedmezo_proto.v1 import coordinator_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")


@dataclass(frozen=True, slots=True)
class _FromReplica(Item):
    request: wire.ReportReplicaRequest


class Daemon(ServingLoop[Ready]):
    """Serves one run from one journal."""

    _machine: RoundMachine

    def __init__(
        self,
        journal: Journal,
        door: Door | None = None,
        signer: Signer | None = None,
        snapshots: Path | None = None,
    ) -> None:
        """`journal` is opened and not yet loaded; it must hold a genesis record.

        Without a `signer` checkpoints are not signed. `snapshots` is the folder that the replica
        writes to; None: there are none.
        """
        super().__init__(door)
        self._journal = journal
        self._machine = RoundMachine()
        self._signer = signer
        self._shelf = SnapshotShelf(snapshots)
        self._loading = True
        self.replica_secret = secrets.token_bytes(32)

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
        self._shelf.open(self.genesis.config.run_id)
        await self._on_disk(lambda: self._shelf.sweep(at_start=True))
        await self._flush([self._machine.start(self._now_ms())])

    def _fold_journal(self) -> None:
        """Everything from the start, one record after the other: a million do not fit in a list.

        Runs in the journal's thread; nothing is served yet.
        """
        collects = gc.isenabled()
        gc.disable()  # Nothing here makes cycles, and looking for them takes a tenth of the time.
        apply = self._machine.apply
        try:
            for entry in self._journal.load():
                record = entry.record
                apply(record)
                if type(record) is Answered:  # nearly all are
                    continue
                if not self._loading:
                    return  # given up
                self._fold(entry)
                self._shelf.fold(record, self._machine.state.agreed)
        finally:
            if collects:
                gc.enable()

    async def resume(self, rate_factor: float) -> None:
        """Let a paused run go on; before `serve`. Raises `ConfigError` if it is not paused."""
        await self._flush([self._machine.resume(rate_factor)])

    @property
    def pause_reason(self) -> str:
        """Why the run is paused; empty if it is not."""
        return self._machine.reason if self._machine.phase is Phase.PAUSED else ""

    # ------------------------------------------------------------ the loop

    async def _after_turn(self) -> None:
        """Write down the replica's newest snapshot, once the run has agreed to its weights."""
        snapshotted = self._shelf.take_agreed()
        if snapshotted is not None:
            await self._flush([self._recorded(snapshotted)])
            # Beside the loop: a large file takes its time to go.
            asyncio.get_running_loop().run_in_executor(None, self._shelf.sweep)

    async def _flush(self, readies: Sequence[Ready]) -> None:
        records = [record for ready in readies for record in ready.records]
        entries = iter(await self._append(records) if records else ())
        for ready in readies:
            for entry in [next(entries) for _ in ready.records]:
                if isinstance(entry.record, Committed):
                    await self._send_commit(
                        entry.row, self._signature(entry.record.round, entry.head)
                    )
            await self._send(ready.messages)

    async def _append(self, records: Sequence[Record]) -> list[Entry]:
        entries = await self._on_disk(lambda: self._journal.append(records))
        for entry in entries:
            self._fold(entry)
            self._shelf.fold(entry.record, self._machine.state.agreed)
            self._tell(entry.record)
        self._announce()
        return entries

    def _step_other(self, item: Item) -> list[Ready]:
        assert isinstance(item, _FromReplica), "nothing else comes"
        return self._from_replica(item.request)

    def _from_replica(self, request: wire.ReportReplicaRequest) -> list[Ready]:
        digest = request.weights_digest
        readies = self._digest_reported(PartyDigest(REPLICA_PARTY, request.round, digest))
        readies.append(self._machine.step(ReplicaDigest(request.round, digest64_of(digest))))
        if request.HasField("evaluation"):
            evaluation = evaluated_from_pb(request.evaluation)
            readies.append(self._machine.step(ReplicaEvaluated(evaluation)))
        if request.HasField("snapshot"):
            self._snapshot_reported(request)
        return readies

    def _snapshot_reported(self, request: wire.ReportReplicaRequest) -> None:
        report = request.snapshot
        if report.complaint:
            log.warning("no snapshot of round %d: %s", request.round, report.complaint)
            return
        self._shelf.offer(
            Snapshotted(
                request.round, request.weights_digest, report.file_sha256, report.file_bytes
            )
        )

    def _digest_reported(self, digest: PartyDigest) -> list[Ready]:
        known = {(d.party, d.round) for d in self._machine.state.divergences}
        found = self._digests.report(digest)
        return [self._recorded(d) for d in found if (d.party, d.round) not in known]

    def _recorded(self, record: Diverged | Snapshotted) -> Ready:
        """A fact that the daemon found, not the machine: folded here, appended like the others."""
        self._machine.apply(record)
        return Ready(records=(record,))

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
                log.info("round %d committed, %d pairs", record.round, record.pairs)
                if self._machine.phase is Phase.FINISHED and record.round == self._machine.round:
                    log.info("the run is finished")
            case Diverged():
                log.error(
                    "%s diverged: its weights after round %d have digest %016x, the run's have %016x",
                    record.party,
                    record.round,
                    record.found_digest64,
                    record.expected_digest64,
                )
            case Paused(round_, reason):
                log.error("the run is paused after round %d: %s", round_, reason)
            case Resumed(rate_factor):
                log.info("the run is resumed, with learning rates times %g", rate_factor)
            case Snapshotted(round_):
                log.info("snapshot of round %d, %d bytes", round_, record.file_bytes)
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
        """As every loop does; and the newest snapshot, if that is of a later round."""
        answer = super().describe(version, run_id, round_)
        newest = self._shelf.newest
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
        about = self._snapshot_to_pb(self._shelf.find(request.round))
        yield wire.ReadSnapshotResponse(snapshot=about)
        async with contextlib.aclosing(self._shelf.read(request.round, request.offset)) as chunks:
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
        await self._items.put(_FromReplica(request))

    def status(self, run_id: str) -> wire.GetStatusResponse:
        """As every loop's, and what the journal knows besides."""
        answer, state = super().status(run_id), self._machine.state
        answer.evaluations.extend(evaluated_to_pb(e) for e in state.evaluations)
        answer.divergences.extend(diverged_to_pb(d) for d in state.divergences)
        return answer
