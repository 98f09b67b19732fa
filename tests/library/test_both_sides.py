"""Both sides of a run over transports that lose, repeat and reorder, and over stores that fail."""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedmezo
from fedmezo import Coordinator, Session, library_coordinator
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import (
    ConfigError,
    DivergedError,
    ExcludedError,
    FedMezoError,
    JournalBehindError,
    JournalCompactedError,
    JournalError,
    MismatchError,
    NotReadyError,
    ProtocolError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.journal import Journal, JournalStore, MemoryStore, Row
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Admitted, Answered, Committed, Diverged, Genesis, Record
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of
from tests.library.dropped_records import drop_records
from tests.library.light_engine import LightEngine

NAMES = ("a", "b", "c")
TURNS_MAX = 20_000


def small_run(**changes: Any) -> Genesis:
    values: dict[str, Any] = {"workers_min": 3, "quorum": 3, "rounds": 5, "local_steps": 2}
    return genesis_of(config_of(**values | changes))


def open_session(genesis: Genesis, name: str) -> Session:
    return Session(genesis, name, LightEngine(name))


def records_in(store: JournalStore) -> list[Record]:
    return [decode_record(entry.row.body) for entry in Journal(store).load()]


def run_in_order(genesis: Genesis, store: JournalStore | None = None) -> Coordinator:
    """A run over queues that lose nothing."""
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    for _ in range(TURNS_MAX):
        if coordinator.done:
            return coordinator
        for name, session in sessions.items():
            for down in coordinator.outgoing(name):
                for up in session.receive(down):
                    coordinator.receive(name, up)
    raise AssertionError("the run did not end")


def check(store: JournalStore, config: RunConfig) -> None:
    """No answer counted twice, and the rounds are whole."""
    records = records_in(store)
    answers = Counter((r.round, r.slot) for r in records if isinstance(r, Answered))
    assert all(count == 1 for count in answers.values())
    rounds = [r.round for r in records if isinstance(r, Committed)]
    assert rounds == list(range(1, config.rounds + 1))


def test_a_run_over_queues_ends_with_one_digest() -> None:
    store = MemoryStore()
    coordinator = run_in_order(small_run(), store)
    assert coordinator.finished
    assert coordinator.round == 5
    assert set(coordinator.digests) == set(NAMES)
    assert len(set(coordinator.digests.values())) == 1
    check(store, coordinator.config)


def test_exchanges_give_the_same_journal_as_messages_in_order() -> None:
    genesis = small_run()
    in_order, by_calls = MemoryStore(), MemoryStore()
    first = run_in_order(genesis, in_order)
    coordinator = Coordinator(genesis, by_calls)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert coordinator.head == first.head
    assert coordinator.digests == first.digests
    # Answers come in the order in which workers finish.
    assert sorted(map(repr, records_in(by_calls))) == sorted(map(repr, records_in(in_order)))


def test_sessions_with_a_key_sign_what_the_journal_keeps() -> None:
    genesis, store = small_run(), MemoryStore()
    coordinator = Coordinator(genesis, store)
    keys = {name: Ed25519PrivateKey.generate() for name in NAMES[:2]}
    sessions = [
        Session(genesis, name, LightEngine(name), signing_key=keys.get(name)) for name in NAMES
    ]
    downs = [b""] * len(NAMES)
    while not coordinator.done:
        for n, session in enumerate(sessions):
            downs[n] = coordinator.exchange(session.exchange(downs[n]))
    machine, audit = RoundMachine(), SignatureAudit(None)
    for entry in Journal(store).load():
        record = decode_record(entry.row.body)
        machine.apply(record)
        audit.take(entry, record, machine.state)
    assert next(audit.lines()) == "answers: 10 signed and checked, 5 unsigned"
    admitted = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    assert machine.state.keys == admitted
    assert records_in(store).count(Admitted("a", admitted["a"])) == 1


class BadNetwork:
    """Carries messages; loses some, repeats some, and hands them out in any order."""

    def __init__(self, dice: random.Random, loss: float = 0.2, repeats: float = 0.2) -> None:
        self._dice, self._loss, self._repeats = dice, loss, repeats
        self._under_way: list[tuple[str, bytes]] = []

    def send(self, to: str, data: bytes) -> None:
        if self._dice.random() >= self._loss:
            self._under_way.append((to, data))

    def arrival(self) -> tuple[str, bytes] | None:
        if not self._under_way:
            return None
        number = self._dice.randrange(len(self._under_way))
        if self._dice.random() < self._repeats:
            return self._under_way[number]
        return self._under_way.pop(number)


def run_over_a_bad_network(
    dice: random.Random,
    open_coordinator: Callable[[], Coordinator],
    sessions: dict[str, Session],
    restart_rate: float = 0.01,
) -> Coordinator:
    """A whole run over exchanges that the server begins, with restarts of either side."""
    coordinator = open_coordinator()
    up, down = BadNetwork(dice), BadNetwork(dice)
    known: set[str] = set()
    for turn in range(TURNS_MAX):
        if coordinator.done and coordinator.digests.keys() == sessions.keys():
            return coordinator
        coordinator.tick(turn * 20)
        if dice.random() < restart_rate:
            coordinator, known = open_coordinator(), set()
        if dice.random() < restart_rate / 2:
            name = dice.choice(sorted(sessions))
            sessions[name] = open_session(coordinator.genesis, name)
        for name in sessions:
            if dice.random() < 0.3:
                down.send(name, coordinator.down_for(name) if name in known else b"")
        if arrived := down.arrival():
            name, data = arrived
            up.send(name, sessions[name].exchange(data))
        if arrived := up.arrival():
            known.add(coordinator.take(arrived[1]))
        known &= coordinator.workers
    raise AssertionError("the run did not end")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("changes", "same_head"),
    [
        ({}, True),
        ({"quorum": 2}, False),
        ({"buffer_answers": 2, "staleness_max_rounds": 4, "quorum": 2}, False),
        ({"seed_policy": "pool", "pool_size": 16, "rebase_every_rounds": 2}, True),
        ({"weighting": "rows", "report_losses": True, "digest_every_rounds": 3}, True),
    ],
    ids=["plain", "quorum", "buffered", "pool", "rows and losses"],
)
def test_a_bad_network_under_a_server_that_begins_changes_nothing(
    seed: int, changes: dict[str, Any], same_head: bool
) -> None:
    """Restarts of either side too: the journal goes on, and a worker begins at its base."""
    genesis, store = small_run(deadline_ms=5000, **changes), MemoryStore()
    sessions = {name: open_session(genesis, name) for name in NAMES}
    coordinator = run_over_a_bad_network(
        random.Random(seed), lambda: Coordinator(genesis, store), sessions
    )
    check(store, coordinator.config)
    assert len(set(coordinator.digests.values())) == 1
    if same_head:  # Otherwise it depends on which answers came in time.
        assert coordinator.head == run_in_order(genesis).head


