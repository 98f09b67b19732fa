"""What must hold in every simulated run, checked as it happens by someone who knows the truth."""

from __future__ import annotations

import hashlib
import math
import statistics
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat

from fedmezo_core.config import RunConfig
from fedmezo_core.events import SendAnswer, SendSumStep, Ticket
from fedmezo_core.machines.aggregate import decay_of
from fedmezo_core.machines.rates import schedule_factor
from fedmezo_core.machines.seeds import Pool, seeds_of
from fedmezo_core.records import (
    Admitted,
    Answered,
    Committed,
    Diverged,
    Excluded,
    Masked,
    Opened,
    Paused,
    Readmitted,
    Record,
    Resumed,
    Started,
    Stopped,
    Summed,
    digest64_of,
    rounding_seed_of,
)
from fedmezo_core.trust.secure_aggregation.fixed_point import mean_of_sums, quantised

BASE_WEIGHTS = hashlib.sha256(b"base").digest()


class ViolationError(AssertionError):
    """Something that must never happen has happened."""


@lru_cache(maxsize=256)
def weights_after(weights: bytes, commit: Committed) -> bytes:
    """32 bytes in place of weights; they depend on all commits since the base, in their order."""
    weights = BASE_WEIGHTS if commit.from_base else weights
    return hashlib.sha256(weights + repr(commit).encode()).digest()


@lru_cache(maxsize=256)
def measure(worker: str, seeds: tuple[int, ...], weights: bytes) -> tuple[tuple[float, ...], float]:
    """The oracle: what this worker's data gives along these seeds on these weights."""
    grads, is_huge = [], False
    for seed in seeds:
        digest = hashlib.sha256(weights + seed.to_bytes(8, "little") + worker.encode()).digest()
        grads.append(_binary32(int.from_bytes(digest[:4], "little") / 2**28 - 8))
        is_huge |= digest[4] < 16
    loss = _binary32(abs(grads[0]))
    # Now and then far more than is usual, so that it is clipped where the contract says so.
    return tuple(64 * grad for grad in grads) if is_huge else tuple(grads), loss


def rows_of(worker: str) -> int:
    """How many rows of data a worker says it has."""
    return 10 + 7 * len(worker) + worker.encode()[-1] % 5


