"""The run's journal, folded: what a restart must rebuild. Pure, and it decides nothing.

Equal journals give equal states, live or after a restart: a record changes the state only in
`RunState.apply`. The round machine decides which records follow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from fedmezo_core.config import COHORT_MAX, RunConfig
from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.machines.aggregate import (
    CLIP_ROUNDS,
    Share,
    clipped,
    coefficients_of,
    staleness_discount,
)
from fedmezo_core.machines.answers import is_digest_round
from fedmezo_core.machines.health import Health
from fedmezo_core.machines.rates import SIGNAL_ROUNDS, update_distances
from fedmezo_core.machines.roster import RECENT_ROUNDS_MAX, WORKERS_SEEN_MAX, RoundSummary
from fedmezo_core.machines.seeds import Pool, seeds_of
from fedmezo_core.records import (
    Admitted,
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Excluded,
    Genesis,
    Masked,
    Opened,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RoundSlot,
    SignedHead,
    Snapshotted,
    Started,
    Stopped,
    Summed,
)
from fedmezo_core.trust.secure_aggregation.fixed_point import levels_of

EXCLUDED_MAX = COHORT_MAX
"""Most workers that are excluded at a time."""
DIGESTS_KEPT_MAX = 8
"""Most rounds whose digests are remembered, plus `staleness_max` in a buffered run."""

EPOCH_MAX = 2**32 - 2
"""Newest epoch that a start can follow: messages hold epochs in 32 bits."""

_Value = TypeVar("_Value")


class Accepted(NamedTuple):
    """An answer in the journal, with the epoch of the ticket that it was given to."""

    epoch: int
    record: Answered


@dataclass(slots=True)
class RoundState:
    """One round's slots, and the answers to them."""

    round: int
    cohort: list[str] = field(default_factory=list)
    """Worker of each slot. A worker has several if it was found diverged and came back, or if the
    run is buffered."""
    slots: dict[str, int] = field(default_factory=dict)
    """Worker -> its newest slot. Invariant: none of these slots is in `excluded`."""
    answers: dict[int, Accepted] = field(default_factory=dict)
    """Slot -> its accepted answer."""
    excluded: set[int] = field(default_factory=set)
    """Answered slots that are never committed: they were measured on diverged weights, or their
    worker was excluded."""
    committed: set[int] = field(default_factory=set)
    """Answered slots whose answers are in a commit of this round or of a later one."""
    rates: list[float] = field(default_factory=list)
    """Learning rate of each slot."""
    eps: float | None = None
    """Perturbation scale of the round; None if it is the contract's."""
    masked: Masked | None = None
    """With secure aggregation: the answers whose sum is, or was, about to be unmasked."""
    summed: Summed | None = None
    """What that came to, once it is known."""

    @property
    def counting(self) -> int:
        """Count of answers that may yet be committed."""
        return len(self.answers) - len(self.excluded) - len(self.committed)

    def counted(self) -> list[Answered]:
        """Answers that may yet be committed, in slot order."""
        left = self.answers.keys() - (self.excluded | self.committed)
        return [self.answers[slot].record for slot in sorted(left)]

    def drop(self, worker: str, slots: set[int]) -> None:
        """Never commit the answers to these slots, which are the worker's."""
        self.excluded |= slots
        if self.slots.get(worker) in slots:
            del self.slots[worker]