@pytest.mark.parametrize("seed", range(15))
def test_a_bad_network_under_clients_that_begin_changes_nothing(seed: int) -> None:
    dice = random.Random(seed)
    genesis = small_run(deadline_ms=5000)
    store = MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    old_ups: list[bytes] = []
    old_downs: dict[str, list[bytes]] = {name: [b""] for name in NAMES}
    for turn in range(TURNS_MAX):
        if coordinator.done and coordinator.digests.keys() == set(NAMES):
            break
        coordinator.tick(turn * 20)
        name = dice.choice(NAMES)
        newest = old_downs[name][-1] if dice.random() < 0.8 else dice.choice(old_downs[name])
        up = sessions[name].exchange(newest)
        old_ups.append(up)
        if dice.random() < 0.2:
            coordinator.exchange(dice.choice(old_ups))  # A repeated request; its reply is lost.
        if dice.random() < 0.8:
            reply = coordinator.exchange(up)
            if dice.random() < 0.8:
                old_downs[name].append(reply)
    else:
        raise AssertionError("the run did not end")
    check(store, coordinator.config)
    assert coordinator.head == run_in_order(genesis).head


class FailingStore(MemoryStore):
    """Fails at one append, before or after the rows are durable."""

    def __init__(self, at_append: int, *, keeps: bool) -> None:
        super().__init__()
        self._left, self._keeps = at_append, keeps

    def append(self, rows: Sequence[Row]) -> None:
        self._left -= 1
        if self._left == 0:
            if self._keeps:
                super().append(rows)
            raise JournalError("The disk is gone.")
        super().append(rows)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("at_append", range(2, 18))
