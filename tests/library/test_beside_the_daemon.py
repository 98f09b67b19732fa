"""The library and the daemons: the same seed and data give the same journal and digest."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedmezo
from fedmezo import Coordinator, Genesis, Session, TorchEngine
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.replica.supervisor import describe_base
from fedmezo_coordinator.serving.poll_sessions import PollSessions
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FedMezoError,
    MismatchError,
    SnapshotDamagedError,
    UnavailableError,
)
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.records import Answered, Committed, Record
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    TASK,
    config_of,
    genesis_of,
    records_of,
    run_values,
    served,
    values_without_rate,
)
from tests.integration.support.parties import Workers, save_model, write_rows
from tests.library.light_engine import LightEngine

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {"workers_min": 3, "quorum": 3, "rounds": 4}


def by_kind(records: list[Record]) -> list[str]:
    """Records in an order that does not depend on which worker answers first."""
    return sorted(map(repr, records))


def open_sessions(genesis: Genesis, model: Path, data: list[Path]) -> dict[str, Session]:
    return {
        f"w{k}": Session.open(genesis, f"w{k}", model, path, threads=1, device="cpu")
        for k, path in enumerate(data[:3], start=1)
    }


def run_to_the_end(coordinator: Coordinator, sessions: dict[str, Session]) -> None:
    downs = dict.fromkeys(sessions, b"")
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed_policy": "pool", "pool_size": 16, "rebase_every_rounds": 2},
        {"weighting": "rows", "report_losses": True, "normalized_step": True},
    ],
    ids=["plain", "pool", "rows and losses"],
)
async def test_library_and_daemon_write_the_same_journal(
    tmp_path: Path,
    model_folder: Path,
    data_files: list[Path],
    workers: Workers,
    tiny_genesis: Callable[..., Genesis],
    changes: dict[str, Any],
) -> None:
    genesis = tiny_genesis(**RUN, **changes)
    async with served(tmp_path / "journal.db", genesis) as at:
        started = workers.start_all(at.address, data_files[:3])
        assert not [error for one in started if (error := await one.outcome())]
        over_grpc = {one.name: await one.engine.digest() for one in started}
    store = MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = open_sessions(genesis, model_folder, data_files)
    run_to_the_end(coordinator, sessions)
    ours = [decode_record(entry.row.body) for entry in Journal(store).load()]
    theirs = records_of(tmp_path / "journal.db")
    assert [r for r in ours if isinstance(r, Committed)] == [
        r for r in theirs if isinstance(r, Committed)
    ]
    assert by_kind(ours) == by_kind(theirs)
    assert coordinator.digests == over_grpc
    # Each goes on from the other's journal.
    again = Coordinator(None, tmp_path / "journal.db")
    assert again.head == coordinator.head
    again.close()


async def test_an_exchange_is_a_call_of_the_daemon_without_a_stream(
    tmp_path: Path,
) -> None:
    """`Session.exchange` speaks to `PollSession` as it does to a `Coordinator`."""
    genesis = genesis_of(config_of(**RUN))
    in_library = Coordinator(genesis)
    names = ("a", "b", "c")
    run_to_the_end(in_library, {name: Session(genesis, name, LightEngine(name)) for name in names})

    async def work(client: CoordinatorClient, name: str) -> bytes:
        engine = LightEngine(name)
        session, down = Session(genesis, name, engine), b""
        while True:
            request = wire.PollSessionRequest.FromString(session.exchange(down))
            stub: Any = client._stub
            down = (await stub.PollSession(request)).SerializeToString()
            if session.finished:
                return engine.digest()

    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
    ):
        digests = await asyncio.gather(*(work(client, name) for name in names))
    assert set(digests) == set(in_library.digests.values())
    commits = [r for r in records_of(tmp_path / "journal.db") if isinstance(r, Committed)]
    assert len(commits) == genesis.config.rounds


async def exchange(client: CoordinatorClient, session: Session, down: bytes) -> bytes:
    request = wire.PollSessionRequest.FromString(session.exchange(down))
    stub: Any = client._stub
    with client._errors_mapped():
        response: wire.PollSessionResponse = await stub.PollSession(request)
    return response.SerializeToString()


async def test_a_round_of_the_daemon_does_not_close_between_two_exchanges(tmp_path: Path) -> None:
    """A worker that calls is there between its calls, so its answer counts, as in the library."""
    genesis = genesis_of(config_of(**RUN | {"quorum": 1}))
    names = ("a", "b", "c")
    in_library = Coordinator(genesis)
    run_to_the_end(in_library, {name: Session(genesis, name, LightEngine(name)) for name in names})
    async with (
        served(tmp_path / "journal.db", genesis, session_limit=SessionLimit(3)) as at,
        CoordinatorClient(at.address) as client,
    ):
        sessions = {name: Session(genesis, name, LightEngine(name)) for name in names}
        downs = dict.fromkeys(names, b"")
        for _ in range(50):
            for name, session in sessions.items():
                downs[name] = await exchange(client, session, downs[name])
        assert all(session.finished for session in sessions.values())
        assert at.daemon.status("").sessions == 3
    commits = [r for r in records_of(tmp_path / "journal.db") if isinstance(r, Committed)]
    assert [len(commit.seed_ranges) for commit in commits] == [3] * genesis.config.rounds
    journal = Journal(SqliteStore(tmp_path / "journal.db"))
    assert [entry.head for entry in journal.load()][-1] == in_library.head
    journal.close()


@pytest.mark.parametrize("seed", range(4))
async def test_lost_and_repeated_calls_of_the_daemon_change_nothing(
    tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    genesis = genesis_of(config_of(**RUN))
    names = ("a", "b", "c")
    in_library = Coordinator(genesis)
    run_to_the_end(in_library, {name: Session(genesis, name, LightEngine(name)) for name in names})
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
    ):
        sessions = {name: Session(genesis, name, LightEngine(name)) for name in names}
        downs = {name: [b""] for name in names}
        ups: list[bytes] = []

        async def call(up: bytes) -> bytes:
            stub: Any = client._stub
            request = wire.PollSessionRequest.FromString(up)
            with client._errors_mapped():
                response: wire.PollSessionResponse = await stub.PollSession(request)
            return response.SerializeToString()

        for _ in range(600):
            name = dice.choice(names)
            newest = downs[name][-1] if dice.random() < 0.8 else dice.choice(downs[name])
            ups.append(sessions[name].exchange(newest))
            calls = [call(ups[-1])]
            if dice.random() < 0.3:  # A repeated call at the same time, whose reply is lost.
                calls.append(call(dice.choice(ups)))
            replies = await asyncio.gather(*calls, return_exceptions=True)
            reply = replies[0]
            if isinstance(reply, bytes) and dice.random() < 0.8:
                downs[name].append(reply)
            elif not isinstance(reply, bytes):
                # Two calls of one worker at once: the later one has the session.
                assert isinstance(reply, UnavailableError), reply
            if all(session.finished for session in sessions.values()):
                break
        assert all(session.finished for session in sessions.values())
        assert at.daemon.status("").sessions <= 3
    records = records_of(tmp_path / "journal.db")
    answers = [(r.round, r.slot) for r in records if isinstance(r, Answered)]
    assert len(answers) == len(set(answers)) == 3 * genesis.config.rounds
    journal = Journal(SqliteStore(tmp_path / "journal.db"))
    assert [entry.head for entry in journal.load()][-1] == in_library.head
    journal.close()


async def test_calls_at_the_same_time_leave_one_session_that_counts(tmp_path: Path) -> None:
    async def enter() -> None:
        pass

    genesis = genesis_of(config_of(**RUN))
    async with served(tmp_path / "journal.db", genesis) as at:
        sessions = PollSessions(lambda _: at.daemon)
        up = Session(genesis, "a", LightEngine("a")).exchange()
        for _ in range(3):
            calls = [sessions.poll(wire.PollSessionRequest.FromString(up), enter) for _ in range(4)]
            await asyncio.gather(*calls, return_exceptions=True)
        status = at.daemon.status("")
        assert status.sessions == sum(worker.connected for worker in status.workers) == 1


async def test_a_caller_that_goes_away_at_the_end_of_a_run_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genesis = genesis_of(config_of(workers_min=1, quorum=1, rounds=1))
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
    ):
        session, down = Session(genesis, "a", LightEngine("a")), b""
        while not session.finished:
            down = await exchange(client, session, down)
        flush = at.daemon._flush

        async def cancelling(readies: Any) -> None:
            if readies:
                calling.cancel()
                await asyncio.sleep(0)
            await flush(readies)

        up = wire.PollSessionRequest.FromString(session.exchange(b""))
        calling = asyncio.create_task(at.daemon.join(up.messages[0].hello, exchanges=True))
        with monkeypatch.context() as patch:
            patch.setattr(at.daemon, "_flush", cancelling)
            with pytest.raises(asyncio.CancelledError):
                await calling
        async with asyncio.timeout(10):
            await exchange(client, session, b"")


async def test_the_daemon_does_not_ask_again_at_once_who_cannot_measure(tmp_path: Path) -> None:
    class Unable(LightEngine):
        asked = 0

        def measure(self, order: fedmezo.Measure) -> fedmezo.Measured:
            self.asked += 1
            raise fedmezo.MeasurementError("a loss is not a number")

    genesis = genesis_of(config_of(workers_min=1, quorum=1, rounds=2))
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
    ):
        engine, down = Unable("a"), b""
        session = Session(genesis, "a", engine)
        for _ in range(6):
            down = await exchange(client, session, down)
        assert engine.asked == 1


async def test_a_worker_that_was_sent_away_learns_of_it_by_its_next_exchange(
    tmp_path: Path,
) -> None:
    genesis = genesis_of(config_of(**RUN | {"rounds": 6}))
    names = ("a", "b", "c")
    async with (
        served(tmp_path / "journal.db", genesis) as at,
        CoordinatorClient(at.address) as client,
    ):
        sessions = {name: Session(genesis, name, LightEngine(name)) for name in names}
        downs, found = dict.fromkeys(names, b""), 0
        for _ in range(50):
            for name, session in list(sessions.items()):
                if name == "c" and not found and session.round == 2:
                    engine = session.engine
                    assert isinstance(engine, LightEngine)
                    engine._digest = b"other".ljust(32)
                try:
                    downs[name] = await exchange(client, session, downs[name])
                except DivergedError:
                    found += 1
                    sessions[name], downs[name] = Session(genesis, name, LightEngine(name)), b""
        assert found == 1
        assert all(session.finished for session in sessions.values())


# ---------------------------------------------------------------- the torch engine


class LikeADataset:
    """What a `datasets.Dataset` has of rows: it can be iterated and has a length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


