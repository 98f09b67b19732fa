"""Who takes part: the workers of a coordinator, or of a relay's site, and what each of them does.

The round machine and the relay's machine keep their workers in a `Roster`. They decide themselves
which work is assigned and which answers count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fedmezo_core.config import COHORT_MAX
from fedmezo_core.errors import ProtocolError, StaleTicketError, UnknownWorkerError
from fedmezo_core.events import AnswerReceived, Expel, Refuse, SumReceived, UnableReceived
from fedmezo_core.machines.aggregate import size_of
from fedmezo_core.machines.cohort import choose_cohort
from fedmezo_core.machines.scores import Score, see_commit
from fedmezo_core.records import RoundSlot

RECENT_ROUNDS_MAX = 1000
"""Most summaries of rounds, evaluations and divergences that are kept for the status."""
WORKERS_SEEN_MAX = 4 * COHORT_MAX
"""Most workers that are remembered; those that left longest ago are forgotten first."""
AGAIN_AFTER_ROUNDS = 32
"""Rounds after which a worker that missed a deadline is waited for again, for one more deadline.
Each further miss doubles them. A worker that is slower than the others needs this: where nobody
waits for it, each of its answers comes after the commit."""
PARDONS_MAX = 6
"""Pardons after which the time to the next one no longer doubles: it is 1,024 rounds."""
NAMED_MAX = 3
"""Most workers that one sentence for the log names."""
COMPLAINT_CHARS_MAX = 512
"""Longest complaint that is kept, in characters."""


class Phase(Enum):
    """Where the run is."""

    WAITING = "waiting"
    """No round is open: fewer workers are ready than the run wants."""
    OPEN = "open"
    """Answers are coming in."""
    FINISHED = "finished"
    """All rounds are committed, or the run was stopped early."""
    PAUSED = "paused"
    """Nothing is assigned until a person resumes the run."""


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """A committed round, for the status. `mean_loss` is in nats, None if no answer carried one."""

    round: int
    mean_loss: float | None
    answers: int


@dataclass(slots=True)
class WorkerView:
    """What a machine remembers of one worker, for the status and for its decisions."""

    worker: str
    rounds_answered: int = 0
    """Count of committed rounds that hold an answer of this worker."""
    mean_loss: float | None = None
    """Mean loss of the last accepted answer, in nats; None if it carried none."""
    complaint: str = ""
    """What went wrong in this session since the worker's last accepted answer; empty: nothing."""
    told_diverged: bool = False
    """Whether the worker knows that its weights differ, and is expected to rebuild them."""
    learning_rate: float | None = None
    """Learning rate of the last assignment."""
    misses: int = 0
    """Deadlines that passed while the worker was waited for, since it was last pardoned."""
    pardons: int = 0
    """How often its misses were pardoned, because it answered or joined again."""
    pardon_round: int = 0
    """First round in which its misses can be pardoned again."""
    score: Score = field(default_factory=Score)
    """How its answers compare with those of others."""
    again_round: int = 0
    """First round in which a worker with misses is waited for once more."""

    def is_late(self, round_: int) -> bool:
        """Whether it missed a deadline, so that `round_` does not wait for it."""
        return self.misses > 0 and round_ < self.again_round

    def pardon(self, round_: int) -> None:
        """It has answered `round_` in time, or joined again before it: forget what it missed.

        The first time that is so at once. Later it takes the longer the more often it was, so that
        a worker cannot miss one deadline after the other.
        """
        if self.misses and round_ >= self.pardon_round:
            self.misses = 0
            self.pardons = min(self.pardons + 1, PARDONS_MAX)