@dataclass
class Checker:
    """Fed everything that becomes durable, is sent by a worker, or is acknowledged to one."""

    config: RunConfig
    weights: list[bytes] = field(default_factory=lambda: [BASE_WEIGHTS])
    """True weights after each committed round."""
    epoch: int = 0
    cohorts: dict[int, list[str]] = field(default_factory=dict)
    """Round -> worker of each slot."""
    rates: dict[int, list[float]] = field(default_factory=dict)
    """Round -> learning rate of each slot, as journaled."""
    rate_factor: float = 1.0
    """What resumptions have made of the learning rates."""
    paused: bool = False
    stopped: bool = False
    """Whether an operator has ended the run."""
    excluded: set[str] = field(default_factory=set)
    """Workers that an operator has taken out of the run."""
    void: set[tuple[int, int]] = field(default_factory=set)
    """Round and slot of every answer that an exclusion took out."""
    pool: Pool | None = None
    usual_sizes: list[float] = field(default_factory=list)
    """Lower median of the sizes of the answers of each committed round."""
    answers: dict[tuple[int, int], Answered] = field(default_factory=dict)
    committed: set[tuple[int, int]] = field(default_factory=set)
    """Round and slot of every answer that a commit holds."""
    ages: list[int] = field(default_factory=list)
    """How many rounds old each committed answer was."""
    named: set[tuple[int, str, int]] = field(default_factory=set)
    keys: dict[str, bytes] = field(default_factory=dict)
    sent_answers: set[tuple[str, SendAnswer]] = field(default_factory=set)
    masked: Masked | None = None
    """What is unmasked now."""
    summed: Summed | None = None
    unmasked_rounds: set[int] = field(default_factory=set)
    is_calm: bool = False
    """Whether nothing has gone wrong for so long that every sum must come out."""
    may_fail: bool = False
    """Whether the sum that is unmasked now need not: there were faults, or a start since."""
    sum_sizes: list[int] = field(default_factory=list)
    """How many answers each committed sum is of; 0 where it did not come out."""
    revelations: dict[tuple[str, int], SendSumStep] = field(default_factory=dict)
    """Worker and round -> how it helped to unmask that round's sum."""

    def __post_init__(self) -> None:
        if self.config.seed_policy == "pool":
            self.pool = Pool.of(self.config)

    @property
    def open_round(self) -> int:
        """The round that is, or will be, open."""
        return len(self.weights)

    def appended(self, record: Record) -> None:
        """A record is durable."""
        _require(
            not (self.paused and isinstance(record, (Opened, Committed))),
            f"the run is paused, but goes on with {record}",
        )
        changes = (Opened, Answered, Committed, Paused, Resumed, Stopped)
        _require(
            not (self.stopped and isinstance(record, changes)),
            f"the run was ended, but goes on with {record}",
        )
        match record:
            case Started(epoch):
                self.epoch += 1
                self.may_fail = True
                _require(epoch == self.epoch, f"epoch {epoch} follows {self.epoch - 1}")
            case Opened(round_, first_slot, workers, rates):
                _require(round_ == self.open_round, f"round {round_} opened out of turn")
                cohort = self.cohorts.setdefault(round_, [])
                _require(first_slot == len(cohort), f"slots of round {round_} have a gap")
                _require(not self.excluded & {*workers}, f"{record} has an excluded worker")
                cohort += workers
                contract = [self.config.learning_rate] * len(workers)
                self.rates.setdefault(round_, []).extend(rates or contract)
            case Admitted(worker, key):
                _require(self.keys.get(worker) != key, f"{worker}'s key is admitted twice")
                self.keys[worker] = key
            case Answered():
                worker = self.cohorts[record.round][record.slot]
                key = self.keys.get(worker, b"")
                _require(record.signature in (b"", 2 * key), f"no record has {worker}'s key")
                self._answered(record)
            case Masked():
                self._masked(record)
            case Summed(round_, sums):
                _require(self.masked is not None, f"round {round_} is summed before it is masked")
                _require(self.summed is None, f"round {round_} is summed twice")
                _require(sums in (self._plain_sums(), ()), f"round {round_} is not the plain sum")
                _require(bool(sums) or self.may_fail, f"round {round_} lost its sum for nothing")
                self.summed = record
            case Committed():
                self._committed(record)
            case Diverged():
                self._diverged(record)
            case Paused():
                _require(not self.paused, "paused twice")
                self.paused = True
            case Resumed(rate_factor):
                _require(self.paused, "resumed without a pause")
                self.paused = False
                self.rate_factor *= rate_factor
            case Stopped(round_):
                _require(round_ == self.open_round - 1, f"ended after round {round_}")
                self.stopped = True
            case Excluded(worker=worker):
                _require(worker not in self.excluded, f"{worker} is excluded twice")
                self.excluded.add(worker)
                self.void |= {
                    (answer.round, answer.slot)
                    for answer in self.answers.values()
                    if self.cohorts[answer.round][answer.slot] == worker
                }
            case Readmitted(worker=worker):
                _require(worker in self.excluded, f"{worker} is readmitted, but not excluded")
                self.excluded.remove(worker)
            case _:
                pass

    def forget(self, record: Opened) -> None:
        """The disk lost the newest record."""
        del self.cohorts[record.round][record.first_slot :]
        del self.rates[record.round][record.first_slot :]

    def sent(self, worker: str, answer: SendAnswer) -> None:
        """A worker sent an answer."""
        self.sent_answers.add((worker, replace(answer, head64=None)))

    def revealed(self, worker: str, sent: SendSumStep) -> None:
        """A worker helped to unmask a sum."""
        before = self.revelations.setdefault((worker, sent.ticket.round), sent)
        _require(before == sent, f"{worker} helps to unmask a second sum of one round: {sent}")
        _require(
            sent.ticket.round in self.unmasked_rounds,
            f"{worker} helps to unmask round {sent.ticket.round} before that is durable",
        )

    def acknowledged(self, worker: str, ticket: Ticket) -> None:
        """A worker was told that its answer is durable."""
        stored = self.answers.get((ticket.round, ticket.slot))
        _require(
            stored is not None, f"{worker} got an ack for {ticket}, which is not in the journal"
        )
        assert stored is not None
        _require(
            (worker, _answer_of(stored, ticket)) in self.sent_answers,
            f"{worker} got an ack for {ticket}, but the journal holds {stored}",
        )

    def at_end(self, final: dict[str, bytes], flipped: set[str]) -> None:
        """Everyone has left."""
        _require(
            self.stopped or self.open_round == self.config.rounds + 1,
            f"the run ended in round {self.open_round}",
        )
        for worker, weights in final.items():
            _require(
                (weights == self.weights[-1]) != (worker in flipped),
                f"{worker} ends with other weights than the journal's",
            )

    def _answered(self, record: Answered) -> None:
        what = f"answer to round {record.round}, slot {record.slot}"
        age = self.open_round - record.round
        _require(0 <= age <= self.config.staleness_max, f"{what} outside its rounds")
        _require((record.round, record.slot) not in self.answers, f"second {what}")
        self.answers[record.round, record.slot] = record
        if self._is_sound(record):
            worker = self.cohorts[record.round][record.slot]
            grads, loss, rows = self._oracle(record)
            grads = () if self.config.secure_aggregation else grads
            _require(
                record.projected_grads == grads
                and record.rows == (rows if self.config.weighting == "rows" else None)
                and record.mean_loss == (loss if self.config.report_losses else None),
                f"{what} by {worker} was not measured on that slot's seed and that round's weights",
            )

    def _oracle(self, record: Answered) -> tuple[tuple[float, ...], float, int]:
        """What the worker's data gives for an answer's slot, and how many rows it has."""
        worker = self.cohorts[record.round][record.slot]
        grads, loss = measure(worker, self._seeds(record), self.weights[record.round - 1])
        return grads, loss, rows_of(worker)

    def _is_sound(self, record: Answered) -> bool:
        truth = digest64_of(self.weights[record.round - 1])
        return record.weights_digest64 in (None, truth)

    def _diverged(self, record: Diverged) -> None:
        truth = digest64_of(self.weights[record.round])
        _require(
            record.expected_digest64 == truth and record.found_digest64 != truth,
            f"{record.party} is honest, but {record} was recorded",
        )
        self.named.add((record.round, record.party, record.found_digest64))

    def _committed(self, record: Committed) -> None:
        round_ = record.round
        _require(round_ == self.open_round, f"commit of round {round_} out of turn")
        if self.config.secure_aggregation:
            sound = self._in_sum(round_)
        else:
            sound = self._buffered(record) if self.config.buffer_answers else self._own(round_)
        most = self.config.answers_max
        _require(
            self.config.quorum <= len(sound) <= most, f"round {round_} has {len(sound)} answers"
        )
        for answer in sound:
            key = (answer.round, answer.slot)
            _require(key not in self.committed, f"the answer to {key} is committed twice")
            self.committed.add(key)
            self.ages.append(round_ - answer.round)
        self._check_pairs(record, sound)
        _require(
            record.rounding_seed == rounding_seed_of(self.config.seed, round_), "rounding seed"
        )
        if self.pool is not None:
            drawn = [self._seeds(answer) for answer in sound]
            for seeds, grads in zip(drawn, self._clipped(sound), strict=True):
                self.pool.measured(seeds, grads)
            self.pool.commit(record)
        self.masked = self.summed = None
        sizes = [_size(a.projected_grads) for a in sound if any(a.projected_grads)]
        self.usual_sizes += [statistics.median_low(sizes)] if sizes else []
        self.weights.append(weights_after(self.weights[-1], record))

    def _masked(self, record: Masked) -> None:
        """A sum may be unmasked: of enough workers, all with the run's weights, once a round."""
        _require(record.round == self.open_round, f"{record} is not of the open round")
        _require(self.masked is None, f"round {record.round} has a second sum")
        self.masked, self.may_fail = record, not self.is_calm
        self.unmasked_rounds.add(record.round)
        for slot in record.slots:
            answer = self.answers.get((record.round, slot))
            _require(answer is not None and self._is_sound(answer), f"{record} has unsound {slot}")

    def _plain_sums(self) -> tuple[int, ...]:
        """What the integers of those in the sum add up to."""
        assert self.masked is not None
        answers = [self.answers[self.masked.round, slot] for slot in self.masked.slots]
        integers = [quantised(self._oracle(answer)[0], self.config) for answer in answers]
        return tuple(map(sum, zip(*integers, strict=True)))

    def _in_sum(self, round_: int) -> list[Answered]:
        """The answers that the round's sum is of."""
        assert self.masked is not None, f"round {round_} is committed without a sum"
        assert self.summed is not None, f"round {round_} is committed without a sum"
        self.sum_sizes.append(len(self.masked.slots) if self.summed.sums else 0)
        return [self.answers[round_, slot] for slot in self.masked.slots]

    def _own(self, round_: int) -> list[Answered]:
        """What the commit of a synchronous round must be made of."""
        answers = [
            self.answers[key] for key in sorted(self.answers.keys() - self.void) if key[0] == round_
        ]
        sound = [answer for answer in answers if self._is_sound(answer)]
        for answer in answers:
            key = (round_ - 1, self.cohorts[round_][answer.slot], answer.weights_digest64)
            _require(answer in sound or key in self.named, f"{key} was not named by round {round_}")
        return sound[: self.config.cohort_size_max]

    def _buffered(self, record: Committed) -> list[Answered]:
        """The answers that the commit of a buffered round names; they are sound and not too old."""
        answers = [self.answers[place] for place in record.answers if place in self.answers]
        _require(len(answers) == len(record.answers), f"{record} holds an answer that nobody gave")
        for answer in answers:
            _require((answer.round, answer.slot) not in self.void, f"{answer} is taken out")
            age = record.round - answer.round
            _require(
                self._is_sound(answer) and 0 <= age <= self.config.staleness_max,
                f"round {record.round} commits {answer}, which is {age} rounds old or unsound",
            )
        return answers

    def _seeds(self, answer: Answered) -> tuple[int, ...]:
        return seeds_of(self.config, answer.round, answer.slot, self.pool)

    def _clipped(self, sound: list[Answered]) -> list[tuple[float, ...]]:
        """The oracle's scalars as the contract lets them into the commit."""
        # They were compared with the journaled ones when those were appended.
        given = [self._oracle(answer)[0] for answer in sound]
        sizes = [size for size in [*map(_size, given), *self.usual_sizes[-8:]] if size]
        if not self.config.clip_median_factor or not sizes:
            return given
        usual = statistics.median_low(sizes)
        spread = self.config.clip_spread
        limit = self.config.clip_median_factor * usual * (1 + spread / len(given[0]))
        dropped = self.config.clip_drop_factor * (self.config.clip_median_factor * usual)
        most = max(limit, dropped) if dropped else math.inf
        return [
            tuple(0.0 if _size(grads) > most else grad * (limit / _size(grads)) for grad in grads)
            if _size(grads) > limit
            else grads
            for grads in given
        ]

    def _combined(self, column: Sequence[float], answers: Sequence[tuple[float, ...]]) -> float:
        """What the contract makes of the scalars along one direction."""
        if self.config.aggregation == "sign_vote":
            sizes = [size for size in map(_size, answers) if size]
            vote = sum(grad > 0 for grad in column) - sum(grad < 0 for grad in column)
            return math.copysign(statistics.median_low(sizes), vote) if vote else 0.0
        if self.config.aggregation == "median":
            return statistics.median(column)
        cut = min(int(self.config.trimmed_share * len(column)), (len(column) - 1) // 2)
        kept = sorted(column)[cut : len(column) - cut]
        return math.fsum(kept) / len(kept)

    def _factor(self, terms: list[tuple[int, float, float]], losses: list[float]) -> float:
        """What the contract lets the commit's directions multiply its step by."""
        at = self.config.rate_directions
        if not at:
            return 1.0
        steps = self.config.local_steps
        directions = len({seed for seed, _, _ in terms}) / steps
        gain = math.fsum(-(term * grad) for _, grad, term in terms) / steps
        loss = statistics.median_low(losses) if losses else 0.0
        limit = 2.0 * (loss if loss > 0 else math.log(2))
        return directions * (gain + limit) / (directions * gain + at * limit)

    def _check_pairs(self, record: Committed, sound: list[Answered]) -> None:
        """The commit holds what the oracle's scalars come to, once for each direction."""
        total = sum(answer.rows or 1 for answer in sound)
        terms: list[tuple[int, float, float]] = []
        losses = [answer.mean_loss for answer in sound if answer.mean_loss is not None]
        clipped = self._clipped(sound)
        has_step = True
        if self.summed is not None:
            has_step, total = bool(self.summed.sums), 1
            sums = self.summed.sums or (0,) * self.config.pairs_per_answer
            clipped = [mean_of_sums(sums, len(sound), self.config)]
            sound = sorted(sound, key=lambda answer: self.rates[answer.round][answer.slot])
        elif self.config.aggregation != "mean":
            # One answer stands for all, whoever gave it.
            clipped = [tuple(map(self._combined, zip(*clipped, strict=True), repeat(clipped)))]
            losses = [statistics.median_low(losses)] if losses else []
            total = 1
        for answer, grads in zip(sound, clipped, strict=False):
            seeds = self._seeds(answer)
            discount = (1.0 + record.round - answer.round) ** -self.config.staleness_exponent
            rate = self.rates[answer.round][answer.slot] * discount
            for seed, grad in zip(seeds, grads, strict=True):
                term = -(rate * grad * (answer.rows or 1))
                terms.append((seed, grad, term / (total * self.config.probes)))
        factor = self._factor(terms, losses)
        wanted: dict[int, list[float]] = {}
        for seed, _, term in terms:
            wanted.setdefault(seed, []).append(_binary32(term * factor))
        wanted_sums = {seed: _binary32(math.fsum(terms)) for seed, terms in wanted.items()}
        rate_factor = schedule_factor(self.config, record.round) * self.rate_factor * has_step
        decay = decay_of(self.config, rate_factor * min(1.0, factor))
        whole = decay * (self.pool.decay if self.pool is not None and record.from_base else 1.0)
        _require(record.decay == _binary32(whole), f"round {record.round} decays otherwise")
        if record.from_base:
            assert self.pool is not None
            for number, before in enumerate(self.pool.coefficients):
                seed = self.pool.first_seed + number
                wanted_sums[seed] = _binary32(decay * before + wanted_sums.get(seed, 0.0))
        found = {
            seed_range.first_seed + number: coefficient
            for seed_range in record.seed_ranges
            for number, coefficient in enumerate(seed_range.coefficients)
        }
        _require(
            found == wanted_sums,
            f"round {record.round} commits {found}, the oracle says {wanted_sums}",
        )


def _size(grads: Sequence[float]) -> float:
    return math.sqrt(math.fsum(grad * grad for grad in grads) / len(grads))


def _answer_of(record: Answered, ticket: Ticket) -> SendAnswer:
    return SendAnswer(ticket, record.scalars)


def _binary32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ViolationError(sentence)
