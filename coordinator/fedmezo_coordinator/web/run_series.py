"""Curves and counts of a run, folded from the records of its journal.

What is kept has a bound, whatever the length of the run. The fold is pure: the same records give
the same curves, live and after a restart.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedmezo_proto.v1 import journal_pb2 as pb

POINTS_MAX = 800
"""Most points of a curve; a screen shows no more."""
EVENTS_MAX = 100
"""Most events that are kept: the newest."""
OPEN_ROUNDS_MAX = 258
"""Most rounds whose answers are kept until a commit holds them; `staleness_max_rounds` allows no
more."""


@dataclass(slots=True)
class Point:
    """Values of neighbouring rounds, as one point of a curve."""

    last_round: int
    """The newest of its rounds."""
    count: int
    """Count of its values."""
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Mean of its values."""
        return self.total / self.count

    def take(self, other: Point) -> None:
        """Take the values of the point after this one."""
        self.last_round = other.last_round
        self.count += other.count
        self.total += other.total
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)


class Curve:
    """A value over the rounds, in at most `points_max` points.

    When it is full, each two neighbouring points become one, with the mean, the smallest and the
    largest of their values. So the whole run stays visible, evenly.
    """

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        """`points_max` is even, and at least 2."""
        self._points_max = points_max
        self.points: list[Point] = []
        """Oldest first. All but the newest hold `stride` values."""
        self.stride = 1
        """Values that make a point: a power of two."""

    def add(self, round_: int, value: float) -> None:
        """Add the value of the next round that has one; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        new = Point(round_, 1, value, value, value)
        if self.points and self.points[-1].count < self.stride:
            self.points[-1].take(new)
            return
        if len(self.points) == self._points_max:
            halves = iter(self.points)
            self.points = [_joined(one, other) for one, other in zip(halves, halves, strict=True)]
            self.stride *= 2
        self.points.append(new)

    def mean_of(self, points: slice) -> float | None:
        """Mean over some of the points; None if they are none."""
        means = [point.mean for point in self.points[points]]
        return math.fsum(means) / len(means) if means else None

    @property
    def newest(self) -> float | None:
        """Mean of the newest point; None if there is none."""
        return self.points[-1].mean if self.points else None


def _joined(one: Point, other: Point) -> Point:
    one.take(other)
    return one


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened to the run as a whole, as its journal says."""

    kind: str
    """The record's kind, such as `paused`."""
    round: int
    """Last committed round."""
    sentence: str


@dataclass(slots=True)
class _Open:
    """A round whose answers no commit holds yet."""

    workers: list[str] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    """Slot -> mean loss in nats; NaN for an answer without one."""


_OF_NOBODY = frozenset({"started", "resumed", "snapshotted"})
"""Kinds of events that tell of no worker."""


class RunSeries:
    """The fold: give it every record of a journal, in order."""

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        """`points_max` is that of each `Curve`."""
        self.shows_workers = True
        """Whether what tells of single workers is kept: losses, and what happened to whom."""
        self.losses = Curve(points_max)
        """Mean training loss of each round whose answers carry losses, in nats."""
        self.answers = Curve(points_max)
        """Count of answers in each commit."""
        self.heldout_losses = Curve(points_max)
        self.heldout_accuracies = Curve(points_max)
        self.events: deque[RunEvent] = deque(maxlen=EVENTS_MAX)
        self.round = 0
        """Last committed round."""
        self.pairs_total = 0
        """Pairs in all commits."""
        self.answers_total = 0
        """Accepted answers."""
        self.evaluations_total = 0
        self._open: dict[int, _Open] = {}

    def take(self, body: bytes) -> None:
        """Fold the next record, given as its verified bytes."""
        record = pb.Record.FromString(body)
        kind = record.WhichOneof("kind")
        match kind:
            case "answered":
                self._answered(record.answered)
            case "opened":
                self._opened(record.opened)
            case "committed":
                self._committed(record.committed)
            case "evaluated":
                self._evaluated(record.evaluated)
            case "excluded":
                self._excluded(record.excluded)
                self._note(kind, f"{record.excluded.worker}: {record.excluded.reason}")
            case "readmitted":
                self._note(kind, record.readmitted.worker)
            case "started":
                self._note(kind, f"start {record.started.epoch} of the run")
            case "diverged":
                found = record.diverged
                self._note(kind, f"{found.party}: other weights after round {found.round}")
            case "paused":
                self._note(kind, record.paused.reason)
            case "resumed":
                self._note(kind, f"learning rates times {record.resumed.rate_factor:g}")
            case "stopped":
                self._note(kind, record.stopped.reason)
            case "snapshotted":
                self._note(kind, f"{record.snapshotted.file_bytes:,} bytes")
            case _:
                pass

    def _note(self, kind: str, sentence: str) -> None:
        if not self.shows_workers and kind not in _OF_NOBODY:
            return
        self.events.append(RunEvent(kind, self.round, sentence))

    def _opened(self, record: pb.Opened) -> None:
        current = self._open.setdefault(record.round, _Open())
        current.workers.extend(record.workers)
        while len(self._open) > OPEN_ROUNDS_MAX:
            del self._open[next(iter(self._open))]

    def _answered(self, record: pb.Answered) -> None:
        self.answers_total += 1
        current = self._open.setdefault(record.round, _Open())
        loss = record.mean_loss if record.HasField("mean_loss") else math.nan
        current.losses[record.slot] = loss

    def _committed(self, record: pb.Committed) -> None:
        self.round = record.round
        self.pairs_total += sum(len(run.coefficients) for run in record.runs)
        losses = list(self._losses_in(record))
        if not losses:  # A copy of the run holds no answers.
            return
        self.answers.add(record.round, len(losses))
        known = [loss for loss in losses if not math.isnan(loss)]
        if known and self.shows_workers:
            self.losses.add(record.round, math.fsum(known) / len(known))

    def _losses_in(self, record: pb.Committed) -> Iterator[float]:
        """Losses of the answers that a commit holds, which are forgotten."""
        if not record.slots:
            yield from self._open.pop(record.round, _Open()).losses.values()
            return
        for age, slot in zip(record.staleness, record.slots, strict=True):
            current = self._open.get(record.round - age)
            if current is not None and slot in current.losses:
                yield current.losses.pop(slot)

    def _evaluated(self, record: pb.Evaluated) -> None:
        self.evaluations_total += 1
        self.heldout_losses.add(record.round, record.loss)
        self.heldout_accuracies.add(record.round, record.accuracy)

    def _excluded(self, record: pb.Excluded) -> None:
        """Forget the answers of a worker that never count now."""
        for current in self._open.values():
            for slot, worker in enumerate(current.workers):
                if worker == record.worker:
                    current.losses.pop(slot, None)
