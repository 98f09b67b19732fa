"""A whole federation in memory, on one thread, from one seed.

The round machine, the journal and the session machines are real. Their drivers, the network, the
clock and the disk are simulated, and break as the seed says: streams tear; messages are delayed,
doubled, lost or reordered; the coordinator and workers crash at the worst points and lose what was
not appended; clocks jump; runs pause; an operator pauses, resumes, stops, excludes and readmits;
weights flip. `Checker` knows the truth and raises `ViolationError`.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, FedMezoError, ProtocolError
from fedmezo_core.events import (
    Ack,
    Acknowledged,
    AnswerReceived,
    ApplyCommit,
    AskSum,
    Assign,
    Assigned,
    CommitReceived,
    Connected,
    Disconnected,
    Expel,
    Finish,
    FinishedByCoordinator,
    Leave,
    Measure,
    Measured,
    MeasureFailed,
    Ready,
    Refuse,
    RefusedByCoordinator,
    ReportWeights,
    RoundEvent,
    RoundMessage,
    SendAnswer,
    SendHello,
    SendSumStep,
    SendUnable,
    SessionEvent,
    SharesRevealed,
    SumAsked,
    SumReceived,
    Tick,
    Ticket,
    UnableReceived,
    WeightsReported,
    Welcomed,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import decode_record, encode_record, encode_records
from fedmezo_core.journal.journal import (
    MOVES_HEAD,
    ZERO_HASH,
    Entry,
    Journal,
    MemoryStore,
    Row,
    head_after,
)
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.session import SessionMachine
from fedmezo_core.records import Committed, Genesis, Opened, Paused, Record, Scalars, digest64_of
from fedmezo_core.trust.secure_aggregation.masking import ENTROPY_BYTES
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from tests.sim.checker import (
    BASE_WEIGHTS,
    Checker,
    ViolationError,
    measure,
    rows_of,
    weights_after,
)

TICK_MS = 200
HOUR_MS = 3_600_000
CALM_AFTER_MS = 5000
"""Time after the faults until everybody who was away is back."""
EVENTS_MAX = 60_000
"""A run that needs more has stopped making progress."""


_decoded = lru_cache(maxsize=256)(decode_record)
"""Of commits, which many parties read; the journal decodes anew each time."""


@dataclass(frozen=True)
class Scenario:
    """What one seed runs. Rates are per opportunity while faults last."""

    workers: int
    config: RunConfig
    replica: bool
    hostile: bool
    """The network also loses, doubles and reorders inside a stream, and delivers after it tore."""
    flips_max: int
    """Workers whose weights change behind their back."""
    lose_tail: bool
    """A crash of the coordinator loses the newest record if it is an `Opened`: a disk that lied."""
    heal_at_ms: int
    """Faults end here."""
    delay_ms_max: int
    tear_rate: float
    coordinator_crash_rate: float
    worker_crash_rate: float
    unable_rate: float
    double_rate: float
    drop_rate: float
    hold_rate: float = 0.0
    """Steps whose records wait for the next ones, to share an append: a crash loses them all."""
    clock_jump_rate: float = 0.0
    """Ticks that are an hour wrong; of those forward, the clock keeps the hour."""
    orders: int = 0
    """Orders that an operator gives, beside those that follow from them."""


def draw_learning(rng: random.Random) -> dict[str, Any]:
    """How the run learns: rates, averages and whose directions."""
    return {
        "schedule": rng.choice(("constant", "linear", "cosine")),
        "warmup_rounds": rng.choice((0, 1)),
        "weighting": rng.choice(("uniform", "rows")),
        "weight_decay": rng.choice((0.0, 0.1)),
        "personal_rate": rng.choice(("frozen", "update_distance", "random")),
        "seed_policy": rng.choice(("per_worker", "per_worker", "shared", "pool")),
        "pool_size": rng.choice((1, 3, 50)),
        "pool_sampling": rng.choice(("uniform", "weighted")),
        "rebase_every_rounds": rng.choice((1, 2, 3, 64)),
    }


def draw_buffering(rng: random.Random, learning: dict[str, Any], quorum: int) -> dict[str, Any]:
    """Whether rounds are buffered, which not every way to learn goes with."""
    is_shared = learning["seed_policy"] == "shared"
    is_weighted = (learning["seed_policy"], learning["pool_sampling"]) == ("pool", "weighted")
    if is_shared or is_weighted or rng.random() < 0.4:
        return {}
    return {
        "buffer_answers": quorum + rng.choice((0, 0, 1, 2, 6)),
        "staleness_max_rounds": rng.choice((0, 1, 3, 10)),
        "staleness_exponent": rng.choice((0.0, 0.5, 1.0)),
    }


def draw_aggregation(seed: int, learning: dict[str, Any]) -> str:
    """How answers along the same directions become one."""
    drawn = (learning["seed_policy"], learning["weighting"], learning["personal_rate"])
    if drawn != ("shared", "uniform", "frozen"):
        return "mean"
    return ("mean", "trimmed_mean", "median", "sign_vote")[seed // 36 % 4]


def secure_values(seed: int, workers: int, quorum: int, workers_min: int) -> dict[str, Any]:
    """What a run with secure aggregation has in place of what was drawn, for three workers or more.

    Its deadline is longer than a message and its reply take, because a sum's steps have to be in
    time.
    """
    quorum = max(quorum, 3)
    return {
        "secure_aggregation": True,
        "secure_threshold_percent": (50, 66)[seed // 1000 % 2],
        "seed_policy": "shared",
        "aggregation": "mean",
        "weighting": "uniform",
        "personal_rate": "frozen",
        "report_losses": False,
        "clip_median_factor": 0.0,
        "projected_grad_abs_max": 100.0,
        "quorum": quorum,
        "workers_min": max(workers_min, 3),
        "cohort_size_max": workers,
        "deadline_ms": (3000, 10_000)[seed // 2000 % 2],
        "buffer_answers": 0,
        "staleness_max_rounds": RunConfig.model_fields["staleness_max_rounds"].default,
        "staleness_exponent": RunConfig.model_fields["staleness_exponent"].default,
    }


def draw_scenario(rng: random.Random, *, is_secure: bool | None = None) -> Scenario:
    """Any scenario in which honest parties can finish and a flipped worker can be told apart.

    is_secure: whether it has secure aggregation, if it has three workers; None: as the dice say.
    """
    workers = rng.randint(1, 6)
    quorum = rng.randint(1, workers)
    replica = rng.random() < 0.5
    can_flip = quorum >= 2 and (workers >= 3 or replica)
    flips_max = 0 if not can_flip or rng.random() < 0.4 else (3 if replica else 1)
    learning = draw_learning(rng)
    seed = rng.getrandbits(64)
    config = RunConfig(
        run_id="sim",
        model="none",
        task=TaskConfig(verbalizers={"a": "a", "b": "b"}),
        seed=seed,
        clip_median_factor=(0.0, 1.0, 2.0)[seed % 3],
        clip_spread=(4.0, 0.0)[seed // 9 % 2],
        clip_drop_factor=(0.0, 1.5)[seed // 18 % 2],
        rate_directions=(0, 3, 64)[seed // 3 % 3],
        aggregation=draw_aggregation(seed, learning),
        rounds=rng.randint(2, 9),
        local_steps=rng.randint(1, 4),
        probes=rng.choice((1, 1, 2, 3)),
        estimator=rng.choice(("two_sided", "one_sided")),
        learning_rate=10.0 ** rng.uniform(-7, -1),
        workers_min=rng.randint(1, workers),
        quorum=quorum,
        cohort_size_max=rng.randint(quorum, workers),
        deadline_ms=rng.choice((300, 1000, 5000)),
        digest_every_rounds=1 if flips_max else rng.randint(1, 3),
        report_losses=rng.random() < 0.5,
        # The oracle's losses are noise, which sometimes looks like a run gone wrong.
        pause_rounds=rng.choice((0, 0, 1, 2)),
        pause_loss_factor=2.0,
        **learning,
        **draw_buffering(rng, learning, quorum),
    )
    if is_secure is None:
        is_secure = seed // 144 % 12 == 0
    if is_secure and workers >= 3:
        secure = secure_values(seed, workers, quorum, config.workers_min)
        config = RunConfig.model_validate(config.model_dump(exclude_unset=True) | secure)
        flips_max = min(flips_max, workers - config.quorum)
        config = config.model_copy(update={"digest_every_rounds": 1 if flips_max else 2})
    calm = rng.random() < 0.15
    hostile = rng.random() < 0.4

    def rate(most: float) -> float:
        return 0.0 if calm or rng.random() < 0.25 else rng.uniform(0, most)

    return Scenario(
        workers=workers,
        config=config,
        replica=replica,
        hostile=hostile,
        flips_max=flips_max,
        lose_tail=hostile and rng.random() < 0.5,
        heal_at_ms=rng.randint(1000, 20_000),
        delay_ms_max=rng.choice((5, 50, 400)),
        tear_rate=rate(0.05),
        coordinator_crash_rate=rate(0.08),
        worker_crash_rate=rate(0.05),
        unable_rate=rate(0.2),
        double_rate=rate(0.2),
        drop_rate=rate(0.05) if hostile else 0.0,
        hold_rate=rate(0.5),
        clock_jump_rate=rate(0.02),
        orders=(0, 0, 1, 2, 5)[seed // 144 % 5],
    )


@dataclass(frozen=True)
class Hello:
    """First message up."""

    round: int
    head: bytes


Up = Hello | SendAnswer | SendSumStep | SendUnable
Down = SessionEvent | Expel


@dataclass(eq=False)
class Stream:
    """One connection of one worker to one coordinator start."""

    worker: Worker
    machine: RoundMachine
    """Stands for the coordinator start that it leads to."""
    alive: bool = True
    up_after_ms: int = 0
    down_after_ms: int = 0


class World:
    """Owns the clock, the dice and everybody."""

    command = "python -m tests.sim"
    """What replays a seed."""

    def __init__(
        self,
        seed: int,
        *,
        scenario: Scenario | None = None,
        machine: Callable[[], RoundMachine] = RoundMachine,
        append_first: bool = True,
        transcript: list[str] | None = None,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.scenario = scenario or self.draw()
        self.now_ms = 0
        self.transcript = transcript
        self.make_machine = machine
        self.append_first = append_first
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._scheduled = 0
        self.flips = 0
        self.faults: Counter[str] = Counter()
        """What has gone wrong so far."""
        self.store = MemoryStore()
        self.genesis = Genesis(self.scenario.config, bytes(32), bytes(32), bytes(32), 1, 4)
        [entry] = Journal(self.store).append(encode_records([self.genesis]))
        self.genesis_head = entry.head
        self.checker = Checker(self.scenario.config)
        self.coordinator = Coordinator(self)
        self.parties: list[Worker] = []
        """Whoever is a worker of the coordinator."""
        self.workers: list[Worker] = []
        """Whoever measures."""
        self.everyone: list[Worker] = []
        self.populate()
        self.replica = Replica(self) if self.scenario.replica else None
        self.operator = Operator(self)

    def draw(self) -> Scenario:
        """The scenario, if none was given."""
        return draw_scenario(self.rng)

    def populate(self) -> None:
        """Nobody stands between the coordinator and those who measure."""
        self.parties = [Worker(self, f"w{n}") for n in range(self.scenario.workers)]
        self.workers = self.everyone = self.parties

    @property
    def faulty(self) -> bool:
        """Whether faults still happen."""
        return self.now_ms < self.scenario.heal_at_ms

    def chance(self, rate: float) -> bool:
        """One roll; always no once faults have ended."""
        return self.faulty and rate > 0 and self.rng.random() < rate

    def loses(self) -> bool:
        """Whether the network loses a message now."""
        lost = self.chance(self.scenario.drop_rate)
        self.faults["a message was lost"] += lost
        return lost

    def doubles(self) -> bool:
        """Whether the network delivers a message twice."""
        doubled = self.scenario.hostile and self.chance(0.05)
        self.faults["a message was doubled"] += doubled
        return doubled

    def later(self, delay_ms: int, what: Callable[[], None]) -> None:
        """Do `what` after `delay_ms`."""
        self._scheduled += 1
        heapq.heappush(self._heap, (self.now_ms + delay_ms, self._scheduled, what))

    def say(self, who: str, what: object) -> None:
        """A line of the transcript, if one is wanted."""
        if self.transcript is not None:
            self.transcript.append(f"{self.now_ms:>7} {who:<12} {what}")

    def run(self) -> None:
        """To the end of the run; raises `ViolationError`, naming the seed."""
        try:
            self._run()
        except ViolationError as violation:
            raise ViolationError(
                f"{violation}; replay with: {self.command} --seed {self.seed}"
            ) from violation

    def _run(self) -> None:
        self.say("world", self.scenario)
        self.coordinator.boot()
        for worker in self.everyone:
            self.later(self.rng.randint(0, 500), worker.boot)
        if self.replica is not None:
            self.later(TICK_MS, self.replica.poll)
        self.later(self.scenario.heal_at_ms, self._heal)
        self.operator.begin()
        for _ in range(EVENTS_MAX):
            if all(worker.left for worker in self.workers):
                break
            self.now_ms, _, what = heapq.heappop(self._heap)
            what()
        else:
            raise ViolationError(
                f"no progress: round {self.coordinator.machine.round} of "
                f"{self.scenario.config.rounds} after {EVENTS_MAX} events"
            )
        self.coordinator.check_fold()
        flipped = {worker.name for worker in self.workers if worker.flipped}
        self.checker.at_end({w.name: w.weights for w in self.workers}, flipped)

    def _heal(self) -> None:
        # What silent loss left hanging ends as a keepalive would end it.
        self.say("world", "faults end")
        if self.scenario.hostile:
            for worker in self.everyone:
                worker.tear()


class SecureWorld(World):
    """A world whose runs have secure aggregation, if they have three workers or more."""

    command = "python -m tests.sim --secure"

    def draw(self) -> Scenario:
        """As for any world, but for that."""
        return draw_scenario(self.rng, is_secure=True)


class Coordinator:
    """The daemon's loop: step, append, send."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = False
        self.machine = world.make_machine()
        self.machine.has_replica = world.scenario.replica
        self.journal = Journal(world.store)
        self.streams: dict[str, Stream] = {}
        self.commits: list[Row] = []
        self.heads: list[bytes] = []
        self.owed: list[Ready] = []
        """What the machine asked for and was not done yet."""
        self.clock_ahead_ms = 0

    def boot(self) -> None:
        """Fold the journal, begin an epoch; if the run is paused, the operator may let it go on."""
        rng = self.world.rng
        self.clock_ahead_ms = rng.choice((0, -self.world.now_ms, HOUR_MS, -HOUR_MS))
        self.machine = self.world.make_machine()
        self.machine.has_replica = self.world.scenario.replica
        self.journal = Journal(self.world.store)
        self.commits, self.heads = [], []
        for entry in self.journal.load():
            self.machine.apply(_decoded(entry.row.body))
            self._remember(entry)
        self.up = True
        self.perform(self.machine.start(self._clock_ms()))
        if self.up and self.machine.phase is Phase.PAUSED and rng.random() < 0.8:
            self.perform(self.machine.resume(rng.choice((0.1, 0.5, 1.0))))
        if self.up:
            self.world.say("coordinator", f"serving epoch {self.machine.epoch}")
            self._tick(self.machine)

    def crash(self) -> None:
        """Everything but the store is lost."""
        world = self.world
        world.say("coordinator", "crash")
        world.faults["the coordinator crashed"] += 1
        world.faults["a crash lost records that waited for an append"] += bool(self.owed)
        self.up = False
        self.streams = {}
        self.owed = []
        for worker in world.parties:
            # What was sent before the crash may still arrive, until the worker notices.
            world.later(
                world.rng.randint(0, 2 * world.scenario.delay_ms_max), worker.tear_of_stream()
            )
        if world.scenario.lose_tail:
            rows = world.store._rows
            last = decode_record(rows[-1].body)
            if isinstance(last, Opened):
                rows.pop()
                world.checker.forget(last)
                world.say("disk", f"lost {last}")
                world.faults["the disk lost the newest record"] += 1
        world.later(world.rng.randint(10, 2000), self.boot)

    def check_fold(self) -> None:
        """A restart would rebuild exactly what is live."""
        if self.owed:
            return
        folded = RunState()
        for entry in Journal(self.world.store).load():
            folded.apply(_decoded(entry.row.body))
        if folded != self.machine.state:
            raise ViolationError(f"a restart folds to {folded}, live is {self.machine.state}")

    def step(self, event: RoundEvent) -> None:
        """One event through the machine; what it asks for may wait, to share an append."""
        ready = self.machine.step(event)
        if self.world.chance(self.world.scenario.hold_rate):
            self.owed.append(ready)
            self.world.later(self.world.rng.randint(0, 30), partial(self._flush, self.machine))
        else:
            self.perform(ready)

    def _flush(self, machine: RoundMachine) -> None:
        if self.up and self.machine is machine and self.owed:
            self.perform(Ready())

    def perform(self, ready: Ready) -> None:
        """Append, then send (or, for a control, the other way round); any point may be the last."""
        world = self.world
        readies = [*self.owed, ready]
        records = tuple(record for each in readies for record in each.records)
        parts = [partial(self._append, records), partial(self._send_all, readies)]
        if not world.append_first:
            parts.reverse()
        crash_at = world.rng.choice((0, 1, 2)) if self._crashes(records) else 3
        for number, part in enumerate(parts):
            if crash_at == number:
                self.crash()
                return
            part()
            self.owed = []
        if crash_at == 2:
            self.check_fold()
            self.crash()

    def _crashes(self, records: Sequence[Record]) -> bool:
        rate = self.world.scenario.coordinator_crash_rate
        return bool(records) and self.world.chance(rate)

    def _append(self, records: tuple[Record, ...]) -> None:
        entries = self.journal.append(encode_records(records)) if records else ()
        for entry, record in zip(entries, records, strict=True):
            self.world.say("journal", record)
            self.world.faults["the run paused"] += isinstance(record, Paused)
            calm_at_ms = self.world.scenario.heal_at_ms + CALM_AFTER_MS
            self.world.checker.is_calm = self.world.now_ms > calm_at_ms
            self.world.checker.appended(record)
            self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        if entry.row.kind in MOVES_HEAD:
            self.commits.append(entry.row)
            self.heads.append(entry.head)

    def _send_all(self, readies: Sequence[Ready]) -> None:
        for ready in readies:
            self._send(ready)

    def _send(self, ready: Ready) -> None:
        for record in ready.records:
            if isinstance(record, Committed):
                for stream in self.streams.values():
                    self._down(stream, CommitReceived(record, encode_record(record)))
        for message in ready.messages:
            stream_or_none = self.streams.get(message.worker)
            if stream_or_none is not None:
                self._down(stream_or_none, _down_of(message, self.heads))
                if isinstance(message, Assign):
                    stream_or_none.worker.release()

    def receive(self, stream: Stream, message: Up) -> None:
        """A message from a worker came out of the network."""
        world, name = self.world, stream.worker.name
        if not self.up:
            return
        if isinstance(message, Hello):
            if stream.alive and stream.machine is self.machine:
                self._greet(stream, message)
            return
        comes_late = self.streams.get(name) is not stream
        if comes_late and not (world.scenario.hostile and stream.worker.repeats_itself):
            return
        match message:
            case SendAnswer():
                # Whoever drives the machine has checked the signatures of those who sign.
                key = hashlib.sha256(name.encode()).digest()
                signed = (2 * key, key) if key[0] % 2 else ()
                self.step(AnswerReceived(name, message.ticket, message.scalars, *signed))
            case SendUnable(ticket, reason, useless_shares_of):
                self.step(UnableReceived(name, ticket, reason, useless_shares_of))
            case SendSumStep(ticket, attempt, step) if not comes_late:
                # A restarted process makes other secrets, so an ended stream's count no more.
                self.step(SumReceived(name, ticket, attempt, step))
            case SendSumStep():
                pass

    def _greet(self, stream: Stream, hello: Hello) -> None:
        worker = stream.worker
        self._flush(self.machine)
        if not self.up:
            return
        if hello.round >= len(self.heads) or self.heads[hello.round] != hello.head:
            raise ViolationError(
                f"{worker.name} holds round {hello.round}, which is not in the journal"
            )
        if worker.name in self.streams:
            self.lost(self.streams[worker.name])
        # It is sent the commits that it lacks, so those must be durable by now.
        self._flush(self.machine)
        if not self.up:
            return
        self.streams[worker.name] = stream
        round_ = self.machine.round
        self._down(stream, Welcomed(self.machine.epoch, round_, self.heads[round_]))
        for row in self.commits[hello.round + 1 :]:
            record = _decoded(row.body)
            assert isinstance(record, Committed)
            self._down(stream, CommitReceived(record, row.body))
        self.step(WorkerReady(worker.name))

    def was_sent(self, worker: str, answer: SendAnswer) -> None:
        """A worker of this coordinator has sent an answer."""
        self.world.checker.sent(worker, answer)

    def told_durable(self, worker: str, ticket: Ticket) -> None:
        """A worker of this coordinator was told that its answer is durable."""
        self.world.checker.acknowledged(worker, ticket)

    def ended_with(self, worker: str, weights: bytes) -> None:
        """A worker of this coordinator reports its last weights."""

    def lost(self, stream: Stream) -> None:
        """The coordinator notices that a stream tore."""
        if self.up and self.streams.get(stream.worker.name) is stream:
            del self.streams[stream.worker.name]
            self.step(WorkerLost(stream.worker.name))

    def _down(self, stream: Stream, message: Down) -> None:
        world = self.world
        if not stream.alive or world.loses():
            return
        at_ms = world.now_ms + world.rng.randint(0, world.scenario.delay_ms_max)
        if not (world.scenario.hostile and world.faulty):
            at_ms = max(at_ms, stream.down_after_ms)
        stream.down_after_ms = max(stream.down_after_ms, at_ms)
        for _ in range(2 if world.doubles() else 1):
            world.later(at_ms - world.now_ms, lambda: stream.worker.receive(stream, message))

    def _tick(self, machine: RoundMachine) -> None:
        if self.up and self.machine is machine:
            wrong_ms = self.world.rng.randint(-5000, 0) if self.world.chance(0.02) else 0
            if self.world.chance(self.world.scenario.clock_jump_rate):
                wrong_ms = self.world.rng.choice((HOUR_MS, -HOUR_MS))
                self.clock_ahead_ms += max(wrong_ms, 0)
                self.world.faults["the clock jumped by an hour"] += 1
            self.step(Tick(self._clock_ms() + min(wrong_ms, 0)))
            if self.up and machine.phase is Phase.PAUSED and self.world.rng.random() < 0.2:
                self.crash()  # The operator restarts it, in order to resume.
            self.world.later(TICK_MS, lambda: self._tick(machine))

    def _clock_ms(self) -> int:
        return self.world.now_ms + self.clock_ahead_ms


