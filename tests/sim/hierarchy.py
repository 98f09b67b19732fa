"""Federations with sites: some workers of the coordinator are relays with workers of their own.

The relays' machines are real, their drivers are simulated. Streams above and below tear. Relays
crash between keeping a commit, sending it and answering, and lose everything but their copy. The
checker knows what each worker measures, and so which workers' answers a site's mean is made of.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedmezo_core.errors import FedMezoError, ProtocolError
from fedmezo_core.events import (
    Acknowledged,
    CommitReceived,
    Connected,
    Disconnected,
    Expel,
    Leave,
    ReportDigest,
    SendAnswer,
    SendHello,
    SendUnable,
    SentAway,
    SessionEvent,
    Tick,
    Ticket,
    Vouched,
    WeightsReported,
    Welcomed,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.journal import Row, head_after
from fedmezo_core.machines.relay import RelayMachine, RelayReady
from fedmezo_core.machines.roster import Phase
from fedmezo_core.records import Answered, Committed, Genesis
from tests.sim.checker import Checker, ViolationError, _binary32, measure, rows_of
from tests.sim.world import (
    TICK_MS,
    Coordinator,
    Down,
    Hello,
    Scenario,
    Stream,
    Worker,
    World,
    _decoded,
    _down_of,
    draw_scenario,
)


@dataclass
class SiteChecker(Checker):
    """Knows whose answers a site's answer is the mean of."""

    sites: dict[str, list[str]] = field(default_factory=dict)
    members: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    """Round and slot of a site's answer -> whose mean it is."""
    crowds: list[int] = field(default_factory=list)
    """Of how many answers each site's answer was the mean."""

    def _answered(self, record: Answered) -> None:
        worker = self.cohorts[record.round][record.slot]
        if worker in self.sites and self._is_sound(record):
            self.members[record.round, record.slot] = self._members(worker, record)
        super()._answered(record)

    def _members(self, site: str, record: Answered) -> tuple[str, ...]:
        names = self.sites[site]
        for count in range(len(names), 0, -1):
            for members in itertools.combinations(names, count):
                if self._mean(members, record)[0] == record.projected_grads:
                    self.crowds.append(count)
                    return members
        raise ViolationError(f"{record} of {site} is nobody's mean")

    def _mean(
        self, members: Sequence[str], record: Answered
    ) -> tuple[tuple[float, ...], float, int]:
        seeds, weights = self._seeds(record), self.weights[record.round - 1]
        weighted = self.config.weighting == "rows"
        rows = [rows_of(name) if weighted else 1 for name in members]
        measured = [measure(name, seeds, weights) for name in members]

        def mean(values: Sequence[float]) -> float:
            terms = [value * count for value, count in zip(values, rows, strict=True)]
            return _binary32(math.fsum(terms) / sum(rows))

        grads = tuple(mean([m[0][k] for m in measured]) for k in range(len(seeds)))
        return grads, mean([m[1] for m in measured]), sum(rows)

    def _oracle(self, record: Answered) -> tuple[tuple[float, ...], float, int]:
        members = self.members.get((record.round, record.slot))
        return super()._oracle(record) if members is None else self._mean(members, record)

    def acknowledged_at(self, site: str, worker: str, ticket: Ticket) -> None:
        """A site's worker was told that its answer is durable."""
        stored = self.answers.get((ticket.round, ticket.slot))
        if stored is None:
            raise ViolationError(
                f"{worker} of {site} got an ack for {ticket}, which is not in the journal"
            )
        members = self.members.get((ticket.round, ticket.slot), ())
        if self._is_sound(stored) and worker not in members:
            raise ViolationError(
                f"{worker} of {site} got an ack for {ticket}, but the journal holds the mean "
                f"of {members}"
            )


@dataclass(frozen=True)
class Sites:
    """What is drawn besides a scenario."""

    workers: tuple[int, ...]
    """Of each site."""
    workers_min: tuple[int, ...]
    deadline_share: float
    crash_rate: float