@dataclass(slots=True)
class RunState:
    """The journal, folded: where the run is, and what later decisions depend on."""

    genesis: Genesis | None = None
    epoch: int = 0
    round: int = 0
    """Last committed round."""
    open: RoundState | None = None
    """The open round. Invariant: `open.round == round + 1`. In a buffered run it has no slots while
    only answers to earlier rounds wait for its commit."""
    earlier: deque[RoundState] = field(default_factory=deque)
    """The newest committed rounds, oldest first: those whose slots may still be answered, and one
    more so that a lost acknowledgement can be repeated."""
    agreed: dict[int, int] = field(default_factory=dict)
    """Round -> first 64 bits of the digest of the weights after it, for the newest rounds known."""
    diverged: dict[str, Diverged] = field(default_factory=dict)
    """Party -> its newest divergence, until its weights agree in a committed digest round."""
    excluded: dict[str, Excluded] = field(default_factory=dict)
    """Worker -> its exclusion from the run, until it is readmitted."""
    divergences: deque[Diverged] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS_MAX))
    evaluations: deque[Evaluated] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS_MAX))
    recent_rounds: deque[RoundSummary] = field(
        default_factory=lambda: deque(maxlen=RECENT_ROUNDS_MAX)
    )
    rate_factor: float = 1.0
    """Product of the factors that the run was resumed with."""
    paused: Paused | None = None
    stopped: Stopped | None = None
    health: Health = field(default_factory=Health)
    pool: Pool | None = None
    """The seed pool; None if the run draws its seeds from no pool."""
    losses: dict[str, deque[float]] = field(default_factory=dict)
    """Worker -> mean losses of its newest committed answers, in nats. The longest silent come
    first."""
    distances: dict[str, float] = field(default_factory=dict)
    """Worker -> how far its newest committed update was from the mean update."""
    usual_sizes: deque[float] = field(default_factory=lambda: deque(maxlen=CLIP_ROUNDS))
    """Lower median of the sizes of each of the newest rounds' answers, in a run that clips by it.
    Rounds that measured nothing but 0 are left out."""
    keys: dict[str, bytes] = field(default_factory=dict)
    """Worker -> the newest key that its answers were signed with, 32 bytes. The key admitted
    longest ago comes first."""
    copied: bool = False
    """Whether this is folded from a copy of the commits only, without openings and answers."""
    _shares: tuple[Sequence[Answered], list[Share], float] = field(
        default=((), [], 0.0), init=False, repr=False, compare=False
    )
    """The last answers given to `shares`, their shares and the lower median of their sizes: the
    machine needs them to make a commit, and `apply` again to fold it."""

    def apply(self, record: Record) -> None:
        """Fold one record; `JournalCorruptError` if it cannot follow those before."""
        if isinstance(record, Genesis):
            if self.genesis is not None:
                raise _misplaced("a second genesis", "exactly one, as the first record")
            self.genesis = record
            if record.config.seed_policy == "pool":
                self.pool = Pool.of(record.config)
            return
        if self.genesis is None:
            raise _misplaced(type(record).__name__, "a genesis as the first record")
        match record:
            case Answered():  # first, because nearly all records are answers
                self._apply_answered(record)
            case Started(epoch):
                if epoch != self.epoch + 1:
                    raise _misplaced(f"a start of epoch {epoch}", f"epoch {self.epoch + 1}")
                self.epoch, self.copied = epoch, False
            case Opened():
                self._apply_opened(record)
            case Committed():
                self._apply_committed(record, self.genesis.config)
            case Diverged():
                self._apply_diverged(record)
            case Evaluated():
                self.evaluations.append(record)
                self.health.evaluated(record, self.genesis.config)
            case Paused():
                if self.paused is not None or record.round != self.round:
                    raise _misplaced(
                        f"a pause after round {record.round}",
                        f"a pause after round {self.round} of a run that goes on",
                    )
                self.paused = record
            case Resumed(rate_factor):
                if self.paused is None:
                    raise _misplaced("a resumption", "a pause before it")
                self.paused = None
                self.rate_factor *= rate_factor
                self.health.resumed()
            case Admitted(worker, key):
                self.keys.pop(worker, None)
                self.keys[worker] = key
                _keep_latest(self.keys, WORKERS_SEEN_MAX)
            case Stopped():
                if self.stopped is not None or record.round != self.round:
                    raise _misplaced(
                        f"an end after round {record.round}",
                        f"an end after round {self.round}, once",
                    )
                self.stopped = record
            case Excluded() | Readmitted():
                self._apply_membership(record)
            case Masked() | Summed():
                self._apply_sum(record, self.genesis.config)
            case Snapshotted(round_):
                if not 1 <= round_ <= self.round:
                    raise _misplaced(
                        f"a snapshot of round {round_}", f"one of a round from 1 to {self.round}"
                    )
            case SignedHead(epoch, round_):
                is_epoch = self.epoch <= epoch <= EPOCH_MAX
                if self.open is not None or round_ != self.round or not is_epoch:
                    raise _misplaced(
                        f"a checkpoint of epoch {epoch}, round {round_}",
                        f"one of epoch {self.epoch} or later, round {self.round}, "
                        "between two rounds",
                    )
                self.epoch, self.copied = epoch, True

    def held(self, round_: int) -> RoundState | None:
        """The round with its slots, if it is open or one of the newest committed ones."""
        if self.open is not None and self.open.round == round_:
            return self.open
        index = round_ - self.round - 1 + len(self.earlier)
        return self.earlier[index] if 0 <= index < len(self.earlier) else None

    def age(self, round_: int) -> int:
        """Age in rounds that an answer to `round_` has in the next commit."""
        return self.round + 1 - round_

    def answerable(self) -> Iterator[RoundState]:
        """Rounds whose answers the next commit may hold, oldest first."""
        assert self.genesis is not None
        for held in self.earlier:
            if self.age(held.round) <= self.genesis.config.staleness_max:
                yield held
        if self.open is not None:
            yield self.open

    @property
    def counting(self) -> int:
        """Count of answers that may be committed next."""
        return sum(held.counting for held in self.answerable())

    def counted(self) -> list[Answered]:
        """Answers that may be committed next, by round and slot."""
        return [answer for held in self.answerable() for answer in held.counted()]

    def worker_of(self, answer: Answered) -> str:
        """The worker that gave an answer to a round that is held."""
        held = self.held(answer.round)
        assert held is not None
        return held.cohort[answer.slot]

    def assignment_of(self, worker: str) -> RoundSlot | None:
        """The worker's last assignment, if it can still be answered and has no answer.

        An excluded worker can answer nothing.
        """
        if worker in self.excluded:
            return None
        for held in reversed(list(self.answerable())):
            slot = held.slots.get(worker)
            if slot is not None:
                return None if slot in held.answers else RoundSlot(held.round, slot)
        return None

    def outstanding(self) -> dict[str, RoundSlot]:
        """Worker -> its last assignment, for all that `assignment_of` finds, by round and slot."""
        workers = {worker for held in self.answerable() for worker in held.slots}
        found = [(self.assignment_of(worker), worker) for worker in workers]
        return {
            worker: assigned for assigned, worker in sorted(f for f in found if f[0]) if assigned
        }

    def signals(self) -> Mapping[str, float]:
        """Worker -> the signal that its personal learning rate follows, where it is known."""
        assert self.genesis is not None
        match self.genesis.config.personal_rate:
            case "last_loss":
                return {worker: losses[-1] for worker, losses in self.losses.items()}
            case "mean_loss":
                return {w: math.fsum(losses) / len(losses) for w, losses in self.losses.items()}
            case "update_distance":
                return self.distances
            case "frozen" | "random":
                return {}

    def shares(self, answers: Sequence[Answered]) -> list[Share]:
        """What each answer puts into the next commit's mean, clipped as the contract says.

        An answer that is not clipped keeps its projected gradients, the same object.
        """
        assert self.genesis is not None
        if self._shares[0] == answers:
            return self._shares[1]
        config, pool = self.genesis.config, self.pool
        by_round = {
            held.round: (held.rates, staleness_discount(config, self.age(held.round)))
            for held in self.answerable()
        }
        grads, size = [answer.projected_grads for answer in answers], 0.0
        if config.clip_median_factor:
            grads, size = clipped(grads, self.usual_sizes, config)
        shares = []
        for answer, taken in zip(answers, grads, strict=True):
            rates, discount = by_round[answer.round]
            seeds = seeds_of(config, answer.round, answer.slot, pool)
            rate = rates[answer.slot] * discount
            shares.append(Share(seeds, taken, rate, answer.rows or 1, answer.mean_loss))
        self._shares = (answers, shares, size)
        return shares

    def _apply_opened(self, record: Opened) -> None:
        assert self.genesis is not None
        current = self.open or RoundState(self.round + 1)
        if (
            record.round != current.round
            or record.first_slot != len(current.cohort)
            or record.round > self.genesis.config.rounds
        ):
            raise _misplaced(
                f"an opening of round {record.round} from slot {record.first_slot}",
                f"round {current.round} from slot {len(current.cohort)}, "
                f"in a run of {self.genesis.config.rounds} rounds",
            )
        if (
            not record.workers
            or len(set(record.workers)) != len(record.workers)
            or any(self._is_taken(current, w) for w in current.slots.keys() & record.workers)
            or len(current.cohort) + len(record.workers) > COHORT_MAX
        ):
            raise _misplaced(
                f"an opening of round {record.round} with workers "
                f"{', '.join(record.workers) or '-'}",
                f"at least one worker without a slot, none twice, at most {COHORT_MAX} slots",
            )
        for slot, worker in enumerate(record.workers, start=record.first_slot):
            current.slots[worker] = slot
        current.cohort.extend(record.workers)
        contract = [self.genesis.config.learning_rate] * len(record.workers)
        current.rates.extend(record.learning_rates or contract)
        current.eps = record.eps
        self.open = current

    def _is_taken(self, current: RoundState, worker: str) -> bool:
        """Whether the worker can have no further slot of the round.

        In a buffered run that is until its slot is answered.
        """
        assert self.genesis is not None
        slot = current.slots.get(worker)
        is_answered = slot in current.answers
        return slot is not None and not (self.genesis.config.buffer_answers and is_answered)

    def _apply_answered(self, record: Answered) -> None:
        assert self.genesis is not None
        config, held = self.genesis.config, self.open
        is_open = held is not None and held.round == record.round
        if not is_open:
            held = self.held(record.round)
        if (
            held is None
            or not (is_open or self.age(record.round) <= config.staleness_max)
            or self.round >= config.rounds
            or not 0 <= record.slot < len(held.cohort)
            or record.slot in held.answers
        ):
            raise _misplaced(
                f"an answer to slot {record.slot} of round {record.round}",
                "an answer to a slot that is open and has none",
            )
        if len(record.projected_grads) != config.scalars_per_answer:
            raise _misplaced(
                f"an answer of {len(record.projected_grads)} projected gradients",
                f"one of {config.scalars_per_answer}",
            )
        if is_digest_round(config, record.round) != (record.weights_digest64 is not None):
            raise _misplaced(
                f"an answer to slot {record.slot} of round {record.round} "
                f"{'without' if record.weights_digest64 is None else 'with'} a digest",
                "a digest in each answer of a digest round and in no other",
            )
        held.answers[record.slot] = Accepted(self.epoch, record)
        if not is_open:
            self._open_for_waiting()

    def _apply_sum(self, record: Masked | Summed, config: RunConfig) -> None:
        held = self.open
        if held is None or held.round != record.round or not config.secure_aggregation:
            raise _misplaced(
                f"a sum of round {record.round}",
                f"one of round {self.round + 1}, once open, in a run with secure aggregation",
            )
        if isinstance(record, Masked):
            counted = {answer.slot for answer in held.counted()}
            if (
                held.masked is not None
                or list(record.slots) != sorted(counted.intersection(record.slots))
                or not config.secure_cohort_min <= len(record.slots) <= config.answers_max
            ):
                raise _misplaced(
                    f"a sum of slots {list(record.slots)} of round {record.round}",
                    f"the round's only one, of {config.secure_cohort_min} or more that answered",
                )
            held.masked = record
            return
        if (
            held.masked is None
            or held.summed is not None
            or len(record.sums) not in (0, config.pairs_per_answer)
            or any(abs(s) > levels_of(config) * len(held.masked.slots) for s in record.sums)
        ):
            raise _misplaced(
                f"{len(record.sums)} sums of round {record.round}",
                f"none, or {config.pairs_per_answer} of the answers that were masked, once",
            )
        held.summed = record

    def _open_for_waiting(self) -> None:
        """Open the next round without slots if answers to earlier rounds wait for its commit."""
        assert self.genesis is not None
        if self.open is None and self.counting and self.round < self.genesis.config.rounds:
            self.open = RoundState(self.round + 1)

    def _apply_committed(self, record: Committed, config: RunConfig) -> None:
        record.check_within(config)
        current = self.open
        if self.copied and current is None and record.round == self.round + 1:
            self._commit_to_pool(record)
            self.recent_rounds.append(RoundSummary(record.round, None, len(record.seed_ranges)))
            self.round = record.round
            return
        if current is None or record.round != current.round:
            raise _misplaced(
                f"a commit of round {record.round}",
                f"a commit of round {self.round + 1}, once open",
            )
        answers = (
            self._summed_answers(record, current)
            if config.secure_aggregation
            else self._answers_of(record, config)
        )
        held_by_round = {held.round: held for held in self.answerable()}
        workers = [held_by_round[answer.round].cohort[answer.slot] for answer in answers]
        self._learn(record, workers, answers, config)
        for worker, answer in zip(workers, answers, strict=True):
            if answer.weights_digest64 is not None:
                self.agreed[answer.round - 1] = answer.weights_digest64
                if self.diverged:
                    self.diverged.pop(worker, None)
        keep_newest_rounds(self.agreed, config)
        losses = [answer.mean_loss for answer in answers if answer.mean_loss is not None]
        mean_loss = math.fsum(losses) / len(losses) if losses else None
        self.recent_rounds.append(RoundSummary(record.round, mean_loss, len(answers)))
        measured = [answer.projected_grads for answer in answers]
        if current.summed is not None:
            measured = [current.summed.sums] if answers else [(1.0,)]  # No sum says nothing.
        zeros = len(answers) * config.pairs_per_answer if not any(map(any, measured)) else None
        self.health.committed(record.round, mean_loss, zeros, config)
        for answer in answers:
            held_by_round[answer.round].committed.add(answer.slot)
        self.round, self.open, self._shares = record.round, None, ((), [], 0.0)
        self.earlier.append(current)
        while len(self.earlier) > config.staleness_max + 1:
            self.earlier.popleft()
        self._open_for_waiting()

    def _answers_of(self, record: Committed, config: RunConfig) -> list[Answered]:
        """The answers that a commit is made of; `JournalCorruptError` if they do not give it."""
        waiting = self.counted()
        if config.buffer_answers:
            by_slot = {RoundSlot(answer.round, answer.slot): answer for answer in waiting}
            answers = [by_slot[slot] for slot in record.answers if slot in by_slot]
            is_sound = len(answers) == len(record.answers) <= config.answers_max and sorted(
                set(record.answers)
            ) == list(record.answers)
        else:
            answers, is_sound = waiting[: config.answers_max], not record.answers
        expected_ranges = (
            len(answers) if config.seed_policy == "per_worker" else len(record.seed_ranges)
        )
        if len(record.seed_ranges) != expected_ranges or not answers or not is_sound:
            raise _misplaced(
                f"a commit of round {record.round} with {len(record.seed_ranges)} answers' pairs",
                f"pairs of {len(answers)} answers, each of them once",
            )
        return answers

    def _summed_answers(self, record: Committed, current: RoundState) -> list[Answered]:
        """The answers in the round's sum, none without one; `JournalCorruptError` before it."""
        if current.masked is None or current.summed is None or len(record.seed_ranges) != 1:
            raise _misplaced(
                f"a commit of round {record.round} with {len(record.seed_ranges)} answers' pairs",
                "one of the sum of the round's answers, once that is known",
            )
        if not current.summed.sums:
            return []
        return [current.answers[slot].record for slot in current.masked.slots]

    def _learn(
        self, record: Committed, workers: list[str], answers: list[Answered], config: RunConfig
    ) -> None:
        """Keep what later rates, seeds and clips depend on."""
        if config.personal_rate in ("last_loss", "mean_loss"):
            for worker, answer in zip(workers, answers, strict=True):
                if answer.mean_loss is not None:
                    losses = self.losses.pop(worker, None) or deque(maxlen=SIGNAL_ROUNDS)
                    losses.append(answer.mean_loss)
                    self.losses[worker] = losses
            _keep_latest(self.losses, WORKERS_SEEN_MAX)
        measures_distances = config.personal_rate == "update_distance"
        if not (measures_distances or self.pool is not None or config.clip_median_factor):
            return
        shares = self.shares(answers)
        if self._shares[2]:
            self.usual_sizes.append(self._shares[2])
        if measures_distances:
            self._keep_distances(workers, shares, config)
        self._commit_to_pool(record)
        if self.pool is not None:
            for share in shares:
                self.pool.measured(share.seeds, share.projected_grads)

    def _commit_to_pool(self, record: Committed) -> None:
        if self.pool is None:
            return
        outside = [r for r in record.seed_ranges if not self.pool.holds(r)]
        if outside:
            raise _misplaced(
                f"a commit of round {record.round} with seed {outside[0].first_seed:016x}",
                f"seeds of the run's pool of {len(self.pool.coefficients)}",
            )
        self.pool.commit(record)

    def _keep_distances(
        self, workers: Sequence[str], shares: Sequence[Share], config: RunConfig
    ) -> None:
        assert self.genesis is not None
        total = sum(share.weight for share in shares)
        updates: list[dict[int, float]] = []
        for share, coefficients in zip(shares, coefficients_of(shares, config), strict=True):
            update: dict[int, float] = {}
            for seed, coefficient in zip(share.seeds, coefficients, strict=True):
                # A coefficient is the update's own one times the answer's part in the mean.
                update[seed] = update.get(seed, 0.0) + coefficient * total / share.weight
            updates.append(update)
        distances = update_distances(
            updates,
            [share.weight / total for share in shares],
            self.genesis.trainable_elements,
        )
        for worker, distance in zip(workers, distances, strict=True):
            self.distances.pop(worker, None)
            self.distances[worker] = distance
        _keep_latest(self.distances, WORKERS_SEEN_MAX)

    def _apply_diverged(self, record: Diverged) -> None:
        self.divergences.append(record)
        self.diverged.pop(record.party, None)
        self.diverged[record.party] = record
        _keep_latest(self.diverged, COHORT_MAX)
        held = self.held(record.round + 1)
        if held is None:
            return
        differing = {
            answer.slot
            for answer in held.counted()
            if held.cohort[answer.slot] == record.party
            and answer.weights_digest64 == record.found_digest64
        }
        held.drop(record.party, differing)

    def _apply_membership(self, record: Excluded | Readmitted) -> None:
        known = record.worker in self.excluded
        if record.round != self.round or known != isinstance(record, Readmitted):
            raise _misplaced(
                f"{type(record).__name__} of {record.worker} after round {record.round}",
                f"an exclusion or readmission, in turn, after round {self.round}",
            )
        if isinstance(record, Readmitted):
            del self.excluded[record.worker]
            return
        if len(self.excluded) >= EXCLUDED_MAX:
            raise _misplaced(
                f"an exclusion of {record.worker}", f"at most {EXCLUDED_MAX} at a time"
            )
        self.excluded[record.worker] = record
        for held in self.answerable():
            held.drop(
                record.worker,
                {a.slot for a in held.counted() if held.cohort[a.slot] == record.worker},
            )


def keep_newest_rounds(by_round: dict[int, int], config: RunConfig) -> None:
    """Drop the oldest rounds beyond `DIGESTS_KEPT_MAX` and those of late answers."""
    while len(by_round) > DIGESTS_KEPT_MAX + config.staleness_max:
        del by_round[min(by_round)]


def _keep_latest(by_party: dict[str, _Value], count_max: int) -> None:
    while len(by_party) > count_max:
        del by_party[next(iter(by_party))]


def _misplaced(found: str, expected: str) -> JournalCorruptError:
    return JournalCorruptError(
        f"The journal holds {found} where {expected} must stand; "
        "restore the journal file from a copy."
    )
