"""What the page shows of a run, as values for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedmezo_coordinator.web.run_alarms import shortened, straggler_limit_ms
from fedmezo_coordinator.web.run_series import Curve, Point, RunSeries
from fedmezo_coordinator.web.runs_in_view import LIST_EVERY_S, RunInView
from fedmezo_core.errors import ConfigError
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

WORKERS_IN_A_PAGE = 50
"""Workers that are sent at a time."""
DIGITS = 6
"""Significant digits of what is measured."""

PHASES: dict[int, str] = {
    runs.RUN_PHASE_CREATING: "creating",
    runs.RUN_PHASE_RUNNING: "running",
    runs.RUN_PHASE_PAUSED: "paused",
    runs.RUN_PHASE_FINISHED: "finished",
    runs.RUN_PHASE_FAILED: "failed",
}
"""A run's phase -> its word."""
STATES = ("measuring", "ready", "slow", "diverged", "away", "done")
"""What a worker can be doing."""
CURVES: dict[str, Callable[[RunSeries], Curve]] = {
    "losses": lambda series: series.losses,
    "heldout_losses": lambda series: series.heldout_losses,
    "heldout_accuracies": lambda series: series.heldout_accuracies,
    "answers": lambda series: series.answers,
}
"""Name of a curve on the page -> the curve."""
_SORT_KEYS: dict[str, Callable[[wire.WorkerStatus, str], Any]] = {
    "worker": lambda one, _: one.worker,
    "state": lambda _, state: STATES.index(state),
    "rounds": lambda one, _: one.rounds_answered,
    "loss": lambda one, _: one.mean_loss if one.HasField("mean_loss") else -math.inf,
    "rate": lambda one, _: one.learning_rate,
    "answer_s": lambda one, _: one.answered_after_ms,
    "size": lambda one, _: one.relative_size,
    "agreement": lambda one, _: one.agreement if one.HasField("agreement") else -math.inf,
    "up": lambda one, _: one.bytes_up,
    "down": lambda one, _: one.bytes_down,
}
"""Column -> what a worker, with its state, is sorted by."""


def state_of(worker: wire.WorkerStatus, *, is_over: bool, slow_ms: float) -> str:
    """What a worker is doing: one of `STATES`."""
    if worker.diverged:
        return "diverged"
    if not worker.connected:
        return "done" if is_over else "away"
    if worker.answered_after_ms > slow_ms:
        return "slow"
    return "measuring" if worker.measuring else "ready"


def states_of(phase: int, status: wire.GetStatusResponse) -> list[str]:
    """The state of each worker, in the status's order."""
    is_over, slow_ms = phase == runs.RUN_PHASE_FINISHED, straggler_limit_ms(status)
    return [state_of(one, is_over=is_over, slow_ms=slow_ms) for one in status.workers]


def weights_bytes(status: wire.GetStatusResponse) -> int:
    """Bytes one way, had each answer of this start been the trained weights instead."""
    return int(status.trainable_bytes) * sum(one.rounds_answered for one in status.workers)


def run_line(view: RunInView) -> dict[str, Any]:
    """A run in the list of runs."""
    run, series = view.run, view.series
    status = view.status(LIST_EVERY_S)
    return {
        "run_id": run.run_id,
        "phase": PHASES.get(run.run_phase, "unknown"),
        "reason": run.phase_reason,
        "round": series.round,
        "rounds": view.rounds_planned,
        "connected": 0 if status is None else sum(one.connected for one in status.workers),
        "urgent": sum(alarm.is_urgent for alarm in view.alarms(LIST_EVERY_S)),
    }


def run_head(view: RunInView) -> dict[str, Any]:
    """All of a run but its curves and the single workers."""
    status, series = view.status(), view.series
    pace = view.rounds_per_minute
    alarms = [
        {"kind": str(alarm.kind), "urgent": alarm.is_urgent, "text": alarm.sentence}
        for alarm in shortened(view.alarms())
    ]
    head = {
        **run_line(view),
        "alarms": alarms,
        "caught_up": view.is_caught_up,
        "rounds_per_minute": pace and _short(pace),
        "answers_total": series.answers_total,
        "pairs_total": series.pairs_total,
    }
    if status is None:
        return head
    best = min(status.evaluations, key=lambda one: one.loss, default=None)
    newest = status.evaluations[-1] if status.evaluations else None
    losses = [one.mean_loss for one in status.recent_rounds if one.HasField("mean_loss")]
    return {
        **head,
        "round": status.round,
        "model": status.config.model,
        "epoch": status.epoch,
        "records": status.records,
        "states": Counter(states_of(view.run.run_phase, status)),
        "workers": len(status.workers),
        "bytes_up": sum(one.bytes_up for one in status.workers),
        "bytes_down": sum(one.bytes_down for one in status.workers),
        "weights_bytes": weights_bytes(status),
        "loss": _finite(losses[-1]) if losses else None,
        "heldout": _evaluation(newest),
        "best": _evaluation(best),
        "evaluation_due": status.evaluation_due,
        "waiting_for": status.config.workers_min if status.phase == wire.PHASE_WAITING else 0,
    }