def test_a_restored_coordinator_goes_on_after_any_cut(at_append: int, keeps: bool) -> None:
    genesis = small_run()
    store = FailingStore(at_append, keeps=keeps)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    failures = 0

    def begin() -> Coordinator:
        nonlocal failures
        try:
            return Coordinator(genesis, store)
        except JournalError:
            failures += 1
            return Coordinator(genesis, store)

    def connect(coordinator: Coordinator) -> None:
        for name, session in sessions.items():
            session.disconnect()
            for up in session.connect():
                coordinator.receive(name, up)

    coordinator, connected = begin(), False
    for _ in range(TURNS_MAX):
        try:
            if not connected:
                connect(coordinator)
                connected = True
            if coordinator.done and coordinator.digests.keys() == set(NAMES):
                break
            for name, session in sessions.items():
                for down in coordinator.outgoing(name):
                    for up in session.receive(down):
                        coordinator.receive(name, up)
        except JournalError:
            failures += 1
            with pytest.raises(JournalError, match="make a new one from the same store"):
                coordinator.tick(0)
            coordinator, connected = begin(), False
    assert failures == 1
    check(store, coordinator.config)
    assert coordinator.head == run_in_order(genesis).head
    assert len(set(coordinator.digests.values())) == 1


def test_a_coordinator_goes_on_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    genesis = small_run()
    first = run_in_order(genesis, None)
    coordinator = Coordinator(genesis, path)
    session = open_session(genesis, "a")
    [hello] = session.connect()
    coordinator.receive("a", hello)
    coordinator.close()
    again = Coordinator(None, str(path))
    assert again.epoch == 2
    assert again.genesis_bytes == fedmezo.encode_genesis(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while not again.done:
        for name, one in sessions.items():
            downs[name] = again.exchange(one.exchange(downs[name]))
    assert again.head == first.head
    again.close()
    with pytest.raises(ConfigError, match="holds run tiny-run with another genesis"):
        Coordinator(small_run(rounds=6), path)


def test_a_store_without_a_run_needs_a_genesis() -> None:
    with pytest.raises(ConfigError, match="holds no run yet"):
        Coordinator()


def test_bytes_that_are_no_genesis_are_refused() -> None:
    with pytest.raises(ProtocolError, match="These 13 bytes hold no genesis"):
        Coordinator(b"not a genesis")


@pytest.mark.parametrize("name", ["Worker 1", "", "replica"])
def test_a_name_that_no_worker_may_have_is_refused_at_once(name: str) -> None:
    with pytest.raises(ProtocolError, match=f"'{name}' is no worker's name"):
        open_session(small_run(), name)


# ---------------------------------------------------------------- what a coordinator refuses


def ended(messages: Sequence[bytes]) -> wire.Ended:
    last = wire.SessionResponse.FromString(messages[-1])
    assert last.WhichOneof("kind") == "ended"
    return last.ended


def test_another_base_is_refused_with_the_daemons_sentence() -> None:
    genesis = small_run()
    other = Session(
        Genesis(genesis.config, b"m" * 32, b"B" * 32, b"t" * 32, 8, 32), "a", LightEngine("a")
    )
    coordinator = Coordinator(genesis)
    [hello] = other.connect()
    coordinator.receive("a", hello)
    with pytest.raises(MismatchError, match="differs from the run in its base weights"):
        [other.receive(data) for data in coordinator.outgoing("a")]
    assert not coordinator.workers
    refused = coordinator.exchange(other.exchange())
    with pytest.raises(MismatchError, match="differs from the run in its base weights"):
        other.exchange(refused)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff", b"", b"x" * 70_000, wire.SessionRequest().SerializeToString()],
    ids=["no message", "empty", "too long", "no kind"],
)
def test_bad_bytes_end_their_session_only(data: bytes) -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    coordinator.receive("a", data)
    assert coordinator.workers == {"b", "c"}
    assert ended(coordinator.outgoing("a")).reason in ("ProtocolError", "UnavailableError")
    with pytest.raises(FedMezoError):
        coordinator.take(data)
    assert sessions["b"].exchange(b"\xff\xff") == sessions["b"].exchange(b"x" * 9)


