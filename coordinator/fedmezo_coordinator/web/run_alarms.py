"""What a person should look at in a run, found in its status and its curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from fedmezo_coordinator.web.run_series import Curve, RunSeries
from fedmezo_core.records import digest64_hex
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

ALARMS_OF_A_KIND_MAX = 20
"""Most alarms of one kind that are told one by one; the last of them counts the others."""
RISING_POINTS = 5
"""Points at either end of a curve that are compared."""
RISING_FACTOR = 1.1
"""A loss rises if its newest points are more than this many times its first ones."""
SLOW_FACTOR = 4.0
"""A worker is slow if its last answer took more than this many times the median of all."""
SLOW_MIN_MS = 2000
"""Nobody is called slow for an answer within this time."""
LAG_MAX_MS = 250.0
"""The event loop is late if one event in a hundred waits longer than this."""


class AlarmKind(StrEnum):
    """What is wrong. These are also values of a label of the metrics."""

    FAILED = "failed"
    PAUSED = "paused"
    DIGEST_MISMATCH = "digest_mismatch"
    DIVERGENCE = "divergence"
    OUTLIER = "outlier"
    STRAGGLER = "straggler"
    AWAY = "away"
    COMPLAINT = "complaint"
    EXCLUDED = "excluded"
    DECLINED = "declined"
    REPLICA = "replica"
    OVERLOAD = "overload"


URGENT = frozenset({AlarmKind.FAILED, AlarmKind.PAUSED, AlarmKind.DIGEST_MISMATCH})
"""Kinds that a person has to act on."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One thing to look at."""

    kind: AlarmKind
    sentence: str

    @property
    def is_urgent(self) -> bool:
        """Whether a person has to act."""
        return self.kind in URGENT


def alarms_of(
    phase: int,
    reason: str,
    status: wire.GetStatusResponse | None,
    series: RunSeries,
    declines: Mapping[str, str] = MappingProxyType({}),
) -> list[Alarm]:
    """All alarms of a run, the urgent ones first; `phase` is a `RunPhase`.

    `declines` says for each worker that does not take part why.
    """
    found = [*_of_the_run(phase, reason)]
    for worker, why in declines.items():
        found.append(Alarm(AlarmKind.DECLINED, f"{worker} does not take part: {why}"))
    if status is not None:
        found += [*_of_weights(status), *_of_losses(series), *_of_workers(phase, status)]
        if status.replica_complaint:
            found.append(Alarm(AlarmKind.REPLICA, status.replica_complaint))
        if status.loop_lag_p99_ms > LAG_MAX_MS:
            found.append(
                Alarm(
                    AlarmKind.OVERLOAD,
                    f"The coordinator is late by {status.loop_lag_p99_ms:.0f} ms for one event in "
                    "a hundred.",
                )
            )
    return sorted(found, key=lambda alarm: not alarm.is_urgent)


def counted_by_kind(alarms: list[Alarm]) -> dict[AlarmKind, int]:
    """How many alarms there are of each kind, kinds without one included."""
    return {kind: sum(alarm.kind is kind for alarm in alarms) for kind in AlarmKind}


def shortened(alarms: list[Alarm]) -> list[Alarm]:
    """At most `ALARMS_OF_A_KIND_MAX` of each kind; a last one counts those that are left out."""
    told: list[Alarm] = []
    seen = dict.fromkeys(AlarmKind, 0)
    for alarm in alarms:
        seen[alarm.kind] += 1
        if seen[alarm.kind] <= ALARMS_OF_A_KIND_MAX:
            told.append(alarm)
    for kind, count in seen.items():
        if count > ALARMS_OF_A_KIND_MAX:
            told.append(Alarm(kind, f"There are {count - ALARMS_OF_A_KIND_MAX} more of this kind."))
    return told


def _of_the_run(phase: int, reason: str) -> Iterator[Alarm]:
    if phase == runs.RUN_PHASE_FAILED:
        yield Alarm(AlarmKind.FAILED, reason or "The run cannot go on.")
    if phase == runs.RUN_PHASE_PAUSED:
        yield Alarm(AlarmKind.PAUSED, reason or "The run is paused.")


def _of_weights(status: wire.GetStatusResponse) -> Iterator[Alarm]:
    newest = {found.party: found for found in status.divergences}
    for party in status.diverged_parties:
        found = newest.get(party)
        if found is None:
            yield Alarm(AlarmKind.DIGEST_MISMATCH, f"{party} has other weights than the run.")
            continue
        yield Alarm(
            AlarmKind.DIGEST_MISMATCH,
            f"{party} has other weights than the run after round {found.round}: digest "
            f"{digest64_hex(found.found_digest64)}, the run's "
            f"{digest64_hex(found.expected_digest64)}.",
        )


def _of_losses(series: RunSeries) -> Iterator[Alarm]:
    for what, curve in (("training", series.losses), ("held-out", series.heldout_losses)):
        pair = _rise(curve)
        if pair is not None:
            yield Alarm(
                AlarmKind.DIVERGENCE,
                f"The {what} loss has risen from {pair[0]:.4f} to {pair[1]:.4f} since the run "
                "began.",
            )


def _rise(curve: Curve) -> tuple[float, float] | None:
    """First and newest value of a curve that rises; None if it does not."""
    if len(curve.points) < 2 * RISING_POINTS:
        return None
    first, newest = curve.mean_of(slice(RISING_POINTS)), curve.mean_of(slice(-RISING_POINTS, None))
    if first is None or newest is None or newest <= RISING_FACTOR * first:
        return None
    return first, newest


def _of_workers(phase: int, status: wire.GetStatusResponse) -> Iterator[Alarm]:
    slow_ms = straggler_limit_ms(status)
    away = 0
    for worker in status.workers:
        if worker.suspicion:
            yield Alarm(AlarmKind.OUTLIER, f"{worker.worker}: {worker.suspicion}")
        if worker.complaint:
            yield Alarm(AlarmKind.COMPLAINT, f"{worker.worker}: {worker.complaint}")
        if worker.connected and worker.answered_after_ms > slow_ms:
            yield Alarm(
                AlarmKind.STRAGGLER,
                f"{worker.worker} took {worker.answered_after_ms / 1000:.1f} s for its last "
                f"answer, more than {SLOW_FACTOR:g} times as long as most.",
            )
        away += not worker.connected
    if away and phase == runs.RUN_PHASE_RUNNING:
        who = "1 worker is" if away == 1 else f"{away:,} workers are"
        yield Alarm(AlarmKind.AWAY, f"{who} away: seen since this start, and not connected now.")
    for gone in status.excluded:
        yield Alarm(AlarmKind.EXCLUDED, f"{gone.worker} is excluded: {gone.reason}")


def straggler_limit_ms(status: wire.GetStatusResponse) -> float:
    """Time of an answer, in milliseconds, above which a worker is called slow."""
    times = [worker.answered_after_ms for worker in status.workers if worker.answered_after_ms]
    return max(SLOW_MIN_MS, SLOW_FACTOR * statistics.median(times)) if times else SLOW_MIN_MS
