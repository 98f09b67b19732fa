"""What reads bytes about runs: orders to a host of many, steps of hidden sums, the library."""

from __future__ import annotations

import asyncio
import atexit
import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fedmezo import Coordinator, Session
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.runs.hosted_run import HostedRun, OfferedFile
from fedmezo_coordinator.runs.many_runs import ManyRuns
from fedmezo_coordinator.serving.service import CoordinatorServicer, _reader
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.errors import FedMezoError, SecureSumError
from fedmezo_core.events import SharesRevealed
from fedmezo_core.journal.codec import encode_record, encode_records
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.records import Genesis
from fedmezo_core.trust.secure_aggregation.masking import SumContext, run_digest_of
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from fedmezo_core.trust.secure_aggregation.sum_collector import STEP_MS, SumCollector
from fedmezo_core.wire.sum_messages import asked_from_pb, sum_received_from_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2, secure_sum_pb2
from tests.fuzz.in_process import ChangedStateError, Context, EndedError, awaited
from tests.integration.support.harness import config_of, genesis_of
from tests.library.light_engine import LightEngine

RUN_METHODS: Final[dict[str, type[Message]]] = {
    method.name: GetMessageClass(method.input_type)
    for method in runs_pb2.DESCRIPTOR.services_by_name["RunService"].methods
}
"""Methods about runs; the first byte of an input is the number of one."""
READS: Final = frozenset({"ListRuns", "OfferRuns", "ReadRunFile", "OpenPage"})
"""Methods that may change nothing, whatever they answer."""
UPLOADED: Final = b'{"text": "good", "label": "yes"}\n'
"""A file that is there for a run to come."""
ADAPTER: Final = b"an adapter's settings"
"""The file that the run `going` offers."""


def pieces_of(data: bytes) -> list[bytes]:
    """The records of a serialized `ReadJournalResponse`; none for other bytes."""
    try:
        return [entry.record for entry in wire.ReadJournalResponse.FromString(data).entries]
    except DecodeError:
        return []


# ---------------------------------------------------------------- orders to a host of runs


class _Unloaded(ManyRuns):
    """Runs whose bases and journals nobody loads."""

    def _begin(self, run: HostedRun) -> None:
        run.failure = ""


class _Host:
    """A coordinator of three runs: one goes on, one is over, one has failed."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        made = tempfile.TemporaryDirectory(prefix="fedmezo-fuzz-")
        atexit.register(made.cleanup)
        self.root = Path(made.name)
        self.number = 0
        self._fresh()

    def _fresh(self) -> None:
        self.number += 1
        self.folder = self.root / str(self.number)
        self.folder.mkdir()
        (self.folder / "adapter_config.json").write_bytes(ADAPTER)
        process = CoordinatorSettings(runs=self.folder)
        self.runs = _Unloaded(process, self.folder, SessionLimit(), "")
        self.servicer = CoordinatorServicer("coordinator", CallerLimits(0), ConnectionWatch(1))
        self.daemons: list[Daemon] = []

        async def begin() -> None:
            for run_id in ("going", "over"):
                journal = Journal(MemoryStore())
                journal.append(encode_records([genesis_of(config_of(run_id=run_id))]))
                daemon = Daemon(journal, self.runs.session_limit)
                await daemon.load()
                self.daemons.append(daemon)
                self.runs._runs[run_id] = HostedRun(run_id, loop=daemon)
            self.runs._runs["broken"] = HostedRun("broken", failure="its disk is full")
            for run_id in ("over", "broken"):
                (self.folder / run_id).mkdir()
            over = self.daemons[1]
            path = self.folder / "adapter_config.json"
            file = OfferedFile(path, b"f" * 32, len(ADAPTER))
            self.runs._runs["going"].files = {"adapter/adapter_config.json": file}
            self.serving = [asyncio.create_task(daemon.serve()) for daemon in self.daemons]
            await over.order(lambda machine: machine.stop("enough"))
            self.servicer.begin(self.runs)

        self.loop.run_until_complete(begin())
        self.before = self.state

    def end(self) -> None:
        """End all tasks and threads."""

        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            for daemon in self.daemons:
                daemon._pages._thread.shutdown()
                daemon._writer.shutdown()

        self.loop.run_until_complete(end())

    @property
    def state(self) -> tuple[object, ...]:
        """What no refused call may change."""
        return (
            tuple((one.run_id, one.phase, tuple(one.declined)) for one in self.runs.hosted()),
            tuple((len(one._journal), one._journal.head) for one in self.daemons),
            tuple(sorted(path.name for path in self.folder.iterdir() if path.is_dir())),
        )

    def call(self, method: str, request: Any) -> None:
        """Let a handler answer a call; one that is refused may change nothing."""
        context: Any = Context()

        async def answer() -> None:
            if method != "ReadRunFile":
                await self.servicer.answer_about_runs(method, request, context)
                return
            async for _ in self.servicer.ReadRunFile(request, context):
                pass

        went_well = True
        try:
            self.loop.run_until_complete(awaited(answer()))
        except EndedError:
            went_well = False
        # A refused upload may have been removed.
        if self.state != self.before:
            self.end()
            self._fresh()
            if method in READS or not (went_well or method == "UploadFile"):
                raise ChangedStateError(f"{method} changed the state that it may not change")


@cache
def _host() -> _Host:
    host = _Host()

    def end() -> None:
        host.end()
        host.loop.close()

    atexit.register(end)
    return host


def read_run_call(data: bytes) -> None:
    """A call of any method about runs, through the handlers that gRPC calls."""
    method, kind = list(RUN_METHODS.items())[data[0] % len(RUN_METHODS) if data else 0]
    request: Any = _reader(kind)(data[1:])
    if isinstance(request, runs_pb2.OfferRunsRequest) and request.wait_ms <= 60_000:
        request.wait_ms = 0
    _host().call(method, request)


# ---------------------------------------------------------------- sums that hide their terms

SUM_MEMBERS: Final = 4
SUM_EPOCH, SUM_ROUND = 4, 7


@cache
def sum_genesis() -> Genesis:
    """Of a run with secure aggregation."""
    config = config_of(
        seed_policy="shared",
        aggregation="mean",
        secure_aggregation=True,
        clip_median_factor=0.0,
        clip_spread=0.0,
        workers_min=3,
        quorum=3,
        cohort_size_max=8,
    )
    return genesis_of(config)


def sum_grads(slot: int) -> tuple[float, ...]:
    """What a member has measured."""
    dice = random.Random(slot)
    count = sum_genesis().config.pairs_per_answer
    return tuple(dice.uniform(-9, 9) for _ in range(count))


def sum_entropy(slot: int, attempt: int) -> bytes:
    """What a member makes its secrets of: the same at each try, so that kept inputs fit them."""
    return random.Random(1000 * attempt + slot).randbytes(32)


def sum_collector() -> SumCollector:
    """A coordinator's part in the sum of four members."""
    genesis = sum_genesis()
    directions = genesis.config.pairs_per_answer
    context = SumContext(run_digest_of(genesis), SUM_EPOCH, SUM_ROUND, 1, directions)
    return SumCollector(genesis.config, context, {n: f"w{n}" for n in range(SUM_MEMBERS)}, 0)