def test_a_message_without_a_hello_is_told_to_connect_again() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    session = open_session(genesis, "a")
    session.connect()
    report = wire.SessionRequest(weights_report=wire.WeightsReport(round=0))
    coordinator.receive("a", report.SerializeToString())
    with pytest.raises(UnavailableError, match="connect again with a hello"):
        session.receive(coordinator.outgoing("a")[0])
    for up in session.connect():
        coordinator.receive("a", up)
    assert coordinator.workers == {"a"}


def test_a_hello_over_another_workers_connection_is_refused() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    session = open_session(genesis, "b")
    coordinator.receive("a", session.connect()[0])
    assert "came over the connection of a" in ended(coordinator.outgoing("a")).message
    with pytest.raises(ProtocolError, match="came over the connection of a"):
        coordinator.take(session.exchange(), worker="a")
    with pytest.raises(UnknownWorkerError):
        coordinator.down_for("b")
    assert not coordinator.has_news("b")


def test_a_worker_ahead_of_the_journal_is_told_so() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while coordinator.round < 2:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    older = Coordinator(genesis)
    refused = older.exchange(sessions["a"].exchange())
    with pytest.raises(JournalBehindError, match="the journal is older than the worker"):
        sessions["a"].exchange(refused)
    for up in sessions["b"].connect():
        older.receive("b", up)
    with pytest.raises(JournalBehindError, match="the journal is older than the worker"):
        sessions["b"].receive(older.outgoing("b")[0])
    # The newest one is back.
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert coordinator.head == run_in_order(genesis).head


def test_a_worker_whose_weights_differ_is_sent_away_and_may_come_back() -> None:
    genesis, store = small_run(rounds=6), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    found = False
    for _ in range(TURNS_MAX):
        if coordinator.done:
            break
        for name, session in list(sessions.items()):
            if name == "c" and not found and session.round == 2:
                engine = session.engine
                assert isinstance(engine, LightEngine)
                engine._digest = b"other".ljust(32)
            try:
                downs[name] = coordinator.exchange(session.exchange(downs[name]))
            except DivergedError:
                found = True
                sessions[name], downs[name] = open_session(genesis, name), b""
    assert found
    assert coordinator.done
    assert [r.party for r in records_in(store) if isinstance(r, Diverged)] == ["c"]
    assert len(set(coordinator.digests.values())) == 1


def test_a_worker_that_restarts_at_the_end_is_told_of_it() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    ups: list[bytes] = []
    while not coordinator.done:
        for name, session in sessions.items():
            ups.append(session.exchange(downs[name]))
            downs[name] = coordinator.exchange(ups[-1])
    assert not any(map(coordinator.has_news, NAMES))
    coordinator.take(ups[0])  # A late repetition.
    assert coordinator.done
    assert coordinator.has_news("a")
    coordinator.take(sessions["a"].exchange(coordinator.down_for("a")))
    assert not coordinator.has_news("a")
    again = open_session(genesis, "b")
    coordinator.take(again.exchange())
    assert coordinator.has_news("b")
    coordinator.take(again.exchange(coordinator.down_for("b")))
    assert again.finished
    assert not coordinator.has_news("b")


def test_a_worker_that_stays_away_is_lost_after_its_lease() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis, lease_ms=1000)
    session = open_session(genesis, "a")
    coordinator.tick(5_000_000)
    coordinator.exchange(session.exchange())
    coordinator.tick(5_000_999)
    assert coordinator.workers == {"a"}
    coordinator.tick(5_001_000)
    assert not coordinator.workers