def run_events(view: RunInView) -> list[dict[str, Any]]:
    """What happened to a run as a whole, the newest first."""
    return [
        {"kind": event.kind, "round": event.round, "text": event.sentence}
        for event in reversed(view.series.events)
    ]


def _evaluation(one: Any) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"round": one.round, "loss": _finite(one.loss), "accuracy": _finite(one.accuracy)}


@dataclass(frozen=True, slots=True)
class WorkersQuery:
    """Which workers to show, and in which order."""

    sort: str = "worker"
    descending: bool = False
    state: str = ""
    """Only workers in this state; empty: in any."""
    name: str = ""
    """Only workers whose names contain this."""
    page: int = 0

    def check(self) -> None:
        """Raise `ConfigError` for what no page of workers can be."""
        if self.sort not in _SORT_KEYS:
            raise ConfigError(f"sort is one of {', '.join(_SORT_KEYS)}.")
        if self.state and self.state not in STATES:
            raise ConfigError(f"state is one of {', '.join(STATES)}.")
        if not 0 <= self.page < 10_000 or len(self.name) > 64:
            raise ConfigError("page is 0 to 9999, and name has at most 64 characters.")


def workers_page(view: RunInView, query: WorkersQuery) -> dict[str, Any]:
    """A page of a run's workers; the last one if there are not so many pages."""
    status = view.status()
    workers = [] if status is None else list(status.workers)
    states = [] if status is None else states_of(view.run.run_phase, status)
    found = [
        (one, state)
        for one, state in zip(workers, states, strict=True)
        if (not query.state or state == query.state) and query.name in one.worker
    ]
    if (query.sort, query.descending) != ("worker", False):  # They come sorted by name.
        key = _SORT_KEYS[query.sort]
        found.sort(key=lambda pair: key(*pair), reverse=query.descending)
    pages = max(1, math.ceil(len(found) / WORKERS_IN_A_PAGE))
    page = min(query.page, pages - 1)
    begin = page * WORKERS_IN_A_PAGE
    return {
        "total": len(workers),
        "found": len(found),
        "page": page,
        "pages": pages,
        "rows": [_worker(*pair) for pair in found[begin : begin + WORKERS_IN_A_PAGE]],
    }


def _worker(one: wire.WorkerStatus, state: str) -> dict[str, Any]:
    return {
        "worker": one.worker,
        "state": state,
        "rounds": one.rounds_answered,
        "loss": _finite(one.mean_loss) if one.HasField("mean_loss") else None,
        "rate": _finite(one.learning_rate) if one.HasField("learning_rate") else None,
        "answer_s": one.answered_after_ms / 1000 if one.answered_after_ms else None,
        "up": one.bytes_up,
        "down": one.bytes_down,
        "size": _finite(one.relative_size) if one.HasField("relative_size") else None,
        "agreement": _finite(one.agreement) if one.HasField("agreement") else None,
        "note": one.suspicion or one.complaint,
    }


class CurvesSent:
    """What one watcher has of a run's curves, so that only the rest is sent."""

    def __init__(self) -> None:
        self._have: dict[str, tuple[int, int, int]] = {}

    def news(self, series: RunSeries) -> dict[str, Any]:
        """For each curve that has changed, the points from `at` on, which replace the old ones.

        A point is [round, mean, smallest, largest].
        """
        found: dict[str, Any] = {}
        for name, curve_of in CURVES.items():
            curve = curve_of(series)
            if not curve.points:
                continue
            stride, count, newest = self._have.get(name, (0, 0, 0))
            now = (curve.stride, len(curve.points), curve.points[-1].count)
            if now == (stride, count, newest):
                continue
            # The newest point may have taken more values since.
            at = max(count - 1, 0) if curve.stride == stride else 0
            found[name] = {"at": at, "points": [_point(point) for point in curve.points[at:]]}
            self._have[name] = now
        return found


def _point(point: Point) -> list[float]:
    return [point.last_round, *(_short(value) for value in (point.mean, point.low, point.high))]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _finite(value: float) -> float | None:
    return _short(value) if math.isfinite(value) else None
