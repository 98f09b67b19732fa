"""`make bench-coordinator`: what one coordinator process on one core holds, over TLS."""

from __future__ import annotations

import argparse
import os
import resource
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.figures import REPORTS, Figure, arguments_of, collect, publish
from benchmarks.serving.measured_coordinator import HOST, Coordinator, contract, cores, serving
from benchmarks.serving.swarm import (
    Caller,
    Swarm,
    Worker,
    answer_to,
    hello_of,
    signed_answer_to,
)
from fedmezo_coordinator.compaction import SEAL_RECORDS
from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import decode_record, encode_record, encode_records
from fedmezo_core.journal.journal import COMMITTED, ZERO_HASH, Journal, head_after
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import (
    Answered,
    Committed,
    Opened,
    Record,
    Scalars,
    SeedRange,
    first_seed_of,
    rounding_seed_of,
)
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_proto.v1 import coordinator_pb2 as wire

REPORT = REPORTS / "bench-coordinator.json"
STEPS = 10
"""Local steps, and so scalars of an answer."""
GRADS = tuple((k - 4.5) / 8 for k in range(STEPS))
WEEK_MS = 7 * 24 * 3600 * 1000
PATIENCE_S = 300.0
UNARY_IN_FLIGHT = 64
SETTLE_S = 0.1
"""Rest before and after a burst, in which the coordinator ends what is left of the one before."""

Ticket = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    submitting: int = 1000
    bursts: int = 10
    polling: int = 1000
    loaded_s: float = 60.0
    rounds: int = 1000
    idle: int = 10_000
    idle_s: float = 150.0
    """As long as it takes until the coordinator has pinged every worker once."""
    listening: int = 1000
    commits: int = 20
    returning: int = 5000
    records: int = 1_000_000


SMALL = Sizes(
    submitting=200,
    bursts=3,
    polling=100,
    loaded_s=3.0,
    rounds=100,
    idle=500,
    idle_s=3.0,
    listening=200,
    commits=5,
    returning=300,
    records=50_000,
)
"""Only to see that it runs: seconds each, and no figure for a report."""


# ---------------------------------------------------------------- workers


@contextmanager
def swarm_of(coordinator: Coordinator, count: int) -> Iterator[Swarm]:
    """A swarm of `count` workers, not yet joined."""
    swarm = Swarm(
        (HOST, coordinator.port),
        coordinator.genesis,
        head_after(ZERO_HASH, encode_record(coordinator.genesis)),
        [f"worker-{number:05d}" for number in range(count)],
    )
    try:
        yield swarm
    finally:
        swarm.close()


@contextmanager
def running(
    count: int, config: RunConfig, *, signing: bool = False, pinned: bool = True
) -> Iterator[tuple[Coordinator, Swarm]]:
    """A coordinator of its own, and workers that have joined it; `signing`: every second signs."""
    with (
        tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder,
        serving(Path(folder), config, pinned=pinned) as coordinator,
        swarm_of(coordinator, count) as swarm,
    ):
        for worker in swarm.workers[1::2] if signing else ():
            worker.signer = AnswerSigner(Ed25519PrivateKey.generate(), worker.head)
        swarm.join_all()
        yield coordinator, swarm


class Answering:
    """Lets every worker answer its assignments at once, and counts."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.acknowledged: set[Ticket] = set()
        self.acks = 0
        self.commits = 0
        self.committed_at_s: list[float] = []
        """When each round's commit came to its first worker."""
        swarm.on_message = self._took
        for worker in swarm.workers:
            self._answer(worker)

    def _took(self, worker: Worker, message: wire.SessionResponse) -> None:
        match message.WhichOneof("kind"):
            case "assign":
                self._answer(worker)
            case "ack":
                self.acks += 1
                self.acknowledged.add(_ticket(message.ack.ticket))
            case "commit" if worker.round > self.commits:
                self.commits = worker.round
                self.committed_at_s.append(time.perf_counter())
            case _:
                pass

    def _answer(self, worker: Worker) -> None:
        if worker.assigned is not None:
            self.swarm.send(worker, answer_to(worker.assigned, GRADS[: worker.assigned.steps]))
            worker.assigned = None


