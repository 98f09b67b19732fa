"""The coordinator's round machine: no clock, no socket, no disk, no entropy.

    machine = RoundMachine()
    for record in stored:               # a restart folds what the journal holds
        machine.apply(record)
    ready = machine.start(now_ms)       # then a new epoch
    ready = machine.step(event)         # then one event at a time

The driver owes every `Ready` in this order: append `records` durably, send each `Committed` among them
to every connected worker, then send `messages`. A failed append ends the process.

`step` decides. What a restart must rebuild lives in `RunState` and changes only in `apply`, which a
live step and a restart both go through; what a restart may forget lives in `RoundMachine`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from fedmezo_core.config import COHORT_MAX, RunConfig
from fedmezo_core.errors import (
    ConfigError,
    EquivocationError,
    JournalCorruptError,
    JournalError,
    ProtocolError,
    StaleTicketError,
    UnknownWorkerError,
)
from fedmezo_core.events import (
    Ack,
    AnswerReceived,
    Assign,
    Expel,
    Finish,
    Ready,
    Refuse,
    ReplicaDigest,
    ReplicaEvaluated,
    RoundEvent,
    RoundMessage,
    Tick,
    Ticket,
    UnableReceived,
    Work,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.machines.aggregate import (
    Share,
    coefficients_of,
    decay_of,
    staleness_discount,
    to_binary32,
)
from fedmezo_core.machines.answers import checked, content_of, is_digest_round
from fedmezo_core.machines.cohort import REPLICA_PARTY, agreed_digest, choose_cohort
from fedmezo_core.machines.health import Health
from fedmezo_core.machines.rates import SIGNAL_ROUNDS, own_rates, schedule_factor, update_distances
from fedmezo_core.machines.seeds import Pool, seed_ranges_of, seeds_of
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Paused,
    Record,
    Resumed,
    RoundSlot,
    SeedRange,
    SignedHead,
    Snapshotted,
    Started,
    Stopped,
    rounding_seed_of,
)

RECENT_ROUNDS_MAX = 1000
"""Summaries of rounds, evaluations and divergences kept for the status."""
DIGESTS_KEPT_MAX = 8
"""Rounds whose agreed digest, and whose replica digest, is remembered; beside those that an answer of a
buffered run may be old."""
WORKERS_SEEN_MAX = 4 * COHORT_MAX
"""Workers whose figures are kept for the status; the longest gone are forgotten first."""
COMPLAINT_CHARS_MAX = 512
"""Longest complaint kept."""
FRUITLESS_DEADLINES_MAX = 2
"""Deadlines in a row at which every worker had said that it cannot measure, before the run pauses."""


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


class Accepted(NamedTuple):
    """An answer in the journal, with the epoch of the ticket that it was given to."""

    epoch: int
    record: Answered


_accepted_of: Callable[[tuple[int, Answered]], Accepted] = partial(tuple.__new__, Accepted)


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """A committed round, for the status. `mean_loss` is in nats, None if no answer carried one."""

    round: int
    mean_loss: float | None
    answers: int


@dataclass(slots=True)
class RoundState:
    """One round's slots, and the answers to them."""

    round: int
    cohort: list[str] = field(default_factory=list)
    """Worker of each slot. A worker found diverged may come back under a later slot, and one of a
    buffered run takes one slot after the other."""
    slots: dict[str, int] = field(default_factory=dict)
    """Worker -> its newest slot that counts. Invariant: none of these is in `excluded`."""
    answers: dict[int, Accepted] = field(default_factory=dict)
    """Slot -> the answer that stands."""
    excluded: set[int] = field(default_factory=set)
    """Answered slots that were measured on diverged weights: never committed."""
    committed: set[int] = field(default_factory=set)
    """Answered slots that a commit holds, of this round or of a later one."""
    rates: list[float] = field(default_factory=list)
    """Learning rate of each slot."""
    eps: float | None = None
    """The round's, or None for the contract's."""

    @property
    def counting(self) -> int:
        """Count of answers that may yet be committed."""
        return len(self.answers) - len(self.excluded) - len(self.committed)

    def counted(self) -> list[Answered]:
        """Answers that may yet be committed, in slot order."""
        left: Set[int] = self.answers.keys()
        if self.excluded or self.committed:
            left = left - self.excluded - self.committed
        return [self.answers[slot].record for slot in sorted(left)]


