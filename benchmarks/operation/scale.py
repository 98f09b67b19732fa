"""A million devices under a thousand relays: real machines, simulated clock, measured costs.

The coordinator's round machine and every relay's machine are those of the daemons, and all
messages are the real ones, serialised to count their bytes. Devices, network and clock are
simulated. A server is one thread that serves what arrives in order; what each message costs it was
measured on the real daemon (`Costs`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median

from benchmarks.figures import Figure
from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.events import (
    Ack,
    Acknowledged,
    AnswerReceived,
    Assign,
    Assigned,
    CommitReceived,
    Connected,
    Ready,
    RoundEvent,
    RoundMessage,
    SendAnswer,
    SessionEvent,
    Tick,
    Vouched,
    Welcomed,
    WorkerLost,
    WorkerReady,
)
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, Row, head_after
from fedmezo_core.machines.relay import RelayMachine, RelayReady
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Committed, Genesis, Scalars
from fedmezo_core.wire.messages import answer_to_pb, commit_to_pb, message_to_pb

TICK_S = 1.0
SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Costs:
    """What a message costs a server, in seconds of one core, and a session in bytes of memory.

    From `make bench-coordinator`. Answers and memory (10,000 idle workers) are those of
    docs/benchmarks.md. Handing down is from two Xeon cores: half a core at 1,350 answers a second
    in whole rounds, less the 186 us that an answer alone took there.
    """

    submission_s: float = 286e-6
    """To take an answer, keep it durably or for the mean, and acknowledge it."""
    hand_down_s: float = 186e-6
    """To send a worker a commit and its next assignment."""
    session_bytes: float = 82e3


@dataclass(frozen=True, slots=True)
class Federation:
    """How many there are, and how they are connected."""

    sites: int
    """Relays; 0: the devices connect to the coordinator."""
    devices: int
    """Devices of a site, or of the coordinator."""
    seed_policy: str = "shared"
    probes: int = 8
    measuring_s: float = 20.0
    """Median time of a device's measurement; the slowest of 1,000 takes five times as long."""
    spread: float = 0.5
    """Standard deviation of its logarithm."""
    delay_s: float = 0.08
    """Mean one-way delay between a device and its server; a third of it above a relay."""
    deadline_s: float = 60.0
    """The run's; a relay gives its devices 0.8 of it."""
    lost_share: float = 0.002
    """Devices that vanish within a round, and come back for the next one."""
    away_share: float = 0.1
    """Devices that are switched off throughout."""


class Server:
    """One thread that serves what arrives, one after the other."""

    def __init__(self) -> None:
        self.free_at_s = 0.0
        self.busy_s = 0.0
        self.bytes_up = 0
        """What arrived from below."""
        self.bytes_down = 0

    def serve(self, arrives_s: float, cost_s: float) -> float:
        """When what arrives then is done."""
        self.free_at_s = max(self.free_at_s, arrives_s) + cost_s
        self.busy_s += cost_s
        return self.free_at_s


@dataclass(slots=True)
class Site:
    """A relay and its devices."""

    name: str
    machine: RelayMachine
    devices: list[str]
    server: Server = field(default_factory=Server)