def read_sum_asks(data: bytes) -> int:
    """The steps that a coordinator asks a member for; it reveals shares at most once a round."""
    member = SecureMember(sum_genesis(), "w0")
    revealed: dict[int, set[SharesRevealed]] = {}
    pieces = pieces_of(data)
    for piece in pieces:
        try:
            asked = asked_from_pb(secure_sum_pb2.SumAsk.FromString(piece))
            entropy = sum_entropy(asked.ticket.slot, asked.attempt)
            asked = replace(asked, entropy=entropy)
            sent = member.step(asked, sum_grads(0))
        except (DecodeError, FedMezoError):
            continue
        if isinstance(sent.step, SharesRevealed):
            revealed.setdefault(asked.ticket.round, set()).add(sent.step)
    assert all(len(steps) == 1 for steps in revealed.values()), "a round was revealed twice"
    return max(1, len(pieces))


def read_sum_replies(data: bytes) -> int:
    """The steps that members reply; one that is refused counts as none."""
    collector = sum_collector()
    pieces = pieces_of(data)
    now_ms = 0
    for piece in pieces:
        try:
            reply = secure_sum_pb2.SumReply.FromString(piece)
            received = sum_received_from_pb(f"w{reply.step.slot}", reply)
        except (DecodeError, FedMezoError):
            continue
        before = collector.members, len(collector._replies), collector._step
        try:
            collector.take(received)
        except SecureSumError:
            assert (collector.members, len(collector._replies), collector._step) == before
            collector.refused(received.worker)
        collector.advance(now_ms)
    for _ in range(SUM_MEMBERS):
        now_ms += STEP_MS
        collector.advance(now_ms)
    while collector.is_busy:
        collector.work()
    assert collector.failure or collector.sums is not None, "the sum neither ends nor fails"
    if collector.sums is not None:
        wanted = sum_genesis().config.sum_threshold(len(collector._peers))
        assert len(collector.survivors) >= wanted
    return max(1, len(pieces))


# ---------------------------------------------------------------- the library


@cache
def library_genesis() -> bytes:
    """Of the run that the library's two sides are given bytes about."""
    return encode_record(genesis_of(config_of(workers_min=1, quorum=1, rounds=100)))


def read_exchange(data: bytes) -> None:
    """What goes up in an exchange with the library's coordinator, and what comes down then."""
    coordinator = Coordinator(library_genesis())
    sound = Session(library_genesis(), "w1", LightEngine("w1"))
    coordinator.exchange(sound.exchange())
    before = len(coordinator.journal)
    try:
        worker = coordinator.take(data)
    except FedMezoError as error:
        assert len(coordinator.journal) == before, "a refused exchange is in the journal"
        coordinator.refusal(data, error)
    else:
        coordinator.down_for(worker)
    coordinator.tick(1)
    coordinator.exchange(sound.exchange(coordinator.exchange(sound.exchange())))


def read_library_responses(data: bytes) -> int:
    """A coordinator's messages, as the library's session takes them from streams and calls."""
    pieces = pieces_of(data)
    for is_call in (False, True):
        session = _library_session()
        for piece in pieces:
            try:
                if is_call:
                    _exchanged(session, piece)
                else:
                    session.receive(piece)
            except DecodeError:
                continue
            except FedMezoError:
                session = _library_session()
    return max(1, len(pieces))


def _library_session() -> Session:
    session = Session(library_genesis(), "w1", LightEngine("w1"))
    session.connect()
    return session


def _exchanged(session: Session, piece: bytes) -> None:
    up = wire.PollSessionRequest.FromString(session.exchange())
    down = wire.PollSessionResponse(nonce=up.nonce)
    down.messages.add().ParseFromString(piece)
    session.exchange(down.SerializeToString())