def draw_sites(rng: random.Random, scenario: Scenario) -> Sites:
    """Of the coordinator's workers, how many are sites, and how large these are."""
    workers = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, scenario.workers)))
    return Sites(
        workers,
        tuple(rng.randint(1, count) for count in workers),
        rng.choice((0.5, 0.8, 1.0)),
        0.0 if rng.random() < 0.3 else rng.uniform(0, 0.05),
    )


class HierarchyWorld(World):
    """A world in which some of the coordinator's workers are sites."""

    command = "python -m tests.sim --sites"

    def __init__(
        self,
        seed: int,
        *,
        sites: Sites | None = None,
        scenario: Scenario | None = None,
        transcript: list[str] | None = None,
        relay: type[RelayMachine] = RelayMachine,
    ) -> None:
        self.make_relay = relay
        drawing = random.Random(f"sites {seed}")
        scenario = scenario or draw_scenario(random.Random(seed), is_secure=False)
        # The checker finds a site's answer by the mean of what its workers measured.
        unclipped = scenario.config.model_copy(
            update={"clip_median_factor": 0.0, "aggregation": "mean"}
        )
        scenario = replace(scenario, config=unclipped)
        self.sites = sites or draw_sites(drawing, scenario)
        self.relays: list[Relay] = []
        super().__init__(seed, scenario=scenario, transcript=transcript)

    def populate(self) -> None:
        """The first workers of the coordinator are sites."""
        checker = self.checker = SiteChecker(self.scenario.config)
        self.reported: dict[str, bytes] = {}
        """What relays said of their workers' last weights."""
        for number, count in enumerate(self.sites.workers):
            relay = Relay(self, f"s{number}", number)
            workers = [Worker(self, f"s{number}w{n}", relay) for n in range(count)]
            checker.sites[relay.name] = [worker.name for worker in workers]
            relay.workers = workers
            self.relays.append(relay)
            self.workers += workers
            self.parties.append(relay.uplink)
        ordinary = range(len(self.relays), self.scenario.workers)
        alone = [Worker(self, f"w{n}") for n in ordinary]
        self.workers += alone
        self.parties += alone
        self.everyone = [*self.parties, *(w for r in self.relays for w in r.workers)]


class Uplink(Worker):
    """How the coordinator sees a relay."""

    repeats_itself = False

    def __init__(self, world: HierarchyWorld, name: str, relay: Relay) -> None:
        super().__init__(world, name)
        self.relay = relay

    def boot(self) -> None:
        """The relay starts."""
        self.relay.boot()

    def crash(self, why: str) -> None:
        """So does the relay."""
        self.relay.crash_for(why)

    def tear(self) -> None:
        """The stream breaks; both ends notice some time later."""
        self.break_off(Disconnected())

    def break_off(self, how: Disconnected | SentAway) -> None:
        """The stream ends in one of two ways."""
        stream, world = self.stream, self.world
        if stream is None:
            return
        world.faults["a stream broke"] += 1
        stream.alive = False
        self.stream = None
        world.later(world.rng.randint(0, 1000), lambda: world.coordinator.lost(stream))
        if self.relay.up:
            self.relay.feed(how)

    def receive(self, stream: Stream, message: Down) -> None:
        """A message came out of the network."""
        world, relay = self.world, self.relay
        if stream is not self.stream or not relay.up:
            return
        if world.chance(world.scenario.tear_rate):
            world.say(self.name, "stream tears")
            self.tear()
            return
        if isinstance(message, Expel):
            self.break_off(SentAway(message.message))
            return
        if isinstance(message, Acknowledged):
            world.coordinator.told_durable(self.name, message.ticket)
        relay.feed(message)