def _ticket(ticket: wire.Ticket) -> Ticket:
    return ticket.epoch, ticket.round, ticket.slot


# ---------------------------------------------------------------- the figures


def submissions(sizes: Sizes) -> Iterator[Figure]:
    """All but one worker of a round answer at once: the round stays open, nothing else is sent."""
    count = sizes.submitting
    config = contract(
        workers_min=count,
        quorum=count,
        cohort_size_max=count,
        local_steps=STEPS,
        deadline_ms=WEEK_MS,
    )
    with running(count, config) as (coordinator, swarm):
        seconds = cpu_s = 0.0
        for _ in range(sizes.bursts):
            swarm.run(lambda: all(w.assigned for w in swarm.workers), PATIENCE_S, "assignments")
            cpu_before_s = coordinator.cpu_s
            seconds += _burst(swarm, _answers_of(swarm.workers[1:]))
            cpu_s += coordinator.cpu_s - cpu_before_s
            first = swarm.workers[0]
            assert first.assigned is not None
            swarm.send(first, answer_to(first.assigned, GRADS))
            first.assigned = None
        acks = sizes.bursts * (count - 1)
        yield Figure(
            f"durable submissions over streams, {count:,} workers, {STEPS} scalars each, "
            "sent to acknowledged",
            acks / seconds,
            "/s",
            "at least 4000",
        )
        yield Figure("the same: CPU time of the coordinator each", 1e6 * cpu_s / acks, "us")
        swarm.run(lambda: all(w.assigned for w in swarm.workers), PATIENCE_S, "assignments")
        yield from _full_load(sizes, coordinator, swarm)


def signatures(sizes: Sizes) -> Iterator[Figure]:
    """The same with half of the workers signing; one core, and one more for the checks."""
    yield from _signatures(sizes, pinned=True)
    yield from _signatures(sizes, pinned=False)


def _signatures(sizes: Sizes, *, pinned: bool) -> Iterator[Figure]:
    """Bursts of those who sign take turns with bursts of the others."""
    count = sizes.submitting
    config = contract(
        workers_min=count,
        quorum=count,
        cohort_size_max=count,
        local_steps=STEPS,
        deadline_ms=WEEK_MS,
    )
    with running(count, config, signing=True, pinned=pinned) as (coordinator, swarm):
        halves = {
            "unsigned": [worker for worker in swarm.workers[1:] if worker.signer is None],
            "signed": [worker for worker in swarm.workers if worker.signer is not None],
        }
        seconds, cpu_s = dict.fromkeys(halves, 0.0), dict.fromkeys(halves, 0.0)
        for burst in range(1 + sizes.bursts):
            swarm.run(lambda: all(w.assigned for w in swarm.workers), PATIENCE_S, "assignments")
            coordinator.keep_apart()
            # Workers sign on machines of their own, so this comes before the time.
            answers = {which: _answers_of(half) for which, half in halves.items()}
            for which in sorted(halves, reverse=burst % 2 == 1):
                swarm.run_for(SETTLE_S)
                cpu_before_s = coordinator.cpu_s
                taken_s = _burst(swarm, answers[which])
                # What is left after the last acknowledgement belongs to this half, too.
                swarm.run_for(SETTLE_S)
                if burst:  # The first one starts the process that checks signatures.
                    seconds[which] += taken_s
                    cpu_s[which] += coordinator.cpu_s - cpu_before_s
            first = swarm.workers[0]
            assert first.assigned is not None
            swarm.send(first, answer_to(first.assigned, GRADS))
            first.assigned = None
    acks = {which: sizes.bursts * len(half) for which, half in halves.items()}
    cpu = {which: cpu_s[which] / acks[which] for which in halves}
    where = "one core" if pinned else "signatures checked on the core of the load"
    for which in halves:
        name = f"durable submissions over streams, {count:,} workers, {where}, {which}"
        yield Figure(name, acks[which] / seconds[which], "/s")
        name = f"the same, {which}: CPU time of the coordinator's process"
        yield Figure(name, 1e6 * cpu[which], "us")
    if not pinned and cpu["signed"]:  # A small run may take less than the clock shows.
        # What bounds the throughput where the checks have a core of their own.
        name = "throughput that signatures cost the coordinator's process, by its CPU time"
        yield Figure(name, 100 * (1 - cpu["unsigned"] / cpu["signed"]), "%", "at most 15")
    loss = 100 * (1 - acks["signed"] / seconds["signed"] * seconds["unsigned"] / acks["unsigned"])
    yield Figure(f"throughput that signatures cost, {where}", loss, "%", "at most 15")


