"""Many runs in one coordinator: rounds beside those of one run, a full disk, a start, a kill.

The load is the same with many runs and with one: the same workers, each of which measures for a
while and then answers.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.figures import Figure
from benchmarks.serving.measured_coordinator import (
    HOST,
    Coordinator,
    begin_journal,
    contract,
    cores,
    genesis_of,
)
from benchmarks.serving.swarm import Swarm, Worker, answer_to
from fedmezo_core.config import PROTOCOL_VERSION
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, Journal, head_after
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from fedmezo_proto.v1 import runs_pb2, runs_pb2_grpc

MEASURING_S = (0.8, 1.2)
"""Shortest and longest time that a worker measures."""
FULL_BYTES = 1 << 20
"""Size of the disk that is full soon."""
ROUNDS_BEFORE_KILL, ROUNDS = 3, 6
"""Rounds of the runs that are killed, before the kill and in all."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    runs: int = 20
    workers: int = 1000
    """Of all runs together."""
    seconds: float = 40.0

    @property
    def workers_of_a_run(self) -> int:
        """Workers of each of many runs."""
        return self.workers // self.runs


class CoordinatorOfMany(Coordinator):
    """A coordinator of many runs, each with the same contract but for its name."""

    def __init__(self, folder: Path, names: Sequence[str], workers: int, **more: Any) -> None:
        """`more` are values of the contract; each run has `workers` workers."""
        of_all = {"workers_min": workers, "quorum": workers, "cohort_size_max": workers} | more
        self.runs = folder / "runs"
        self.geneses = {name: genesis_of(contract(run_id=name, **of_all)) for name in names}
        super().__init__(folder, contract())

    @property
    def serves(self) -> Sequence[str | Path]:
        """The flags that say what it serves."""
        return ("--runs", self.runs)

    def begin(self) -> None:
        """Make each run's folder as the coordinator itself would."""
        for name, genesis in self.geneses.items():
            folder = self.runs / name
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "settings.toml").write_text('model = "none"\nreplica = false\n')
            (folder / "run.json").write_text('{"created_ms": 1, "files": {}}')
            begin_journal(folder / "journal.db", genesis)

    def phases(self) -> dict[str, int]:
        """What each run is doing."""
        return {run.run_id: run.phase for run in self.summaries()}

    def summaries(self) -> Sequence[runs_pb2.RunSummary]:
        """What it says of its runs."""
        with self.channel() as channel:
            stub = runs_pb2_grpc.RunServiceStub(channel)
            listed: runs_pb2.ListRunsResponse = stub.ListRuns(runs_pb2.ListRunsRequest())
            return listed.runs

    def head(self, name: str) -> bytes:
        """Head of a run's newest round."""
        with self.channel() as channel:
            request = wire.GetRunRequest(protocol_versions=[PROTOCOL_VERSION], run_id=name)
            described: wire.GetRunResponse = rpc.CoordinatorServiceStub(channel).GetRun(request)
            return described.head

    def wait_until_it_serves(self, timeout_s: float = 120.0) -> None:
        """Ask until every run is served."""
        end_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(grpc.RpcError):
                if all(phase != runs_pb2.RUN_PHASE_CREATING for phase in self.phases().values()):
                    return
            if time.monotonic() > end_s:
                log = (self.folder / "coordinator.log").read_text(errors="replace")
                raise RuntimeError(f"the coordinator does not serve:\n{log[-2000:]}")
            time.sleep(0.01)