class Relay(Coordinator):
    """A relay's loop: step, keep, send down, send up."""

    world: HierarchyWorld

    def __init__(self, world: HierarchyWorld, name: str, number: int) -> None:
        super().__init__(world)
        self.world = world
        self.name = name
        self.number = number
        self.workers: list[Worker] = []
        self.uplink = Uplink(world, name, self)
        genesis = _decoded(world.store.read(0, 1)[0].body)
        assert isinstance(genesis, Genesis)
        self.genesis = genesis
        self.commits = [world.store.read(0, 1)[0]]
        """The copy: genesis and commits. Survives a crash."""
        self.heads = [world.genesis_head]
        self.relay: RelayMachine = self._machine()
        self._bodies: dict[int, bytes] = {}
        self._signed: set[int] = set()
        self._welcomed_round = 0

    def _machine(self) -> RelayMachine:
        sites = self.world.sites
        return self.world.make_relay(
            self.genesis,
            len(self.commits) - 1,
            self.heads[-1],
            workers_min=sites.workers_min[self.number],
            deadline_share=sites.deadline_share,
        )

    # ------------------------------------------------------------ life

    def boot(self) -> None:
        """Begin from the copy."""
        self.relay = self._machine()
        # What streams are compared by.
        self.machine = self.relay  # type: ignore[assignment]
        self._bodies, self._signed = {}, set()
        self.up = True
        self.world.say(self.name, f"relay at round {self.relay.round}")
        self._ticking(self.relay)
        self._follow(self.relay)

    def crash_for(self, why: str) -> None:
        """Everything but the copy is lost."""
        world = self.world
        world.say(self.name, f"crash: {why}")
        world.faults["a relay crashed"] += 1
        self.up = False
        self.streams = {}
        self.uplink.tear()
        for worker in self.workers:
            late_ms = world.rng.randint(0, 2 * world.scenario.delay_ms_max)
            world.later(late_ms, worker.tear_of_stream())
        world.later(world.rng.randint(10, 2000), self.boot)

    def _ticking(self, relay: RelayMachine) -> None:
        if self.up and self.relay is relay:
            self.feed(Tick(self.world.now_ms))
            self.world.later(TICK_MS, partial(self._ticking, relay))

    # ------------------------------------------------------------ above

    def _follow(self, relay: RelayMachine) -> None:
        """Catch up now and then, and join while there are workers."""
        if not self.up or self.relay is not relay or relay.left:
            return
        if self.uplink.stream is None and self.world.coordinator.up:
            self._catch_up()
            if self.up and self.relay is relay and relay.is_staffed and not relay.left:
                self.uplink.stream = Stream(self.uplink, self.world.coordinator.machine)
                self.feed(Connected())
        elif not relay.is_staffed and relay.phase is not Phase.FINISHED:
            self.uplink.tear()
        self.world.later(self.world.rng.randint(50, 500), partial(self._follow, relay))

    def _catch_up(self) -> None:
        world = self.world
        missing = world.coordinator.commits[self.relay.received_round + 1 :]
        some = world.rng.randint(0, len(missing)) if world.faulty else len(missing)
        for row in missing[:some]:
            record = _decoded(row.body)
            assert isinstance(record, Committed)
            self.feed(CommitReceived(record, row.body))
            if not self.up:
                return
        coordinator = world.coordinator
        if coordinator.machine.round == self.relay.received_round:
            self._signed.add(coordinator.machine.round)
            machine = coordinator.machine
            is_over = machine.phase is Phase.FINISHED
            self.feed(Vouched(machine.epoch, machine.round, coordinator.heads[-1], is_over))

    def feed(self, event: SessionEvent | Vouched | SentAway | Tick | WeightsReported) -> None:
        """One event through the machine, then what it asks for."""
        if not isinstance(event, Tick):
            self.world.say(self.name, event)
        if isinstance(event, Welcomed):
            self._welcomed_round = event.round
            self._signed.add(event.round)
        signed_from = self._welcomed_round if self.uplink.stream is not None else math.inf
        if isinstance(event, CommitReceived) and event.commit.round >= signed_from:
            self._signed.add(event.commit.round)
        try:
            ready = self.relay.step(event)
        except ProtocolError as error:
            if not self.world.scenario.hostile:
                raise ViolationError(
                    f"{self.name} was sent what breaks the protocol: {error}"
                ) from error
            self.world.say(self.name, error)
            self.uplink.tear()
            return
        except FedMezoError as error:
            raise ViolationError(f"{self.name}: {error}") from error
        if isinstance(event, CommitReceived):
            self._bodies[event.commit.round] = event.record_bytes
        self.owe(ready)

    # ------------------------------------------------------------ the loop

    def step(self, event: Any) -> None:
        """One event from a worker of the site."""
        self.owe(self.relay.step(event))

    def owe(self, ready: RelayReady) -> None:
        """Keep, send down, send up; any point may be the last."""
        world = self.world
        parts = [
            partial(self._keep, ready),
            partial(self._send_down, ready),
            partial(self._send_up, ready),
        ]
        is_something = bool(ready.records or ready.messages or ready.up)
        crashes = is_something and world.chance(world.sites.crash_rate)
        crash_at = world.rng.choice((0, 1, 2, 3)) if crashes else 4
        for number, part in enumerate(parts):
            if crash_at == number:
                self.crash_for("kill -9")
                return
            part()
            if not self.up:
                return
        if crash_at == 3:
            self.crash_for("kill -9")

    def _keep(self, ready: RelayReady) -> None:
        for record in ready.records:
            body = self._bodies.pop(record.round)
            self.commits.append(Row(len(self.commits), body, b""))
            self.heads.append(head_after(self.heads[-1], body))
            known = self.world.coordinator.heads[record.round : record.round + 1]
            if known and known[0] != self.heads[-1]:
                raise ViolationError(f"{self.name} keeps another commit of round {record.round}")

    def _send_down(self, ready: RelayReady) -> None:
        if ready.dismissed:
            self.world.faults["a site had to join again"] += 1
            for worker in self.workers:
                if self.streams.pop(worker.name, None) is not None:
                    worker.tear_of_stream()()
        for record in ready.records:
            if self.streams and record.round not in self._signed:
                raise ViolationError(f"{self.name} sends round {record.round} without a signature")
            for stream in list(self.streams.values()):
                body = self.commits[record.round].body
                self._down(stream, CommitReceived(record, body))
        for message in ready.messages:
            stream_or_none = self.streams.get(message.worker)
            if stream_or_none is not None:
                self._down(stream_or_none, _down_of(message, self.heads))
            if isinstance(message, Expel):
                self.streams.pop(message.worker, None)

    def _send_up(self, ready: RelayReady) -> None:
        for action in ready.up:
            match action:
                case SendHello(round_, head):
                    self.uplink._up(Hello(round_, head))
                case SendAnswer():
                    self.world.coordinator.was_sent(self.name, action)
                    self.uplink._up(action)
                case SendUnable():
                    self.uplink._up(action)
                case ReportDigest(_, digest):
                    self.world.reported[self.name] = digest
                case Leave():
                    self.world.say(self.name, "leaves")

    # ------------------------------------------------------------ below

    def _greet(self, stream: Stream, hello: Hello) -> None:
        worker = stream.worker
        if not self.relay.may_welcome:
            worker.tear_of_stream()()
            return
        if hello.round > self.relay.round or self.heads[hello.round] != hello.head:
            raise ViolationError(
                f"{worker.name} holds round {hello.round}, which is not in its relay's copy"
            )
        if worker.name in self.streams:
            self.lost(self.streams[worker.name])
            if not self.up:
                return
        round_ = self.relay.round
        self.streams[worker.name] = stream
        self._down(stream, Welcomed(self.relay.epoch, round_, self.heads[round_]))
        for row in self.commits[hello.round + 1 : round_ + 1]:
            record = _decoded(row.body)
            assert isinstance(record, Committed)
            self._down(stream, CommitReceived(record, row.body))
        self.step(WorkerReady(worker.name))

    def lost(self, stream: Stream) -> None:
        """The relay notices that a stream tore."""
        if self.up and self.streams.get(stream.worker.name) is stream:
            del self.streams[stream.worker.name]
            self.step(WorkerLost(stream.worker.name))

    def was_sent(self, worker: str, answer: SendAnswer) -> None:
        """Nobody counts what stays in the site."""

    def told_durable(self, worker: str, ticket: Ticket) -> None:
        """A worker of the site was told that its answer is durable."""
        checker = self.world.checker
        assert isinstance(checker, SiteChecker)
        checker.acknowledged_at(self.name, worker, ticket)

    def ended_with(self, worker: str, weights: bytes) -> None:
        """A worker of the site reports its last weights."""
        if self.up:
            self.feed(WeightsReported(worker, self.relay.round, weights))
