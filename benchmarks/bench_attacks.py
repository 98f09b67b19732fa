"""`make bench-attacks`: two honest workers beside one attack after the other, over TLS."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from benchmarks.attacks.attacker import ATTACKS
from benchmarks.bench_coordinator import (
    GRADS,
    STEPS,
    allow_files,
    swarm_of,
    write_rounds,
)
from benchmarks.figures import REPORTS, Figure, arguments_of, collect, publish
from benchmarks.serving.measured_coordinator import Coordinator, contract, serving
from benchmarks.serving.swarm import Swarm, Worker, answer_to, hello_of
from fedmezo_proto.v1 import coordinator_pb2 as wire

REPORT = REPORTS / "bench-attacks.json"
NONE = "none"
"""The name of the measurement without an attack."""
MEASURING_S = 0.03
"""Time that an honest worker takes to measure, in which it uses no core."""
MANY = 20
"""Connections from which on their memory is divided by their number."""
ATTACKER_NICENESS = 19
"""The attacker shares a core with the honest workers, who have machines of their own in truth. So
it takes what they leave of it, which is nearly all."""
DEADLINE_MS = 1000
"""Deadline of the run's rounds, which members that never answer hold up until they are known."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    seconds: float = 10.0
    """Length of each attack: in 5 s there are some 150 answers, and p99 is the second-worst."""
    records: int = 20_000
    """Length of the journal, of which attackers read pages."""


SMALL = Sizes(seconds=1.0, records=2_000)
"""Only to see that it runs."""


class Honest:
    """Workers that measure nothing, and how long each answer waits for its acknowledgement."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.waits_s: list[float] = []
        self.core_waits_s: list[float] = []
        """How much of each wait these workers themselves waited for their core."""
        self.commits = 0
        self.failures = 0
        """Sessions lost and answers refused."""
        self._sent_s: dict[str, tuple[float, float]] = {}
        swarm.on_message = self._took
        self._due: deque[tuple[float, Worker]] = deque()
        for worker in swarm.workers:
            self._measure(worker)

    def run_for(self, seconds: float) -> None:
        """Work for so long."""
        end_s = time.perf_counter() + seconds
        while (now_s := time.perf_counter()) < end_s:
            while self._due and self._due[0][0] <= now_s:
                self._answer(self._due.popleft()[1])
            next_s = self._due[0][0] if self._due else end_s
            self.swarm.turn(max(0.0, min(next_s, end_s) - now_s))

    def begin(self) -> None:
        """Forget everything so far."""
        self.waits_s, self.core_waits_s, self.commits, self.failures = [], [], 0, 0

    def end(self) -> None:
        """Count what still waits."""
        for sent in self._sent_s.values():
            self._waited(*sent)

    def _waited(self, sent_s: float, core_wait_s: float) -> None:
        self.waits_s.append(time.perf_counter() - sent_s)
        self.core_waits_s.append(_core_wait_s() - core_wait_s)

    def _took(self, worker: Worker, message: wire.SessionResponse) -> None:
        match message.WhichOneof("kind"):
            case "assign":
                self._measure(worker)
            case "ack":
                sent = self._sent_s.pop(worker.name, None)
                if sent is not None:
                    self._waited(*sent)
            case "refused" | "ended" | "welcome":
                self.failures += 1
            case "commit" if worker is self.swarm.workers[0]:
                self.commits += 1
            case _:
                pass

    def _measure(self, worker: Worker) -> None:
        if worker.assigned is not None and all(worker is not due for _, due in self._due):
            self._due.append((time.perf_counter() + MEASURING_S, worker))

    def _answer(self, worker: Worker) -> None:
        if worker.assigned is not None:
            self._sent_s[worker.name] = time.perf_counter(), _core_wait_s()
            self.swarm.send(worker, answer_to(worker.assigned, GRADS[: worker.assigned.steps]))
            worker.assigned = None


class SyncProbe:
    """How long the disk takes to keep a block of another file, forty times a second.

    An answer is acknowledged once it is on disk, so it waits at least as long. A disk that others
    share has held up every sync for up to a second.
    """

    def __init__(self, folder: Path) -> None:
        self.waits_s: list[float] = []
        self._file = folder / "sync-probe"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            while not self._ended.wait(0.025):
                begin_s = time.perf_counter()
                os.pwrite(file.fileno(), b"\1" * 4096, 0)
                os.fdatasync(file.fileno())
                self.waits_s.append(time.perf_counter() - begin_s)


def _core_wait_s() -> float:
    """How long this process's main thread was ready to run so far while others had its core."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def _p99_ms(waits_s: Sequence[float]) -> float:
    """The wait that 99 % of the answers do not exceed."""
    ordered = sorted(waits_s)
    return 1e3 * ordered[int(0.99 * len(ordered))] if ordered else float("inf")


