"""The coordinator's round machine: no clock, no socket, no disk, no entropy.

    machine = RoundMachine()
    for record in stored:               # a restart folds what the journal holds
        machine.apply(record)
    ready = machine.start(now_ms)       # then a new epoch
    ready = machine.step(event)         # then one event at a time

The driver owes every `Ready` in this order: append `records` durably, send each `Committed` among
them to every connected worker, then send `messages`. A failed append ends the process.

`step` decides. What a restart must rebuild lives in `RunState` and changes only in `apply`, which
a live step and a restart both go through. What a restart may forget lives in `RoundMachine` and in
its `Roster`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedmezo_core.config import COHORT_MAX, RunConfig
from fedmezo_core.errors import (
    ConfigError,
    EquivocationError,
    ExcludedError,
    JournalError,
    StaleTicketError,
)
from fedmezo_core.events import (
    Ack,
    AnswerReceived,
    AskSum,
    Assign,
    Expel,
    Finish,
    Ready,
    ReplicaEvaluated,
    RoundEvent,
    RoundMessage,
    SumReceived,
    Tick,
    Ticket,
    UnableReceived,
    WeightsReported,
    Work,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.machines.aggregate import (
    Share,
    coefficients_of,
    combined,
    commit_factor,
    decay_of,
    is_far_larger,
    to_binary32,
)
from fedmezo_core.machines.answers import checked, content_of, is_digest_round
from fedmezo_core.machines.cohort import shuffled
from fedmezo_core.machines.divergence import REPLICA_PARTY, DigestBoard, agreed_digest, differing
from fedmezo_core.machines.rates import own_rates, schedule_factor
from fedmezo_core.machines.roster import (
    COMPLAINT_CHARS_MAX,
    NAMED_MAX,
    Phase,
    Roster,
    RoundSummary,
)
from fedmezo_core.machines.run_state import (
    EXCLUDED_MAX,
    RoundState,
    RunState,
    keep_newest_rounds,
)
from fedmezo_core.machines.seeds import SHARED_SLOT, seed_ranges_of, seeds_of
from fedmezo_core.records import (
    Admitted,
    Answered,
    Committed,
    Diverged,
    Excluded,
    Genesis,
    Masked,
    Opened,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RoundSlot,
    SeedRange,
    Started,
    Stopped,
    Summed,
    digest64_hex,
    digest64_of,
    rounding_seed_of,
)
from fedmezo_core.trust.secure_aggregation.fixed_point import mean_of_sums
from fedmezo_core.trust.secure_aggregation.masking import SumContext, run_digest_of
from fedmezo_core.trust.secure_aggregation.sum_collector import SumCollector

RATE_FACTOR_MIN, RATE_FACTOR_MAX = 1e-200, 1e9
"""Least and most that all resumptions of a run together multiply its learning rates by."""
FRUITLESS_DEADLINES_MAX = 2
"""Deadlines in a row at which no worker could measure, before the run pauses."""
FAILED_ATTEMPTS_MAX = 8
"""Attempts at the sum of one round that fail, before the run pauses."""
EMPTY_SUMS_MAX = 4
"""Rounds in a row that are committed without their sum, before the run pauses."""


class RoundMachine:
    """Opens rounds, takes answers, compares weights, commits. See the module's text for its use."""

    def __init__(self, *, has_replica: bool = False, slot_secret: bytes = b"") -> None:
        """`has_replica`: whether the replica's digests come, so that its word is waited for.

        `slot_secret` (32 random bytes, which nobody else knows) decides the order of a cohort's
        slots in runs whose commits must not tell whose their pairs are; only those need it.
        """
        self._slot_secret = slot_secret
        self.has_replica = has_replica
        self.state = RunState()
        self.roster = Roster("this coordinator start")
        self.digests = DigestBoard()
        self._started = False
        self._now_ms = 0
        self._closes_at_ms = 0
        # Round -> first 64 bits of the replica's digest after it, for the newest rounds known.
        self._replica_digests: dict[int, int] = {}
        self._replica_agreed_round = -1
        # Deadlines in a row at which the open round had no answer and nobody who could give one.
        self._fruitless_deadlines = 0
        # With secure aggregation: the attempt that is going on, how many there were since the
        # start, and the workers that are known to hold their measurement of the open round.
        self._sum: SumCollector | None = None
        self._attempts = 0
        # Attempts at the open round's sum that failed, and the round that a person last resumed
        # after: what failed up to it no longer counts.
        self._failed_attempts = 0
        self._resumed_after = 0
        self._holding: set[str] = set()
        # Workers whose shares were no use in a sum that failed, with what was wrong. They are left
        # out of further ones for as long as they stay, if there are enough others.
        self._useless: dict[str, str] = {}
        self._records: list[Record] = []
        self._messages: list[RoundMessage] = []
        self._warnings: list[str] = []

    # ------------------------------------------------------------ what the status shows

    @property
    def genesis(self) -> Genesis:
        """What the run is; `JournalError` before a genesis was applied."""
        if self.state.genesis is None:
            raise JournalError(
                "The journal holds no run yet; create the run with its genesis record first."
            )
        return self.state.genesis

    @property
    def config(self) -> RunConfig:
        """The run's contract."""
        return self.genesis.config

    @property
    def phase(self) -> Phase:
        """Where the run is."""
        if self.state.round >= self.config.rounds or self.state.stopped is not None:
            return Phase.FINISHED
        if self.state.paused is not None:
            return Phase.PAUSED
        return Phase.WAITING if self.state.open is None else Phase.OPEN

    @property
    def round(self) -> int:
        """Last committed round; 0 before the first."""
        return self.state.round

    @property
    def epoch(self) -> int:
        """Coordinator starts so far."""
        return self.state.epoch

    @property
    def cohort(self) -> tuple[str, ...]:
        """Worker of each slot of the open round; empty if none is open."""
        return () if self.state.open is None else tuple(self.state.open.cohort)

    @property
    def reason(self) -> str:
        """Why the run is paused, or was stopped early; empty if it is neither."""
        found = self.state.stopped or self.state.paused
        return found.reason if found is not None else ""

    @property
    def diverged(self) -> frozenset[str]:
        """Parties whose weights were found to differ and have not agreed since."""
        parties = {
            party
            for party, found in self.state.diverged.items()
            if self.digests.confirmed_round(party, replica_comes=self.has_replica) < found.round
        }
        if self._replica_agrees:
            parties.discard(REPLICA_PARTY)
        return frozenset(parties)

    @property
    def is_busy(self) -> bool:
        """Whether it computes something long; it goes on with each tick.

        A driver that has nothing else to do may step with ticks, one after the other, until it is
        done. Each of them takes some milliseconds, so that others can have their turn in between.
        """
        return self._sum is not None and self._sum.is_busy

    @property
    def recent_rounds(self) -> Sequence[RoundSummary]:
        """The newest committed rounds, oldest first; to be read, not changed."""
        return self.state.recent_rounds

    # ------------------------------------------------------------ driving it

    def restore(self, state: RunState) -> None:
        """Begin with a folded state in place of the records before it; the machine changes it."""
        assert not self._started, "a journal begins once"
        self.state = state

    def apply(self, record: Record) -> None:
        """Fold a durable record: before `start` the journal's, later those that the driver adds.

        Raises `JournalCorruptError` if the record cannot follow those before.
        """
        self.state.apply(record)

    def start(self, now_ms: int = 0) -> Ready:
        """Begin a new epoch at `now_ms`; its record must be durable before anything is sent.

        An open round goes on with the answers it has, and with a whole deadline from now.
        Raises `JournalError` without a genesis.
        """
        assert not self._started, "a machine starts once"
        hides = self.config.journal_readers != "everyone"
        assert self._slot_secret or not hides, "the order of the slots needs a secret"
        self._now_ms = now_ms
        self._restart_deadline()
        self._started = True
        self.roster.expect(self._outstanding())
        self._record(Started(self.state.epoch + 1))
        return self._take_ready()

    def resume(self, rate_factor: float) -> Ready:
        """Let a paused run go on, with learning rates `rate_factor` times what they were.

        Raises `ConfigError` if the run is not paused, or the factor not above 0.
        """
        assert self._started, "start comes before a resumption"
        if self.phase is not Phase.PAUSED:
            raise ConfigError(
                f"The run is {self.phase.value}, not paused, so there is nothing to resume; start "
                "the coordinator without resume."
            )
        self.check_rate_factor(rate_factor)
        self._record(Resumed(rate_factor))
        self._fruitless_deadlines = self._failed_attempts = 0
        self._resumed_after = self.state.round
        self._restart_deadline()
        current = self.state.open
        if current is None or current.masked is None:
            self._assign_outstanding()  # Who joined meanwhile was not told of its work.
        self._advance()
        return self._take_ready()

    def check_rate_factor(self, rate_factor: float) -> None:
        """Raise `ConfigError` if the learning rates cannot be meant to be multiplied by this.

        All factors of a run count together: nothing can undo one that is in the journal.
        """
        if not (math.isfinite(rate_factor) and rate_factor > 0):
            raise ConfigError(
                f"The learning rates cannot be multiplied by {rate_factor!r}; "
                "give a number above 0."
            )
        together = self.state.rate_factor * rate_factor
        if not RATE_FACTOR_MIN <= together <= RATE_FACTOR_MAX:
            raise ConfigError(
                f"With {rate_factor:g} the learning rates would be {together:g} times the "
                f"contract's; give a factor with which they stay between {RATE_FACTOR_MIN:g} and "
                f"{RATE_FACTOR_MAX:g} times."
            )

    def pause(self, reason: str) -> Ready:
        """Hold the run for a person's `reason` until `resume`; a paused run stays as it is.

        No round opens or closes meanwhile. An open round keeps its answers and still takes those
        that come. Raises `ConfigError` if the run is finished, or the reason empty or too long.
        """
        assert self._started, "start comes before a pause"
        if self.phase is Phase.FINISHED:
            raise ConfigError("The run is finished, so there is nothing to pause.")
        if self.phase is not Phase.PAUSED:
            self._record(Paused(self.state.round, _checked_reason(reason)))
        return self._take_ready()

    def stop(self, reason: str) -> Ready:
        """End the run with the rounds that it has; a finished run stays as it is.

        The answers of an open round do not count. Raises `ConfigError` if the reason is empty or
        too long.
        """
        assert self._started, "start comes before an end"
        if self.phase is not Phase.FINISHED:
            self._record(Stopped(self.state.round, _checked_reason(reason)))
            self._finish_all()
        return self._take_ready()

    def exclude(self, worker: str, reason: str) -> Ready:
        """Take a worker out of the run, with its answers that no commit holds, for `reason`.

        Its session ends, and it takes no part until `readmit`. The worker need not be known yet.
        Raises `ConfigError` if it is excluded already or cannot be, or without a reason.
        """
        assert self._started, "start comes before an exclusion"
        reason = " ".join(reason.split())
        if worker == REPLICA_PARTY:
            raise ConfigError(f"{worker!r} is the coordinator's own; name a worker to exclude.")
        if worker in self.state.excluded:
            raise ConfigError(
                f"Worker {worker} is excluded already: {self.state.excluded[worker].reason}; "
                "readmit it first to give another reason."
            )
        if not 0 < len(reason) <= COMPLAINT_CHARS_MAX:
            raise ConfigError(
                f"The reason has {len(reason)} characters; say in 1 to {COMPLAINT_CHARS_MAX} why "
                f"worker {worker} is excluded."
            )
        if len(self.state.excluded) >= EXCLUDED_MAX:
            raise ConfigError(
                f"{EXCLUDED_MAX} workers are excluded, the most; readmit one before the next."
            )
        record = Excluded(self.state.round, worker, reason)
        self._record(record)
        if worker in self.roster.ready:
            self._messages.append(self._excluded(record))
        assignment = self.roster.assignments.get(worker)
        if assignment is not None:
            self.roster.release(worker, assignment)
        self._advance()
        return self._take_ready()

    def readmit(self, worker: str) -> Ready:
        """Let an excluded worker take part again, once it joins.

        Raises `ConfigError` if it is not excluded.
        """
        assert self._started, "start comes before a readmission"
        if worker not in self.state.excluded:
            raise ConfigError(
                f"Worker {worker} is not excluded; fedmezo status names those that are."
            )
        self._record(Readmitted(self.state.round, worker))
        self._advance()
        return self._take_ready()

    def _excluded(self, record: Excluded) -> Expel:
        """End the session of an excluded worker; returns the message to it."""
        self.roster.leave(record.worker)
        return Expel(record.worker, excluded_sentence(record), ExcludedError.__name__)

    def step(self, event: RoundEvent) -> Ready:
        """Take one event; the driver owes what is returned before it calls again."""
        assert self._started, "start comes before the first step"
        match event:
            case WorkerReady(worker):
                self._worker_ready(worker)
            case WorkerLost(worker):
                self.roster.leave(worker)
                self._useless.pop(worker, None)
                if self._sum is not None:
                    self._sum.lost(worker)
            case AnswerReceived():
                self._messages.extend(self.roster.take(event, self._answer))
            case UnableReceived():
                self._messages.extend(self.roster.take(event, self._unable))
            case SumReceived():
                self._messages.extend(self.roster.take(event, self._sum_received))
            case WeightsReported():
                self._weights_reported(event)
            case ReplicaEvaluated(evaluation):
                self._record(evaluation)
                self._judge_health()
            case Tick(now_ms):
                self._now_ms = max(self._now_ms, now_ms)
                if self._sum is not None:
                    self._sum.work()
        self._advance()
        return self._take_ready()

    # ------------------------------------------------------------ events

    def _worker_ready(self, worker: str) -> None:
        if worker == REPLICA_PARTY:
            sentence = (
                f"{REPLICA_PARTY!r} is the name of the coordinator's own weights; "
                "start the worker under another name."
            )
            self._messages.append(Expel(worker, sentence))
            return
        excluded = self.state.excluded.get(worker)
        if excluded is not None:
            self._messages.append(self._excluded(excluded))
            return
        self.roster.join(worker, self.state.round + 1)
        known = self.state.diverged.get(worker)
        if known is not None and not self.roster.view(worker).told_diverged:
            # The coordinator went down, or the worker was away, between finding out and telling.
            self._messages.append(self.roster.expel(worker, _diverged_sentence(known)))
            return
        if self.phase is Phase.FINISHED:
            self._messages.append(Finish(worker, self.state.round))
            return
        self._holding.discard(worker)  # It may be a new process.
        self._useless.pop(worker, None)
        if self.phase is not Phase.PAUSED:
            assignment = self.state.assignment_of(worker) or self._unsummed(worker)
            current = self.state.open
            # What is unmasked now takes no more answers.
            if assignment is not None and (current is None or current.masked is None):
                self._assign(assignment.round, (assignment.slot,))
        if self._sum is not None:
            self._messages.extend(self._sum.joined(worker))

    def _answer(self, event: AnswerReceived) -> None:
        state, ticket, held = self.state, event.ticket, self._held_of(event)
        accepted = held.answers.get(ticket.slot)
        epochs = [state.epoch if accepted is None else accepted.epoch]
        if self.config.secure_aggregation and held is state.open:
            epochs.append(state.epoch)  # It may have been asked again.
        if ticket.epoch not in epochs:
            raise self._stale(event)
        if accepted is None and (held is not state.open or self.phase is Phase.FINISHED):
            self._check_not_too_late(event)
        scalars = checked(event, held.rates[ticket.slot], self.config)
        if accepted is None:
            if state.open is None:
                self._restart_deadline()
            if event.signature and state.keys.get(event.worker) != event.key:
                self._record(Admitted(event.worker, event.key))
            self._record(Answered(ticket.round, ticket.slot, scalars, event.signature))
            assignment = RoundSlot(ticket.round, ticket.slot)
            self.roster.answered(event.worker, assignment, scalars.mean_loss)
        elif content_of(scalars) != content_of(accepted.record.scalars):
            raise EquivocationError(
                f"Worker {event.worker} gave a second, different answer to slot {ticket.slot} of "
                f"round {ticket.round}; the first one stands: drop this one."
            )
        if self.config.secure_aggregation and held is state.open:
            self._holding.add(event.worker)
            self._fruitless_deadlines = 0
            self.roster.release(event.worker, RoundSlot(ticket.round, ticket.slot))
        self._messages.append(Ack(event.worker, ticket))

    def _check_not_too_late(self, event: AnswerReceived) -> None:
        """Refuse an answer that no later commit can hold."""
        ticket, oldest = event.ticket, self.config.staleness_max
        if self.phase is Phase.FINISHED and ticket.round > self.state.round:
            raise StaleTicketError(
                f"The run was ended before round {ticket.round} was committed, so the answer of "
                f"worker {event.worker} to slot {ticket.slot} cannot count; drop it."
            )
        if self.phase is not Phase.FINISHED and self.state.age(ticket.round) <= oldest:
            return
        late = (
            f", and it is {self.state.age(ticket.round)} rounds old, more than "
            f"staleness_max_rounds = {oldest}"
            if oldest and self.phase is not Phase.FINISHED
            else ""
        )
        raise StaleTicketError(
            f"Round {ticket.round} was committed without the answer of worker {event.worker} to "
            f"slot {ticket.slot}{late}; drop the answer and wait for the next assignment."
        )

    def _unable(self, event: UnableReceived) -> None:
        ticket, held = event.ticket, self._held_of(event)
        if (
            self.state.age(held.round) > self.config.staleness_max
            or ticket.epoch != self.state.epoch
        ):
            raise self._stale(event)
        self.roster.unable(event)
        if self._sum is None or not event.useless_shares_of:
            self._holding.discard(event.worker)
        if self._sum is not None:
            self._sum.refused(event.worker, event.useless_shares_of)

    def _held_of(self, event: AnswerReceived | UnableReceived) -> RoundState:
        """The round that the event's ticket names, if the slot is the worker's."""
        ticket, held = event.ticket, self.state.held(event.ticket.round)
        is_slot = held is not None and 0 <= ticket.slot < len(held.cohort)
        if held is None or not is_slot or held.cohort[ticket.slot] != event.worker:
            raise self._stale(event)
        return held

    def _weights_reported(self, report: WeightsReported) -> None:
        """Record who differs by full digests; nobody is sent away, for the run may be over."""
        if report.round > self.state.round:
            return  # This journal does not hold the round, so there is nothing to compare with.
        known = {(d.party, d.round) for d in self.state.divergences}
        for record in self.digests.report(report, replica_comes=self.has_replica):
            if (record.party, record.round) not in known:
                self._record(record)
        if report.party == REPLICA_PARTY:
            self._replica_digests[report.round] = digest64_of(report.weights_digest)
            keep_newest_rounds(self._replica_digests, self.config)
            if report.round in self.state.agreed:
                self._judge(report.round, [], self.state.agreed[report.round])

    # ------------------------------------------------------------ rounds

    def _advance(self) -> None:
        """Open, close and commit as far as what is known allows."""
        while self.phase in (Phase.WAITING, Phase.OPEN):
            if not (self._open() if self.state.open is None else self._close()):
                return

    def _open(self) -> bool:
        if len(self.roster.ready) < self.config.workers_min:
            return False
        cohort = self._choose(RoundState(self.state.round + 1))
        if not cohort:
            return False
        self._restart_deadline()
        self._add_slots(cohort)
        return True

    def _close(self) -> bool:
        """Commit the open round if it is settled or overdue and enough answers agree."""
        config, current = self.config, self.state.open
        assert current is not None
        if config.secure_aggregation:
            return self._close_by_sum(current)
        overdue = self._now_ms >= self._closes_at_ms
        if config.buffer_answers:
            wanted = config.quorum if overdue else config.buffer_answers
        elif self.roster.waited_for and not overdue and current.counting < config.cohort_size_max:
            return False
        else:
            wanted = config.quorum
        if self.state.counting >= wanted:
            answers = self._agreeing()
            if len(answers) >= wanted:
                self._commit(current, answers[: config.answers_max])
                return True
        self._extend(current, overdue)
        return False

    # ------------------------------------------------------------ secure aggregation

    def _outstanding(self) -> dict[str, RoundSlot]:
        """Worker -> what it can still be asked for: its assignment, or to say what it holds."""
        found, current = self.state.outstanding(), self.state.open
        if self.config.secure_aggregation and current is not None:
            for worker in sorted(current.slots):
                again = self._unsummed(worker)
                if again is not None:
                    found[worker] = again
        return found

    def _unsummed(self, worker: str) -> RoundSlot | None:
        """The slot that a worker has answered, if it is not known to hold its measurement.

        The journal has no answer that it could be taken from.
        """
        current = self.state.open
        if current is None or not self.config.secure_aggregation or worker in self._holding:
            return None
        slot = current.slots.get(worker)
        is_answered = slot in current.answers and worker not in self.state.excluded
        return RoundSlot(current.round, slot) if slot is not None and is_answered else None

    def asked_of(self, worker: str) -> tuple[AskSum, ...]:
        """The step of a sum that the worker is asked for now, if it is; it may be sent again."""
        return () if self._sum is None else self._sum.asks((worker,))

    def _sum_received(self, event: SumReceived) -> None:
        # Without a sum it crossed the commit: not all shares are needed to unmask one.
        if self._sum is not None:
            self._sum.take(event)

    def _close_by_sum(self, current: RoundState) -> bool:
        """Commit the open round by the sum of its answers, as soon as there is one.

        The sum is begun when a round with plain answers would be committed.
        """
        config = self.config
        if self._sum is not None or current.masked is not None:
            return self._go_on_with_sum(current)
        overdue = self._now_ms >= self._closes_at_ms
        holding = len(self._holding & self.roster.ready)
        if self.roster.waited_for and not overdue and holding < config.cohort_size_max:
            return False
        if holding >= config.quorum:
            present = self._holding & self.roster.ready
            answers = [a for a in self._agreeing() if self.state.worker_of(a) in present]
            # Those whose weights differ were sent away just now.
            members = {
                answer.slot: worker
                for answer in answers
                if (worker := self.state.worker_of(answer)) in self.roster.ready
            }
            useful = {s: worker for s, worker in members.items() if worker not in self._useless}
            if len(useful) >= config.quorum:
                for worker in self._useless.keys() & set(members.values()):
                    self.roster.complain(worker, f"left out of sums: {self._useless[worker]}")
                members = useful
            if len(members) >= config.quorum:
                self._begin_sum(current, dict(list(members.items())[: config.answers_max]))
                return False
        self._extend(current, overdue)
        return False

    def _begin_sum(self, current: RoundState, members: Mapping[int, str]) -> None:
        self._attempts += 1
        context = SumContext(
            run_digest_of(self.genesis),
            self.state.epoch,
            current.round,
            self._attempts,
            self.config.pairs_per_answer,
        )
        self._sum = SumCollector(self.config, context, members, self._now_ms)
        self._messages.extend(self._sum.asks())

    def _named_wrong(self, current: RoundState, attempt: SumCollector) -> str:
        """Remember whose shares were wrong in an attempt that is over; a sentence if any were."""
        for worker, said in attempt.wrong.items():
            self.roster.complain(worker, f"it {said}, in the sum of round {current.round}")
        named = [f"worker {worker} {said}" for worker, said in attempt.wrong.items()]
        more = f"; and {len(named) - NAMED_MAX} more" if len(named) > NAMED_MAX else ""
        return "; ".join(named[:NAMED_MAX]) + more

    def _go_on_with_sum(self, current: RoundState) -> bool:
        """Go on with the attempt; returns whether the round was committed, or may be tried again.

        Once a sum was about to be unmasked, the round is committed with it or without a step: a
        second sum of the round could be subtracted from the first.
        """
        attempt, masked = self._sum, current.masked
        counted = {answer.slot for answer in current.counted()}
        if attempt is None:
            wrong = "the coordinator was started anew while the sum was being unmasked"
        elif not counted.issuperset(attempt.members if masked is None else masked.slots):
            wrong = "a member was sent away"
        else:
            if attempt.advance(self._now_ms):
                if attempt.survivors:
                    self._record(Masked(current.round, attempt.survivors))
                self._messages.extend(attempt.asks())
            wrong = attempt.failure
        if attempt is not None and not wrong and attempt.sums is None:
            return False
        is_named = False
        if attempt is not None and (named := self._named_wrong(current, attempt)):
            if wrong:
                wrong = f"{wrong}; {named}"
                is_named = bool(attempt.wrong.keys() - self._useless)
                self._useless |= {name: self.roster.view(name).complaint for name in attempt.wrong}
            else:
                self._warnings.append(f"round {current.round}: {named}")
        if current.masked is not None:
            sums = () if wrong or attempt is None or attempt.sums is None else attempt.sums
            self._record(Summed(current.round, sums))
            answers = [current.answers[s].record for s in current.masked.slots] if sums else []
            if wrong:
                self._warnings.append(
                    f"round {current.round} is committed without a step, because its sum could not "
                    f"be unmasked: {wrong}"
                )
            self._commit(current, answers)
            if wrong:
                self._pause_without_sums(wrong)
            return True
        assert attempt is not None
        self._failed_attempts += 1
        self._warnings.append(
            f"round {current.round}: attempt {attempt.attempt} at the sum failed: {wrong}"
        )
        # Who could not use the shares of those that are left out now still holds its measurement.
        self._holding -= attempt.dropped - (attempt.refusers if is_named else set())
        self._sum = None
        self._pause_failing_sum(current, attempt, wrong)
        return True

    def _pause_failing_sum(self, current: RoundState, attempt: SumCollector, wrong: str) -> None:
        """Pause a run that tries for the sum of one round again and again, and does not get it."""
        if not self.config.pause_rounds or self._failed_attempts < FAILED_ATTEMPTS_MAX:
            return
        said = [
            f"{worker} says: {complaint}"
            for worker in sorted(attempt.dropped)
            if worker in self.roster.workers and (complaint := self.roster.view(worker).complaint)
        ]
        self._pause(
            f"{self._failed_attempts} attempts at the sum of round {current.round} failed, at last "
            f"because {wrong}; {_AFTER_SUMS}" + "".join(f"; {sentence}" for sentence in said)
        )

    def _pause_without_sums(self, wrong: str) -> None:
        """Pause a run that commits round after round without the sum of its answers."""
        count = 0
        for summary in reversed(self.state.recent_rounds):
            if summary.answers or summary.round <= self._resumed_after:
                break
            count += 1
        is_over = self.phase in (Phase.FINISHED, Phase.PAUSED)
        if is_over or not self.config.pause_rounds or count < EMPTY_SUMS_MAX:
            return
        self._pause(
            f"the newest {count} rounds were committed without a step, because their sums could "
            f"not be unmasked, at last because {wrong}; {_AFTER_SUMS}"
        )

    def _pause(self, reason: str) -> None:
        self._record(Paused(self.state.round, reason[:COMPLAINT_CHARS_MAX]))

    def _share_of_sum(self, current: RoundState) -> Share:
        """What the mean of the summed answers puts into the commit; zeros if there is no sum.

        Its learning rate is the smallest of their slots'; they differ only if the run was resumed
        within the round.
        """
        assert current.masked is not None
        assert current.summed is not None
        config, slots = self.config, current.masked.slots
        sums = current.summed.sums or (0,) * config.pairs_per_answer
        return Share(
            seeds_of(config, current.round, SHARED_SLOT, None),
            mean_of_sums(sums, len(slots), config),
            min(current.rates[slot] for slot in slots),
        )

    # ------------------------------------------------------------ whose answers count

    def _agreeing(self) -> list[Answered]:
        """The answers measured on the run's weights; workers that gave others are sent away.

        Answers of which nobody can tell yet whether they are the run's are left out.
        """
        agreeing: list[Answered] = []
        for held in list(self.state.answerable()):
            if not is_digest_round(self.config, held.round):
                agreeing += held.counted()
            elif held.counting and (expected := self._expected_digest(held)) is not None:
                found = [(held.cohort[a.slot], a.weights_digest64 or 0) for a in held.counted()]
                self._judge(held.round - 1, found, expected)
                agreeing += held.counted()
        return agreeing

    def _expected_digest(self, held: RoundState) -> int | None:
        """Digest that the weights before `held` should have: agreed earlier, or decided now.

        The replica decides, or else a vote of the workers, of whom each has one, however many
        answers it gave. Fewer workers than the quorum decide nothing.
        """
        before = held.round - 1
        if before in self.state.agreed:
            return self.state.agreed[before]
        replica = self._replica_digests.get(before)
        votes = {held.cohort[a.slot]: a.weights_digest64 or 0 for a in held.counted()}
        if replica is None and len(votes) < self.config.quorum:
            return None
        return agreed_digest(list(votes.values()), replica, replica_comes=self.has_replica)

    def _judge(self, round_: int, found: list[tuple[str, int]], expected: int) -> None:
        """Record which of the workers in `found`, and whether the replica, differs after `round_`.

        The workers are sent away. A replica that has not agreed since it was recorded is not
        recorded again.
        """
        replica = self._replica_digests.get(round_)
        if replica is not None:
            found = [*found, (REPLICA_PARTY, replica)]
        for party, digest64 in differing(found, expected):
            if party == REPLICA_PARTY and not self._replica_agrees:
                continue
            record = Diverged(round_, party, digest64, expected)
            self._record(record)
            if party in self.roster.ready:
                self._messages.append(self.roster.expel(party, _diverged_sentence(record)))
            elif party in self.roster.workers:
                self.roster.view(party).told_diverged = False
        if replica == expected:
            self._replica_agreed_round = max(self._replica_agreed_round, round_)

    def _commit(self, current: RoundState, answers: list[Answered]) -> None:
        given = [(self.state.worker_of(answer), answer.projected_grads) for answer in answers]
        overdue = self._now_ms >= self._closes_at_ms
        self._record(self._committed(current, answers))
        is_shared = self.config.seed_policy == "shared"
        if self.config.secure_aggregation:
            self._sum, self._failed_attempts = None, 0
            self._holding.clear()
        elif warning := self.roster.compare(current.round, given, is_shared=is_shared):
            self._warnings.append(warning)
        late = {
            worker: assignment
            for worker, assignment in self.roster.assignments.items()
            if self.state.age(assignment.round) > self.config.staleness_max
        }
        if overdue or self.config.buffer_answers:
            self._complain_of(late)
            self.roster.miss(late)
        for worker, assignment in late.items():
            self.roster.release(worker, assignment)
        # Workers get the commit first, so what this step has assigned again is too late for them.
        self._messages[:] = [
            message
            for message in self._messages
            if not (isinstance(message, Assign) and message.worker in late)
        ]
        self._restart_deadline()
        self._fruitless_deadlines = 0
        for worker in dict(given):
            self.roster.view(worker).rounds_answered += 1
        self._judge_health()
        if self.phase is Phase.FINISHED:
            self._finish_all()

    def _committed(self, current: RoundState, answers: list[Answered]) -> Committed:
        """The record that closes the round."""
        config, pool = self.config, self.state.pool
        if config.secure_aggregation:
            shares = [self._share_of_sum(current)]
        else:
            shares = combined(self._clipped_shares(current, answers), config)
        coefficients = coefficients_of(shares, config)
        if config.seed_policy == "per_worker":
            seed_ranges = tuple(
                SeedRange(share.seeds[0], values)
                for share, values in zip(shares, coefficients, strict=True)
            )
        else:
            terms: dict[int, list[float]] = {}
            for share, values in zip(shares, coefficients, strict=True):
                for seed, value in zip(share.seeds, values, strict=True):
                    terms.setdefault(seed, []).append(value)
            seed_ranges = seed_ranges_of(
                [(seed, to_binary32(math.fsum(terms[seed]))) for seed in sorted(terms)]
            )
        factor = self._factor(current.round) if answers else 0.0
        if config.weight_decay:
            # A longer step decays no more, so that a decay can never take all of a weight.
            factor *= min(1.0, commit_factor(shares, config))
        record = Committed(
            current.round,
            seed_ranges,
            rounding_seed_of(config.seed, current.round),
            decay_of(config, factor),
            answers=tuple(RoundSlot(a.round, a.slot) for a in answers if config.buffer_answers),
        )
        if pool is None or current.round % config.rebase_every_rounds:
            return record
        return pool.from_base(record)

    def _clipped_shares(self, current: RoundState, answers: list[Answered]) -> list[Share]:
        """What each answer puts into the mean; tells of answers that were far larger than usual."""
        config, shares = self.config, self.state.shares(answers)
        scaled = [
            (self.state.worker_of(answer), answer.projected_grads, share.projected_grads)
            for answer, share in zip(answers, shares, strict=True)
            if share.projected_grads is not answer.projected_grads
            and is_far_larger(answer.projected_grads, share.projected_grads, config)
        ]
        if scaled:
            self._warnings.append(self.roster.clipped(current.round, scaled))
        return shares

    def _complain_of(self, late: Mapping[str, RoundSlot]) -> None:
        config = self.config
        within = (
            f"before it was more than {config.staleness_max} rounds old"
            if config.buffer_answers
            else f"within {config.deadline_ms} ms"
        )
        for worker, assignment in late.items():
            if worker in self.roster.ready:
                self.roster.complain(worker, f"did not answer round {assignment.round} {within}")

    def _judge_health(self) -> None:
        """Stop the run if it no longer gets better, pause it if it has gone wrong."""
        if self.phase in (Phase.FINISHED, Phase.PAUSED):
            return
        config, state = self.config, self.state
        if reason := state.health.no_better(config.early_stop_evaluations):
            self._record(Stopped(state.round, reason))
            self._finish_all()
        elif reason := state.health.gone_wrong(config, state.round):
            self._record(Paused(state.round, reason))

    def _finish_all(self) -> None:
        self.roster.release_all()  # Nothing more is committed.
        self._sum = None
        self._messages.extend(
            Finish(worker, self.state.round)
            for worker in self.roster.workers
            if worker in self.roster.ready
        )

    def _extend(self, current: RoundState, overdue: bool) -> None:
        """Too few answers agree: ask workers that are free, and at the deadline everyone again."""
        added = self._choose(current)
        if not added and not overdue:
            return
        if overdue and self._pauses_fruitless(current):
            return
        if overdue or not self.config.buffer_answers:
            self._restart_deadline()
        if overdue:
            self.roster.miss(tuple(self.roster.assignments))
            self._assign_outstanding()
        if added:
            self._add_slots(added)

    def _choose(self, current: RoundState) -> tuple[str, ...]:
        """Ready workers without an assignment that get slots of `current`, as many as may work."""
        config, ready, idle = self.config, self.roster.ready, self.roster.idle
        if config.buffer_answers:
            room = max(0, config.cohort_size_max - (len(ready) - len(idle)))
        else:
            room = max(1, config.cohort_size_max - current.counting)
        room = min(room, COHORT_MAX - len(current.cohort))
        if room <= 0:
            return ()
        free = [worker for worker in idle if self._is_free(current, worker)]
        return self.roster.choose(config.seed, current.round, free, room)

    def _is_free(self, current: RoundState, idle: str) -> bool:
        """Whether a worker without an assignment may get a slot of `current`.

        A worker that could not measure stays out of the round. A buffered round that has enough
        answers, but cannot tell yet whether they agree, needs more workers and not more answers.
        """
        slot = current.slots.get(idle)
        return slot is None or (
            slot in current.answers and current.counting < self.config.buffer_answers
        )

    def _pauses_fruitless(self, current: RoundState) -> bool:
        """Pause a run in which nobody can measure any more, as when the weights overflow."""
        unable = [worker for worker in current.slots if worker in self.roster.ready]
        # With secure aggregation only an answer whose worker still holds it can come to anything.
        answered = self._holding if self.config.secure_aggregation else current.answers
        fruitless = bool(unable) and not answered and not self.roster.assignments
        self._fruitless_deadlines = self._fruitless_deadlines + 1 if fruitless else 0
        if not self.config.pause_rounds or self._fruitless_deadlines < FRUITLESS_DEADLINES_MAX:
            return False
        self._pause(
            f"no worker could measure round {current.round} in {self._fruitless_deadlines} "
            f"attempts; {unable[-1]} says: {self.roster.view(unable[-1]).complaint}"
        )
        return True

    def _factor(self, round_: int) -> float:
        """What the contract's learning rate is multiplied by in `round_`."""
        return schedule_factor(self.config, round_) * self.state.rate_factor

    def _add_slots(self, workers: tuple[str, ...]) -> None:
        config, round_, first_slot = self.config, self.state.round + 1, len(self.cohort)
        if config.journal_readers != "everyone":
            workers = shuffled(workers, self._slot_secret, round_, first_slot)
        factor = self._factor(round_)
        rates = tuple(
            factor * rate for rate in own_rates(config, round_, workers, self.state.signals())
        )
        same = all(rate == config.learning_rate for rate in rates)
        eps = config.eps * factor if config.eps_follows_rate and factor != 1.0 else None
        self._record(Opened(round_, first_slot, workers, () if same else rates, eps))
        self._assign(round_, range(first_slot, first_slot + len(workers)))

    def _assign(self, round_: int, slots: Iterable[int]) -> None:
        """Ask the workers of these slots to measure."""
        held, config = self.state.held(round_), self.config
        assert held is not None
        epoch, pool = self.state.epoch, self.state.pool
        eps = config.eps if held.eps is None else held.eps
        want_digest = is_digest_round(config, round_)
        later_rounds = config.staleness_max - self.state.age(round_)
        deadline_ms = max(self._closes_at_ms - self._now_ms, 0) + later_rounds * config.deadline_ms
        for slot in slots:
            worker, rate = held.cohort[slot], held.rates[slot]
            self.roster.assign(worker, RoundSlot(round_, slot), rate)
            work = Work(seeds_of(config, round_, slot, pool), rate, eps, want_digest)
            self._messages.append(Assign(worker, Ticket(epoch, round_, slot), work, deadline_ms))

    def _assign_outstanding(self) -> None:
        """Ask ready workers again for what they can still answer."""
        for worker, assignment in self._outstanding().items():
            if worker in self.roster.ready:
                self._assign(assignment.round, (assignment.slot,))

    def _restart_deadline(self) -> None:
        self._closes_at_ms = self._now_ms + self.config.deadline_ms

    # ------------------------------------------------------------ small parts

    @property
    def _replica_agrees(self) -> bool:
        """Whether the replica was never found to differ, or has agreed with a round since."""
        found = self.state.diverged.get(REPLICA_PARTY)
        return found is None or self._replica_agreed_round > found.round

    def _stale(self, event: AnswerReceived | UnableReceived) -> StaleTicketError:
        now = f"this is epoch {self.state.epoch} and the last committed round is {self.state.round}"
        return self.roster.stale(event, now)

    def _record(self, record: Record) -> None:
        self.apply(record)
        self._records.append(record)

    def _take_ready(self) -> Ready:
        ready = Ready(tuple(self._records), tuple(self._messages), tuple(self._warnings))
        for owed in (self._records, self._messages, self._warnings):
            owed.clear()
        return ready


_AFTER_SUMS = (
    "exclude a worker that is named here, or that the log names each time, and resume the run"
)


def _checked_reason(reason: str) -> str:
    """A person's reason in one line; raises `ConfigError` if the journal cannot hold it."""
    reason = " ".join(reason.split())
    if not 0 < len(reason) <= COMPLAINT_CHARS_MAX:
        raise ConfigError(
            f"The reason has {len(reason)} characters; say why in 1 to {COMPLAINT_CHARS_MAX}."
        )
    return reason


def excluded_sentence(record: Excluded) -> str:
    """What a worker is told that the operator has excluded."""
    return (
        f"The run's operator excluded worker {record.worker} after round {record.round}: "
        f"{record.reason}. Its answers no longer count; ask the operator to readmit it."
    )


def _diverged_sentence(record: Diverged) -> str:
    return (
        f"The weights of worker {record.party} after round {record.round} are not the run's: their "
        f"digest begins {digest64_hex(record.found_digest64)}, the run's "
        f"{digest64_hex(record.expected_digest64)}; restart the worker so that it rebuilds them "
        "from the base and the journal."
    )
