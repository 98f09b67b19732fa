"""What tests of whole runs share: real programs, a real daemon, and workers that a test scripts.

Nothing here imports torch; `parties` does.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.free_port import free_port as free_port
from fedmezo_coordinator.coordinator_settings import CALLER_CALLS_PER_S, RelaySettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.relay_daemon import Relay
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving.service import bind_server, start_server
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.config import PROTOCOL_VERSION, RunConfig, parse_run
from fedmezo_core.errors import FedMezoError, UnavailableError
from fedmezo_core.journal.codec import decode_commit, decode_record, encode_records
from fedmezo_core.journal.journal import Entry, Journal, head_after
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Answered, Genesis, Record
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.client import CoordinatorClient, SessionStream
from fedmezo_core.wire.messages import answer_from_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

ROOT = Path(__file__).parents[3]
ROOTS = (".", "proto", "coordinator", "worker", "integrations")
"""Folders that hold packages of ours."""
PATIENCE_S = 120.0
"""Longest wait for anything; a busy machine may need most of it."""
LOOK_EVERY_S = 0.02

TASK: dict[str, Any] = {
    "template": "Review: {text} It was",
    "verbalizers": {"negative": " terrible", "positive": " great"},
    "tokens_max": 32,
}


def run_values(**changes: Any) -> dict[str, Any]:
    """A small run's contract, as it stands in a TOML file."""
    values: dict[str, Any] = {
        "run_id": "tiny-run",
        "model": "tiny",
        "task": TASK,
        "seed": 7,
        "rounds": 6,
        "local_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        # The tests' rates are for the few directions of their own rounds.
        "rate_directions": 0,
        # And for answers that may be far larger than usual: their rounds have few.
        "clip_median_factor": 10.0,
        "clip_spread": 4.0,
        "clip_drop_factor": 0.0,
        "workers_min": 4,
        "quorum": 4,
    }
    return values | changes


def values_without_rate() -> dict[str, Any]:
    """A contract without a rate, whose default is too long because the adapter's scale is large."""
    lora = {"rank": 2, "alpha": 2000.0, "freeze_a": True, "target_modules": ["c_fc"]}
    values = run_values(lora=lora)
    del values["learning_rate"]
    return values


def config_of(**changes: Any) -> RunConfig:
    return parse_run(run_values(**changes), "the test's run")


def genesis_of(config: RunConfig) -> Genesis:
    """A genesis without a model, for scripted workers."""
    return Genesis(
        config, b"m" * 32, b"b" * 32, b"t" * 32, trainable_elements=8, trainable_bytes=32
    )


async def until(
    holds: Callable[[], Awaitable[bool]], what: str, patience_s: float = PATIENCE_S
) -> None:
    """Wait until `holds` returns True; `what` says what the test waits for."""
    end_s = time.monotonic() + patience_s
    while not await holds():
        assert time.monotonic() < end_s, f"waited {patience_s} s in vain for: {what}"
        await asyncio.sleep(LOOK_EVERY_S)


async def at_round(client: CoordinatorClient, round_: int) -> None:
    """Wait until the run has committed `round_`."""

    async def reached() -> bool:
        return (await client.get_status()).round >= round_

    await until(reached, f"round {round_}")


async def joined(client: CoordinatorClient, worker: str) -> None:
    """Wait until a worker has joined."""

    async def has_joined() -> bool:
        return any(w.worker == worker for w in (await client.get_status()).workers)

    await until(has_joined, f"worker {worker} to join")


async def replica_digested(client: CoordinatorClient, round_: int) -> None:
    """Wait until the replica has digested the weights after `round_`, or after a later round."""

    async def digested() -> bool:
        digests = (await client.get_status()).digests
        return any(d.party == "replica" and d.round >= round_ for d in digests)

    await until(digested, f"the replica's digest of round {round_}")


async def vouched_for(client: CoordinatorClient) -> None:
    """Wait until the coordinator above a relay has vouched for the relay's copy."""

    async def has_head() -> bool:
        return (await client.get_run()).round_head != b""

    await until(has_head, "the relay to be vouched for")


# ---------------------------------------------------------------- programs