@contextmanager
def attacking(
    coordinator: Coordinator, name: str, seconds: float
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that attacks, and the file with what it says."""
    described, hello = coordinator.describe(), coordinator.folder / "hello"
    welcome = hello_of(coordinator.genesis, "hostile", described.round, described.head)
    hello.write_bytes(welcome.SerializeToString())
    said = coordinator.folder / "attacker.log"
    with said.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.attacks.attacker", name, str(coordinator.port)),
                *("--seconds", str(seconds), "--hello", hello),
            ],
            stdout=output,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        os.setpriority(os.PRIO_PROCESS, process.pid, ATTACKER_NICENESS)
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()


def measure(name: str, sizes: Sizes) -> Iterator[Figure]:
    """The figures of honest workers beside one attack."""
    config = contract(
        workers_min=2, quorum=2, cohort_size_max=4, local_steps=STEPS, deadline_ms=DEADLINE_MS
    )
    with tempfile.TemporaryDirectory(prefix="fedmezo-attack-") as folder:
        waiting = Coordinator(Path(folder), config)
        write_rounds(waiting.journal, config, sizes.records)
        with (
            serving(Path(folder), config, limited=True) as coordinator,
            swarm_of(coordinator, 2) as swarm,
        ):
            follow(coordinator, swarm)
            swarm.join_all()
            honest = Honest(swarm)
            honest.run_for(0.5)
            with SyncProbe(Path(folder)) as probe:
                yield from _beside(name, sizes, coordinator, honest)
            yield Figure(f"{name}: a sync of another file, p99", _p99_ms(probe.waits_s), "ms")


def follow(coordinator: Coordinator, swarm: Swarm) -> None:
    """Let the workers hold the journal's last round."""
    described = coordinator.describe()
    for worker in swarm.workers:
        worker.round, worker.head = described.round, described.head


def _beside(name: str, sizes: Sizes, coordinator: Coordinator, honest: Honest) -> Iterator[Figure]:
    connections, actions, peak_mb = 0, 0, 0.0
    before_mb = coordinator.resident_mb
    if name == NONE:
        begin_s = time.monotonic()
        honest.begin()
        honest.run_for(sizes.seconds)
    else:
        with attacking(coordinator, name, sizes.seconds) as (process, said):
            while "\n" not in said.read_text():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended before it began")
                honest.run_for(0.05)
            honest.begin()
            begin_s = time.monotonic()
            while process.poll() is None and time.monotonic() < begin_s + 2 * sizes.seconds:
                honest.run_for(0.1)
                peak_mb = max(peak_mb, coordinator.resident_mb)
            last = json.loads(said.read_text().splitlines()[-1])
            connections, actions = last["connections"], last.get("actions", 0)
    seconds = time.monotonic() - begin_s
    honest.end()
    yield Figure(f"{name}: an answer's wait, p99", _p99_ms(honest.waits_s), "ms", "at most 100")
    own = f"{name}: what honest workers wait for their own core meanwhile, p99"
    yield Figure(own, _p99_ms(honest.core_waits_s), "ms")
    yield Figure(f"{name}: failures", honest.failures, "", "at most 0")
    yield Figure(f"{name}: rounds", honest.commits / seconds, "/s")
    if actions:
        yield Figure(f"{name}: the attacker's actions", actions / sizes.seconds, "/s")
    if name != NONE:
        yield Figure(f"{name}: the coordinator's memory grew by", peak_mb - before_mb, "MB")
    if connections >= MANY:
        each = (peak_mb - before_mb) / connections
        what = f"{name}: memory for each of {connections} connections"
        yield Figure(what, each, "MB", "at most 0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a minute: does it run?")
    arguments = arguments_of(parser, REPORT, [NONE, *ATTACKS])
    allow_files()
    sizes = SMALL if arguments.small else Sizes()
    figures = collect(partial(measure, name, sizes) for name in arguments.only)
    publish(figures, REPORT, f"two honest workers beside attacks of {sizes.seconds:.0f} s each")


if __name__ == "__main__":
    main()
