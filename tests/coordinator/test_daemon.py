"""The daemon's own parts: a worker's outbox, and what it serves without."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.serving.long_run import next_assignment
from benchmarks.serving.swarm import answer_to, hello_of
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.serving.callers import check_operator
from fedmezo_coordinator.serving.worker_session import OUTBOX_MAX, WorkerSession
from fedmezo_core.errors import (
    ConfigError,
    ExcludedError,
    FedMezoError,
    ForbiddenError,
    JournalCorruptError,
    NotReadyError,
    ProtocolError,
)
from fedmezo_core.journal.codec import (
    decode_record,
    encode_record,
    encode_records,
    evaluated_to_pb,
)
from fedmezo_core.journal.journal import ZERO_HASH, Entry, Journal, head_after
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.roster import RECENT_ROUNDS_MAX
from fedmezo_core.records import (
    Answered,
    Committed,
    Evaluated,
    Excluded,
    Genesis,
    Opened,
    Started,
)
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    config_of,
    environment,
    genesis_of,
    records_of,
    relayed,
    scripted_workers,
    served,
    until,
)

MESSAGE = wire.SessionResponse(ack=wire.Ack())


def drained(session: WorkerSession) -> list[wire.SessionResponse | bytes | FedMezoError]:
    return [session.outbox.get_nowait() for _ in range(session.outbox.qsize())]


def test_a_worker_that_reads_slowly_is_cut_off_and_told_to_reconnect() -> None:
    session = WorkerSession("slow")
    for _ in range(3 * OUTBOX_MAX):
        session.put(MESSAGE)
    waiting = drained(session)
    assert len(waiting) == OUTBOX_MAX
    assert waiting[:-1] == [MESSAGE] * (OUTBOX_MAX - 1)
    assert isinstance(waiting[-1], NotReadyError)
    assert "Worker slow reads more slowly than the run writes" in str(waiting[-1])


def test_a_session_ends_once_and_with_what_was_first() -> None:
    session = WorkerSession("w1")
    session.put(MESSAGE)
    session.end(ProtocolError("first"))
    session.end(ProtocolError("second"))
    session.put(MESSAGE)
    waiting = drained(session)
    assert waiting[0] == MESSAGE
    assert [str(item) for item in waiting[1:]] == ["first"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "fedmezo_coordinator.programs.coordinator_command",
        "fedmezo_coordinator.programs.fedmezo_command",
        "fedmezo_coordinator.daemon",
        "fedmezo_coordinator.programs.relay_command",
        "fedmezo_coordinator.serving.service",
        "fedmezo_coordinator.replica.replica",
        "fedmezo_core.wire.client",
        "fedmezo_worker.worker_command",
    ],
)
def test_importing_it_imports_no_library_of_numbers(module: str) -> None:
    heavy = "{'torch', 'numba', 'numpy', 'transformers', 'pyarrow', 'safetensors', 'peft'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_a_journal_without_genesis_is_refused(tmp_path: Path) -> None:
    journal = Journal(SqliteStore(tmp_path / "journal.db"))
    daemon = Daemon(journal)
    with pytest.raises(JournalCorruptError, match="does not begin with a genesis record"):
        await daemon.load()
    await daemon.close()


async def test_every_start_is_an_epoch_in_the_journal(tmp_path: Path) -> None:
    path, genesis = tmp_path / "journal.db", genesis_of(config_of())
    for epoch in (1, 2, 3):
        async with served(path, genesis) as at:
            assert at.daemon.status("").epoch == epoch
    assert records_of(path) == [genesis, Started(1), Started(2), Started(3)]


async def test_the_status_shows_progress_traffic_and_losses(tmp_path: Path) -> None:
    genesis = genesis_of(
        config_of(rounds=2, workers_min=1, quorum=1, local_steps=1, report_losses=True)
    )
    async with served(tmp_path / "journal.db", genesis) as at:
        assert at.daemon.status("").phase == wire.PHASE_WAITING
        async with scripted_workers(at.address, genesis, "w1") as [hand]:
            await hand.open()
            assign = await hand.assigned()
            status = at.daemon.status("")
            assert status.phase == wire.PHASE_OPEN
            assert status.workers[0].measuring
            await hand.answer(assign, mean_loss=0.75)
            await hand.answer(await hand.assigned(), mean_loss=0.25)
            await hand.next("finished")
            status = at.daemon.status("")
    assert status.phase == wire.PHASE_FINISHED
    assert [r.mean_loss for r in status.recent_rounds] == [0.75, 0.25]
    worker = status.workers[0]
    assert (worker.worker, worker.rounds_answered, worker.mean_loss) == ("w1", 2, 0.25)
    assert worker.bytes_up > 0
    assert worker.bytes_down == sum(m.ByteSize() for m in hand.received)
    assert status.trainable_bytes == genesis.trainable_bytes


async def test_the_status_keeps_the_best_evaluation_when_it_forgets_others(
    tmp_path: Path,
) -> None:
    path, genesis = tmp_path / "journal.db", genesis_of(config_of())
    evaluations = [
        Evaluated(round=0, loss=abs(number - 2.0), accuracy=0.5, rows=9, weights_digest=b"w" * 32)
        for number in range(RECENT_ROUNDS_MAX + 5)
    ]
    journal = Journal(SqliteStore(path))
    journal.append(encode_records([genesis, Started(1), *evaluations]))
    journal.close()
    async with served(path, genesis) as at:
        losses = [evaluation.loss for evaluation in at.daemon.status("").evaluations]
    assert losses == [0.0, *(float(number) for number in range(3, RECENT_ROUNDS_MAX + 3))]


async def test_a_run_that_ends_ruined_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    genesis = genesis_of(config_of(rounds=3, workers_min=1, quorum=1, local_steps=1))
    async with served(tmp_path / "journal.db", genesis) as at:
        async with scripted_workers(at.address, genesis, "w1") as [hand]:
            await hand.open()
            for _ in range(3):
                await hand.answer(await hand.assigned(), projected_grads=[0.0])
            await hand.next("finished")
        evaluation = Evaluated(round=3, loss=0.7, accuracy=0.5, rows=9, weights_digest=b"w" * 32)
        report = wire.ReportReplicaRequest(
            secret=at.daemon.replica_secret,
            round=3,
            weights_digest=b"w" * 32,
            evaluation=evaluated_to_pb(evaluation),
        )
        with caplog.at_level(logging.INFO):
            await at.daemon.report_replica(report)

            async def is_noted() -> bool:
                return "last evaluation, of round 3, has loss 0.7000" in caplog.text

            await until(is_noted, "the evaluation in the log")
    assert "the run is finished, but every projected gradient since round 1 is exactly 0" in (
        caplog.text
    )


async def test_a_worker_that_joins_later_gets_the_commits_it_lacks(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(rounds=9, workers_min=1, quorum=1, local_steps=1))
    path = tmp_path / "journal.db"
    async with (
        served(path, genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2") as [first, late],
    ):
        await first.open()
        for _ in range(3):
            await first.answer(await first.assigned())
        await first.assigned()
        assert (await late.open()).round == 3
        notices = [(await late.next("commit")).commit for _ in range(3)]
        commits = [decode_record(notice.record) for notice in notices]
        assert [getattr(commit, "round", None) for commit in commits] == [1, 2, 3]
        assert [m.WhichOneof("kind") for m in late.received] == ["welcome", *["commit"] * 3]


async def test_nothing_more_is_taken_from_a_session_that_another_has_replaced(
    tmp_path: Path,
) -> None:
    """A relay's mean may change with a restart, and its acknowledgement does not say which."""
    genesis = genesis_of(config_of(rounds=9, workers_min=1, quorum=1, local_steps=1))
    head = head_after(ZERO_HASH, encode_record(genesis))
    async with served(tmp_path / "journal.db", genesis) as at:
        old = await at.daemon.join(hello_of(genesis, "w1", 0, head))
        assign = await next_assignment(old)
        new = await at.daemon.join(hello_of(genesis, "w1", 0, head))
        assert (await next_assignment(new)).ticket == assign.ticket
        await at.daemon.receive(old, answer_to(assign, [1.0]))
        await at.daemon.receive(new, answer_to(assign, [2.0]))
        await next_assignment(new)
    answers = [r for r in records_of(tmp_path / "journal.db") if isinstance(r, Answered)]
    assert [answer.projected_grads for answer in answers] == [(2.0,)]


