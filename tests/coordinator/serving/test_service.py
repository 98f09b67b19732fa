"""The service over real gRPC and a real journal, with workers driven by hand."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedmezo_coordinator.limits.caller_limits import CallerLimits
from fedmezo_coordinator.limits.connection_watch import ConnectionWatch
from fedmezo_coordinator.limits.said_seldom import LINES_A_MINUTE
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.serving import service
from fedmezo_coordinator.serving.service import CoordinatorServicer
from fedmezo_core.config import MESSAGE_BYTES_MAX
from fedmezo_core.errors import (
    DivergedError,
    FedMezoError,
    JournalBehindError,
    MismatchError,
    NotReadyError,
    ProtocolError,
    ReplacedError,
    UnknownWorkerError,
    VersionError,
    WrongRunError,
)
from fedmezo_core.journal.signed_heads import Witness, open_signer
from fedmezo_core.records import Answered, Committed, Diverged, Evaluated
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.grpc_status import REASON_KEY
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import coordinator_pb2_grpc as rpc
from tests.fuzz.in_process import Context
from tests.integration.support.harness import (
    ScriptedWorker,
    Served,
    answer_to,
    answered_tickets,
    config_of,
    genesis_of,
    records_of,
    scripted_workers,
    served,
    until,
)

GENESIS = genesis_of(config_of(rounds=3, local_steps=3, workers_min=2, quorum=2))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
async def at(journal: Path) -> AsyncIterator[Served]:
    async with served(journal, GENESIS) as running:
        yield running


@pytest.fixture
async def two(at: Served) -> AsyncIterator[list[ScriptedWorker]]:
    """Two workers that have joined: the first round is open."""
    async with scripted_workers(at.address, GENESIS, "w1", "w2") as both:
        for hand in both:
            await hand.open()
        yield both


@asynccontextmanager
async def raw_stub(address: str) -> AsyncIterator[rpc.CoordinatorServiceAsyncStub]:
    """The generated stub, to see the statuses that go over the wire."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield rpc.CoordinatorServiceStub(channel)


async def work_on(both: list[ScriptedWorker], at: Served) -> None:
    """Whatever happened before: the run finishes."""
    rounds = await asyncio.gather(*(hand.work_to_the_end() for hand in both))
    assert rounds == [3, 3]
    assert at.daemon.status("").phase == wire.PHASE_FINISHED


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "grads",
    [
        [math.nan, 0.0, 0.0],
        [0.0, math.inf, 0.0],
        [0.0, 0.0, -math.inf],
        [0.0, 10_001.0, 0.0],
        [0.5, 0.5],
        [0.5] * 4,
        [],
    ],
    ids=["NaN", "infinity", "-infinity", "over the clip", "too few", "too many", "none"],
)
async def test_scalars_outside_the_contract_are_refused_and_the_run_goes_on(
    at: Served, two: list[ScriptedWorker], grads: list[float]
) -> None:
    assign = await two[0].assigned()
    await two[0].answer(assign, projected_grads=grads)
    refused = (await two[0].next("refused")).refused
    assert refused.reason == "ScalarError"
    assert refused.ticket == assign.ticket
    assert "Worker w1, round 1, slot 0" in refused.message
    await two[0].answer(assign)
    await work_on(two, at)


@pytest.mark.parametrize(
    "ticket",
    [(2, 1, 0), (0, 1, 0), (1, 2, 0), (1, 0, 0), (1, 1, 1), (1, 1, 4_000_000_000)],
    ids=["later epoch", "no epoch", "later round", "no round", "other's slot", "no such slot"],
)
async def test_a_ticket_that_is_not_the_workers_open_one_is_stale(
    at: Served, two: list[ScriptedWorker], ticket: tuple[int, int, int]
) -> None:
    assign = await two[0].assigned()
    epoch, round_, slot = ticket
    await two[0].answer(assign, ticket=wire.Ticket(epoch=epoch, round=round_, slot=slot))
    refused = (await two[0].next("refused")).refused
    assert refused.reason == "StaleTicketError"
    assert "is not open" in refused.message
    await two[0].answer(assign)
    await work_on(two, at)