class Simulation:
    """A federation from its first round on."""

    def __init__(self, federation: Federation, costs: Costs, seed: int = 0) -> None:
        self.federation = federation
        self.costs = costs
        self.rng = random.Random(seed)
        here = federation.sites or self._present()
        self.config = RunConfig(
            run_id="scale",
            model="none",
            task=TaskConfig(verbalizers={"a": "a", "b": "b"}),
            rounds=1_000_000,
            local_steps=1,
            probes=federation.probes,
            seed_policy=federation.seed_policy,
            seed=seed,
            workers_min=here,
            quorum=max(1, here // 2),
            cohort_size_max=here,
            deadline_ms=int(1000 * federation.deadline_s),
            digest_every_rounds=1_000,
        )
        genesis = Genesis(self.config, bytes(32), bytes(32), bytes(32), 1, 4)
        self.head = head_after(ZERO_HASH, encode_record(genesis))
        self.machine = RoundMachine()
        self.machine.apply(genesis)
        self.machine.start(0)
        self.server = Server()
        self.machines_s = 0.0
        """CPU time of the machines themselves, on this computer."""
        self.answers = 0
        """Answers of devices."""
        self.rounds: list[tuple[float, float]] = []
        """When each round began and was committed."""
        self.sites = [self._site(genesis, number) for number in range(federation.sites)]
        self.names = [site.name for site in self.sites] or [f"d{n}" for n in range(here)]

    def _present(self) -> int:
        """Devices of a site that are switched on."""
        federation = self.federation
        return sum(self.rng.random() >= federation.away_share for _ in range(federation.devices))

    def _site(self, genesis: Genesis, number: int) -> Site:
        machine = RelayMachine(genesis, 0, self.head)
        machine.step(Vouched(1, 0, self.head))
        devices = [f"d{n}" for n in range(self._present())]
        for device in devices:
            machine.step(WorkerReady(device))
        machine.step(Connected())
        machine.step(Welcomed(1, 0, self.head))
        return Site(f"s{number}", machine, devices)

    # ------------------------------------------------------------ rounds

    def run(self, rounds: int) -> None:
        """Commit so many rounds."""
        messages = [m for name in self.names for m in self._centre(WorkerReady(name)).messages]
        now_s = 0.0
        for _ in range(rounds):
            began_s = now_s
            given = {m.worker: m for m in messages if isinstance(m, Assign)}
            answers = sorted(self._answers_to(given.items(), began_s))
            commit, messages, now_s = self._committed(answers)
            self._hand_down(commit)
            self.rounds.append((began_s, now_s))

    def _answers_to(
        self, given: Iterable[tuple[str, Assign]], now_s: float
    ) -> Iterator[tuple[float, str, SendAnswer]]:
        """When each of the coordinator's workers has its answer there."""
        sites = {site.name: site for site in self.sites}
        for name, assign in given:
            sent_s = self._down(self.server, assign, now_s)
            event = Assigned(assign.ticket, assign.work, assign.deadline_ms)
            if name in sites:
                found = self._site_answer(sites[name], event, sent_s + self._delay_s() / 3)
                if found is not None:
                    yield found[0] + self._delay_s() / 3, name, found[1]
                continue
            back_s = sent_s + self._delay_s() + self._measuring_s() + self._delay_s()
            if self.rng.random() >= self.federation.lost_share:
                yield back_s, name, self._measured(event)

    def _site_answer(
        self, site: Site, event: Assigned, now_s: float
    ) -> tuple[float, SendAnswer] | None:
        """A site's mean and when it is sent; None if it has none.

        Devices that are late for it stop as soon as the next commit reaches them.
        """

        def mean_after(event: Tick | Assigned | WorkerLost | AnswerReceived) -> SendAnswer | None:
            up = self._relay(site, event).up
            return next((action for action in up if isinstance(action, SendAnswer)), None)

        self._relay(site, Tick(int(1000 * now_s)))
        coming = sorted(self._measurements(site, event, now_s))
        answer = self._measured(event)  # Its values are the same for all devices of the site.
        size = self._up_bytes(answer)
        lost: list[str] = []
        mean: SendAnswer | None = None
        tick_s = now_s
        for arrives_s, device, comes in coming:
            if not comes:
                lost.append(device)
                mean = mean_after(WorkerLost(device))
                continue
            now_s = site.server.serve(arrives_s, self.costs.submission_s)
            site.server.bytes_up += size
            self.answers += 1
            if now_s >= tick_s + TICK_S:
                tick_s = now_s
                mean = mean_after(Tick(int(1000 * now_s)))
            mean = mean or mean_after(AnswerReceived(device, event.ticket, answer.scalars))
            if mean is not None:
                break
        while mean is None and site.machine.roster.awaited:
            now_s = max(now_s, tick_s) + TICK_S
            mean = mean_after(Tick(int(1000 * now_s)))
        for device in lost:
            self._relay(site, WorkerReady(device))
        return None if mean is None else (now_s, mean)

    def _measurements(
        self, site: Site, event: Assigned, now_s: float
    ) -> Iterator[tuple[float, str, bool]]:
        """When each device of a site has its answer there, or is found to have vanished."""
        for message in self._relay(site, event).messages:
            if isinstance(message, Assign):
                sent_s = self._down(site.server, message, now_s)
                back_s = sent_s + self._delay_s() + self._measuring_s() + self._delay_s()
                yield back_s, message.worker, self.rng.random() >= self.federation.lost_share

    def _committed(
        self, answers: Iterable[tuple[float, str, SendAnswer]]
    ) -> tuple[Committed, list[RoundMessage], float]:
        """The round's commit, what follows it, and when."""
        messages: list[RoundMessage] = []

        def commit_in(event: AnswerReceived | Tick) -> Committed | None:
            ready = self._centre(event)
            messages.extend(ready.messages)
            return next((r for r in ready.records if isinstance(r, Committed)), None)

        commit, now_s = None, self.server.free_at_s
        for arrives_s, name, answer in answers:
            now_s = self.server.serve(arrives_s, self.costs.submission_s)
            self.server.bytes_up += self._up_bytes(answer)
            commit = commit_in(Tick(int(1000 * now_s))) or commit_in(
                AnswerReceived(name, answer.ticket, answer.scalars)
            )
            if commit is not None:
                break
        while commit is None:  # The deadline closes the round.
            now_s += TICK_S
            commit = commit_in(Tick(int(1000 * now_s)))
        self._acknowledge(messages)
        return commit, messages, now_s

    def _acknowledge(self, messages: Iterable[RoundMessage]) -> None:
        """Take acknowledgements down to the devices; their cost is in that of the answers."""
        sites = {site.name: site for site in self.sites}
        for message in messages:
            if not isinstance(message, Ack):
                continue
            size = message_to_pb(message, self.config, lambda _round: self.head).ByteSize()
            self.server.bytes_down += size
            if message.worker in sites:
                site = sites[message.worker]
                ready = self._relay(site, Acknowledged(message.ticket, self.head))
                site.server.bytes_down += size * len(ready.messages)

    def _hand_down(self, commit: Committed) -> None:
        """Give a commit to everybody; assignments go with it, and their cost is in it."""
        body = encode_record(commit)
        event = CommitReceived(commit, body, self.head)
        self.head = head_after(self.head, body)
        notice = commit_to_pb(Row(commit.round, body, b""), bytes(SIGNATURE_BYTES)).ByteSize()
        self.server.bytes_down += notice * len(self.names)
        for site in self.sites:
            self._relay(site, event)
            site.server.bytes_down += notice * len(site.devices)

    # ------------------------------------------------------------ costs

    def _down(self, server: Server, assign: Assign, now_s: float) -> float:
        """Send an assignment, with the commit before it; returns when that is done."""
        message = message_to_pb(assign, self.config, lambda _round: self.head)
        server.bytes_down += message.ByteSize()
        return server.serve(now_s, self.costs.hand_down_s)

    def _up_bytes(self, answer: SendAnswer) -> int:
        return answer_to_pb(answer).ByteSize()

    def _delay_s(self) -> float:
        return self.rng.expovariate(1 / self.federation.delay_s)

    def _measuring_s(self) -> float:
        return self.federation.measuring_s * self.rng.lognormvariate(0, self.federation.spread)

    def _measured(self, event: Assigned) -> SendAnswer:
        grads = tuple(self.rng.gauss(0, 1) for _ in event.work.seeds)
        digest = 1 if event.work.want_digest else None
        return SendAnswer(event.ticket, Scalars(grads, None, digest))

    def _centre(self, event: WorkerReady | AnswerReceived | Tick) -> Ready:
        begin_s = time.process_time()
        ready = self.machine.step(event)
        self.machines_s += time.process_time() - begin_s
        return ready

    def _relay(
        self,
        site: Site,
        event: RoundEvent | SessionEvent,
    ) -> RelayReady:
        begin_s = time.process_time()
        ready = site.machine.step(event)
        self.machines_s += time.process_time() - begin_s
        return ready


FEDERATIONS = {
    "1,000 devices": Federation(sites=0, devices=1_000),
    "4,000 devices": Federation(sites=0, devices=4_000),
    "100 relays of 1,000 devices": Federation(sites=100, devices=1_000),
    "1,000 relays of 1,000 devices": Federation(sites=1_000, devices=1_000),
    # Devices with a GPU, near their relay.
    "1,000 relays of 1,000 fast devices": Federation(
        sites=1_000, devices=1_000, measuring_s=0.5, spread=0.2, delay_s=0.02, deadline_s=10.0
    ),
}
SMALL = 3
"""The first so many take seconds."""
ROUNDS = 3


def figures(small: bool) -> Iterator[Figure]:
    """Rounds of federations of several sizes; the last of them on servers twice as fast, too."""
    costs = Costs()
    faster = replace(costs, submission_s=costs.submission_s / 2, hand_down_s=costs.hand_down_s / 2)
    for name, federation in [*FEDERATIONS.items()][: SMALL if small else None]:
        yield from _measured(name, federation, costs)
    if not small:
        yield from _measured(f"{name}, faster servers", federation, faster)


def _measured(name: str, federation: Federation, costs: Costs) -> Iterator[Figure]:
    simulation = Simulation(federation, costs)
    simulation.run(ROUNDS)
    centre, sessions = simulation.server, len(simulation.names)
    yield Figure(f"{name}: a round", median(e - b for b, e in simulation.rounds), "s")
    yield Figure(f"{name}: centre, busy in a round", centre.busy_s / ROUNDS, "s")
    yield Figure(f"{name}: centre, up in a round", centre.bytes_up / ROUNDS / 1e6, "MB")
    yield Figure(f"{name}: centre, down in a round", centre.bytes_down / ROUNDS / 1e6, "MB")
    yield Figure(f"{name}: centre, sessions", sessions * costs.session_bytes / 1e6, "MB")
    if simulation.sites:
        relays = [site.server for site in simulation.sites]
        busy_s = max(relay.busy_s for relay in relays)
        up = max(relay.bytes_up for relay in relays)
        down = max(relay.bytes_down for relay in relays)
        yield Figure(f"{name}: a relay, busy in a round", busy_s / ROUNDS, "s")
        yield Figure(f"{name}: a relay, up in a round", up / ROUNDS / 1e6, "MB")
        yield Figure(f"{name}: a relay, down in a round", down / ROUNDS / 1e6, "MB")
    answers = simulation.answers or ROUNDS * sessions
    each_us = 1e6 * simulation.machines_s / answers
    yield Figure(f"{name}: the machines' own CPU for an answer, here", each_us, "us")