def test_a_worker_that_takes_no_messages_must_connect_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_coordinator, "MESSAGES_WAITING_MAX", 4)
    genesis = small_run(quorum=2, workers_min=2, deadline_ms=1000, rounds=8)
    coordinator = Coordinator(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    for turn in range(100):
        coordinator.tick(turn * 500)
        for name in ("b", "c"):
            for down in coordinator.outgoing(name):
                for up in sessions[name].receive(down):
                    coordinator.receive(name, up)
    assert coordinator.finished
    assert "a" not in coordinator.workers
    with pytest.raises(NotReadyError, match="4 messages waited for worker a; connect again"):
        sessions["a"].receive(coordinator.outgoing("a")[0])
    for up in sessions["a"].connect():
        coordinator.receive("a", up)
    for down in coordinator.outgoing("a"):
        for up in sessions["a"].receive(down):
            coordinator.receive("a", up)
    assert sessions["a"].finished
    assert coordinator.done


def test_there_is_a_most_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_coordinator, "WORKERS_MAX", 2)
    genesis = small_run()
    coordinator = Coordinator(genesis)
    for name in ("a", "b"):
        coordinator.exchange(open_session(genesis, name).exchange())
    late = open_session(genesis, "c")
    refused = coordinator.exchange(late.exchange())
    with pytest.raises(NotReadyError, match="2 workers are connected"):
        late.exchange(refused)
    coordinator.disconnect("b")
    late.exchange(coordinator.exchange(late.exchange()))
    assert coordinator.workers == {"a", "c"}


def test_dropped_records_are_asked_of_nobody() -> None:
    """A worker that lacks them is refused with the daemon's sentence; others go on."""
    genesis, store = small_run(), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while coordinator.round < 3:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    for name, session in sessions.items():
        session.exchange(coordinator.down_for(name))
        assert session.round == 3
    drop_records(store, coordinator)
    again = Coordinator(genesis, store)
    assert again.round == 3
    assert again.head == coordinator.head
    fresh = open_session(genesis, "d")
    refused = again.exchange(fresh.exchange())
    with pytest.raises(JournalCompactedError, match="only the commits after round 3"):
        fresh.exchange(refused)
    while not again.done or again.digests.keys() != set(NAMES):
        for session in sessions.values():
            session.exchange(again.exchange(session.exchange()))
    assert again.head == run_in_order(genesis).head


# ---------------------------------------------------------------- what hostile parties send