async def test_a_caller_that_goes_away_while_it_replaces_a_session_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genesis = genesis_of(config_of(rounds=9, workers_min=2, quorum=1, local_steps=1))
    head = head_after(ZERO_HASH, encode_record(genesis))
    path = tmp_path / "journal.db"
    async with served(path, genesis) as at:
        first = await at.daemon.join(hello_of(genesis, "w1", 0, head))
        await at.daemon.join(hello_of(genesis, "w2", 0, head))
        await at.daemon.receive(first, answer_to(await next_assignment(first), [1.0]))

        async def answered() -> bool:
            return at.daemon.status("").records == 4

        await until(answered, "the answer")
        writing, may_write = threading.Event(), threading.Event()
        append = Journal.append

        def slow(journal: Journal, bodies: Sequence[bytes]) -> list[Entry]:
            writing.set()
            may_write.wait(10)
            return append(journal, bodies)

        monkeypatch.setattr(Journal, "append", slow)
        # Without the session that is replaced, nobody is waited for, so the round is committed.
        joining = asyncio.create_task(at.daemon.join(hello_of(genesis, "w2", 0, head)))
        assert await asyncio.to_thread(writing.wait, 10)
        joining.cancel()
        await asyncio.sleep(0)
        may_write.set()
        await asyncio.wait_for(at.daemon.join(hello_of(genesis, "w3", 0, head)), 10)
    assert [record.round for record in records_of(path) if isinstance(record, Committed)] == [1]


