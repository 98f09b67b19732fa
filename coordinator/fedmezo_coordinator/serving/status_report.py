"""The status of a run, as `GetStatus` reports it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.serving.worker_session import Traffic
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_core.journal.journal import Journal
from fedmezo_core.machines.divergence import DigestBoard
from fedmezo_core.machines.roster import Phase, Roster, RoundSummary, WorkerView
from fedmezo_core.records import Genesis
from fedmezo_proto.v1 import coordinator_pb2 as wire

HIDDEN_REASON = "an observer or operator can read why"
"""What callers read in place of a reason that tells of single workers."""

_PHASES = {
    Phase.WAITING: wire.PHASE_WAITING,
    Phase.OPEN: wire.PHASE_OPEN,
    Phase.FINISHED: wire.PHASE_FINISHED,
    Phase.PAUSED: wire.PHASE_PAUSED,
}


@dataclass(slots=True)
class ReplicaView:
    """What a coordinator knows of its replica's process, for the status."""

    evaluates: bool = False
    """Whether it runs, or will again, and has held-out rows."""
    complaint: str = ""
    """Why its process ended last, if it has reported nothing since; else empty."""
    snapshot_complaint: str = ""
    """Why the last snapshot could not be written; empty if it could."""

    @property
    def complaints(self) -> str:
        """Both complaints."""
        return "; ".join(filter(None, (self.complaint, self.snapshot_complaint)))


class MachineStatus(Protocol):
    """What a machine shows of itself: the round machine's, or a relay's."""

    @property
    def phase(self) -> Phase:
        """Phase of the run."""

    @property
    def round(self) -> int:
        """Last committed round that workers know of."""

    @property
    def epoch(self) -> int:
        """Count of coordinator starts."""

    @property
    def reason(self) -> str:
        """Why the run stands still; empty if it does not."""

    @property
    def roster(self) -> Roster:
        """Every worker seen since the start, and what each of them does."""

    @property
    def digests(self) -> DigestBoard:
        """The full digests that parties have reported."""

    @property
    def diverged(self) -> frozenset[str]:
        """Parties whose weights were found to differ from the run's and have not agreed since."""

    @property
    def recent_rounds(self) -> Iterable[RoundSummary]:
        """The newest rounds, oldest first."""


def status_report(
    machine: MachineStatus,
    genesis: Genesis,
    journal: Journal,
    *,
    phase: Phase,
    round_: int,
    traffic: Mapping[str, Traffic],
    connected: Container[str],
    contested: Callable[[str], str],
    session_limit: SessionLimit,
    uptime_ms: int,
    loop_lag_p99_ms: float,
) -> wire.GetStatusResponse:
    """The status of a run with the counters of each worker in `traffic`, sorted by name.

    `contested` says what is wrong with a worker's name, if anything is. `phase` and `round_` are
    the durable ones; the machine's own may be an append ahead.
    """
    roster, diverged = machine.roster, machine.diverged
    awaited = frozenset(roster.awaited)
    return wire.GetStatusResponse(
        config=config_to_pb(genesis.config),
        phase=_PHASES[phase],
        round=round_,
        epoch=machine.epoch,
        records=len(journal),
        head=journal.head,
        workers=[
            _worker_status(
                roster.workers.get(name, WorkerView(name)),
                counters,
                contested(name),
                connected=name in connected,
                measuring=name in awaited,
                diverged=name in diverged,
            )
            for name, counters in sorted(traffic.items())
        ],
        digests=[
            wire.PartyDigest(party=d.party, round=d.round, weights_digest=d.weights_digest)
            for d in machine.digests.newest()
        ],
        diverged_parties=sorted(diverged),
        recent_rounds=[
            wire.RoundStatus(round=s.round, mean_loss=s.mean_loss, answers=s.answers)
            for s in machine.recent_rounds
            if s.round <= round_
        ],
        trainable_bytes=genesis.trainable_bytes,
        uptime_ms=uptime_ms,
        reason=machine.reason,
        loop_lag_p99_ms=loop_lag_p99_ms,
        sessions=session_limit.sessions,
        sessions_refused=session_limit.refused,
    )


def hide_others(status: wire.GetStatusResponse, name: str) -> None:
    """Remove from a status what it says of single workers other than `name`, losses included.

    The mean loss of a round is one too: with its own loss a worker of two knows the other's. A
    worker's size and agreement compare it with the others, and what is suspected of it would tell
    an attacker when it is seen.
    """
    for field in ("workers", "excluded"):
        _keep_own(getattr(status, field), "worker", name)
    for row in status.workers:
        for compared in ("relative_size", "agreement", "suspicion"):
            row.ClearField(compared)
    for found in (status.digests, status.divergences):
        _keep_own(found, "party", name)
    parties = [party for party in status.diverged_parties if party == name]
    status.ClearField("diverged_parties")
    status.diverged_parties.extend(parties)
    for summary in status.recent_rounds:
        summary.ClearField("mean_loss")
    if status.reason:
        status.reason = HIDDEN_REASON
    status.ClearField("replica_complaint")


def _keep_own(found: Any, field: str, name: str) -> None:
    """Leave only what is of `name` in a repeated field, whose messages name a party in `field`."""
    own = [one for one in found if getattr(one, field) == name]
    del found[:]
    found.extend(own)


def _worker_status(
    view: WorkerView, counters: Traffic, contest: str, **flags: bool
) -> wire.WorkerStatus:
    return wire.WorkerStatus(
        worker=view.worker,
        rounds_answered=view.rounds_answered,
        bytes_up=counters.bytes_up,
        bytes_down=counters.bytes_down,
        mean_loss=view.mean_loss,
        answered_after_ms=counters.answered_after_ms,
        complaint=contest or view.complaint,
        learning_rate=view.learning_rate,
        relative_size=view.score.size,
        agreement=view.score.agreement,
        suspicion=view.score.told,
        **flags,
    )