def _answers_of(workers: Sequence[Worker]) -> list[tuple[Worker, wire.SessionRequest]]:
    """Each worker with its answer, signed if it signs."""
    return [(w, signed_answer_to(w.assigned, GRADS, w)) for w in workers if w.assigned is not None]


def _burst(swarm: Swarm, answers: Sequence[tuple[Worker, wire.SessionRequest]]) -> float:
    """Seconds from the first answer sent to the last one acknowledged."""
    left = len(answers)

    def took(worker: Worker, message: wire.SessionResponse) -> None:
        nonlocal left
        left -= message.HasField("ack")

    swarm.on_message = took
    begin = time.perf_counter()
    for number, (worker, answer) in enumerate(answers):
        swarm.send(worker, answer)
        worker.assigned = None
        if number % 32 == 0:
            swarm.turn(0.0)
    swarm.run(lambda: left == 0, PATIENCE_S, "acknowledgements")
    return time.perf_counter() - begin


def _full_load(sizes: Sizes, coordinator: Coordinator, swarm: Swarm) -> Iterator[Figure]:
    """Whole rounds: each answer also gets a commit of all workers' pairs and a new assignment."""
    answering = Answering(swarm)
    begin, cpu_before_s = time.perf_counter(), coordinator.cpu_s
    swarm.run_for(sizes.loaded_s)
    seconds = time.perf_counter() - begin
    busy = 100 * (coordinator.cpu_s - cpu_before_s) / seconds
    count = f"{len(swarm.workers):,} workers"
    yield Figure(
        f"the same in whole rounds of {count}, each with its commit to all and new assignments",
        answering.acks / seconds,
        "/s",
    )
    yield Figure(f"full load, {count}: the coordinator's core", busy, "% busy")
    lag = coordinator.status().loop_lag_p99_ms
    yield Figure(f"full load, {count}: event-loop lag, p99", lag, "ms", "at most 25")


def unary(sizes: Sizes) -> Iterator[Figure]:
    """PollSession: one call takes an answer up and brings its acknowledgement down."""
    count = sizes.polling
    config = contract(
        workers_min=count,
        quorum=count,
        cohort_size_max=count,
        local_steps=STEPS,
        deadline_ms=WEEK_MS,
    )
    with (
        tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder,
        serving(Path(folder), config) as coordinator,
    ):
        times, seconds, cpu_s = _poll(coordinator, count, sizes.bursts)
    times.sort()
    name = f"durable submissions by unary calls, {UNARY_IN_FLIGHT} in flight"
    yield Figure(name, len(times) / seconds, "/s", "at least 1000")
    yield Figure(f"{name}, median", 1e3 * statistics.median(times), "ms")
    yield Figure(f"{name}, p99", 1e3 * times[int(0.99 * len(times))], "ms", "at most 100")
    each = 1e6 * cpu_s / len(times)
    yield Figure("the same: CPU time of the coordinator each", each, "us")


@dataclass(slots=True)
class Poller:
    """A worker without a stream."""

    name: str
    token: bytes = b""
    assigned: wire.Assign | None = None

    def took(self, answer: wire.PollSessionResponse) -> None:
        """Keep what matters of an answer."""
        self.token = answer.token
        for message in answer.messages:
            if message.HasField("assign"):
                self.assigned = message.assign

    def request(self, *messages: wire.SessionRequest, wait_ms: int = 0) -> bytes:
        """A call."""
        return wire.PollSessionRequest(
            token=self.token, messages=messages, wait_ms=wait_ms
        ).SerializeToString()

    def submission(self) -> bytes:
        """The call that answers."""
        assert self.assigned is not None
        answer, self.assigned = answer_to(self.assigned, GRADS), None
        return self.request(answer, wait_ms=30_000)