class Operator:
    """Gives orders at any time, and each again until it is told that it was carried out.

    A run that it pauses it resumes later, and a worker that it excludes it readmits.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # Dice of its own: the other parties fare as they do without it, until its first order.
        self.dice = random.Random(f"orders {world.seed}")

    def begin(self) -> None:
        """Choose when to give which orders."""
        scenario = self.world.scenario
        kinds = ["pause", "pause", "resume", "stop"]
        if not scenario.flips_max:  # Otherwise those that are left could not tell who is right.
            kinds += ["exclude"] * 3
        for _ in range(scenario.orders):
            kind, worker = self.dice.choice(kinds), self.dice.choice(self.world.parties).name
            at_ms = self.dice.randint(0, scenario.heal_at_ms)
            self.world.later(at_ms, partial(self.order, kind, worker))

    def order(self, kind: str, worker: str) -> None:
        """Give an order; if nobody answers, or the answer is lost, again later."""
        world, coordinator = self.world, self.world.coordinator
        machine = coordinator.machine
        again = partial(self.order, kind, worker)
        if not coordinator.up:
            world.later(self.dice.randint(10, 500), again)
            return
        world.say("operator", f"{kind} {worker}")
        try:
            ready = self._obeyed(machine, kind, worker)
        except ConfigError as error:
            # As after an order that was carried out before a crash, or of a run that is over.
            world.say("operator", error)
        else:
            coordinator.perform(ready)
        if not coordinator.up or coordinator.machine is not machine:
            world.faults["a crash cut an order off"] += 1
            world.later(self.dice.randint(10, 500), again)
        elif world.faulty and self.dice.random() < 0.3:
            world.faults["an order was given twice"] += 1
            world.later(self.dice.randint(0, 300), again)
        elif kind in _LATER:
            world.faults["an operator paused a run or excluded a worker"] += 1
            world.later(self.dice.randint(0, 3000), partial(self.order, _LATER[kind], worker))

    @staticmethod
    def _obeyed(machine: RoundMachine, kind: str, worker: str) -> Ready:
        """What the machine makes of an order, as a coordinator gives it to it."""
        match kind:
            case "pause":
                return machine.pause("the operator wants to look")
            case "resume":
                is_paused = machine.phase is Phase.PAUSED
                return machine.resume(0.5) if is_paused else Ready()
            case "stop":
                return machine.stop("the operator has seen enough")
            case "exclude":
                return machine.exclude(worker, "the operator has doubts")
            case _:
                return machine.readmit(worker)


_LATER = {"pause": "resume", "exclude": "readmit"}
"""An order -> the one that undoes it."""


class Worker:
    """The agent's loop around a session machine, with an oracle for an engine."""

    repeats_itself = True
    """A restarted process answers the same, so that a late answer of the old one does no harm."""

    def __init__(self, world: World, name: str, above: Coordinator | None = None) -> None:
        self.world = world
        self.name = name
        self.above = above or world.coordinator
        self.left = False
        self.flipped = False
        self.weights = BASE_WEIGHTS
        self.session: SessionMachine | None = None
        self.stream: Stream | None = None
        self.running: Measure | None = None
        self.duration_ms: int | None = None
        """How long a measurement takes; None: as the dice say."""
        self.held_back: list[tuple[Stream, Up]] = []
        """Under way when its stream tore; a hostile network hands it over at the worst time."""

    def boot(self) -> None:
        """Start from the base."""
        self.weights, self.flipped, self.running = BASE_WEIGHTS, False, None
        config = self.world.scenario.config
        self.session = SessionMachine(
            0,
            self.world.genesis_head,
            report_losses=config.report_losses,
            report_rows=config.weighting == "rows",
            staleness_max=config.staleness_max,
            secure=self.secure_member() if config.secure_aggregation else None,
        )
        self.connect(self.session)

    def secure_member(self) -> SecureMember:
        """Its part in sums, in a process that remembers nothing of an earlier one."""
        return SecureMember(self.world.genesis, self.name)

    def crash(self, why: str) -> None:
        """Everything is lost."""
        self.world.say(self.name, f"crash: {why}")
        self.world.faults["a worker crashed"] += 1
        self.tear()
        self.session, self.running = None, None
        self.world.later(self.world.rng.randint(10, 2000), self.boot)

    def connect(self, session: SessionMachine) -> None:
        """Catch up from the journal, then open a stream; again later if nobody is there."""
        world = self.world
        if session is not self.session or self.stream is not None or self.left:
            return
        if not self.above.up:
            world.later(world.rng.randint(50, 500), lambda: self.connect(session))
            return
        self._jump(session)
        missing = self.above.commits[session.round + 1 :]
        for row in missing[: world.rng.randint(0, len(missing))]:
            record = _decoded(row.body)
            assert isinstance(record, Committed)
            self.step(CommitReceived(record, row.body))
        self.stream = Stream(self, self.above.machine)
        self.step(Connected())

    def _jump(self, session: SessionMachine) -> None:
        """Begin at the newest commit from the base, now and then."""
        rows, head = self.above.commits, ZERO_HASH
        newest: CommitReceived | None = None
        for row in rows:
            record = _decoded(row.body)
            if isinstance(record, Committed) and record.from_base:
                newest = CommitReceived(record, row.body, head_before=head)
            head = head_after(head, row.body)
        if newest is not None and newest.commit.round > session.round and self.world.chance(0.5):
            self.step(newest)

    def tear(self) -> None:
        """The stream breaks; both ends notice some time later."""
        stream, session, world = self.stream, self.session, self.world
        if stream is None:
            return
        world.faults["a stream broke"] += 1
        stream.alive = False
        self.stream = None
        world.later(world.rng.randint(0, 1000), lambda: self.above.lost(stream))
        if session is not None:
            self.step(Disconnected())
            world.later(world.rng.randint(10, 1500), lambda: self.connect(session))

    def release(self) -> None:
        """Hand over what the network held back, because the coordinator waits for an answer now."""
        for stream, message in self.held_back:
            late_ms = self.world.rng.randint(0, 100)
            self.world.later(late_ms, partial(self.above.receive, stream, message))
        self.held_back.clear()

    def tear_of_stream(self) -> Callable[[], None]:
        """What breaks the stream that is open now, whenever it is called."""
        stream = self.stream

        def tear() -> None:
            if stream is not None and self.stream is stream:
                self.tear()

        return tear

    def receive(self, stream: Stream, message: Down) -> None:
        """A message came out of the network."""
        if stream is not self.stream or self.session is None:
            return
        world = self.world
        if world.chance(world.scenario.tear_rate):
            world.say(self.name, "stream tears")
            self.tear()
            return
        if world.chance(world.scenario.worker_crash_rate):
            self.crash("kill -9")
            return
        if isinstance(message, Expel):
            self.crash(message.message)
            return
        if isinstance(message, Acknowledged):
            self.above.told_durable(self.name, message.ticket)
        self.step(message)
        may_flip = world.flips < world.scenario.flips_max and world.now_ms > 500
        if may_flip and self.running is None and world.chance(0.03) and self.weights:
            world.flips += 1
            self.flipped = True
            self.weights = hashlib.sha256(self.name.encode() + self.weights).digest()
            world.say(self.name, "a bit of its weights flips")
            world.faults["weights flipped"] += 1

    def step(self, event: SessionEvent) -> None:
        """One event through the machine, then what it asks for."""
        assert self.session is not None
        if isinstance(event, SumAsked):
            event = replace(event, entropy=self.world.rng.randbytes(ENTROPY_BYTES))
        self.world.say(self.name, event)
        try:
            actions = self.session.step(event)
        except ProtocolError as error:
            if not self.world.scenario.hostile:
                raise ViolationError(
                    f"{self.name} was sent what breaks the protocol: {error}"
                ) from error
            self.world.say(self.name, error)
            self.tear()
            return
        except FedMezoError as error:
            raise ViolationError(f"{self.name}: {error}") from error
        for action in actions:
            self.perform(action)

    def perform(self, action: Any) -> None:
        """One action of the session machine."""
        world = self.world
        match action:
            case SendHello(round_, head):
                self._up(Hello(round_, head))
            case ApplyCommit(commit):
                if self.running is not None:
                    raise ViolationError(f"{self.name}: weights changed under a measurement")
                self.weights = weights_after(self.weights, commit)
                if commit.from_base:
                    self.flipped = False  # Nothing of the old weights is left.
            case Measure():
                if self.running is not None:
                    raise ViolationError(f"{self.name}: two measurements at once")
                self.running = action
                session = self.session
                duration_ms = self.duration_ms or world.rng.choice((1, 20, 150, 900))
                world.later(duration_ms, lambda: self._end_measure(session, action))
            case SendAnswer():
                self.above.was_sent(self.name, action)
                self._up(action)
                if world.chance(world.scenario.double_rate):
                    world.faults["a message was doubled"] += 1
                    self._up(action)
            case SendUnable():
                self._up(action)
            case SendSumStep():
                if isinstance(action.step, SharesRevealed):
                    world.checker.revealed(self.name, action)
                self._up(action)
                if world.chance(world.scenario.double_rate):
                    world.faults["a message was doubled"] += 1
                    self._up(action)
            case ReportWeights(round_):
                assert round_ == world.scenario.config.rounds or world.checker.stopped
                self.above.ended_with(self.name, self.weights)
            case Leave():
                world.say(self.name, "leaves")
                self.left = True
                self.tear()

    def _end_measure(self, session: SessionMachine | None, asked: Measure) -> None:
        if session is not self.session or self.running is not asked:
            return
        self.running = None
        if self.world.chance(self.world.scenario.unable_rate):
            self.step(MeasureFailed(asked.ticket, "loss is nan"))
            return
        grads, loss = measure(self.name, asked.work.seeds, self.weights)
        digest64 = digest64_of(self.weights) if asked.work.want_digest else None
        self.step(Measured(asked.ticket, Scalars(grads, loss, digest64, rows_of(self.name))))

    def _up(self, message: Up) -> None:
        world, stream = self.world, self.stream
        if stream is None or world.loses():
            return
        at_ms = world.now_ms + world.rng.randint(0, world.scenario.delay_ms_max)
        if not (world.scenario.hostile and world.faulty):
            at_ms = max(at_ms, stream.up_after_ms)
        stream.up_after_ms = max(stream.up_after_ms, at_ms)

        def arrive() -> None:
            if stream.alive:
                self.above.receive(stream, message)
            elif world.scenario.hostile and world.chance(0.9):
                self.held_back.append((stream, message))

        world.later(at_ms - world.now_ms, arrive)


class Replica:
    """The coordinator's own copy of the weights, in a process of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.weights = BASE_WEIGHTS
        self.round = 0

    def poll(self) -> None:
        """Apply the next commit, if there is one, and report."""
        world, coordinator = self.world, self.world.coordinator
        if coordinator.up:
            if self.round + 1 < len(coordinator.commits):
                record = _decoded(coordinator.commits[self.round + 1].body)
                assert isinstance(record, Committed)
                self.weights = weights_after(self.weights, record)
                self.round = record.round
            coordinator.step(WeightsReported(REPLICA_PARTY, self.round, self.weights))
        world.later(world.rng.randint(20, 600), self.poll)


def _down_of(message: RoundMessage, heads: Sequence[bytes]) -> Down:
    match message:
        case Assign():
            return Assigned(message.ticket, message.work, message.deadline_ms)
        case Ack(_, ticket):
            return Acknowledged(ticket, heads[ticket.round - 1])
        case Refuse(_, ticket, reason, sentence):
            return RefusedByCoordinator(ticket, reason, sentence)
        case Finish(_, round_):
            return FinishedByCoordinator(round_)
        case AskSum(_, ticket, attempt, step):
            return SumAsked(ticket, attempt, step)
        case Expel():
            return message
