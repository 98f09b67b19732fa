"""A late worker behind large commits, and connections that ask for pages and never read them."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.serving.measured_coordinator import HOST, Coordinator, contract, serving
from benchmarks.serving.swarm import (
    Swarm,
    Worker,
    answer_to,
    call_frame,
    frame,
    message_frame,
    tls_context,
)
from fedmezo_core.config import RunConfig
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import (
    Answered,
    Committed,
    Opened,
    Scalars,
    SeedRange,
    first_seed_of,
    rounding_seed_of,
)
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire

STEPS = 2048
COHORT = 128
"""Answers of a commit before the benchmark begins: 262,144 coefficients, 1 MiB."""
HONEST = 4
"""Workers that answer at once, and so answers of a commit while it is measured."""
GRADS = (0.5,) * STEPS
UNREAD_CONNECTIONS = 32
CALLS_EACH = 16
PATIENCE_S = 300.0
SAMPLE_S = 0.01


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    commits: int = 200
    phases: int = 3
    phase_s: float = 10.0


SMALL = Sizes(commits=12, phases=1, phase_s=2.0)
"""Only to see that it runs; no figure for a report."""


def write_commits(path: Path, config: RunConfig, count: int) -> tuple[int, bytes]:
    """Continue a new journal by rounds of `COHORT` answers; bytes of commits, and the head."""
    journal = Journal(SqliteStore(path))
    for _ in journal.load():
        pass
    names = tuple(f"early-{number}" for number in range(COHORT))
    size = 0
    for round_ in range(1, count + 1):
        ranges = tuple(
            SeedRange(first_seed_of(config.seed, round_, slot), (1e-4,) * STEPS)
            for slot in range(COHORT)
        )
        commit = Committed(round_, ranges, rounding_seed_of(config.seed, round_))
        digest = 99 if round_ == 1 else None
        answers = [Answered(round_, slot, Scalars(GRADS, None, digest)) for slot in range(COHORT)]
        bodies = encode_records([Opened(round_, 0, names), *answers, commit])
        size += len(bodies[-1])
        journal.append(bodies)
    head = journal.head
    journal.close()
    return size, head


async def _read_all(address: str, ca: Path, commits: int) -> float:
    async with CoordinatorClient(address, ca) as client:
        begin_s = time.perf_counter()
        round_ = 0
        while round_ < commits:
            page = await client.read_journal(commits_only=True, from_round=round_ + 1)
            round_ += len(page.entries)
        return time.perf_counter() - begin_s


def _late_worker(
    address: str, ca: Path, commits: int, times_s: multiprocessing.Queue[float]
) -> None:
    """A process that reads the first commits again and again; puts the seconds of each time."""
    while True:
        times_s.put(asyncio.run(_read_all(address, ca, commits)))


@contextmanager
def late_worker(coordinator: Coordinator, commits: int) -> Iterator[multiprocessing.Queue[float]]:
    """Read the commits in another process for the time of the block."""
    context = multiprocessing.get_context("spawn")
    times_s: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(
        target=_late_worker,
        args=(f"{HOST}:{coordinator.port}", coordinator.ca, commits, times_s),
        daemon=True,
    )
    process.start()
    try:
        yield times_s
    finally:
        process.kill()
        process.join()


@contextmanager
def unread_pages(coordinator: Coordinator) -> Iterator[None]:
    """Connections that ask for pages, have the smallest window, and read nothing."""
    opened = []
    request = wire.ReadJournalRequest(from_round=1, commits_only=True).SerializeToString()
    with ExitStack() as stack:
        for _ in range(UNREAD_CONNECTIONS):
            plain = socket.create_connection((HOST, coordinator.port))
            connection = stack.enter_context(tls_context().wrap_socket(plain, server_hostname=HOST))
            calls = b"".join(
                call_frame("ReadJournal", HOST, stream)
                + message_frame(request, stream=stream, last=True)
                for stream in range(1, 2 * CALLS_EACH, 2)
            )
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + calls)
            opened.append(connection)
        yield


@contextmanager
def watched_memory(coordinator: Coordinator) -> Iterator[list[float]]:
    """The most resident memory, in MB, that the coordinator has during the block."""
    peak_mb = [coordinator.resident_mb]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            peak_mb[0] = max(peak_mb[0], coordinator.resident_mb)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak_mb
    finally:
        over.set()
        watching.join()


class Honest:
    """Workers that answer at once; remembers the time from each answer to its acknowledgement."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.times_s: list[float] = []
        self._sent_at_s: dict[str, float] = {}
        swarm.on_message = self._took
        for worker in swarm.workers:
            self._answer(worker)

    def run_for(self, seconds: float) -> list[float]:
        """The times of so many seconds."""
        self.times_s = []
        self.swarm.run_for(seconds)
        return self.times_s

    def _took(self, worker: Worker, message: wire.SessionResponse) -> None:
        if message.HasField("assign"):
            self._answer(worker)
        elif message.HasField("ack"):
            self.times_s.append(time.perf_counter() - self._sent_at_s[worker.name])

    def _answer(self, worker: Worker) -> None:
        if worker.assigned is not None:
            self._sent_at_s[worker.name] = time.perf_counter()
            self.swarm.send(worker, answer_to(worker.assigned, GRADS[: worker.assigned.steps]))
            worker.assigned = None