def _poll(coordinator: Coordinator, count: int, rounds: int) -> tuple[list[float], float, float]:
    """Seconds of each submission and of all bursts together, and the coordinator's CPU seconds."""
    address = HOST, coordinator.port
    callers = [Caller(address, "PollSession") for _ in range(UNARY_IN_FLIGHT)]
    head = head_after(ZERO_HASH, encode_record(coordinator.genesis))
    pollers = [Poller(f"worker-{number:05d}") for number in range(count)]

    def hello(poller: Poller) -> bytes:
        message = hello_of(coordinator.genesis, poller.name, 0, head)
        return poller.request(wire.SessionRequest(hello=message))

    _in_lanes(callers, pollers, hello)
    times: list[float] = []
    seconds = cpu_s = 0.0
    for _ in range(rounds):
        while lacking := [poller for poller in pollers if poller.assigned is None]:
            _in_lanes(callers, lacking, lambda poller: poller.request(wait_ms=30_000))
        begin, cpu_before_s = time.perf_counter(), coordinator.cpu_s
        times += _in_lanes(callers, pollers[1:], Poller.submission)
        seconds += time.perf_counter() - begin
        cpu_s += coordinator.cpu_s - cpu_before_s
        _in_lanes(callers, pollers[:1], Poller.submission)
    for caller in callers:
        caller.sock.close()
    return times, seconds, cpu_s


def _in_lanes(
    callers: Sequence[Caller], pollers: Sequence[Poller], request_of: Callable[[Poller], bytes]
) -> list[float]:
    """A call for each poller, one at a time on each connection; the seconds that each took."""
    waiting = iter(pollers)
    calls: dict[int, tuple[Caller, Poller, float]] = {}
    times: list[float] = []
    with select.epoll() as epoll:

        def begin_next(caller: Caller) -> None:
            poller = next(waiting, None)
            if poller is None:
                calls.pop(caller.sock.fileno(), None)
                return
            calls[caller.sock.fileno()] = caller, poller, time.perf_counter()
            caller.call(request_of(poller))

        for caller in callers:
            epoll.register(caller.sock.fileno(), select.EPOLLIN)
            begin_next(caller)
        while calls:
            for fileno, _ in epoll.poll(PATIENCE_S):
                if fileno not in calls:  # a ping, or the like
                    continue
                caller, poller, begin_s = calls[fileno]
                answer = caller.take()
                if answer is not None:
                    times.append(time.perf_counter() - begin_s)
                    poller.took(wire.PollSessionResponse.FromString(answer))
                    begin_next(caller)
    return times


def empty_round(sizes: Sizes) -> Iterator[Figure]:
    """Two workers that measure nothing."""
    config = contract(workers_min=2, quorum=2, cohort_size_max=2, local_steps=1)
    with running(2, config) as (coordinator, swarm):
        answering = Answering(swarm)
        swarm.run(lambda: answering.commits >= sizes.rounds, PATIENCE_S, "rounds")
        at = answering.committed_at_s
        times = sorted(1e3 * (after - before) for before, after in pairwise(at))
        syncs = sorted(_fdatasync_ms(coordinator.folder / "synced", 200))
    yield Figure(
        "empty round of two workers, commit to commit, median",
        statistics.median(times),
        "ms",
        "at most 3",
    )
    yield Figure("the same, p99", times[int(0.99 * len(times))], "ms")
    yield Figure("fdatasync of 4 KiB on the same disk, median", statistics.median(syncs), "ms")


def _fdatasync_ms(path: Path, count: int) -> Iterator[float]:
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for _ in range(count):
            os.write(file, bytes(4096))
            begin = time.perf_counter()
            os.fdatasync(file)
            yield 1e3 * (time.perf_counter() - begin)
    finally:
        os.close(file)