@dataclass(slots=True)
class RunState:
    """The journal, folded. Equal journals give equal states, live or after a restart."""

    genesis: Genesis | None = None
    epoch: int = 0
    round: int = 0
    """Last committed round."""
    open: RoundState | None = None
    """Invariant: `open.round == round + 1`. In a buffered run it has no slots as long as only answers to
    earlier rounds wait for its commit."""
    earlier: deque[RoundState] = field(default_factory=deque)
    """The newest committed rounds, oldest first: those whose slots may still be answered, and one more,
    so that a lost acknowledgement can be given again."""
    agreed: dict[int, int] = field(default_factory=dict)
    """Round -> first 64 bits of the digest of the weights after it, for the newest rounds known."""
    diverged: dict[str, Diverged] = field(default_factory=dict)
    """Parties found diverged whose weights have not agreed again in a committed digest round."""
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
    """Of runs that draw their seeds from one."""
    losses: dict[str, deque[float]] = field(default_factory=dict)
    """Worker -> mean losses of its newest committed answers; the longest silent come first."""
    distances: dict[str, float] = field(default_factory=dict)
    """Worker -> how far its newest committed update was from the mean update."""
    copied: bool = False
    """Whether these are a copy's commits, without how they came about."""

    def apply(self, record: Record) -> None:
        """Fold one record; `JournalCorruptError` if it cannot follow those before."""
        if type(record) is Answered and self.genesis is not None:  # nearly all records are
            self._apply_answered(record)
            return
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
            case Started(epoch):
                if epoch != self.epoch + 1:
                    raise _misplaced(f"a start of epoch {epoch}", f"epoch {self.epoch + 1}")
                self.epoch, self.copied = epoch, False
            case Opened():
                self._apply_opened(record)
            case Answered():
                self._apply_answered(record)
            case Committed():
                self._apply_committed(record, self.genesis.config)
            case Diverged():
                self._apply_diverged(record)
            case Evaluated():
                self.evaluations.append(record)
                self.health.evaluated(record, self.genesis.config.pause_loss_factor)
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
            case Stopped():
                if self.stopped is not None or record.round != self.round:
                    raise _misplaced(
                        f"an end after round {record.round}",
                        f"an end after round {self.round}, once",
                    )
                self.stopped = record
            case Snapshotted(round_):
                if not 1 <= round_ <= self.round:
                    raise _misplaced(
                        f"a snapshot of round {round_}", f"one of a round from 1 to {self.round}"
                    )
            case SignedHead(epoch, round_):
                if self.open is not None or round_ != self.round or epoch < self.epoch:
                    raise _misplaced(
                        f"a checkpoint of epoch {epoch}, round {round_}",
                        f"one of epoch {self.epoch} or later, round {self.round}, between two rounds",
                    )
                self.epoch, self.copied = epoch, True

    @property
    def closed(self) -> RoundState | None:
        """The last committed round."""
        return self.earlier[-1] if self.earlier else None

    def held(self, round_: int) -> RoundState | None:
        """The round with its slots, if it is open or one of the newest committed ones."""
        if self.open is not None and self.open.round == round_:
            return self.open
        place = round_ - self.round - 1 + len(self.earlier)
        return self.earlier[place] if 0 <= place < len(self.earlier) else None

    def age(self, round_: int) -> int:
        """How many rounds old an answer of `round_` is for the next commit."""
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

    def worker_of(self, place: RoundSlot) -> str:
        """Whose slot it is; of a round that is held."""
        held = self.held(place.round)
        assert held is not None
        return held.cohort[place.slot]

    def assignment_of(self, worker: str) -> RoundSlot | None:
        """What the worker was assigned last, if that can still be answered and is not."""
        for held in reversed(list(self.answerable())):
            slot = held.slots.get(worker)
            if slot is not None:
                return None if slot in held.answers else RoundSlot(held.round, slot)
        return None

    def outstanding(self) -> dict[str, RoundSlot]:
        """Worker -> what `assignment_of` says, by round and slot."""
        workers = {worker for held in self.answerable() for worker in held.slots}
        found = [(self.assignment_of(worker), worker) for worker in workers]
        return {worker: place for place, worker in sorted(p for p in found if p[0]) if place}

    def signals(self) -> Mapping[str, float]:
        """What personal learning rates follow: of each worker, as far as it is known."""
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
        """What each answer puts into the next commit's mean."""
        assert self.genesis is not None
        config, pool = self.genesis.config, self.pool
        shares = []
        for round_, of_round in groupby(answers, key=attrgetter("round")):
            held = self.held(round_)
            assert held is not None
            discount = staleness_discount(config, self.age(round_))
            for answer in of_round:
                seeds = seeds_of(config, round_, answer.slot, pool)
                rate = held.rates[answer.slot] * discount
                shares.append(Share(seeds, answer.projected_grads, rate, answer.rows or 1))
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
                f"an opening of round {record.round} with workers {', '.join(record.workers) or '-'}",
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
        """Whether the worker can have no more slots of the round: one, or in a buffered run one a time."""
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
        if is_digest_round(config, record.round) != (record.weights_digest64 is not None):
            raise _misplaced(
                f"an answer to slot {record.slot} of round {record.round} "
                f"{'without' if record.weights_digest64 is None else 'with'} a digest",
                "a digest in each answer of a digest round and in no other",
            )
        held.answers[record.slot] = _accepted_of((self.epoch, record))
        if not is_open:
            self._open_for_waiting()

    def _open_for_waiting(self) -> None:
        """Answers to earlier rounds wait for a commit, so there is a round that it will close."""
        assert self.genesis is not None
        if self.open is None and self.counting and self.round < self.genesis.config.rounds:
            self.open = RoundState(self.round + 1)

    def _apply_committed(self, record: Committed, config: RunConfig) -> None:
        current = self.open
        if self.copied and current is None and record.round == self.round + 1:
            if self.pool is not None:
                self.pool.commit(record)
            self.recent_rounds.append(RoundSummary(record.round, None, len(record.seed_ranges)))
            self.round = record.round
            return
        if current is None or record.round != current.round:
            raise _misplaced(
                f"a commit of round {record.round}",
                f"a commit of round {self.round + 1}, once open",
            )
        answers = self._answers_of(record, config)
        held_by_round = {held.round: held for held in self.answerable()}
        workers = [held_by_round[answer.round].cohort[answer.slot] for answer in answers]
        self._learn(record, workers, answers, config)
        for worker, answer in zip(workers, answers, strict=True):
            if answer.weights_digest64 is not None:
                self.agreed[answer.round - 1] = answer.weights_digest64
                if self.diverged:
                    self.diverged.pop(worker, None)
        _keep_newest(self.agreed, config)
        losses = [answer.mean_loss for answer in answers if answer.mean_loss is not None]
        mean_loss = math.fsum(losses) / len(losses) if losses else None
        self.recent_rounds.append(RoundSummary(record.round, mean_loss, len(answers)))
        if mean_loss is not None:
            self.health.trained(record.round, mean_loss, config.pause_loss_factor)
        for answer in answers:
            held_by_round[answer.round].committed.add(answer.slot)
        self.round, self.open = record.round, None
        self.earlier.append(current)
        while len(self.earlier) > config.staleness_max + 1:
            self.earlier.popleft()
        self._open_for_waiting()

    def _answers_of(self, record: Committed, config: RunConfig) -> list[Answered]:
        """The answers that a commit is made of; `JournalCorruptError` if it cannot be made of them."""
        waiting = self.counted()
        if config.buffer_answers:
            by_place = {RoundSlot(answer.round, answer.slot): answer for answer in waiting}
            answers = [by_place[place] for place in record.answers if place in by_place]
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

    def _learn(
        self, record: Committed, workers: list[str], answers: list[Answered], config: RunConfig
    ) -> None:
        """Keep what later rates and seeds depend on."""
        if config.personal_rate in ("last_loss", "mean_loss"):
            for worker, answer in zip(workers, answers, strict=True):
                if answer.mean_loss is not None:
                    losses = self.losses.pop(worker, None) or deque(maxlen=SIGNAL_ROUNDS)
                    losses.append(answer.mean_loss)
                    self.losses[worker] = losses
            _keep_latest(self.losses)
        measures_distances = config.personal_rate == "update_distance"
        if not measures_distances and self.pool is None:
            return
        shares = self.shares(answers)
        if measures_distances:
            self._keep_distances(workers, shares, config)
        if self.pool is not None:
            outside = [r for r in record.seed_ranges if not self.pool.holds(r)]
            if outside:
                raise _misplaced(
                    f"a commit of round {record.round} with seed {outside[0].first_seed:016x}",
                    f"seeds of the run's pool of {config.pool_size}",
                )
            self.pool.commit(record)
            for share in shares:
                self.pool.measured(share.seeds, share.projected_grads)

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
        _keep_latest(self.distances)

    def _apply_diverged(self, record: Diverged) -> None:
        self.divergences.append(record)
        self.diverged.pop(record.party, None)
        self.diverged[record.party] = record
        if len(self.diverged) > COHORT_MAX:
            del self.diverged[next(iter(self.diverged))]
        held = self.held(record.round + 1)
        if held is None:
            return
        differing = {
            answer.slot
            for answer in held.counted()
            if held.cohort[answer.slot] == record.party
            and answer.weights_digest64 == record.found_digest64
        }
        held.excluded |= differing
        if held.slots.get(record.party) in differing:
            del held.slots[record.party]


