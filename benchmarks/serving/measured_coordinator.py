"""A coordinator process to be measured, with TLS and a real journal, on a core of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import trustme

from benchmarks.free_port import free_port
from fedmezo_core.config import PROTOCOL_VERSION, RunConfig, parse_run
from fedmezo_core.journal.codec import encode_records
from fedmezo_core.journal.journal import Journal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CHANNEL_OPTIONS
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
START_S = 120.0
ALL_CORES = sorted(os.sched_getaffinity(0))
"""Cores that this process may use before it keeps itself to some of them."""


def contract(**changes: Any) -> RunConfig:
    """A run's contract for workers without a model."""
    values: dict[str, Any] = {
        "run_id": "bench",
        "model": "none",
        "task": {"template": "{text}", "verbalizers": {"no": " no", "yes": " yes"}},
        "rounds": 10_000_000,
        "digest_every_rounds": 1_000_000,
    }
    return parse_run(values | changes, "the benchmark's run")


def genesis_of(config: RunConfig) -> Genesis:
    """A genesis of a model that is never loaded."""
    return Genesis(
        config, b"m" * 32, b"b" * 32, b"t" * 32, trainable_elements=8, trainable_bytes=32
    )


def begin_journal(path: Path, genesis: Genesis) -> None:
    """Begin a run without loading its model, if it has not begun."""
    if not path.exists():
        journal = Journal(SqliteStore(path))
        journal.append(encode_records([genesis]))
        journal.close()


def cores() -> tuple[set[int], set[int]]:
    """Cores of the coordinator and of its load; the same ones where there is only one."""
    return {ALL_CORES[0]}, set(ALL_CORES[1:]) or {ALL_CORES[0]}


def cpu_s_of(pid: int) -> float:
    """CPU time of another process so far, in seconds, by the clock that Linux keeps for it.

    The clock is named as by clock_getcpuclockid(3); /proc counts in hundredths of a second.
    """
    return time.clock_gettime((~pid << 3) | 2)


class Coordinator:
    """The process, which may be killed and started again on the same port and journal."""

    def __init__(
        self, folder: Path, config: RunConfig, *, pinned: bool = True, limited: bool = False
    ) -> None:
        """`folder` keeps journal, keys and log.

        Without `limited`, callers are not: the load of a benchmark comes from one address.
        """
        self.folder = folder
        self.genesis = genesis_of(config)
        self.journal = folder / "journal.db"
        self.ca = folder / "ca.pem"
        self._pinned = pinned
        unlimited = ("--caller-calls-per-s", "0", "--caller-connections-max", "20128")
        self._limits = () if limited else unlimited
        self.more_flags: Sequence[str] = ()
        self._issue()
        self.port = free_port(HOST)
        self.begin()

    def begin(self) -> None:
        """Begin what it will serve, if it is not there."""
        begin_journal(self.journal, self.genesis)

    @property
    def serves(self) -> Sequence[str | Path]:
        """The flags that say what it serves."""
        return ("--no-replica", "--journal", self.journal)

    def _issue(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca))
        pair = authority.issue_cert(HOST)
        pair.private_key_pem.write_to_path(str(self.folder / "key.pem"))
        (self.folder / "cert.pem").write_bytes(b"".join(b.bytes() for b in pair.cert_chain_pems))

    def start(self) -> None:
        """Start it, and wait until it answers a GetStatus."""
        self.launch()
        self.wait_until_it_serves()

    def launch(self) -> None:
        """Start it only."""
        server_cores = cores()[0] if self._pinned else set(ALL_CORES)
        self._log = (self.folder / "coordinator.log").open("ab")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedmezo_coordinator", *self.serves),
                *("--listen", f"{HOST}:{self.port}"),
                *("--tls-cert", self.folder / "cert.pem", "--tls-key", self.folder / "key.pem"),
                *self._limits,
                *self.more_flags,
            ],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.sched_setaffinity(self._process.pid, server_cores)
        self.process = psutil.Process(self._process.pid)

    def _environment(self) -> dict[str, str]:
        """Nobody's settings, our sources, and bytecode of the first start, as installed ones have.

        Without it each start would compile all sources again where the caller writes no bytecode.
        """
        roots = [str(ROOT / folder) for folder in (".", "proto", "coordinator", "worker")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FEDMEZO_", "PYTHON"))}
        return kept | {
            "PYTHONPATH": os.pathsep.join(roots),
            "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"),
        }

    def keep_apart(self) -> None:
        """Keep the process itself to its core, and the processes that it started off it."""
        own = [(thread.id, cores()[0]) for thread in self.process.threads()]
        others = [(child.pid, cores()[1]) for child in self.process.children()]
        for number, allowed in own + others:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(number, allowed)

    def wait_until_it_serves(self, timeout_s: float = START_S) -> None:
        """Ask until it answers."""
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                self.status()
                return
            except grpc.RpcError:
                self.check_it_runs()
                if time.monotonic() > end_s:
                    raise self._failure("does not serve") from None
                time.sleep(0.02)

    def check_it_runs(self) -> None:
        """Raise `RuntimeError` with the end of its log if it has ended by itself."""
        if self._process.poll() is not None:
            raise self._failure("has ended")

    def _failure(self, what: str) -> RuntimeError:
        log = (self.folder / "coordinator.log").read_text(errors="replace")
        return RuntimeError(f"the coordinator {what}:\n{log[-2000:]}")

    def status(self) -> wire.GetStatusResponse:
        """What it says of itself."""
        with self.channel() as channel:
            stub = rpc.CoordinatorServiceStub(channel)
            answer: wire.GetStatusResponse = stub.GetStatus(wire.GetStatusRequest(), timeout=20)
            return answer

    def describe(self) -> wire.GetRunResponse:
        """What it says of its run."""
        with self.channel() as channel:
            request = wire.GetRunRequest(protocol_versions=[PROTOCOL_VERSION])
            stub = rpc.CoordinatorServiceStub(channel)
            answer: wire.GetRunResponse = stub.GetRun(request, timeout=20)
            return answer

    def channel(self) -> grpc.Channel:
        """A new connection by gRPC's own client."""
        trusted = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return grpc.secure_channel(
            f"{HOST}:{self.port}",
            trusted,
            options=(*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", 64 * 2**20)),
        )

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process.poll() is None:
            self.kill()

    @property
    def resident_mb(self) -> float:
        """Memory that it holds."""
        return float(self.process.memory_info().rss) / 1e6

    @property
    def cpu_s(self) -> float:
        """CPU time so far."""
        return cpu_s_of(self.process.pid)


@contextmanager
def serving(
    folder: Path, config: RunConfig, *, pinned: bool = True, limited: bool = False
) -> Iterator[Coordinator]:
    """A started coordinator; the load stays off its core meanwhile."""
    coordinator = Coordinator(folder, config, pinned=pinned, limited=limited)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores()[1])
    try:
        coordinator.start()
        yield coordinator
    finally:
        coordinator.stop()
        os.sched_setaffinity(0, before)