async def test_getrun_says_which_head_the_last_round_has_and_signs_it(
    journal: Path, tmp_path: Path
) -> None:
    signer = open_signer(tmp_path / "signing.key")
    async with (
        served(journal, GENESIS, signer=signer) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        await work_on(both, at)
        described = await both[0].client.get_run()
        assert described.round == 3
        assert described.round_head == at.daemon.status("").head
        witness = Witness(GENESIS.config.run_id, described.checkpoint_key)
        witness.check(3, described.round_head, described.signature)


async def test_the_same_answer_again_is_acknowledged_again_and_written_once(
    journal: Path,
) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        assign = await both[0].assigned()
        for _ in range(3):
            await both[0].answer(assign)
            assert (await both[0].next("ack")).ack.ticket == assign.ticket
    answers = [r for r in records_of(journal) if isinstance(r, Answered)]
    assert len(answers) == 1


async def test_a_second_different_answer_is_refused_and_the_first_stands(journal: Path) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        assign = await both[0].assigned()
        await both[0].answer(assign)
        await both[0].next("ack")
        await both[0].answer(assign, projected_grads=[0.5, 0.5, 0.25])
        refused = (await both[0].next("refused")).refused
        assert refused.reason == "EquivocationError"
        assert "second, different answer" in refused.message
        await work_on(both, at)
    first = next(r for r in records_of(journal) if isinstance(r, Answered) and r.slot == 0)
    assert first.projected_grads == (0.5, 0.5, 0.5)


async def test_nothing_acknowledged_is_missing_from_the_journal(journal: Path) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        await work_on(both, at)
        acknowledged = both[0].acknowledged | both[1].acknowledged
    assert len(acknowledged) == 6
    assert acknowledged <= answered_tickets(journal)


async def test_an_answer_without_the_digest_that_was_asked_for_is_refused(
    at: Served, two: list[ScriptedWorker]
) -> None:
    assign = await two[0].assigned()
    assert assign.want_digest
    await two[0].answer(assign, weights_digest64=None)
    refused = (await two[0].next("refused")).refused
    assert refused.reason == "ProtocolError"
    assert "digest" in refused.message
    await two[0].answer(assign)
    await work_on(two, at)


async def test_a_loss_that_the_run_keeps_private_is_refused(
    at: Served, two: list[ScriptedWorker]
) -> None:
    assign = await two[0].assigned()
    await two[0].answer(assign, mean_loss=0.7)
    refused = (await two[0].next("refused")).refused
    assert refused.reason == "ProtocolError"
    assert "keeps losses private" in refused.message
    await two[0].answer(assign)
    await work_on(two, at)


async def test_a_worker_that_cannot_measure_shows_its_reason_in_the_status(
    at: Served, two: list[ScriptedWorker]
) -> None:
    assign = await two[0].assigned()
    await two[0].send(unable=wire.Unable(ticket=assign.ticket, reason="the loss is NaN\n\x1b[31m"))

    async def shown() -> bool:
        return at.daemon.status("").workers[0].complaint != ""

    await until(shown, "the complaint")
    assert at.daemon.status("").workers[0].complaint == "the loss is NaN  [31m"


# ---------------------------------------------------------------- hello


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"base_digest": b"x" * 32}, MismatchError, "differs from the run in its base weights"),
        ({"tokenizer_digest": b"x" * 32}, MismatchError, "differs from the run in its tokenizer"),
        ({"manifest_digest": b"x" * 32}, MismatchError, "in its manifest (the trainable tensors)"),
        ({"manifest_digest": b""}, MismatchError, "in its manifest (the trainable tensors)"),
        ({"recipe": "fedmezo-1 other"}, MismatchError, "w1's numeric recipe differs"),
        ({"recipe": "r" * 60_000}, MismatchError, "w1's numeric recipe differs"),
        ({"protocol_version": 9}, VersionError, "speaks fedmezo protocol version 1, the caller 9"),
        ({"run_id": "other-run"}, WrongRunError, "'other-run' is not served here"),
        ({"run_id": ""}, WrongRunError, "is not served here"),
        ({"run_id": "r" * 60_000}, WrongRunError, "is not served here"),
        ({"worker": "Bad Name"}, ProtocolError, "set another --name"),
        ({"worker": "w1\n"}, ProtocolError, "set another --name"),
        ({"worker": ""}, ProtocolError, "set another --name"),
        ({"worker": "w" * 65}, ProtocolError, "set another --name"),
        ({"worker": "replica"}, ProtocolError, "set another --name"),
        ({"round": 5}, JournalBehindError, "has applied round 5, but this journal ends at round 0"),
        ({"round": 2**64 - 1}, JournalBehindError, "this journal ends at round 0"),
        ({"head": b"h" * 32}, DivergedError, "restart the worker"),
    ],
)
async def test_a_hello_that_means_something_else_is_refused_by_name(
    at: Served, changes: dict[str, Any], kind: type[FedMezoError], words: str
) -> None:
    async with scripted_workers(at.address, GENESIS, "w1") as [hand]:
        with pytest.raises(kind) as caught:
            await hand.open(**changes)
        assert type(caught.value) is kind
        assert words in str(caught.value)
    assert not at.daemon.status("").workers


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (wire.SessionRequest(answer=wire.Answer()), "INVALID_ARGUMENT"),
        (wire.SessionRequest(), "INVALID_ARGUMENT"),
        # A kind of a later version, as this one sees it: field 15, 3 bytes.
        (wire.SessionRequest.FromString(b"\x7a\x03abc"), "INVALID_ARGUMENT"),
        (wire.SessionRequest(hello=wire.Hello(protocol_version=1)), "NOT_FOUND"),
        (
            wire.SessionRequest(hello=wire.Hello(recipe="r" * MESSAGE_BYTES_MAX)),
            "RESOURCE_EXHAUSTED",
        ),
    ],
    ids=["answer first", "empty", "unknown kind", "hello to no run", "over the limit"],
)
async def test_a_session_that_does_not_begin_with_a_sound_hello_ends_with_a_status(
    at: Served, message: wire.SessionRequest, code: str
) -> None:
    async with raw_stub(at.address) as stub:
        call = stub.Session()
        await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is getattr(grpc.StatusCode, code)
    assert caught.value.details()