def environment(**more: str) -> dict[str, str]:
    """The environment of a program under test: our sources, one thread, no one's settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDMEZO_")}
    roots = [str(ROOT / folder) for folder in ROOTS]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(roots),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class Program:
    """One process, in its own process group; its output goes to a file."""

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path, **more: str) -> None:
        self._said = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed in `end`
            dir=folder, prefix=f"{name}-", suffix=".log", delete=False
        )
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log_path(self) -> Path:
        """The file that has everything it wrote so far."""
        return Path(self._said.name)

    @property
    def said(self) -> str:
        """Everything it wrote so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def children(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    async def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit status, once it has ended by itself."""

        async def ended() -> bool:
            return not self.running

        try:
            await until(ended, f"the end of {self.process.args!r}", patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said}") from None
        return int(self.process.returncode)

    async def says(self, pattern: str, patience_s: float = PATIENCE_S) -> re.Match[str]:
        """The first match of `pattern` in what it says; fails if it ends without it."""
        end_s = time.monotonic() + patience_s
        while True:
            alive = self.running and time.monotonic() < end_s
            found = re.search(pattern, self.said)
            if found:
                return found
            assert alive, (
                f"{self.process.args!r} ended, or went on, without {pattern!r}:\n{self.said}"
            )
            await asyncio.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        """End it and whatever it started, whatever state they are in."""
        with suppress(psutil.NoSuchProcess):
            # Flower gives some of its processes a group of their own.
            for child in self.children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._said.close()


class Programs:
    """Starts programs and ends them with their test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Program] = []

    def start(self, module: str, *arguments: str | Path, **more: str) -> Program:
        """Start a module of ours; `more` goes into its environment."""
        return self._begin(module, [sys.executable, "-m", module, *arguments], **more)

    def start_script(self, name: str, *arguments: str | Path, **more: str) -> Program:
        """Start a command that a package installed beside this Python."""
        scripts = Path(sys.executable).parent
        path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
        return self._begin(name, [scripts / name, *arguments], PATH=path, **more)

    def _begin(self, name: str, command: Sequence[str | Path], **more: str) -> Program:
        program = Program(name, command, self.folder, **more)
        self._started.append(program)
        return program

    def settings(self, run: dict[str, Any]) -> Path:
        """A coordinator's TOML file."""
        path = self.folder / f"coordinator-{len(self._started)}.toml"
        path.write_text(toml_of({"run": run}))
        return path

    async def coordinator(
        self, journal: Path | str, run: dict[str, Any], *arguments: str | Path, port: int = 0
    ) -> tuple[Program, str]:
        """A coordinator that serves, and its address."""
        settings = self.settings(run)
        program = self.start(
            "fedmezo_coordinator",
            *("--config", settings, "--journal", journal, "--listen", f"127.0.0.1:{port}"),
            *arguments,
        )
        found = await program.says(r"is served at (127\.0\.0\.1:\d+)")
        return program, found[1]

    def worker(self, address: str, name: str, data: Path, model: Path, *more: str) -> Program:
        """A worker of one thread."""
        return self.start(
            "fedmezo_worker",
            *("--coordinator", address, "--name", name, "--data", data, "--model", model),
            *("--threads", "1", *more),
        )

    def end(self) -> None:
        """End all; nobody may have shown a traceback to its user."""
        for program in self._started:
            program.end()
        for program in self._started:
            assert "Traceback" not in program.said, program.said


def toml_of(values: dict[str, Any], path: str = "") -> str:
    """Nested values as TOML; strings, numbers, booleans, lists and tables only."""
    import json

    lines = [f"[{path}]"] if path else []
    lines += [f"{key} = {json.dumps(v)}" for key, v in values.items() if not isinstance(v, dict)]
    tables = [
        toml_of(value, f"{path}.{key}" if path else key)
        for key, value in values.items()
        if isinstance(value, dict)
    ]
    return "\n".join([*lines, *tables]) + "\n"


# ---------------------------------------------------------------- the journal


def write_genesis(path: Path, genesis: Genesis) -> None:
    """Begin a journal, so that a coordinator need not load a model to do it."""
    journal = Journal(SqliteStore(path))
    journal.append(encode_records([genesis]))
    journal.close()