def mutated(dice: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes changed, removed or added."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed) + 1)
        match dice.randrange(3):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del changed[at : at + dice.randint(1, 8)]
            case _:
                changed[at:at] = dice.randbytes(dice.randint(1, 8))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_a_worker_sends_the_others_go_on(seed: int) -> None:
    dice = random.Random(seed)
    genesis = small_run(deadline_ms=1000)
    coordinator = Coordinator(genesis, lease_ms=10_000)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    liar = open_session(genesis, "liar")
    downs = dict.fromkeys(NAMES, b"")
    streamed = liar.connect()[0]
    for turn in range(60):
        coordinator.tick(turn * 100)
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
        coordinator.exchange(mutated(dice, dice.choice([liar.exchange(), liar.exchange()])))
        coordinator.receive("liar", streamed)
        coordinator.receive("liar", mutated(dice, streamed))
        coordinator.outgoing("liar")
    for _ in range(TURNS_MAX):
        if coordinator.digests.keys() >= set(NAMES):
            break
        turn += 1
        coordinator.tick(turn * 100)
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert len({coordinator.digests[name] for name in NAMES}) == 1


def malformed(dice: random.Random, answer: wire.Answer) -> wire.Answer:
    """An answer as a faulty worker in another language may write it."""
    grads = list(answer.projected_grads)
    match dice.randrange(9):
        case 0:
            answer.projected_grads[dice.randrange(len(grads))] = dice.choice(
                [math.nan, math.inf, -math.inf, 1e30]
            )
        case 1:
            answer.projected_grads[:] = grads[: dice.randrange(len(grads))]
        case 2:
            answer.projected_grads.extend(grads)
        case 3:
            field = dice.choice(["epoch", "round", "slot"])
            setattr(answer.ticket, field, dice.choice([0, 7, 2**31]))
        case 4:
            answer.head64 = dice.getrandbits(64)
        case 5:
            answer.weights_digest64 = dice.getrandbits(64)
        case 6:
            answer.mean_loss = dice.choice([0.5, math.nan])
        case 7:
            answer.rows = dice.choice([0, 5, 2**63])
        case _:
            answer.ClearField(dice.choice(["ticket", "head64", "weights_digest64"]))
    return answer


@pytest.mark.parametrize("seed", range(15))
def test_a_malformed_answer_is_refused_and_the_run_goes_on(seed: int) -> None:
    dice = random.Random(seed)
    genesis, store = small_run(deadline_ms=1000, rounds=12), MemoryStore()
    coordinator = Coordinator(genesis, store, lease_ms=10**9)
    sessions = {name: open_session(genesis, name) for name in (*NAMES, "faulty")}
    downs = dict.fromkeys(sessions, b"")
    count = 0
    for turn in range(TURNS_MAX):
        if coordinator.digests.keys() >= set(NAMES):
            break
        coordinator.tick(turn * 100)
        for name, session in sessions.items():
            try:
                up = session.exchange(downs[name])
            except FedMezoError:  # It was told what is wrong, and begins again.
                assert name == "faulty"
                sessions[name], downs[name] = open_session(genesis, name), b""
                break
            if name == "faulty":
                request = wire.PollSessionRequest.FromString(up)
                for message in request.messages:
                    if message.HasField("answer"):
                        message.answer.CopyFrom(malformed(dice, message.answer))
                        count += 1
                up = request.SerializeToString()
            downs[name] = coordinator.exchange(up)
    else:
        raise AssertionError("the run did not end")
    assert count
    assert len({coordinator.digests[name] for name in NAMES}) == 1
    check(store, genesis.config)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_a_coordinator_sends_a_session_raises_our_errors(seed: int) -> None:
    dice = random.Random(seed)
    genesis = small_run()
    done = run_in_order(genesis)
    for _ in range(20):
        by_calls, in_order = open_session(genesis, "a"), open_session(genesis, "b")
        with contextlib.suppress(FedMezoError):
            by_calls.exchange(mutated(dice, done.exchange(by_calls.exchange())))
        done.receive("b", in_order.connect()[0])
        for down in done.outgoing("b"):
            with contextlib.suppress(FedMezoError):
                in_order.receive(mutated(dice, down))


# ---------------------------------------------------------------- measuring elsewhere, saving


def test_a_measurement_may_run_elsewhere() -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    sessions = {
        name: Session(genesis, name, LightEngine(name), measure_inline=False) for name in NAMES
    }
    downs = dict.fromkeys(NAMES, b"")
    waits = 0
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
            if session.order is not None:
                order = session.order
                # More may come meanwhile, and it is not measured twice.
                downs[name] = coordinator.exchange(session.exchange(downs[name]))
                assert session.order is order
                assert session.idle
                session.complete(session.measure(order))
                up = session.exchange(downs[name])
                assert wire.PollSessionRequest.FromString(up).messages[1].HasField("answer")
                downs[name] = coordinator.exchange(up)
                waits += 1
    assert waits == 3 * genesis.config.rounds
    assert coordinator.head == run_in_order(genesis).head


class Unable(LightEngine):
    """Never can measure."""

    def measure(self, order: fedmezo.Measure) -> fedmezo.Measured:
        raise fedmezo.MeasurementError("a loss is not a number")


def test_an_engine_that_cannot_measure_says_so() -> None:
    genesis = small_run(workers_min=1, quorum=1)
    coordinator = Coordinator(genesis)
    session = Session(genesis, "a", Unable("a"))
    first = session.exchange(coordinator.exchange(session.exchange()))
    assert wire.PollSessionRequest.FromString(first).messages[1].HasField("unable")
    # It is not asked again at once.
    second = session.exchange(coordinator.exchange(first))
    assert len(wire.PollSessionRequest.FromString(second).messages) == 1


def test_a_paused_run_can_be_resumed() -> None:
    genesis = small_run(workers_min=1, quorum=1, pause_rounds=3, deadline_ms=1000)
    coordinator = Coordinator(genesis, lease_ms=10**9)
    with pytest.raises(ConfigError, match="is waiting, not paused"):
        coordinator.resume(0.5)
    session = Session(genesis, "a", Unable("a"))
    down = b""
    for turn in range(8):
        coordinator.tick(turn * 1000)
        for _ in range(2):
            down = coordinator.exchange(session.exchange(down))
    assert coordinator.phase == "paused"
    assert "a says: a loss is not a number" in coordinator.reason
    assert not coordinator.has_news("a")
    coordinator.resume(0.5)
    assert coordinator.phase == "open"
    coordinator.tick(9000)
    assert coordinator.has_news("a")


def test_an_excluded_worker_is_told_and_may_be_readmitted() -> None:
    genesis = small_run(workers_min=1, quorum=1)
    coordinator = Coordinator(genesis, lease_ms=10**9)
    session = open_session(genesis, "a")
    down = coordinator.exchange(session.exchange(b""))
    with pytest.raises(ConfigError, match="a is not excluded"):
        coordinator.readmit("a")
    coordinator.exclude("a", "noise")
    with pytest.raises(ExcludedError, match="excluded worker a after round 0: noise"):
        session.exchange(coordinator.exchange(session.exchange(down)))
    coordinator.readmit("a")
    again = open_session(genesis, "a")
    down = b""
    for _ in range(3):
        down = coordinator.exchange(again.exchange(down))
    assert coordinator.round > 0


def test_evaluations_are_recorded_and_may_end_the_run() -> None:
    genesis, store = small_run(rounds=50, early_stop_evaluations=2), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    evaluated = -1
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
        session = sessions["a"]
        if session.round > evaluated and not coordinator.finished:
            evaluated = session.round
            loss = 1.0 + 0.1 * abs(evaluated - 3)
            digest = session.engine.digest()
            coordinator.record_evaluation(fedmezo.Evaluated(evaluated, loss, 0.5, 8, digest))
    assert 4 < coordinator.round < 8
    assert coordinator.reason
    losses = [r.loss for r in records_in(store) if isinstance(r, fedmezo.Evaluated)]
    assert min(losses) == 1.0
    for wrong in (
        fedmezo.Evaluated(51, 1.0, 0.5, 8, bytes(32)),
        fedmezo.Evaluated(1, float("nan"), 0.5, 8, bytes(32)),
        fedmezo.Evaluated(1, 1.0, 0.5, 8, b""),
    ):
        with pytest.raises(ConfigError, match="cannot be recorded"):
            coordinator.record_evaluation(wrong)


def test_a_session_whose_engine_failed_is_of_no_more_use() -> None:
    class Broken(LightEngine):
        def apply(self, commits: Sequence[Committed]) -> None:
            raise RuntimeError("out of memory")

    genesis = small_run()
    done = run_in_order(genesis)
    session = Session(genesis, "a", Broken("a"))
    with pytest.raises(RuntimeError, match="out of memory"):
        session.exchange(done.exchange(session.exchange()))
    with pytest.raises(DivergedError, match="make a new engine"):
        session.exchange()


def test_weights_are_saved_with_their_round_and_head(tmp_path: Path) -> None:
    genesis = small_run()
    coordinator = Coordinator(genesis)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while coordinator.round < 3:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    saved = sessions["a"].save(str(tmp_path))
    again = open_session(genesis, "a")
    again.restore(str(saved))
    assert (again.round, again.head) == (sessions["a"].round, sessions["a"].head)
    sessions["a"], downs["a"] = again, b""
    while not coordinator.done:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert coordinator.head == run_in_order(genesis).head
    with pytest.raises(ProtocolError, match="has begun"):
        again.restore(saved)


def test_weights_are_not_saved_while_a_measurement_has_the_engine(tmp_path: Path) -> None:
    genesis = small_run(quorum=2, deadline_ms=1000)
    coordinator = Coordinator(genesis)
    sessions = {
        name: Session(genesis, name, LightEngine(name), measure_inline=name != "c")
        for name in NAMES
    }
    downs = dict.fromkeys(NAMES, b"")
    for turn in range(6):
        coordinator.tick(turn * 500)
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert sessions["c"].round >= 1
    assert sessions["c"].in_vain
    with pytest.raises(NotReadyError, match="complete it, then save"):
        sessions["c"].save(tmp_path)