def idle(sizes: Sizes) -> Iterator[Figure]:
    """Workers that wait: a round of four is open, and nobody answers."""
    config = contract(workers_min=4, quorum=4, cohort_size_max=4, deadline_ms=WEEK_MS)
    with (
        tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder,
        serving(Path(folder), config) as coordinator,
        swarm_of(coordinator, sizes.idle) as swarm,
    ):
        empty_mb, begin = coordinator.resident_mb, time.perf_counter()
        swarm.join_all(2 * PATIENCE_S)
        joined_s = time.perf_counter() - begin
        swarm.run_for(2.0)
        cpu_before_s = coordinator.cpu_s
        swarm.run_for(sizes.idle_s)
        cpu = 100 * (coordinator.cpu_s - cpu_before_s) / sizes.idle_s
        resident_mb = coordinator.resident_mb
        assert swarm.welcomed == sizes.idle, "workers were lost while they waited"
    workers = f"{sizes.idle:,} idle workers over TLS"
    yield Figure(f"{workers}: resident memory", resident_mb / 1e3, "GB", "at most 1.2")
    each_kb = 1e3 * (resident_mb - empty_mb) / sizes.idle
    yield Figure(f"{workers}: resident memory each", each_kb, "kB")
    yield Figure(f"{workers}: CPU of one core", cpu, "%", "at most 2")
    yield Figure(f"{workers}: time to join", joined_s, "s")


def fan_out(sizes: Sizes) -> Iterator[Figure]:
    """Two of the workers make a round; everyone gets its commit."""
    config = contract(workers_min=2, quorum=2, cohort_size_max=2, deadline_ms=WEEK_MS)
    with running(sizes.listening, config) as (_, swarm):
        times = []
        for round_ in range(1, sizes.commits + 1):
            swarm.run(lambda: _assigned(swarm, 2), PATIENCE_S, "assignments")
            begin = time.perf_counter()
            for worker in swarm.workers:
                if worker.assigned is not None:
                    swarm.send(worker, answer_to(worker.assigned, GRADS))
                    worker.assigned = None
            swarm.run(
                partial(_all_at, swarm, round_),
                PATIENCE_S,
                "a commit to reach all workers",
            )
            times.append(1e3 * (time.perf_counter() - begin))
    name = f"commit to {sizes.listening:,} workers, from the last answer to the last worker"
    yield Figure(f"{name}, median", statistics.median(times), "ms", "at most 250")
    yield Figure(f"{name}, longest", max(times), "ms")


def _all_at(swarm: Swarm, round_: int) -> bool:
    return all(worker.round == round_ for worker in swarm.workers)


def _assigned(swarm: Swarm, count: int) -> bool:
    return sum(worker.assigned is not None for worker in swarm.workers) == count