@dataclass(eq=False)
class Measuring:
    """Workers of one run, which answer a while after they were asked."""

    swarm: Swarm
    rng: random.Random
    committed_s: list[float] = field(default_factory=list)
    """When each round's commit came to its first worker."""
    _due: list[tuple[float, int, Worker]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.swarm.on_message = self._took

    def _took(self, worker: Worker, message: wire.SessionResponse) -> None:
        match message.WhichOneof("kind"):
            case "assign":
                self._count += 1
                due_s = time.monotonic() + self.rng.uniform(*MEASURING_S)
                heapq.heappush(self._due, (due_s, self._count, worker))
            case "commit" if worker.round > len(self.committed_s):
                self.committed_s.append(time.monotonic())
            case _:
                pass

    def turn(self, wait_s: float) -> None:
        """Send what is due, and take what has come."""
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            worker = heapq.heappop(self._due)[2]
            if worker.assigned is not None:
                grads = [0.5 * self.rng.random() for _ in range(worker.assigned.steps)]
                self.swarm.send(worker, answer_to(worker.assigned, grads))
                worker.assigned = None
        self.swarm.turn(wait_s)

    def round_s(self) -> list[float]:
        """Length of each round but the first two, in seconds."""
        return [b - a for a, b in zip(self.committed_s[1:], self.committed_s[2:], strict=False)]


@contextlib.contextmanager
def load_on(coordinator: CoordinatorOfMany, workers: int) -> Iterator[dict[str, Measuring]]:
    """The workers of all runs, which have joined."""
    loads: dict[str, Measuring] = {}
    try:
        for name, genesis in coordinator.geneses.items():
            names = [f"{name}-{number:04d}" for number in range(workers)]
            loads[name] = Measuring(swarm_of(coordinator, genesis, names), random.Random(name))
        for load in loads.values():
            load.swarm.begin()
        drive(loads, lambda: all(one.swarm.welcomed == workers for one in loads.values()), 120.0)
        yield loads
    finally:
        for load in loads.values():
            load.swarm.close()


def swarm_of(coordinator: Coordinator, genesis: Genesis, names: Sequence[str]) -> Swarm:
    """Workers of a run at its base."""
    head = head_after(ZERO_HASH, encode_record(genesis))
    return Swarm((HOST, coordinator.port), genesis, head, names)


def drive(loads: dict[str, Measuring], done: Callable[[], bool], timeout_s: float) -> None:
    """Let all workers work until `done`; raises `TimeoutError` if that takes too long."""
    end_s = time.monotonic() + timeout_s
    wait_s = 0.002 / len(loads)
    while not done():
        if time.monotonic() > end_s:
            raise TimeoutError("waited in vain for the workers")
        for load in loads.values():
            load.turn(wait_s)


def drive_for(loads: dict[str, Measuring], seconds: float) -> None:
    """Let all workers work for so long."""
    end_s = time.monotonic() + seconds
    drive(loads, lambda: time.monotonic() >= end_s, 2 * seconds + 60)


@contextlib.contextmanager
def serving(names: Sequence[str], workers: int, **more: Any) -> Iterator[CoordinatorOfMany]:
    """A started coordinator of these runs, which the load stays off."""
    before = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder:
        coordinator = CoordinatorOfMany(Path(folder), names, workers, **more)
        os.sched_setaffinity(0, cores()[1])
        try:
            coordinator.start()
            yield coordinator
        finally:
            coordinator.stop()
            os.sched_setaffinity(0, before)


def names_of(count: int) -> list[str]:
    """Names of runs."""
    return [f"run-{number:02d}" for number in range(count)]


def figures(small: bool) -> Iterator[Figure]:
    """All figures of many runs in one coordinator."""
    sizes = Sizes(runs=4, workers=40, seconds=8.0) if small else Sizes()
    yield from beside_one(sizes)
    yield from full_disk(sizes)
    yield from starting(sizes)


def beside_one(sizes: Sizes) -> Iterator[Figure]:
    """Rounds of many runs beside those of one run with all the workers."""
    alone = rounds_of(["alone"], sizes.workers, sizes.seconds)["alone"]
    many = rounds_of(names_of(sizes.runs), sizes.workers_of_a_run, sizes.seconds)
    alone_s = statistics.median(alone)
    worst_s = max(statistics.median(rounds) for rounds in many.values())
    each = f"{sizes.runs} runs of {sizes.workers_of_a_run} workers"
    yield Figure(f"a round of one run of {sizes.workers} workers, alone", alone_s, "s")
    yield Figure(f"a round of the slowest of {each}", worst_s, "s")
    yield Figure("that over the one alone at the same load", worst_s / alone_s, "x", "at most 1.2")
    yield Figure(f"the longest round of all in {each}", max(max(r) for r in many.values()), "s")


def rounds_of(names: Sequence[str], workers: int, seconds: float) -> dict[str, list[float]]:
    """The length of the rounds of each run, in seconds."""
    with serving(names, workers) as coordinator, load_on(coordinator, workers) as loads:
        drive_for(loads, seconds)
        return {name: load.round_s() for name, load in loads.items()}


def full_disk(sizes: Sizes) -> Iterator[Figure]:
    """Runs that go on while one run's disk is full, and rounds beside that."""
    names = names_of(sizes.runs)
    before = os.sched_getaffinity(0)
    with (
        tempfile.TemporaryDirectory(prefix="fedmezo-bench-") as folder,
        small_disk(Path(folder) / "runs" / names[0]) as is_small,
    ):
        if not is_small:
            return  # Only root can make one.
        coordinator = CoordinatorOfMany(Path(folder), names, sizes.workers_of_a_run)
        os.sched_setaffinity(0, cores()[1])
        try:
            coordinator.start()
            with load_on(coordinator, sizes.workers_of_a_run) as loads:
                fill(coordinator.runs / names[0])
                loads[names[0]].swarm.reconnects = False
                drive_for(loads, sizes.seconds)
                phases = coordinator.phases()
                others = [load.round_s() for name, load in loads.items() if name != names[0]]
        finally:
            coordinator.stop()
            os.sched_setaffinity(0, before)
    failed = [name for name, phase in phases.items() if phase == runs_pb2.RUN_PHASE_FAILED]
    assert failed == names[:1], f"with a full disk have failed: {failed}"
    on = sum(len(rounds) > 2 for rounds in others)
    goal = f"at least {sizes.runs - 1}"
    yield Figure("runs that go on while the disk of another is full", on, "runs", goal)
    longest_s = max(max(rounds) for rounds in others)
    yield Figure("their longest round meanwhile", longest_s, "s")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of `FULL_BYTES` at a folder; False if this user cannot make one."""
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    options = ("-t", "tmpfs", "-o", f"size={FULL_BYTES}", "none", str(folder))
    is_small = mount is not None and not subprocess.run([mount, *options], check=False).returncode
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take all room that is left on a disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def starting(sizes: Sizes) -> Iterator[Figure]:
    """The time until all runs are served: at first, and after a kill under load."""
    names = names_of(sizes.runs)
    with serving(names, sizes.workers_of_a_run, rounds=ROUNDS) as coordinator:
        for flags, how in (("--page", f"{HOST}:0"), ", with the page"), ((), ""):
            coordinator.kill()
            coordinator.more_flags = flags
            began_s = time.monotonic()
            coordinator.start()
            ready_s = time.monotonic() - began_s
            what = f"start of {sizes.runs} empty runs, until all serve{how}"
            yield Figure(what, ready_s, "s", "at most 1")
            yield Figure(f"processor time of that start{how}", coordinator.cpu_s, "s")
        with load_on(coordinator, sizes.workers_of_a_run) as loads:

            def under_way() -> bool:
                return all(len(one.committed_s) >= ROUNDS_BEFORE_KILL for one in loads.values())

            drive(loads, under_way, 60.0)
            coordinator.kill()
            began_s = time.monotonic()
            coordinator.start()
            yield Figure("start after kill -9 under load", time.monotonic() - began_s, "s")

            def over() -> bool:
                return all(len(one.committed_s) >= ROUNDS for one in loads.values())

            drive(loads, over, 120.0)

            def agreeing() -> int:
                heads = {name: load.swarm.workers[0].head for name, load in loads.items()}
                return sum(coordinator.head(name) == head for name, head in heads.items())

            with contextlib.suppress(TimeoutError):  # The last commit may be on its way.
                drive(loads, lambda: agreeing() == len(names), 10.0)
            same = agreeing()
        coordinator.stop()
        sound = sum(is_sound(coordinator.runs / name / "journal.db") for name in names)
    goal = f"at least {sizes.runs}"
    yield Figure("runs that kill -9 left with the head of their workers", same, "runs", goal)
    yield Figure("of their journals are sound", sound, "journals", goal)


def is_sound(path: Path) -> bool:
    """Whether every record of a journal is what was written."""
    store = SqliteStore(path, create=False)
    try:
        return sum(1 for _ in Journal(store).load()) > 0
    finally:
        store.close()