@pytest.mark.parametrize(
    "method",
    ["GetRun", "PollSession", "ReadJournal", "GetStatus", "ReportReplica", "ReadSnapshot"],
)
async def test_bytes_that_are_no_request_get_a_status_and_few_lines_of_the_log(
    at: Served, two: list[ScriptedWorker], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    path = f"/fedmezo.v1.CoordinatorService/{method}"
    async with grpc.aio.insecure_channel(at.address) as channel:
        for _ in range(LINES_A_MINUTE + 2):
            streams = method == "ReadSnapshot"
            call: Any = channel.unary_stream(path) if streams else channel.unary_unary(path)
            answer = call(b"\xff\xff").read() if streams else call(b"\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (
                dict(tuple(caught.value.trailing_metadata() or ()))[REASON_KEY] == "ProtocolError"
            )
    assert [record.getMessage() for record in caplog.records] == [
        "a call came with bytes that are no request"
    ] * LINES_A_MINUTE
    await work_on(two, at)


@pytest.mark.parametrize("kind", ["hello", "nothing", "unknown"])
async def test_a_message_that_has_no_place_ends_the_session_but_not_the_run(
    at: Served, two: list[ScriptedWorker], kind: str
) -> None:
    match kind:
        case "hello":
            message = wire.SessionRequest(hello=two[0].hello())
        case "nothing":
            message = wire.SessionRequest()
        case _:
            message = wire.SessionRequest.FromString(b"\x7a\x03abc")
    await two[0].stream.send(message)
    error = await two[0].ended()
    assert type(error) is ProtocolError
    assert "has no place in an open session" in str(error)
    await two[0].open()
    await work_on(two, at)


async def test_a_message_over_the_limit_ends_that_session_only(
    at: Served, two: list[ScriptedWorker]
) -> None:
    assign = await two[0].assigned()
    await two[0].answer(assign, projected_grads=[0.0] * (MESSAGE_BYTES_MAX // 4))
    assert isinstance(await two[0].ended(), NotReadyError)
    await two[0].open()
    await work_on(two, at)


async def test_a_stream_that_says_nothing_is_closed(
    at: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "HELLO_TIMEOUT_S", 0.05)
    async with raw_stub(at.address) as stub:
        call = stub.Session()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(tuple(caught.value.trailing_metadata() or ()))[REASON_KEY] == "ProtocolError"
    assert "begins with a hello" in str(caught.value.details())


async def test_a_second_session_of_a_name_replaces_the_first(
    at: Served, two: list[ScriptedWorker]
) -> None:
    async with scripted_workers(at.address, GENESIS, "w1") as [again]:
        await again.open()
        error = await two[0].ended()
        assert type(error) is ReplacedError
        assert error.retry_after_s == 30
        assert "Another process has joined as worker w1" in str(error)
        assert not at.daemon.status("").workers[0].complaint
        await work_on([again, two[1]], at)


async def test_processes_that_evict_one_another_are_named_in_the_status(
    at: Served, two: list[ScriptedWorker], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        async with scripted_workers(at.address, GENESIS, "w1") as [again]:
            await again.open()
            await two[0].ended()
            await two[0].open()
            await again.ended()
    complaints = [worker.complaint for worker in at.daemon.status("").workers]
    assert complaints[0].startswith("6 sessions of this name replaced one another")
    assert not complaints[1]
    said = [line for line in caplog.text.splitlines() if "two processes use it" in line]
    assert len(said) == 2
    await work_on(two, at)


class Endless(Context):
    """A stream that says nothing after its first message."""

    async def read(self) -> Any:
        return self._messages.pop(0) if self._messages else await asyncio.Event().wait()


@pytest.mark.parametrize("turns", range(5))
async def test_a_call_that_breaks_off_while_its_session_ends_leaves_no_worker_behind(
    at: Served, two: list[ScriptedWorker], turns: int
) -> None:
    servicer = CoordinatorServicer("coordinator", CallerLimits(0), ConnectionWatch(1))
    servicer.begin(Runs.of(at.daemon))
    request = wire.SessionRequest(hello=two[0].hello(worker="w3")).SerializeToString()
    context: Any = Endless([request])
    call = asyncio.create_task(servicer.session(None, context))

    async def is_in() -> bool:
        return at.daemon.is_connected("w3")

    await until(is_in, "the worker")
    at.daemon._sessions["w3"].end(ProtocolError("no"))
    for _ in range(turns):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    async def is_out() -> bool:
        return not at.daemon.is_connected("w3")

    await until(is_out, "the end of its session")


async def test_a_worker_that_half_closes_leaves_without_an_error(
    at: Served, two: list[ScriptedWorker]
) -> None:
    await two[0].stream.end()
    while await two[0].stream.receive() is not None:
        pass

    async def gone() -> bool:
        return not at.daemon.status("").workers[0].connected

    await until(gone, "the worker to be gone")


# ---------------------------------------------------------------- weights


async def test_the_one_whose_digest_differs_is_named_sent_away_and_not_committed(
    journal: Path,
) -> None:
    genesis = genesis_of(config_of(rounds=2, local_steps=1, workers_min=3, quorum=2))
    async with (
        served(journal, genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2", "w3") as three,
    ):
        for hand in three:
            await hand.open()
        assigns = [await hand.assigned() for hand in three]
        await three[1].answer(assigns[1], weights_digest64=1, projected_grads=[7.0])
        await three[0].answer(assigns[0])
        await three[2].answer(assigns[2])
        error = await three[1].ended()
        assert type(error) is DivergedError
        assert "worker w2 after round 0" in str(error)
        divergence = at.daemon.status("").divergences[0]
        assert (divergence.party, divergence.round) == ("w2", 0)
        assert at.daemon.status("").workers[1].diverged
        # Rebuilt, it is welcome again.
        await three[1].open()
        await asyncio.gather(*(hand.work_to_the_end() for hand in three))
        assert not at.daemon.status("").workers[1].diverged
    records = records_of(journal)
    commits = [r for r in records if isinstance(r, Committed)]
    assert [len(commit.seed_ranges) for commit in commits] == [2, 3]
    assert [r.party for r in records if isinstance(r, Diverged)] == ["w2"]


@pytest.mark.parametrize(
    ("round_", "digest"), [(7, b"d" * 32), (0, b"short")], ids=["no such round", "no digest"]
)
async def test_a_weights_report_about_nothing_ends_the_session(
    at: Served, two: list[ScriptedWorker], round_: int, digest: bytes
) -> None:
    await two[0].send(weights_report=wire.WeightsReport(round=round_, weights_digest=digest))
    error = await two[0].ended()
    assert "A weights report names a committed round" in str(error)
    assert not at.daemon.status("").digests
    await two[0].open()
    await work_on(two, at)


# ---------------------------------------------------------------- unary calls


@pytest.mark.parametrize("versions", [[], [2], [2, 3, 4], list(range(2, 4000))])
async def test_no_common_version_is_a_clear_refusal(at: Served, versions: list[int]) -> None:
    async with raw_stub(at.address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRun(wire.GetRunRequest(protocol_versions=versions))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert dict(tuple(caught.value.trailing_metadata() or ()))[REASON_KEY] == "VersionError"
    assert "upgrade the older of the two" in str(caught.value.details())


async def test_the_newest_common_version_is_chosen(at: Served) -> None:
    async with raw_stub(at.address) as stub:
        answer = await stub.GetRun(wire.GetRunRequest(protocol_versions=[3, 1, 2]))
    assert answer.protocol_version == 1


async def test_every_call_refuses_another_run(at: Served) -> None:
    async with CoordinatorClient(at.address) as client:
        for call in (
            client.get_run("other-run"),
            client.get_status("other-run"),
            client.read_journal(0, run_id="other-run"),
            client.report_replica("other-run", at.daemon.replica_secret, 0, b"d" * 32, None),
        ):
            with pytest.raises(WrongRunError, match="'other-run' is not served here"):
                await call


async def test_only_the_replica_of_this_coordinator_may_report_for_it(
    at: Served, two: list[ScriptedWorker]
) -> None:
    for secret in (b"", b"guess", bytes(32)):
        with pytest.raises(UnknownWorkerError, match="replica process that this coordinator"):
            await two[0].client.report_replica("tiny-run", secret, 0, b"d" * 32, None)
    assert not at.daemon.status("").digests
    await work_on(two, at)


async def test_the_replicas_report_must_name_a_committed_round_and_a_digest(at: Served) -> None:
    secret = at.daemon.replica_secret
    async with CoordinatorClient(at.address) as client:
        for round_, digest in ((1, b"d" * 32), (0, b"short")):
            with pytest.raises(ProtocolError, match="no committed round or no digest"):
                await client.report_replica("tiny-run", secret, round_, digest, None)


async def test_the_replicas_digest_and_evaluation_are_recorded(journal: Path) -> None:
    evaluation = Evaluated(0, loss=0.5, accuracy=0.75, rows=8, weights_digest=b"d" * 32, auc=0.5)
    async with served(journal, GENESIS) as at, CoordinatorClient(at.address) as client:
        secret = at.daemon.replica_secret
        await client.report_replica("tiny-run", secret, 0, b"d" * 32, evaluation)

        async def written() -> bool:
            return at.daemon.status("").records == 3

        await until(written, "the evaluation")
        status = at.daemon.status("")
        assert [(d.party, d.round) for d in status.digests] == [("replica", 0)]
    assert evaluation in records_of(journal)


async def test_a_complaint_about_the_replica_is_over_once_it_reports_again(journal: Path) -> None:
    async with served(journal, GENESIS) as at, CoordinatorClient(at.address) as client:
        daemon, secret = at.daemon, at.daemon.replica_secret

        async def reports(snapshot: wire.SnapshotReport | None, complaint: str) -> None:
            await client.report_replica("tiny-run", secret, 0, b"d" * 32, None, snapshot)

            async def shown() -> bool:
                return daemon.status("").replica_complaint == complaint

            await until(shown, "the replica's complaint")

        daemon.replica.complaint = "the replica ended (killed) and is started again"
        await reports(None, "")
        await reports(
            wire.SnapshotReport(complaint="The disk is full."),
            "no snapshot of round 0: The disk is full.",
        )
        await reports(None, "no snapshot of round 0: The disk is full.")


async def test_the_last_evaluation_is_due_until_it_comes(journal: Path) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as two,
    ):
        daemon, last = at.daemon, GENESIS.config.rounds
        daemon.replica.evaluates = True
        for hand in two:
            await hand.open()
        assert not daemon.status("").evaluation_due
        await asyncio.gather(*(hand.work_to_the_end() for hand in two))
        assert daemon.status("").evaluation_due
        evaluation = Evaluated(last, loss=0.5, accuracy=0.75, rows=8, weights_digest=b"d" * 32)
        secret = daemon.replica_secret
        await two[0].client.report_replica("tiny-run", secret, last, b"d" * 32, evaluation)

        async def over() -> bool:
            return not daemon.status("").evaluation_due

        await until(over, "the evaluation")


@pytest.mark.parametrize("limits", [{"records_max": 4097}, {"wait_ms": 30_001}])
async def test_a_page_over_its_limits_is_refused(at: Served, limits: dict[str, Any]) -> None:
    async with CoordinatorClient(at.address) as client:
        with pytest.raises(ProtocolError, match="ask for less"):
            await client.read_journal(0, **limits)


async def test_pages_cover_the_journal_without_gaps(at: Served, two: list[ScriptedWorker]) -> None:
    await work_on(two, at)
    client = two[0].client
    seqnos, seqno = [], 0
    while page := await client.read_journal(seqno, records_max=2):
        if not page.entries:
            break
        assert len(page.entries) <= 2
        seqnos += [entry.seqno for entry in page.entries]
        seqno = page.next_seqno
    assert seqnos == list(range(at.daemon.status("").records))
    assert page.finished


async def test_commits_only_leaves_out_what_the_weights_do_not_depend_on(
    at: Served, two: list[ScriptedWorker]
) -> None:
    await work_on(two, at)
    page = await two[0].client.read_journal(0, commits_only=True)
    assert len(page.entries) == 4  # genesis and three commits
    assert page.finished


@pytest.mark.parametrize("seqno", [3, 1_000, 2**64 - 1])
async def test_reading_past_the_end_gives_nothing(at: Served, seqno: int) -> None:
    async with CoordinatorClient(at.address) as client:
        page = await client.read_journal(seqno)
    assert (len(page.entries), page.next_seqno) == (0, seqno)


async def test_a_reader_that_waits_gets_the_next_record_as_it_is_written(at: Served) -> None:
    async with scripted_workers(at.address, GENESIS, "w1", "w2") as both:
        waiting = asyncio.create_task(both[0].client.read_journal(2, wait_ms=30_000))
        for hand in both:
            await hand.open()
        page = await waiting
    assert [entry.seqno for entry in page.entries] == [2]


# ---------------------------------------------------------------- restarts


async def test_a_restart_is_a_new_epoch_that_keeps_the_answers_it_has(journal: Path) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        for hand in both:
            await hand.open()
        old = await both[1].assigned()
        await both[0].answer(await both[0].assigned())
        await both[0].next("ack")
    async with served(journal) as at, scripted_workers(at.address, GENESIS, "w1", "w2") as both:
        assert (await both[1].open()).epoch == 2
        new = await both[1].assigned()
        assert (new.ticket.epoch, new.ticket.slot) == (2, old.ticket.slot)
        assert new.first_seed == old.first_seed
        # What was measured before counts under the new ticket only.
        await both[1].answer(old)
        assert (await both[1].next("refused")).refused.reason == "StaleTicketError"
        await both[1].answer(new)
        await both[0].open()
        await work_on(both, at)
    assert {epoch for epoch, _, _ in answered_tickets(journal)} == {1, 2}


async def test_workers_are_told_when_the_coordinator_stops(journal: Path) -> None:
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as both,
    ):
        await both[0].open()
        at.daemon.end_sessions()
        error = await both[0].ended()
        assert "The coordinator is stopping" in str(error)


def test_a_thirty_step_answer_takes_at_most_150_bytes() -> None:
    assign = wire.Assign(
        ticket=wire.Ticket(epoch=20, round=10_000, slot=300), steps=30, want_digest=True
    )
    answer = answer_to(assign, weights_digest64=2**64 - 1, mean_loss=0.7)
    assert wire.SessionRequest(answer=answer).ByteSize() <= 150


async def test_what_a_worker_sent_before_it_closed_its_side_is_taken(
    at: Served, two: list[ScriptedWorker]
) -> None:
    disk_is_slow = threading.Event()
    at.daemon._writer.submit(disk_is_slow.wait)
    try:
        # While this answer waits for the disk, the rest comes in and the side is closed.
        await two[0].answer(await two[0].assigned())
        await two[0].send(weights_report=wire.WeightsReport(round=0, weights_digest=b"d" * 32))
        await two[0].stream.end()

        async def all_came() -> bool:
            return at.daemon._items.qsize() >= 2

        await until(all_came, "the report and the end of the stream")
    finally:
        disk_is_slow.set()
    while await two[0].stream.receive() is not None:
        pass
    assert [digest.party for digest in at.daemon.status("").digests] == ["w1"]