async def test_a_reconnecting_client_sees_the_same_run(tmp_path: Path) -> None:
    genesis = genesis_of(config_of())
    async with served(tmp_path / "journal.db", genesis) as at:
        for _ in range(2):
            async with CoordinatorClient(at.address) as client:
                assert (await client.get_run()).genesis == genesis


async def test_a_round_goes_on_without_a_worker_that_left_once_it_is_overdue(
    tmp_path: Path,
) -> None:
    genesis = genesis_of(
        config_of(rounds=1, workers_min=2, quorum=1, local_steps=1, deadline_ms=300)
    )
    path = tmp_path / "journal.db"
    async with (
        served(path, genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2") as [w1, w2],
    ):
        await w1.open()
        await w2.open()
        await w1.answer(await w1.assigned())
        w2.stream.cancel()

        async def finished() -> bool:
            return at.daemon.status("").phase == wire.PHASE_FINISHED

        await until(finished, "the deadline")
    records = records_of(path)
    assert isinstance(records[0], Genesis)
    assert [r.workers for r in records if isinstance(r, Opened)] == [("w1", "w2")]
    assert [len(r.seed_ranges) for r in records if isinstance(r, Committed)] == [1]


async def test_one_worker_too_many_is_refused_until_another_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmezo_coordinator.serving.loop.WORKERS_MAX", 1)
    genesis = genesis_of(config_of(workers_min=4, quorum=4))
    async with served(tmp_path / "journal.db", genesis) as at:
        async with scripted_workers(at.address, genesis, "w1") as (first,):
            await first.open()
            async with scripted_workers(at.address, genesis, "w2") as (second,):
                with pytest.raises(NotReadyError, match="the most that one coordinator takes"):
                    await second.open()

        async def left() -> bool:
            return not at.daemon.status("").workers[0].connected

        await until(left, "the first worker to leave")
        async with scripted_workers(at.address, genesis, "w2") as (second,):
            await second.open()
            assert [w.worker for w in at.daemon.status("").workers] == ["w2"]


async def test_an_excluded_worker_learns_why_at_once_and_when_it_comes_back(
    tmp_path: Path,
) -> None:
    genesis = genesis_of(config_of(rounds=1, workers_min=2, quorum=1, local_steps=1))
    path = tmp_path / "journal.db"
    async with (
        served(path, genesis) as at,
        scripted_workers(at.address, genesis, "w1", "w2", "w2") as [w1, w2, again],
    ):
        await w1.open()
        await w2.open()
        await w2.answer(await w2.assigned())
        async with CoordinatorClient(at.address) as operator:
            with pytest.raises(ConfigError, match="w1 is not excluded"):
                await operator.readmit_worker("w1")
            with pytest.raises(
                ProtocolError, match=r"'W 2' is no worker's name.* as in `fedmezo st"
            ):
                await operator.exclude_worker("W 2", "noise")
            await operator.exclude_worker("w2", "noise")
        assert at.daemon.status("").records == 5, "the exclusion is durable"
        for worker in (w2, again):
            if worker is again:
                await again.open()
            error = await worker.ended()
            assert isinstance(error, ExcludedError)
            assert "excluded worker w2 after round 0: noise." in str(error)
        await w1.answer(await w1.assigned())
        await w1.next("commit")
        [excluded] = at.daemon.status("").excluded
        assert (excluded.worker, excluded.reason) == ("w2", "noise")
    records = records_of(path)
    assert records[4] == Excluded(0, "w2", "noise")
    assert [len(r.seed_ranges) for r in records if isinstance(r, Committed)] == [1]


def test_a_coordinator_without_a_fleet_takes_orders_from_its_own_machine_alone() -> None:
    for peer in ("ipv4:127.0.0.1:5000", "ipv6:[::1]:5000", "ipv6:%5B::1%5D:5000"):
        check_operator(Caller.ANYONE, peer)
    for peer in ("ipv4:10.0.0.1:5000", "ipv6:[2001:db8::1]:5000", "ipv4:8.8.127.0:1", ""):
        with pytest.raises(ForbiddenError, match="from its own machine alone"):
            check_operator(Caller.ANYONE, peer)
    check_operator(Caller(Role.OPERATOR, "o"), "ipv4:10.0.0.1:5000")


async def test_a_relay_excludes_nobody_and_says_who_can(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "journal.db", genesis_of(config_of())) as at,
        relayed(at.address, tmp_path, "site", workers_min=1) as site,
        CoordinatorClient(site.address) as operator,
    ):
        for order in (operator.exclude_worker("w1", "noise"), operator.readmit_worker("w1")):
            with pytest.raises(ProtocolError, match="exclude its site at the coordinator above"):
                await order