def entries_of(path: Path) -> list[Entry]:
    """The journal of a stopped coordinator, every hash checked and every record applied."""
    store = SqliteStore(path, create=False)
    try:
        entries = list(Journal(store).load())
    finally:
        store.close()
    machine = RoundMachine()
    for entry in entries:
        machine.apply(decode_record(entry.row.body))
    return entries


def bodies_of(path: Path) -> list[bytes]:
    """The bytes of all records, sorted: the answers of a round come in any order."""
    return sorted(entry.row.body for entry in entries_of(path))


def records_of(path: Path) -> list[Record]:
    return [decode_record(entry.row.body) for entry in entries_of(path)]


# ---------------------------------------------------------------- a daemon or relay in this process


@dataclass
class Served:
    """A daemon with a real server on a real port."""

    daemon: Daemon
    address: str
    serving: asyncio.Task[None]


@asynccontextmanager
async def served(
    path: Path,
    genesis: Genesis | None = None,
    *,
    listen: str = "127.0.0.1:0",
    tls: tuple[Path, Path] | None = None,
    signer: Signer | None = None,
    session_limit: SessionLimit | None = None,
    snapshots: Path | None = None,
    compact_after_records: int = 0,
    calls_per_s: float = CALLER_CALLS_PER_S,
) -> AsyncIterator[Served]:
    """Serve the journal at `path`, which `genesis` begins if it is new.

    `snapshots` is the folder of the snapshots' files. `calls_per_s` is how often one address may
    call.
    """
    journal = Journal(SqliteStore(path))
    if journal.is_empty:
        assert genesis is not None
        journal.append(encode_records([genesis]))
    daemon = Daemon(journal, session_limit, signer, snapshots, compact_after_records)
    with tempfile.TemporaryDirectory() as folder:
        local = f"unix:{folder}/replica.sock"
        async with _on_a_port(daemon, listen, tls, local, calls_per_s) as (address, serving):
            yield Served(daemon, address, serving)


@dataclass
class Site:
    """A relay with a real server on a real port."""

    relay: Relay
    address: str
    serving: asyncio.Task[None]


@asynccontextmanager
async def relayed(
    upstream: str,
    folder: Path,
    name: str,
    *,
    listen: str = "127.0.0.1:0",
    signing_key: Ed25519PrivateKey | None = None,
    **changes: Any,
) -> AsyncIterator[Site]:
    """Serve a site from `folder` until the end of the block; `changes` are the relay's settings."""
    values = {"upstream": upstream, "name": name, "journal_copy": folder / f"{name}.db"}
    settings = RelaySettings.model_validate(values | changes)
    async with CoordinatorClient(upstream, settings.tls_ca) as client:
        relay = Relay(settings, client, signing_key=signing_key)
        async with _on_a_port(relay, listen, settings.tls_files) as (address, serving):
            yield Site(relay, address, serving)


