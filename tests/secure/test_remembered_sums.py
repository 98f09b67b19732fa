"""A worker's process remembers whose sums it has helped to unmask, whatever is begun anew in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from fedmezo import Coordinator, Session, encode_genesis
from fedmezo_core.events import Assigned, Connected, SendUnable, Ticket, Welcomed, Work
from fedmezo_core.journal.journal import MemoryStore
from fedmezo_core.machines.seeds import seeds_of
from fedmezo_core.records import Genesis, Masked
from fedmezo_core.trust.secure_aggregation.sum_memory import numbers_digest_of
from fedmezo_core.wire.client import CoordinatorClient, RunDescription
from fedmezo_core.wire.snapshots import Suffix
from fedmezo_worker import worker_command
from fedmezo_worker.agent import Agent
from fedmezo_worker.engine import Engine
from fedmezo_worker.resident import ask
from fedmezo_worker.worker_settings import WorkerSettings
from tests.library.light_engine import LightEngine
from tests.library.test_both_sides import records_in
from tests.secure.test_secure_runs import secure_run

NAMES = ("a", "b", "c", "d")
TURNS_MAX = 60
HEAD = b"h" * 32

Exchange = Callable[[bytes], bytes]


def unmasked(genesis: Genesis, workers: dict[str, Exchange]) -> list[tuple[int, ...]]:
    """The slots of each sum that these workers made, in so many exchanges as a run takes."""
    store = MemoryStore()
    coordinator = Coordinator(genesis, store)
    downs = dict.fromkeys(workers, b"")
    for turn in range(TURNS_MAX):
        if coordinator.finished:
            break
        coordinator.tick(turn * 20)
        for name, exchange in workers.items():
            downs[name] = coordinator.exchange(exchange(downs[name]))
    return [record.slots for record in records_in(store) if isinstance(record, Masked)]


@pytest.fixture
def loop_elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_forever)
        yield loop
        loop.call_soon_threadsafe(loop.stop)
        running.result()
    loop.close()


def test_resident_workers_make_no_second_sum_for_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop_elsewhere: asyncio.AbstractEventLoop
) -> None:
    """The sum without one worker, subtracted from the first, would be that worker's numbers."""

    def opener(_settings: WorkerSettings) -> Callable[[WorkerSettings, Genesis], LightEngine]:
        return lambda settings, _genesis: LightEngine(settings.name)

    monkeypatch.setattr(worker_command, "computer_opener", opener)
    stop, paths = asyncio.Event(), {name: tmp_path / name for name in NAMES}
    served = [
        asyncio.run_coroutine_threadsafe(
            worker_command.serve(
                WorkerSettings(name=name, data=tmp_path, serve=path, model="m"), path, stop
            ),
            loop_elsewhere,
        )
        for name, path in paths.items()
    ]
    while not all(path.is_socket() for path in paths.values()):
        assert not any(one.done() for one in served), [one.exception() for one in served]

    def asking(genesis: Genesis, job: str, name: str) -> Exchange:
        return lambda down: ask(paths[name], job, encode_genesis(genesis), down)[1]

    first, again, other = (
        secure_run(run_id="one", rounds=1),
        secure_run(run_id="two", rounds=1, workers_min=3),
        secure_run(run_id="two", rounds=1, workers_min=3, seed=2),
    )
    try:
        assert unmasked(first, {n: asking(first, "1", n) for n in NAMES}) == [(0, 1, 2, 3)]
        assert unmasked(again, {n: asking(again, "2", n) for n in "abc"}) == []
        assert unmasked(other, {n: asking(other, "3", n) for n in "abc"}) == [(0, 1, 2)]
    finally:
        loop_elsewhere.call_soon_threadsafe(stop.set)
        for one in served:
            one.result(30)


def test_sessions_without_a_common_memory_would_make_it() -> None:
    """So it is the memory that refuses, and not the run."""
    genesis = secure_run(rounds=1, workers_min=3)
    for names in (NAMES, "abc"):
        sessions = {name: Session(genesis, name, LightEngine(name)) for name in names}
        sums = unmasked(genesis, {name: one.exchange for name, one in sessions.items()})
        assert len(sums) == 1


class _LoadsNothing(Engine):
    async def load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        """There is nothing to load."""


class _Describes:
    """Stands in for the client of a coordinator whose run is at its base."""

    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis

    async def get_run(self, _run_id: str, _round: int = 0) -> RunDescription:
        return RunDescription(1, self.genesis, HEAD, 0, 1, Suffix(0, 0), None)


async def test_a_member_that_loads_anew_remembers_what_the_one_before_it_revealed() -> None:
    """As after a damaged snapshot, which a coordinator can bring about."""
    genesis = secure_run()
    client = cast("CoordinatorClient", _Describes(genesis))
    agent = Agent(WorkerSettings(name="a", data=Path("rows.jsonl")), _LoadsNothing(), client)
    first = await agent.join()
    memory = first._machine._secure._memory  # type: ignore[union-attr]
    memory.reveal(numbers_digest_of(genesis, "a"), 1)
    machine = (await agent.join())._machine
    machine.step(Connected())
    machine.step(Welcomed(1, 0, HEAD))
    work = Work(seeds_of(genesis.config, 1, 0, None), 0.5, 1e-3, want_digest=True)
    [said] = machine.step(Assigned(Ticket(1, 1, 0), work))
    assert isinstance(said, SendUnable)
