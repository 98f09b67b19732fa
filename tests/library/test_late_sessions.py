"""A session that lacks dropped records begins from a snapshot, over any transport."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmezo import Coordinator, Genesis, Measure, Measured, Session, library_coordinator
from fedmezo_core.errors import (
    FedMezoError,
    JournalCompactedError,
    ProtocolError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.journal.journal import MemoryStore
from fedmezo_core.records import Committed
from fedmezo_core.wire.snapshot_pieces import HEADER_BYTES_MAX
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.library.dropped_records import drop_records, keep_snapshot
from tests.library.light_engine import LightEngine
from tests.library.test_both_sides import (
    NAMES,
    TURNS_MAX,
    open_session,
    run_in_order,
    run_over_a_bad_network,
    small_run,
)

PIECE_BYTES = 48
ROUND = 3
"""That of the snapshot."""


@dataclass
class Compacted:
    """A run that stopped at round 4, whose journal begins after round 2 or 3."""

    genesis: Genesis
    store: MemoryStore
    sessions: dict[str, Session]
    folder: Path
    file: Path

    def coordinator(self) -> Coordinator:
        return Coordinator(self.genesis, self.store, snapshots=self.folder)


@pytest.fixture
def compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compacted:
    """All records of the first rounds are gone; pieces are small."""
    genesis, store = small_run(deadline_ms=5000), MemoryStore()
    coordinator = Coordinator(genesis, store)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    downs = dict.fromkeys(NAMES, b"")
    while coordinator.round < ROUND:
        for name, session in sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    for name, session in sessions.items():
        session.exchange(coordinator.down_for(name))
    drop_records(store, coordinator)
    file = keep_snapshot(store, sessions["a"], tmp_path / "snapshots")
    monkeypatch.setattr(library_coordinator, "DOWN_BYTES_MAX", PIECE_BYTES)
    assert file.stat().st_size > 2 * PIECE_BYTES
    return Compacted(genesis, store, sessions, tmp_path / "snapshots", file)


@pytest.mark.parametrize("seed", range(12))
def test_a_bad_network_under_a_late_worker_changes_nothing(compacted: Compacted, seed: int) -> None:
    """One worker begins at its base, another one may be restarted; both sides lose messages."""
    compacted.sessions["c"] = open_session(compacted.genesis, "c")
    coordinator = run_over_a_bad_network(
        random.Random(seed), compacted.coordinator, compacted.sessions
    )
    assert coordinator.head == run_in_order(compacted.genesis).head
    assert len(set(coordinator.digests.values())) == 1


def in_order(coordinator: Coordinator, sessions: dict[str, Session]) -> Iterator[None]:
    """Carry what waits, until the run is done."""
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    for _ in range(TURNS_MAX):
        if coordinator.done:
            return
        for name, session in sessions.items():
            for down in coordinator.outgoing(name):
                for up in session.receive(down):
                    coordinator.receive(name, up)
        yield
    raise AssertionError("the run did not end")


def test_a_late_worker_over_messages_in_order(compacted: Compacted) -> None:
    coordinator, sessions = compacted.coordinator(), compacted.sessions
    sessions["c"] = open_session(compacted.genesis, "c")
    for _ in in_order(coordinator, sessions):
        pass
    assert coordinator.head == run_in_order(compacted.genesis).head
    assert coordinator.digests.keys() == set(NAMES)
    assert len(set(coordinator.digests.values())) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_broke(compacted: Compacted) -> None:
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "c")
    offsets: list[int] = []
    for _ in range(200):
        if late.round:
            break
        ups = late.connect()
        for _ in range(2):  # A connection lasts for two messages each way.
            for up in ups:
                wanted = wire.SessionRequest.FromString(up).read_snapshot
                offsets += [wanted.offset] if wanted.round else []
                coordinator.receive("c", up)
            ups = [up for down in coordinator.outgoing("c") for up in late.receive(down)]
        late.disconnect()
        coordinator.disconnect("c")
    assert late.round == ROUND
    assert offsets == sorted(offsets)
    assert len(set(offsets)) > 2


def test_a_reader_of_a_snapshot_holds_nobody_up(compacted: Compacted) -> None:
    """Until it can join it is asked for nothing, and asks for as many pieces as it likes."""
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "late")
    late.exchange(coordinator.exchange(late.exchange()))
    assert "late" in coordinator.workers
    assert coordinator.has_news("late")
    coordinator.receive("other", open_session(compacted.genesis, "other").connect()[0])
    wanted = wire.ReadSnapshotRequest(round=ROUND)
    for _ in range(3):
        request = wire.SessionRequest(read_snapshot=wanted)
        coordinator.receive("other", request.SerializeToString())
    (piece,) = coordinator.outgoing("other")
    assert len(wire.SessionResponse.FromString(piece).snapshot.data) == PIECE_BYTES
    downs = dict.fromkeys(NAMES, b"")
    while not coordinator.finished:
        for name, session in compacted.sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert coordinator.head == run_in_order(compacted.genesis).head
    assert not coordinator.outgoing("other")


def taken(coordinator: Coordinator, session: Session, until_round: int = 1) -> None:
    """Exchange until the session holds a round."""
    down = b""
    for _ in range(100):
        down = coordinator.exchange(session.exchange(down))
        if session.round >= until_round:
            return
    raise AssertionError("the session holds no round")


def test_a_snapshot_that_is_gone_may_come_back(compacted: Compacted) -> None:
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "c")
    up = late.exchange(coordinator.exchange(late.exchange()))
    data = compacted.file.read_bytes()
    compacted.file.unlink()
    with pytest.raises(UnavailableError, match="cannot be read at the coordinator"):
        late.exchange(coordinator.exchange(up))
    with pytest.raises(UnavailableError, match="no longer has the commits after round 0"):
        late.exchange(coordinator.exchange(late.exchange()))
    compacted.file.write_bytes(data)
    taken(coordinator, late)
    assert late.engine.digest() == compacted.sessions["a"].engine.digest()


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_damaged_file_is_refused(compacted: Compacted) -> None:
    compacted.file.write_bytes(flipped(compacted.file.read_bytes()))
    late = open_session(compacted.genesis, "c")
    with pytest.raises(SnapshotDamagedError, match="its SHA-256 begins"):
        taken(compacted.coordinator(), late)
    assert isinstance(late.engine, LightEngine)
    assert late.engine.round == 0


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("file_bytes", HEADER_BYTES_MAX + 33, "check the coordinator"),
        ("file_bytes", 10, "More than the 10 bytes"),
        ("file_sha256", b"x" * 32, "is damaged"),
        ("weights_digest", b"x" * 32, "are not those that the coordinator says"),
        ("head", b"x" * 32, "are not those that the coordinator says"),
        ("round", 4, "are not those that the coordinator says"),
        ("head", b"", "head is 0 bytes long"),
    ],
)
def test_what_a_coordinator_says_of_a_snapshot_is_checked(
    compacted: Compacted, field: str, value: object, error: str
) -> None:
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "c")

    def lie(down: bytes) -> bytes:
        response = wire.PollSessionResponse.FromString(down)
        for message in response.messages:
            if message.HasField("snapshot"):
                setattr(message.snapshot.snapshot, field, value)
        return response.SerializeToString()

    def honest(up: bytes) -> bytes:
        request = wire.PollSessionRequest.FromString(up)
        for message in request.messages:
            if message.HasField("read_snapshot"):
                message.read_snapshot.round = ROUND
        return request.SerializeToString()

    def exchange_all() -> None:
        down = b""
        for _ in range(100):
            down = lie(coordinator.exchange(honest(late.exchange(down))))

    with pytest.raises(FedMezoError, match=error):
        exchange_all()
    assert late.round == 0


def test_a_snapshot_that_changes_on_the_way_is_refused(compacted: Compacted) -> None:
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "c")
    up = late.exchange(coordinator.exchange(late.exchange()))
    response = wire.PollSessionResponse.FromString(coordinator.exchange(up))
    response.messages[0].snapshot.snapshot.file_sha256 = b"x" * 32
    with pytest.raises(SnapshotError, match="is another one than the coordinator offered"):
        late.exchange(response.SerializeToString())


def test_a_session_takes_no_snapshot_of_a_round_that_it_holds(compacted: Compacted) -> None:
    coordinator, late = compacted.coordinator(), open_session(compacted.genesis, "c")
    snapshot = coordinator.exchange(late.exchange())
    session = compacted.sessions["a"]
    before = session.engine.digest()
    response = wire.PollSessionResponse.FromString(snapshot)
    response.nonce = wire.PollSessionRequest.FromString(session.exchange()).nonce
    with pytest.raises(ProtocolError, match="to a session that holds round 3"):
        session.exchange(response.SerializeToString())
    assert session.engine.digest() == before
    session.exchange(coordinator.exchange(session.exchange()))


class Fixed:
    """An engine that cannot take weights from a file."""

    def apply(self, commits: Sequence[Committed]) -> None:
        raise NotImplementedError

    def measure(self, order: Measure) -> Measured:
        raise NotImplementedError

    def digest(self) -> bytes:
        return bytes(32)


def test_an_engine_that_takes_no_snapshot_is_told_so(compacted: Compacted) -> None:
    session = Session(compacted.genesis, "c", Fixed())
    with pytest.raises(JournalCompactedError, match="Fixed cannot take a snapshot; give it the"):
        taken(compacted.coordinator(), session)


def test_a_file_of_sqlite_has_its_snapshots_beside_it(tmp_path: Path) -> None:
    """Where the daemon keeps them, so that adapters need not say where."""
    path = tmp_path / "journal.db"
    assert library_coordinator._snapshots_folder(path, None) == tmp_path / "journal.db.snapshots"
    assert library_coordinator._snapshots_folder(MemoryStore(), None) is None


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_reader_sends_the_others_go_on(compacted: Compacted, seed: int) -> None:
    dice = random.Random(seed)
    coordinator = compacted.coordinator()
    hello = open_session(compacted.genesis, "liar").exchange()
    downs = dict.fromkeys(NAMES, b"")
    for turn in range(TURNS_MAX):
        if coordinator.digests.keys() >= set(NAMES):
            break
        coordinator.tick(turn * 20)
        for name, session in compacted.sessions.items():
            downs[name] = coordinator.exchange(session.exchange(downs[name]))
        request = wire.PollSessionRequest.FromString(hello)
        for _ in range(dice.randrange(3)):
            wanted = wire.ReadSnapshotRequest(
                round=dice.choice([0, 1, ROUND, 2**40]), offset=dice.choice([0, 9, 2**63])
            )
            request.messages.add().read_snapshot.CopyFrom(wanted)
        coordinator.exchange(request.SerializeToString())
    assert coordinator.head == run_in_order(compacted.genesis).head
