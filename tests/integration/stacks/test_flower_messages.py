"""The ServerApp's loop and the ClientApp on a line that loses, repeats and reorders messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from flwr.app import Message, RecordDict

from fedmezo import Coordinator, Session
from fedmezo.library_peers import PEER_LEASE_MS
from fedmezo_core.records import Genesis
from fedmezo_flower import flower_server
from fedmezo_flower.flower_server import AppSettings, gather
from fedmezo_flower.grid_loop import GridLoop
from tests.integration.support.flower_grid import FakeGrid, Mischief, resident
from tests.integration.support.harness import bodies_of, entries_of, served
from tests.integration.support.parties import Workers

TWO = {"rounds": 5, "workers_min": 2, "quorum": 2, "deadline_ms": 60_000}
TURNS_MAX = 100_000


@pytest.fixture(scope="session")
def over_grpc(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    data_files: list[Path],
) -> Ended:
    """How the run ends over gRPC."""

    async def run() -> Ended:
        journal = tmp_path_factory.mktemp("grpc") / "journal.db"
        workers = Workers(model_folder)
        async with served(journal, tiny_genesis(**TWO)) as coordinator:
            working = workers.start_all(coordinator.address, data_files[:2])
            await asyncio.gather(*(worker.task for worker in working))
            digest = working[0].engine.party.weights.digest()
            await workers.end()
        return Ended(journal, digest)

    return asyncio.run(run())


@dataclass(frozen=True)
class Ended:
    """A run at its end."""

    journal: Path
    digest: bytes
    """Of the weights."""


class Federation:
    """Two resident workers, and a coordinator whose journal stays."""

    def __init__(self, folder: Path, genesis: Genesis, model: Path, data: list[Path]) -> None:
        self.journal = folder / "journal.db"
        self.sockets = [folder / f"w{number}.sock" for number in (1, 2)]
        self.genesis = genesis
        self._model = model
        self._data = data

    def worker(self, number: int, name: str = "") -> contextlib.AbstractContextManager[None]:
        """Worker w1 or w2, from its base on."""
        name = name or f"w{number}"

        def open_session(genesis: bytes) -> Session:
            return Session.open(genesis, name, self._model, self._data[number - 1], threads=1)

        return resident(name, self.sockets[number - 1], open_session)

    def run(self, grid: FakeGrid, until_round: int = 10**6) -> Coordinator:
        """Drive the run until it is done or a round is committed; the coordinator is closed."""
        coordinator = Coordinator(self.genesis, self.journal, lease_ms=PEER_LEASE_MS)
        loop = GridLoop(coordinator, grid, clock_s=grid.clock, sleep_s=grid.sleep)
        turns = 0
        while not coordinator.done and coordinator.round < until_round:
            loop.turn()
            grid.sleep(0.2)
            turns += 1
            assert turns < TURNS_MAX
        coordinator.close()
        return coordinator


@pytest.fixture
def federation(
    tmp_path: Path,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    data_files: list[Path],
) -> Federation:
    return Federation(tmp_path, tiny_genesis(**TWO), model_folder, data_files)


def assert_same_end(coordinator: Coordinator, expected: Ended) -> None:
    assert coordinator.head == entries_of(expected.journal)[-1].head
    assert coordinator.digests == {"w1": expected.digest, "w2": expected.digest}


def test_flower_gives_the_same_journal_and_weights_as_grpc(
    federation: Federation, over_grpc: Ended
) -> None:
    grid = FakeGrid(federation.sockets)
    with federation.worker(1), federation.worker(2):
        coordinator = federation.run(grid)
    assert_same_end(coordinator, over_grpc)
    assert bodies_of(federation.journal) == bodies_of(over_grpc.journal)
    # A hello, one message a round, and the end.
    assert grid.messages == 2 * (1 + TWO["rounds"] + 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_line_that_loses_repeats_and_reorders_changes_nothing(
    seed: int, federation: Federation, over_grpc: Ended
) -> None:
    mischief = Mischief(random.Random(seed), lost=0.2, reply_lost=0.2, repeated=0.3, late=0.3)
    grid = FakeGrid(federation.sockets, mischief)
    with federation.worker(1), federation.worker(2):
        coordinator = federation.run(grid)
    assert_same_end(coordinator, over_grpc)
    assert grid.messages > 2 * (2 + TWO["rounds"])


def test_a_server_and_a_worker_that_end_in_between_go_on(
    federation: Federation, over_grpc: Ended
) -> None:
    with federation.worker(1):
        with federation.worker(2):
            federation.run(FakeGrid(federation.sockets), until_round=2)
        with federation.worker(2):
            coordinator = federation.run(FakeGrid(federation.sockets))
    assert coordinator.epoch == 2
    assert_same_end(coordinator, over_grpc)


def test_a_worker_of_a_lost_history_is_rebuilt_from_the_base(
    federation: Federation, over_grpc: Ended
) -> None:
    with federation.worker(1), federation.worker(2):
        federation.run(FakeGrid(federation.sockets), until_round=3)
        federation.journal.unlink()
        coordinator = federation.run(FakeGrid(federation.sockets))
    assert coordinator.epoch == 1
    assert_same_end(coordinator, over_grpc)


def test_the_same_run_again_needs_no_new_worker(federation: Federation, over_grpc: Ended) -> None:
    with federation.worker(1), federation.worker(2):
        federation.run(FakeGrid(federation.sockets))
        federation.journal.unlink()
        again = FakeGrid(federation.sockets, run_id=2)
        assert_same_end(federation.run(again), over_grpc)


def test_a_node_without_its_worker_is_asked_again_and_the_log_says_why(
    federation: Federation, over_grpc: Ended, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FakeGrid(federation.sockets)
    coordinator = Coordinator(federation.genesis, federation.journal, lease_ms=PEER_LEASE_MS)
    loop = GridLoop(coordinator, grid, clock_s=grid.clock, sleep_s=grid.sleep)
    with federation.worker(1):
        for _ in range(200):
            loop.turn()
            grid.sleep(0.2)
        coordinator.close()
        complaints = [
            r.getMessage() for r in caplog.records if "No resident worker" in r.getMessage()
        ]
        assert complaints[0].startswith("Node 2: No resident worker listens on this node")
        assert len(complaints) == 1  # It is said once, though the node was asked often.
        assert str(federation.sockets[1]) not in complaints[0]  # The server gets no path.
        assert "fedmezo-worker --serve SOCKET" in complaints[0]
        with federation.worker(2):
            assert_same_end(federation.run(grid), over_grpc)


def test_two_workers_of_one_name_are_told_apart(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FakeGrid(federation.sockets)
    coordinator = Coordinator(federation.genesis, lease_ms=PEER_LEASE_MS)
    loop = GridLoop(coordinator, grid, clock_s=grid.clock, sleep_s=grid.sleep)
    with federation.worker(1), federation.worker(2, name="w1"):
        for _ in range(50):
            loop.turn()
            grid.sleep(0.2)
    assert coordinator.workers == {"w1"}
    assert coordinator.round == 0
    assert "give each worker a name of its own" in caplog.text


def test_a_worker_follows_its_node_to_another_id(federation: Federation, over_grpc: Ended) -> None:
    grid = FakeGrid([*federation.sockets, federation.sockets[1]])
    grid.online = {1, 2}
    coordinator = Coordinator(federation.genesis, lease_ms=PEER_LEASE_MS)
    loop = GridLoop(coordinator, grid, clock_s=grid.clock, sleep_s=grid.sleep)
    with federation.worker(1), federation.worker(2):
        while not coordinator.done:
            loop.turn()
            grid.sleep(0.2)
            if coordinator.round >= 2:
                grid.online = {1, 3}
    assert_same_end(coordinator, over_grpc)


class RefusingGrid(FakeGrid):
    """A Grid that cannot take some messages; each says so in its own way."""

    def __init__(self, answers: list[list[str | None]]) -> None:
        super().__init__([Path("none"), Path("none")])
        self.answers = answers
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = self.answers.pop(0)
        for message, message_id in zip(messages, ids, strict=False):
            if message_id:
                message.metadata.__dict__["_message_id"] = message_id
                self.sent.append(message)
        return cast("list[str]", ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        assert "" not in wanted
        if self.answers:
            return []
        found = [one for one in self.sent if one.metadata.message_id in wanted]
        return [Message(RecordDict(), reply_to=message) for message in found]


@pytest.mark.parametrize("refused", [["", "one"], [None, "one"], [], ["one"]])
def test_what_flower_could_not_take_is_sent_again(
    refused: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_server, "LOOK_EVERY_S", 0.0)
    is_told = len(refused) == 2
    grid = RefusingGrid([refused, ["two"] if is_told else ["two", "three"]])
    gather(grid, AppSettings(coordinator="127.0.0.1:1", run={"run_id": "a"}))
    assert not grid.answers