def reconnect(sizes: Sizes) -> Iterator[Figure]:
    """kill -9 under load, a new start at once, and everyone comes back with full jitter."""
    count = sizes.returning
    cohort = min(count // 4, 512)
    config = contract(
        workers_min=cohort, quorum=cohort // 2, cohort_size_max=cohort, deadline_ms=2000
    )
    with running(count, config) as (coordinator, swarm):
        answering = Answering(swarm)
        swarm.run(lambda: answering.commits >= 3, PATIENCE_S, "rounds under load")
        acks = answering.acks
        swarm.run(lambda: answering.acks > acks + cohort // 3, PATIENCE_S, "a round half answered")
        before = set(answering.acknowledged)
        begin = time.perf_counter()
        coordinator.kill()
        coordinator.launch()
        for worker in swarm.workers:
            worker.welcomed, worker.assigned = False, None

        def are_back() -> bool:
            coordinator.check_it_runs()
            return swarm.welcomed == count

        swarm.run(are_back, PATIENCE_S, "everyone to come back")
        seconds = time.perf_counter() - begin
        refused = coordinator.status().sessions_refused
        commits = answering.commits
        swarm.run(lambda: answering.commits > commits, PATIENCE_S, "the run to go on")
        coordinator.kill()
        lost = answering.acknowledged - _answered(coordinator.journal)
    yield Figure(f"{count:,} workers back after kill -9", seconds, "s", "at most 30")
    yield Figure("the same: joins refused with a time to come back", refused, "joins")
    yield Figure("the same: answers acknowledged before the kill", len(before), "answers")
    yield Figure("the same: acknowledged answers lost", len(lost), "answers", "at most 0")


def _answered(path: Path) -> set[Ticket]:
    """Tickets of all answers in a verified journal."""
    machine, epoch, found = RoundMachine(), 0, set()
    journal = Journal(SqliteStore(path, create=False))
    try:
        for entry in journal.load():
            record = decode_record(entry.row.body)
            machine.apply(record)
            epoch = getattr(record, "epoch", epoch)
            if isinstance(record, Answered):
                found.add((epoch, record.round, record.slot))
    finally:
        journal.close()
    return found


def start(sizes: Sizes) -> Iterator[Figure]:
    """Starts on `sizes.records` records of rounds of 64 workers, the last of them not sealed."""
    config = contract(
        workers_min=64,
        quorum=64,
        cohort_size_max=64,
        local_steps=STEPS,
        digest_every_rounds=1,
        report_losses=True,
    )
    with tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder:
        coordinator = Coordinator(Path(folder), config)
        # As many records after the newest sealed state as there can be.
        older = write_rounds(coordinator.journal, config, sizes.records - SEAL_RECORDS + 100)
        unsealed_s, _ = _started(coordinator)
        records = write_rounds(coordinator.journal, config, sizes.records)
        mb = coordinator.journal.stat().st_size / 1e6
        seconds, resident_mb = _started(coordinator)
    name = f"{records:,} records ({mb:,.0f} MB) verified and serving"
    yield Figure(name, seconds, "s", "at most 5")
    yield Figure("the same: resident memory", resident_mb, "MB", "at most 100")
    yield Figure(f"{older:,} records without a sealed state, folded and serving", unsealed_s, "s")


def _started(coordinator: Coordinator) -> tuple[float, float]:
    """Seconds until a coordinator serves, and its memory then in MB."""
    begin = time.perf_counter()
    try:
        coordinator.start()
        return time.perf_counter() - begin, coordinator.resident_mb
    finally:
        coordinator.stop()


def write_rounds(path: Path, config: RunConfig, count: int) -> int:
    """Continue a journal up to about `count` records; returns how many there are."""
    journal = Journal(SqliteStore(path))
    round_ = sum(entry.row.kind == COMMITTED for entry in journal.load())
    names = tuple(f"worker-{number:05d}" for number in range(config.cohort_size_max))
    records: list[Record] = []
    while len(journal) + len(records) < count:
        round_ += 1
        digest = 99 if (round_ - 1) % config.digest_every_rounds == 0 else None
        records.append(Opened(round_, 0, names))
        records += [
            Answered(round_, slot, Scalars(GRADS, 0.5, digest)) for slot in range(len(names))
        ]
        runs = tuple(
            SeedRange(first_seed_of(config.seed, round_, slot), GRADS) for slot in range(len(names))
        )
        records.append(Committed(round_, runs, rounding_seed_of(config.seed, round_)))
        if len(records) > 5000:
            journal.append(encode_records(records))
            records = []
    journal.append(encode_records(records))
    length = len(journal)
    journal.close()
    return length


# ---------------------------------------------------------------- the command

GROUPS: dict[str, Callable[[Sizes], Iterator[Figure]]] = {
    "submissions": submissions,
    "signatures": signatures,
    "unary": unary,
    "empty-round": empty_round,
    "fan-out": fan_out,
    "idle": idle,
    "reconnect": reconnect,
    "start": start,
}


def allow_files() -> None:
    """Take all the open files that this process, and the coordinator after it, may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few seconds: does it run?")
    arguments = arguments_of(parser, REPORT, GROUPS)
    allow_files()
    sizes = SMALL if arguments.small else Sizes()
    figures = collect(partial(GROUPS[name], sizes) for name in arguments.only)
    ours, theirs = cores()
    publish(figures, REPORT, f"coordinator on core {sorted(ours)}, its load on {sorted(theirs)}")


if __name__ == "__main__":
    main()