def figures(small: bool) -> Iterator[Figure]:
    """What a late worker costs, and what pages that nobody reads cost the others."""
    sizes = SMALL if small else Sizes()
    config = contract(workers_min=HONEST, quorum=HONEST, cohort_size_max=COHORT, local_steps=STEPS)
    with tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as name:
        folder = Path(name)
        path = Coordinator(folder, config).journal
        size, head = write_commits(path, config, sizes.commits)
        with serving(folder, config) as coordinator:
            yield from _alone(coordinator, sizes.commits, size)
            swarm = Swarm(
                (HOST, coordinator.port),
                coordinator.genesis,
                head,
                [f"honest-{number}" for number in range(HONEST)],
            )
            for worker in swarm.workers:
                worker.round = sizes.commits
            try:
                swarm.join_all()
                yield from _beside(coordinator, Honest(swarm), sizes)
            finally:
                swarm.close()


def _alone(coordinator: Coordinator, commits: int, size: int) -> Iterator[Figure]:
    """One late worker while nothing else happens."""
    read_before = coordinator.process.io_counters().read_chars
    with watched_memory(coordinator) as peak_mb:
        seconds = asyncio.run(_read_all(f"{HOST}:{coordinator.port}", coordinator.ca, commits))
    read = coordinator.process.io_counters().read_chars - read_before
    name = f"one late worker, {commits} commits of 1 MiB"
    yield Figure(f"{name}: bytes read over theirs", read / size, "ratio", "at most 1.2")
    yield Figure("the same: most resident memory", peak_mb[0], "MB", "at most 150")
    yield Figure("the same: speed", size / 1e6 / seconds, "MB/s")


def _beside(coordinator: Coordinator, honest: Honest, sizes: Sizes) -> Iterator[Figure]:
    """Honest workers alone, with a late worker, and with connections that never read as well."""
    alone_s: list[float] = []
    late_s: list[float] = []
    unread_s: list[float] = []
    peak_mb = 0.0
    reads = 0
    for _ in range(sizes.phases):
        alone_s += honest.run_for(sizes.phase_s)
        with late_worker(coordinator, sizes.commits) as times_s:
            _wait_for_one(honest, times_s)
            late_s += honest.run_for(sizes.phase_s)
            with unread_pages(coordinator), watched_memory(coordinator) as peak:
                unread_s += honest.run_for(sizes.phase_s)
                while not times_s.empty():
                    times_s.get()
                unread_s += honest.run_for(sizes.phase_s)
                reads += times_s.qsize()
            peak_mb = max(peak_mb, peak[0])
    alone_ms, late_ms, unread_ms = map(_p99_ms, (alone_s, late_s, unread_s))
    yield Figure(f"answer to acknowledgement, {HONEST} honest workers alone, p99", alone_ms, "ms")
    yield Figure("the same beside one late worker that reads all the time", late_ms, "ms")
    name = f"the same with {UNREAD_CONNECTIONS} connections of unread pages as well"
    yield Figure(name, unread_ms, "ms")
    yield Figure(f"{name}: over that without", unread_ms / late_ms, "ratio", "at most 2")
    yield Figure(f"{name}: over that alone", unread_ms / alone_ms, "ratio")
    yield Figure(f"{name}: most resident memory", peak_mb, "MB")
    yield Figure(f"{name}: times that the late worker read all", reads, "times")


def _wait_for_one(honest: Honest, times_s: multiprocessing.Queue[float]) -> None:
    honest.swarm.run(lambda: not times_s.empty(), PATIENCE_S, "the late worker to catch up")


def _p99_ms(times_s: list[float]) -> float:
    return 1e3 * statistics.quantiles(times_s, n=100)[98]