class Roster:
    """Which workers are known, which are ready, and what they are assigned."""

    def __init__(self, host: str) -> None:
        """`host` is what the workers join, as their error messages name it."""
        self._host = host
        self.workers: dict[str, WorkerView] = {}
        """Workers seen since the start, by name. Only for reading."""
        self.ready: set[str] = set()
        """Workers with an open session whose weights are not known to differ. Only for reading."""
        self.idle: set[str] = set()
        """Ready workers without an assignment. Only for reading."""
        self.assignments: dict[str, RoundSlot] = {}
        """Worker -> the assignment that it can still answer, whether or not it is ready."""
        self.waited_for: set[str] = set()
        """Workers with an assignment that are worth waiting for: they have not left since the start
        or missed a deadline shortly before. Only for reading."""

    @property
    def awaited(self) -> tuple[str, ...]:
        """Workers that can still answer an assignment, by round and slot."""
        return tuple(sorted(self.assignments, key=lambda w: (self.assignments[w], w)))

    def view(self, worker: str) -> WorkerView:
        """What is remembered of the worker; a new name may make the machine forget an old one."""
        view = self.workers.get(worker)
        if view is None:
            if len(self.workers) >= WORKERS_SEEN_MAX:
                gone = next((name for name in self.workers if name not in self.ready), None)
                if gone is not None:
                    del self.workers[gone]
            view = self.workers[worker] = WorkerView(worker)
        return view

    # ------------------------------------------------------------ coming and going

    def join(self, worker: str, round_: int) -> None:
        """The worker's session is open; `round_` is the next one to be committed."""
        view = self.view(worker)
        view.complaint = ""
        view.pardon(round_)
        self.ready.add(worker)
        if worker not in self.assignments:
            self.idle.add(worker)
        elif not view.is_late(round_):
            self.waited_for.add(worker)

    def leave(self, worker: str) -> None:
        """The worker's session is over; its assignment can be answered in the next one."""
        self.ready.discard(worker)
        self.idle.discard(worker)
        self.waited_for.discard(worker)

    def expel(self, worker: str, sentence: str) -> Expel:
        """End the session of a worker whose weights differ; returns the message to it."""
        self.view(worker).told_diverged = True
        self.leave(worker)
        return Expel(worker, sentence)

    # ------------------------------------------------------------ assignments

    def assign(self, worker: str, assignment: RoundSlot, learning_rate: float) -> None:
        """Let the worker answer `assignment`, and wait for that unless it missed a deadline."""
        view = self.view(worker)
        view.learning_rate = learning_rate
        self.assignments[worker] = assignment
        self.idle.discard(worker)
        if not view.is_late(assignment.round):
            self.waited_for.add(worker)

    def expect(self, assignments: Mapping[str, RoundSlot]) -> None:
        """Wait for workers that were assigned something before the start, until they are back."""
        self.assignments.update(assignments)
        self.waited_for.update(assignments)

    def miss(self, workers: Iterable[str]) -> None:
        """The deadline of these workers' assignments is over: do not wait for them for a while."""
        for worker in self.waited_for.intersection(workers):
            self.waited_for.discard(worker)
            if worker in self.workers:
                view, round_ = self.workers[worker], self.assignments[worker].round
                view.again_round = round_ + AGAIN_AFTER_ROUNDS * 2**view.misses
                view.misses += 1
                if view.pardons:
                    view.pardon_round = round_ + AGAIN_AFTER_ROUNDS * 2 ** (view.pardons - 1)

    def choose(
        self, run_seed: int, round_: int, workers: Iterable[str], size_max: int
    ) -> tuple[str, ...]:
        """A round's cohort out of known workers, sorted; those nobody waits for come last.

        See `choose_cohort`.
        """
        first: list[str] = []
        last: list[str] = []
        for worker in workers:
            (last if self.workers[worker].is_late(round_) else first).append(worker)
        chosen = choose_cohort(run_seed, round_, first, size_max)
        more = choose_cohort(run_seed, round_, last, size_max - len(chosen))
        return tuple(sorted(chosen + more))

    def release(self, worker: str, assignment: RoundSlot) -> None:
        """Stop waiting for that answer; nothing changes if the worker has another assignment."""
        if self.assignments.get(worker) == assignment:
            del self.assignments[worker]
            self.waited_for.discard(worker)
            if worker in self.ready:
                self.idle.add(worker)

    def release_all(self) -> None:
        """Stop waiting for any answer."""
        self.assignments.clear()
        self.waited_for.clear()
        self.idle |= self.ready

    def answered(self, worker: str, assignment: RoundSlot, mean_loss: float | None) -> None:
        """The worker's answer was accepted."""
        self.release(worker, assignment)
        view = self.view(worker)
        view.mean_loss, view.complaint = mean_loss, ""
        view.pardon(assignment.round)

    def unable(self, event: UnableReceived) -> None:
        """The worker cannot measure its assignment."""
        self.complain(event.worker, event.reason)
        self.release(event.worker, RoundSlot(event.ticket.round, event.ticket.slot))

    # ------------------------------------------------------------ answers that are refused

    def take(
        self,
        event: AnswerReceived | UnableReceived | SumReceived,
        take: Callable[[Any], None],
    ) -> tuple[Refuse, ...]:
        """Let the machine `take` what a ready worker sent; returns the refusal if it raises one."""
        worker = event.worker
        try:
            if worker not in self.ready:
                raise UnknownWorkerError(
                    f"Worker {worker} has not joined {self._host}, or was sent away; "
                    "open a new session with hello first."
                )
            take(event)
        except ProtocolError as error:
            # A stale ticket is no fault: an answer and a deadline may cross on the way.
            if worker in self.workers and not isinstance(error, StaleTicketError):
                self.complain(worker, str(error))
            return (Refuse(worker, event.ticket, type(error).__name__, str(error)),)
        return ()

    def complain(self, worker: str, sentence: str) -> None:
        """Remember what went wrong with the worker."""
        self.view(worker).complaint = sentence[:COMPLAINT_CHARS_MAX]

    def clipped(
        self, round_: int, found: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    ) -> str:
        """Remember whose answers to `round_` were scaled down; returns a sentence for the log.

        `found` has at least one worker, with its projected gradients before and after that.
        """
        named: list[str] = []
        for worker, before, after in found:
            sizes = f"from {size_of(before):.4g} to {size_of(after):.4g}"
            what = f"its answer to round {round_} was far larger than usual and was scaled down"
            self.complain(worker, f"{what} {sizes}")
            named.append(f"{worker} {sizes}")
        more = f" and {len(named) - NAMED_MAX} more" if len(named) > NAMED_MAX else ""
        return (
            f"round {round_}: answers far larger than usual were scaled down: "
            f"{', '.join(named[:NAMED_MAX])}{more}"
        )

    def compare(
        self, round_: int, answers: Sequence[tuple[str, tuple[float, ...]]], *, is_shared: bool
    ) -> str:
        """Let the workers' scores see their answers to `round_`; returns a sentence for the log.

        is_shared: whether all were measured along the same directions. The sentence is empty if
        nothing is wrong that was not said before.
        """
        scores = [self.view(worker).score for worker, _ in answers]
        found = see_commit(scores, [grads for _, grads in answers], is_shared=is_shared)
        named = [f"{answers[position][0]} {wrong}" for position, wrong in found]
        more = f"; and {len(named) - NAMED_MAX} more" if len(named) > NAMED_MAX else ""
        return f"round {round_}: {'; '.join(named[:NAMED_MAX])}{more}" if named else ""

    @staticmethod
    def stale(event: AnswerReceived | UnableReceived, now: str) -> StaleTicketError:
        """The error for a ticket that cannot be answered; `now` says where the run is instead."""
        ticket = event.ticket
        return StaleTicketError(
            f"Ticket (epoch {ticket.epoch}, round {ticket.round}, slot {ticket.slot}) of worker "
            f"{event.worker} is not open: {now}; drop it and wait for the next assignment."
        )