@asynccontextmanager
async def _on_a_port(
    loop: Daemon | Relay,
    listen: str,
    tls: tuple[Path, Path] | None,
    local: str | None = None,
    calls_per_s: float = CALLER_CALLS_PER_S,
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Load the loop and serve it: the address, and the task that runs it."""
    await loop.load()
    server, port = bind_server(listen, tls, local)
    (await start_server(server, caller_limits=CallerLimits(calls_per_s))).begin(Runs.of(loop))
    serving = asyncio.create_task(loop.serve())
    try:
        yield f"127.0.0.1:{port}", serving
    finally:
        loop.end_sessions()
        await server.stop(0.5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await loop.close()


# ---------------------------------------------------------------- a worker that a test scripts


@dataclass
class ScriptedWorker:
    """A worker without a model: the test decides every message that it sends."""

    client: CoordinatorClient
    genesis: Genesis
    name: str
    head: bytes = b""
    stream: SessionStream = field(init=False)
    received: list[wire.SessionResponse] = field(default_factory=list)
    acknowledged: set[tuple[int, int, int]] = field(default_factory=set)
    signer: AnswerSigner | None = None
    heads: dict[int, bytes] = field(default_factory=dict)
    """Head after each round whose commit came, and after genesis."""

    async def open(self, **changes: Any) -> wire.Welcome:
        """Say hello at the base, with `changes`; the welcome that comes back."""
        self.stream = self.client.session()
        await self.stream.send(wire.SessionRequest(hello=self.hello(**changes)))
        return (await self.next("welcome")).welcome

    def hello(self, **changes: Any) -> wire.Hello:
        """A hello that is welcome, with `changes`."""
        values: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "run_id": self.genesis.config.run_id,
            "worker": self.name,
            "manifest_digest": self.genesis.manifest_digest,
            "base_digest": self.genesis.base_digest,
            "tokenizer_digest": self.genesis.tokenizer_digest,
            "recipe": self.genesis.config.recipe,
            "round": 0,
            "head": self.head,
            "signing_key": b"" if self.signer is None else self.signer.public_key,
        }
        return wire.Hello(**(values | changes))

    async def next(self, kind: str) -> wire.SessionResponse:
        """The next message of a kind; those before it are kept in `received`."""
        while True:
            message = await asyncio.wait_for(self.stream.receive(), PATIENCE_S)
            if message is None:
                raise UnavailableError("the session ended without an error")
            self.received.append(message)
            self._note(message)
            if message.WhichOneof("kind") == kind:
                return message

    async def assigned(self) -> wire.Assign:
        """The next assignment."""
        return (await self.next("assign")).assign

    async def send(self, **kind: Any) -> None:
        """Send one message up."""
        await self.stream.send(wire.SessionRequest(**kind))

    async def answer(self, assign: wire.Assign, **changes: Any) -> None:
        """Answer soundly, with `changes`."""
        await self.send(answer=self.signed(answer_to(assign, **changes)))

    def signed(self, answer: wire.Answer) -> wire.Answer:
        """The answer with a signature, if this worker signs."""
        if self.signer is not None:
            event = answer_from_pb(self.name, answer)
            self.heads.setdefault(0, self.head)
            head = self.heads[event.ticket.round - 1]
            answer.signature = self.signer.sign(event.ticket, head, event.scalars)
        return answer

    def _note(self, message: wire.SessionResponse) -> None:
        """Keep what an acknowledgement or a commit says."""
        if message.HasField("ack"):
            ticket = message.ack.ticket
            self.acknowledged.add((ticket.epoch, ticket.round, ticket.slot))
        if message.HasField("commit") and self.signer is not None:
            self.heads.setdefault(0, self.head)
            body = message.commit.record
            round_ = decode_commit(body).round
            self.heads[round_] = head_after(self.heads[round_ - 1], body)

    async def ended(self) -> FedMezoError:
        """The error that the session ends with."""
        try:
            while (
                message := await asyncio.wait_for(self.stream.receive(), PATIENCE_S)
            ) is not None:
                self.received.append(message)
        except FedMezoError as error:
            return error
        raise AssertionError("the session ended without an error")

    async def work_to_the_end(self) -> int:
        """Answer whatever is assigned until the run is finished; its last round."""
        while True:
            message = await asyncio.wait_for(self.stream.receive(), PATIENCE_S)
            assert message is not None
            self._note(message)
            match message.WhichOneof("kind"):
                case "assign":
                    await self.answer(message.assign)
                case "finished":
                    return int(message.finished.round)
                case _:
                    pass


def answer_to(assign: wire.Assign, **changes: Any) -> wire.Answer:
    """A sound answer, with `changes`."""
    values: dict[str, Any] = {
        "ticket": assign.ticket,
        "projected_grads": [0.5] * assign.steps,
        "weights_digest64": 99 if assign.want_digest else None,
    }
    return wire.Answer(**(values | changes))


@asynccontextmanager
async def scripted_workers(
    address: str, genesis: Genesis, *names: str
) -> AsyncIterator[list[ScriptedWorker]]:
    """Workers that the test scripts, each on its own channel, not yet joined."""
    clients = [CoordinatorClient(address) for _ in names]
    try:
        description = await clients[0].get_run()
        yield [
            ScriptedWorker(client, genesis, name, description.head)
            for client, name in zip(clients, names, strict=True)
        ]
    finally:
        for client in clients:
            await client.close()


def answered_tickets(path: Path) -> set[tuple[int, int, int]]:
    """(epoch, round, slot) of every answer in a stopped coordinator's journal."""
    found, epoch = set(), 0
    for record in records_of(path):
        epoch = getattr(record, "epoch", epoch)
        if isinstance(record, Answered):
            found.add((epoch, record.round, record.slot))
    return found