@dataclass(slots=True)
class WorkerView:
    """One worker since this coordinator start, for the status and for deciding."""

    worker: str
    ready: bool = False
    """A session is open, and its weights are not known to differ."""
    rounds_answered: int = 0
    """Rounds committed with its answer."""
    mean_loss: float | None = None
    """Of its last accepted answer, in nats."""
    complaint: str = ""
    """Last thing it could not do or was refused for in this session; empty if none."""
    told_diverged: bool = False
    """It was connected when it was told that its weights differ."""
    learning_rate: float | None = None
    """Of its last assignment."""


class RoundMachine:
    """Opens rounds, takes answers, compares weights, commits. See the module's text for its use."""

    def __init__(self) -> None:
        self.state = RunState()
        self._started = False
        self._workers: dict[str, WorkerView] = {}
        self._now_ms = 0
        self._closes_at_ms = 0
        # Worker -> its assignment that can still be answered: neither answered, nor given up, nor too old.
        self._awaited: dict[str, RoundSlot] = {}
        # Ready workers, without and with such an assignment.
        self._idle: set[str] = set()
        self._working: set[str] = set()
        self._replica_digests: dict[int, int] = {}
        self._replica_agreed_round = -1
        # Deadlines in a row at which the open round had no answer and no worker that could give one.
        self._fruitless_deadlines = 0
        self._records: list[Record] = []
        self._messages: list[RoundMessage] = []

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
    def awaited(self) -> tuple[str, ...]:
        """Workers that have an assignment which they can still answer, by round and slot."""
        return tuple(sorted(self._awaited, key=self._awaited.__getitem__))

    @property
    def awaits_answers(self) -> bool:
        """Whether the open round waits for any worker."""
        return bool(self._awaited)

    @property
    def reason(self) -> str:
        """Why the run is paused, or was stopped early; empty if it is neither."""
        found = self.state.stopped or self.state.paused
        return found.reason if found is not None else ""

    @property
    def closes_at_ms(self) -> int | None:
        """When the open round may close on its quorum, on the clock of `Tick`; None if none is open.

        The driver owes a `Tick` then; ticks in between are welcome.
        """
        return None if self.state.open is None else self._closes_at_ms

    @property
    def diverged(self) -> frozenset[str]:
        """Parties whose weights were found to differ and have not agreed since."""
        parties = set(self.state.diverged)
        if self._replica_trusted:
            parties.discard(REPLICA_PARTY)
        return frozenset(parties)

    @property
    def recent_rounds(self) -> Sequence[RoundSummary]:
        """The newest committed rounds, oldest first; to be read, not changed."""
        return self.state.recent_rounds

    @property
    def workers(self) -> Mapping[str, WorkerView]:
        """Every worker seen since the start, by name; to be read, not changed."""
        return self._workers

    # ------------------------------------------------------------ driving it

    def restore(self, state: RunState) -> None:
        """Begin with what dropped records came to; before everything else. It is the machine's from now on."""
        assert not self._started, "a journal begins once"
        self.state = state

    def apply(self, record: Record) -> None:
        """Fold a durable record: all of the journal before `start`.

        Later, the driver applies what it appends by itself: divergences that other comparisons found.
        Raises `JournalCorruptError` if the record cannot follow those before.
        """
        self.state.apply(record)

    def start(self, now_ms: int = 0) -> Ready:
        """Begin a new epoch at `now_ms`; its record must be durable before anything is sent.

        An open round goes on with the answers it has, and with a whole deadline from now.
        Raises `JournalError` without a genesis.
        """
        assert not self._started, "a machine starts once"
        self._closes_at_ms = now_ms + self.config.deadline_ms
        self._now_ms = now_ms
        self._started = True
        self._awaited = self.state.outstanding()
        self._record(Started(self.state.epoch + 1))
        return self._take_ready()

    def resume(self, rate_factor: float) -> Ready:
        """Let a paused run go on, with learning rates `rate_factor` times what they were.

        Raises `ConfigError` if the run is not paused, or the factor not above 0.
        """
        assert self._started, "start comes before a resumption"
        if self.phase is not Phase.PAUSED:
            raise ConfigError(
                f"The run is {self.phase.value}, not paused, so there is nothing to resume; start the "
                "coordinator without resume."
            )
        if not (math.isfinite(rate_factor) and rate_factor > 0):
            raise ConfigError(
                f"The learning rates cannot be multiplied by {rate_factor!r}; give a number above 0."
            )
        self._record(Resumed(rate_factor))
        self._fruitless_deadlines = 0
        self._closes_at_ms = self._now_ms + self.config.deadline_ms
        self._advance()
        return self._take_ready()

    def step(self, event: RoundEvent) -> Ready:
        """Take one event; the driver owes what is returned before it calls again."""
        assert self._started, "start comes before the first step"
        match event:
            case WorkerReady(worker):
                self._worker_ready(worker)
            case WorkerLost(worker):
                if worker in self._workers:
                    self._set_ready(worker, False)
            case AnswerReceived():
                try:
                    self._answer(event)
                except ProtocolError as error:
                    self._refuse(event, error)
            case UnableReceived():
                try:
                    self._unable(event)
                except ProtocolError as error:
                    self._refuse(event, error)
            case ReplicaDigest():
                self._replica_digest(event)
            case ReplicaEvaluated(evaluation):
                self._record(evaluation)
                self._judge_health()
            case Tick(now_ms):
                self._now_ms = max(self._now_ms, now_ms)
        self._advance()
        return self._take_ready()

    # ------------------------------------------------------------ events

    def _worker_ready(self, worker: str) -> None:
        if worker == REPLICA_PARTY:
            self._messages.append(
                Expel(
                    worker,
                    f"{REPLICA_PARTY!r} is the name of the coordinator's own weights; "
                    "start the worker under another name.",
                )
            )
            return
        view = self._view(worker)
        view.complaint = ""
        known = self.state.diverged.get(worker)
        if known is not None and not view.told_diverged:
            # The coordinator went down, or the worker was away, between finding out and telling.
            view.told_diverged = True
            self._set_ready(worker, False)
            self._messages.append(Expel(worker, _diverged_sentence(known)))
            return
        self._set_ready(worker, True)
        if self.phase is Phase.FINISHED:
            self._messages.append(Finish(worker, self.state.round))
        elif self.phase is not Phase.PAUSED:
            place = self.state.assignment_of(worker)
            if place is not None:
                self._assign(place.round, (place.slot,))

    def _answer(self, event: AnswerReceived) -> None:
        state, ticket = self.state, event.ticket
        view = self._ready_view(event.worker)
        held = state.held(ticket.round)
        if held is None or not self._owns(held, ticket.slot, event.worker):
            raise self._stale(event.worker, ticket)
        accepted = held.answers.get(ticket.slot)
        if ticket.epoch != (state.epoch if accepted is None else accepted.epoch):
            raise self._stale(event.worker, ticket)
        if accepted is None and held is not state.open:
            self._check_not_too_late(event)
        record = checked(event, held.rates[ticket.slot], self.config)
        if accepted is None:
            if state.open is None:
                self._restart_deadline()
            self._record(record)
            self._await_no_more(event.worker, RoundSlot(ticket.round, ticket.slot))
            view.mean_loss = record.mean_loss
        elif content_of(record) != content_of(accepted.record):
            raise EquivocationError(
                f"Worker {event.worker} gave a second, different answer to slot {ticket.slot} of "
                f"round {ticket.round}; the first one stands: drop this one."
            )
        self._messages.append(Ack(event.worker, ticket))

    def _check_not_too_late(self, event: AnswerReceived) -> None:
        """Refuse the answer to a committed round's ticket that no later commit can hold."""
        ticket, oldest = event.ticket, self.config.staleness_max
        if self.phase is not Phase.FINISHED and self.state.age(ticket.round) <= oldest:
            return
        late = (
            f", and it is {self.state.age(ticket.round)} rounds old, more than staleness_max_rounds = "
            f"{oldest}"
            if oldest and self.phase is not Phase.FINISHED
            else ""
        )
        raise StaleTicketError(
            f"Round {ticket.round} was committed without the answer of worker {event.worker} to "
            f"slot {ticket.slot}{late}; drop the answer and wait for the next assignment."
        )

    def _unable(self, event: UnableReceived) -> None:
        ticket, held = event.ticket, self.state.held(event.ticket.round)
        view = self._ready_view(event.worker)
        if (
            held is None
            or self.state.age(ticket.round) > self.config.staleness_max
            or ticket.epoch != self.state.epoch
            or not self._owns(held, ticket.slot, event.worker)
        ):
            raise self._stale(event.worker, ticket)
        view.complaint = event.reason[:COMPLAINT_CHARS_MAX]
        self._await_no_more(event.worker, RoundSlot(ticket.round, ticket.slot))

    def _replica_digest(self, event: ReplicaDigest) -> None:
        if event.round > self.state.round:
            return  # Of a round that is not in this journal: nothing to compare it with.
        self._replica_digests[event.round] = event.weights_digest64
        _keep_newest(self._replica_digests, self.config)
        self._judge_replica(event.round, self.state.agreed.get(event.round))

    # ------------------------------------------------------------ rounds

    def _advance(self) -> None:
        """Open, close and commit as far as what is known allows."""
        while self.phase in (Phase.WAITING, Phase.OPEN):
            if not (self._open() if self.state.open is None else self._close()):
                return

    def _open(self) -> bool:
        if len(self._idle) + len(self._working) < self.config.workers_min:
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
        overdue = self._now_ms >= self._closes_at_ms
        if config.buffer_answers:
            wanted = config.quorum if overdue else config.buffer_answers
        elif self._awaited and not overdue and current.counting < config.cohort_size_max:
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

    def _agreeing(self) -> list[Answered]:
        """The answers measured on the run's weights; everyone else is recorded and sent away.

        Without those of which nobody can tell yet whether their weights are the run's.
        """
        agreeing: list[Answered] = []
        for held in list(self.state.answerable()):
            if not is_digest_round(self.config, held.round):
                agreeing += held.counted()
            elif held.counting and (expected := self._expected_digest(held)) is not None:
                self._send_away_differing(held, expected)
                self._judge_replica(held.round - 1, expected)
                agreeing += held.counted()
        return agreeing

    def _expected_digest(self, held: RoundState) -> int | None:
        """What the weights before `held` should be: as agreed at an earlier commit, or by a vote now.

        A worker has one vote, however many answers. Fewer workers than the quorum decide nothing without
        the replica.
        """
        before = held.round - 1
        if before in self.state.agreed:
            return self.state.agreed[before]
        replica = self._replica_digests.get(before) if self._replica_trusted else None
        votes = {held.cohort[a.slot]: a.weights_digest64 or 0 for a in held.counted()}
        if replica is None and len(votes) < self.config.quorum:
            return None
        return agreed_digest(list(votes.values()), replica)

    def _send_away_differing(self, held: RoundState, expected: int) -> None:
        """Record who has other weights, once each, and end its session."""
        found = [(held.cohort[a.slot], a.weights_digest64 or 0) for a in held.counted()]
        for worker, digest64 in dict.fromkeys(found):
            if digest64 == expected:
                continue
            record = Diverged(held.round - 1, worker, digest64, expected)
            self._record(record)
            view = self._view(worker)
            view.told_diverged = view.ready
            if view.ready:
                self._messages.append(Expel(worker, _diverged_sentence(record)))
            self._set_ready(worker, False)

    def _judge_replica(self, round_: int, expected: int | None) -> None:
        """Compare the replica's digest after `round_`, if both are known; a new doubt is recorded."""
        found = self._replica_digests.get(round_)
        if found is None or expected is None:
            return
        if found == expected:
            self._replica_agreed_round = max(self._replica_agreed_round, round_)
        elif self._replica_trusted:
            self._record(Diverged(round_, REPLICA_PARTY, found, expected))

    def _commit(self, current: RoundState, answers: list[Answered]) -> None:
        workers = {self.state.worker_of(RoundSlot(answer.round, answer.slot)) for answer in answers}
        overdue = self._now_ms >= self._closes_at_ms
        self._record(self._committed(current, answers))
        late = {
            worker: place
            for worker, place in self._awaited.items()
            if self.state.age(place.round) > self.config.staleness_max
        }
        if overdue or self.config.buffer_answers:
            self._complain_of(late)
        for worker, place in late.items():
            self._await_no_more(worker, place)
        self._restart_deadline()
        self._fruitless_deadlines = 0
        for worker in workers:
            self._view(worker).rounds_answered += 1
        self._judge_health()
        if self.phase is Phase.FINISHED:
            self._finish_all()

    def _committed(self, current: RoundState, answers: list[Answered]) -> Committed:
        """The record that closes the round."""
        config, pool = self.config, self.state.pool
        shares = self.state.shares(answers)
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
        record = Committed(
            current.round,
            seed_ranges,
            rounding_seed_of(config.seed, current.round),
            decay_of(config, self._factor(current.round)),
            answers=tuple(RoundSlot(a.round, a.slot) for a in answers if config.buffer_answers),
        )
        if pool is None or current.round % config.rebase_every_rounds:
            return record
        return pool.from_base(record)

    def _complain_of(self, late: Mapping[str, RoundSlot]) -> None:
        config = self.config
        within = (
            f"before it was more than {config.staleness_max} rounds old"
            if config.buffer_answers
            else f"within {config.deadline_ms} ms"
        )
        for worker in late.keys() & self._working:
            round_ = late[worker].round
            self._view(worker).complaint = f"did not answer round {round_} {within}"

    def _judge_health(self) -> None:
        """Stop the run if it no longer gets better, pause it if it has gone wrong."""
        if self.phase in (Phase.FINISHED, Phase.PAUSED):
            return
        config, state = self.config, self.state
        if reason := state.health.no_better(config.early_stop_evaluations):
            self._record(Stopped(state.round, reason))
            self._finish_all()
        elif reason := state.health.gone_wrong(config.pause_loss_factor, config.pause_rounds):
            self._record(Paused(state.round, reason))

    def _finish_all(self) -> None:
        self._messages.extend(
            Finish(view.worker, self.state.round) for view in self._workers.values() if view.ready
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
            for worker, place in self.state.outstanding().items():
                if worker in self._idle or worker in self._working:
                    self._assign(place.round, (place.slot,))
        if added:
            self._add_slots(added)

    def _choose(self, current: RoundState) -> tuple[str, ...]:
        """Workers to give slots of `current` to: ready, without an assignment, as many as may work."""
        config = self.config
        if config.buffer_answers:
            room = max(0, config.cohort_size_max - len(self._working))
        else:
            room = max(1, config.cohort_size_max - current.counting)
        room = min(room, COHORT_MAX - len(current.cohort))
        if room <= 0:
            return ()
        free = [worker for worker in self._idle if self._is_free(current, worker)]
        return choose_cohort(config.seed, current.round, free, room)

    def _is_free(self, current: RoundState, idle: str) -> bool:
        """Whether a worker that has no assignment may be given a slot of `current`.

        One that said that it cannot measure stays out of the round. And a buffered round that has
        enough answers, of which nobody can tell yet whether they agree, needs more workers, not more
        answers.
        """
        slot = current.slots.get(idle)
        return slot is None or (
            slot in current.answers and current.counting < self.config.buffer_answers
        )

    def _pauses_fruitless(self, current: RoundState) -> bool:
        """Pause a run in which nobody can measure any more; weights that overflow look like this."""
        unable = [
            view
            for worker in current.slots
            if (view := self._workers.get(worker)) is not None and view.ready
        ]
        fruitless = bool(unable) and not current.answers and not self._awaited
        self._fruitless_deadlines = self._fruitless_deadlines + 1 if fruitless else 0
        if not self.config.pause_rounds or self._fruitless_deadlines < FRUITLESS_DEADLINES_MAX:
            return False
        self._record(
            Paused(
                self.state.round,
                f"no worker could measure round {current.round} in {self._fruitless_deadlines} "
                f"attempts; {unable[-1].worker} says: {unable[-1].complaint}"[:COMPLAINT_CHARS_MAX],
            )
        )
        return True

    def _factor(self, round_: int) -> float:
        """What the contract's learning rate is multiplied by in `round_`."""
        return schedule_factor(self.config, round_) * self.state.rate_factor

    def _add_slots(self, workers: tuple[str, ...]) -> None:
        config, round_, first_slot = self.config, self.state.round + 1, len(self.cohort)
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
            self._awaited[worker] = RoundSlot(round_, slot)
            self._sort_in(worker)
            self._view(worker).learning_rate = rate
            work = Work(seeds_of(config, round_, slot, pool), rate, eps, want_digest)
            self._messages.append(Assign(worker, Ticket(epoch, round_, slot), work, deadline_ms))

    def _restart_deadline(self) -> None:
        self._closes_at_ms = self._now_ms + self.config.deadline_ms

    # ------------------------------------------------------------ small parts

    @property
    def _replica_trusted(self) -> bool:
        """The replica votes unless it was found diverged and has not agreed with a round since."""
        found = self.state.diverged.get(REPLICA_PARTY)
        return found is None or self._replica_agreed_round > found.round

    def _set_ready(self, worker: str, ready: bool) -> None:
        self._view(worker).ready = ready
        self._sort_in(worker)

    def _await_no_more(self, worker: str, place: RoundSlot) -> None:
        if self._awaited.get(worker) == place:
            del self._awaited[worker]
            self._sort_in(worker)

    def _sort_in(self, worker: str) -> None:
        """Keep `_idle` and `_working` what they say they are."""
        view = self._workers.get(worker)
        self._idle.discard(worker)
        self._working.discard(worker)
        if view is not None and view.ready:
            (self._working if worker in self._awaited else self._idle).add(worker)

    @staticmethod
    def _owns(held: RoundState, slot: int, worker: str) -> bool:
        return 0 <= slot < len(held.cohort) and held.cohort[slot] == worker

    def _view(self, worker: str) -> WorkerView:
        view = self._workers.get(worker)
        if view is None:
            if len(self._workers) >= WORKERS_SEEN_MAX:
                gone = next((one for one in self._workers.values() if not one.ready), None)
                if gone is not None:
                    del self._workers[gone.worker]
            view = self._workers[worker] = WorkerView(worker)
        return view

    def _ready_view(self, worker: str) -> WorkerView:
        view = self._workers.get(worker)
        if view is None or not view.ready:
            raise UnknownWorkerError(
                f"Worker {worker} has not joined this coordinator start, or was sent away; "
                "open a new session with hello first."
            )
        return view

    def _stale(self, worker: str, ticket: Ticket) -> StaleTicketError:
        return StaleTicketError(
            f"Ticket (epoch {ticket.epoch}, round {ticket.round}, slot {ticket.slot}) of worker "
            f"{worker} is not open: this is epoch {self.state.epoch} and the last committed round is "
            f"{self.state.round}; drop it and wait for the next assignment."
        )

    def _refuse(self, event: AnswerReceived | UnableReceived, error: ProtocolError) -> None:
        view = self._workers.get(event.worker)
        # A stale ticket is no fault: an answer and a deadline may cross on the way.
        if view is not None and not isinstance(error, StaleTicketError):
            view.complaint = str(error)[:COMPLAINT_CHARS_MAX]
        self._messages.append(Refuse(event.worker, event.ticket, type(error).__name__, str(error)))

    def _record(self, record: Record) -> None:
        self.apply(record)
        self._records.append(record)

    def _take_ready(self) -> Ready:
        ready = Ready(tuple(self._records), tuple(self._messages))
        self._records.clear()
        self._messages.clear()
        return ready


def _diverged_sentence(record: Diverged) -> str:
    return (
        f"The weights of worker {record.party} after round {record.round} are not the run's: their "
        f"digest begins {_digest_hex(record.found_digest64)}, the run's "
        f"{_digest_hex(record.expected_digest64)}; restart the worker so that it rebuilds them from "
        "the base and the journal."
    )


def _digest_hex(digest64: int) -> str:
    """The digest's first 8 bytes, as `sha256sum` would print them."""
    return digest64.to_bytes(8, "little").hex()


def _keep_newest(by_round: dict[int, int], config: RunConfig) -> None:
    while len(by_round) > DIGESTS_KEPT_MAX + config.staleness_max:
        del by_round[min(by_round)]


def _keep_latest(by_worker: dict[str, Any]) -> None:
    while len(by_worker) > WORKERS_SEEN_MAX:
        del by_worker[next(iter(by_worker))]


def _misplaced(found: str, expected: str) -> JournalCorruptError:
    return JournalCorruptError(
        f"The journal holds {found} where {expected} must stand; "
        "restore the journal file from a copy."
    )