def test_rows_of_a_file_a_list_and_a_dataset_give_the_same_run(
    model_folder: Path, data_files: list[Path], tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis(workers_min=1, quorum=1, rounds=2)
    rows = [json.loads(line) for line in data_files[0].read_text().splitlines()]
    heads = set()
    for given in (data_files[0], str(data_files[0]), rows, LikeADataset(rows)):
        coordinator = Coordinator(genesis)
        session = Session.open(genesis, "w1", model_folder, given, threads=1)
        run_to_the_end(coordinator, {"w1": session})
        heads.add(coordinator.head)
    assert len(heads) == 1


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "There are no rows in the data given"),
        (["a row"], "Row 1 of the data given is str, not a mapping"),
        ([{"text": "Fine."}], "the data given has no column label; its columns are text"),
        ([{"text": "Fine.", "label": "sideways"}], "sideways"),
        ([{"text": None, "label": "positive"}], "Row 1 of the data given has no text"),
    ],
    ids=["none", "text", "no label", "unknown label", "missing value"],
)
def test_bad_rows_are_named(
    model_folder: Path, tiny_genesis: Callable[..., Genesis], rows: Any, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        TorchEngine(tiny_genesis(), "w1", model_folder, rows, threads=1)


def test_another_model_is_refused(
    tmp_path: Path, data_files: list[Path], tiny_genesis: Callable[..., Genesis]
) -> None:
    save_model(tmp_path / "other", change=1.0)
    with pytest.raises(MismatchError, match="base weights loaded here differ"):
        Session.open(tiny_genesis(), "w1", tmp_path / "other", data_files[0], threads=1)


def test_folders_may_be_text(
    tmp_path: Path,
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
) -> None:
    lora = {"rank": 2, "alpha": 4, "freeze_a": True, "target_modules": ["c_fc"]}
    with pytest.raises(FedMezoError, match="no-adapter"):
        fedmezo.begin_run(
            run_values(lora=lora), model_folder, adapter=str(tmp_path / "no-adapter"), threads=1
        )
    TorchEngine(
        tiny_genesis(),
        "w1",
        model_folder,
        data_files[0],
        offload_folder=str(tmp_path / "offload"),
        threads=1,
    )
    assert (tmp_path / "offload").is_dir()


def test_begin_run_gives_the_genesis_that_the_daemon_would(
    model_folder: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    begun = fedmezo.begin_run(run_values(), model_folder, threads=1)
    assert begun == tiny_genesis()
    assert fedmezo.decode_genesis(fedmezo.encode_genesis(begun)) == begun
    with pytest.raises(ConfigError, match=r"the run's contract: roundz is not a known setting"):
        fedmezo.begin_run(run_values(roundz=3), model_folder)


async def test_begin_run_measures_the_rate_that_the_daemon_would(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = values_without_rate()
    file = write_rows(tmp_path / "rows.jsonl", count=60)
    settings = CoordinatorSettings(model=str(model_folder), run=given, heldout=file)
    there = await describe_base(settings, settings.run_config("the test"))
    begun = fedmezo.begin_run(given, model_folder, rate_rows=file, threads=1)
    assert begun == there
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    others = [{"words": row["text"], "label": row["label"]} for row in rows]
    again = fedmezo.begin_run(
        given, model_folder, rate_rows=others, columns={"text": "words"}, threads=1
    )
    assert again == begun
    assert "was not measured" not in caplog.text
    alone = fedmezo.begin_run(given, model_folder, threads=1)
    assert alone.config.learning_rate > begun.config.learning_rate
    assert "was not measured (there are no rows for that; give rate_rows)" in caplog.text
    for has_rate in (run_values(), config_of()):
        with pytest.raises(ConfigError, match="rate_rows measure a learning_rate, and the"):
            fedmezo.begin_run(has_rate, model_folder, rate_rows=file)
    with pytest.raises(DataError, match="fewer than two batches of 4"):
        fedmezo.begin_run(given, model_folder, rate_rows=rows[:7], threads=1)


def test_saved_weights_go_on_with_the_run(
    tmp_path: Path,
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
) -> None:
    genesis = tiny_genesis(workers_min=1, quorum=1, rounds=4)
    coordinator = Coordinator(genesis)

    def fresh() -> Session:
        return Session.open(genesis, "w1", model_folder, data_files[0], threads=1)

    session, down = fresh(), b""
    while session.round < 2:
        down = coordinator.exchange(session.exchange(down))
    path = session.save(str(tmp_path / "saved"))
    again = fresh()
    again.restore(str(path))
    assert (again.round, again.head) == (2, session.head)
    assert again.engine.digest() == session.engine.digest()
    run_to_the_end(coordinator, {"w1": again})
    whole = Coordinator(genesis)
    run_to_the_end(whole, {"w1": fresh()})
    assert coordinator.digests == whole.digests
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(SnapshotDamagedError):
        fresh().restore(path)
    with pytest.raises(SnapshotDamagedError, match="it is of run tiny-run, not of other"):
        Session.open(
            tiny_genesis(run_id="other"), "w1", model_folder, data_files[0], threads=1
        ).restore(session.save(tmp_path / "saved"))


def test_an_objective_is_given_as_a_function(
    model_folder: Path, data_files: list[Path], tiny_genesis: Callable[..., Genesis]
) -> None:
    task = TASK | {"objective": "my.module:score"}
    genesis = tiny_genesis(workers_min=1, quorum=1, rounds=1, task=task)
    calls = []

    def score(predictions: fedmezo.Predictions) -> float:
        calls.append(len(predictions.rows))
        return -float(predictions.log_likelihoods.sum())

    session = Session.open(genesis, "w1", model_folder, data_files[0], objective=score, threads=1)
    run_to_the_end(Coordinator(genesis), {"w1": session})
    assert calls == [4] * 4
    with pytest.raises(ConfigError, match=r"by my\.module:score; give that function"):
        Session.open(genesis, "w1", model_folder, data_files[0])
    with pytest.raises(ConfigError, match="by their loss, not by an objective"):
        Session.open(tiny_genesis(), "w1", model_folder, data_files[0], objective=score)
