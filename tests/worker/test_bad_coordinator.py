"""A worker against a coordinator that lies: whatever it sends is bounded, or a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import (
    FedMezoError,
    JournalCorruptError,
    ProtocolError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import RoundSlot, SeedRange, Started
from fedmezo_core.wire import client as client_module
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.messages import assigned_from_pb, commit_of, snapshot_to_pb
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.faults.light_worker import LightEngine
from tests.integration.support.harness import config_of, genesis_of
from tests.integration.support.liar import Liar, commit, page_of, serving

PATIENCE_S = 20.0
SNAPSHOT = Snapshot(1, b"h" * 32, b"w" * 32, b"f" * 32, 1000)


async def outcome(
    liar: Liar, tmp_path: Path, *, copy: bool = True, give_up_after_s: float = 0.5
) -> BaseException | None:
    """How a worker ends that takes part in the liar's run."""
    async with serving(liar) as address:
        settings = WorkerSettings(
            coordinator=address,
            name="w1",
            data=tmp_path / "rows.jsonl",
            give_up_after_s=give_up_after_s,
            journal_copy=tmp_path / "copy.db" if copy else None,
        )
        try:
            await asyncio.wait_for(work(settings, cast("Engine", LightEngine())), PATIENCE_S)
        except FedMezoError as error:
            return error
    return None


CONFIG = config_of()
BUFFERED = config_of(buffer_answers=2, staleness_max_rounds=3, quorum=1)
POOL = config_of(seed_policy="pool", pool_size=8)
SHARED = config_of(seed_policy="shared")
RANGE = SeedRange(0, (0.5,) * CONFIG.pairs_per_answer)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (
            CONFIG,
            {"seed_ranges": (RANGE,) * 65},
            "has 65 ranges of seeds, where there are at most 64",
        ),
        (CONFIG, {"seed_ranges": (SeedRange(0, (0.5,) * 3),)}, "has 3 pairs in one range"),
        (CONFIG, {"seed_ranges": (SeedRange(2**64 - 1, (0.5, 0.5)),)}, "holds a seed of 2.64"),
        (CONFIG, {"seed_ranges": (SeedRange(0, (float("nan"), 0.5)),)}, "that is no number"),
        (CONFIG, {"round": 7}, "is beyond the 6 rounds"),
        (CONFIG, {"from_base": True}, "starts from the base, which only a pool's does"),
        (CONFIG, {"answers": (RoundSlot(1, 0),)}, "names 1 answers, where there are at most 0"),
        (SHARED, {"seed_ranges": (RANGE,) * 2}, "has 2 ranges of seeds"),
        (POOL, {"seed_ranges": (SeedRange(0, (0.5,) * 9),)}, "has 9 pairs in one range"),
        (POOL, {"seed_ranges": (SeedRange(0, ()),) * 9}, "has 9 ranges of seeds"),
        (BUFFERED, {"answers": (RoundSlot(1, 0),) * 3}, "names 3 answers"),
        (BUFFERED, {"answers": (RoundSlot(1, 4096),)}, "an answer to slot 4096 of round 1"),
        (BUFFERED, {"round": 6, "answers": (RoundSlot(2, 0),)}, "an answer to slot 0 of round 2"),
    ],
)
async def test_a_commit_beyond_the_contract_is_refused(
    config: RunConfig, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    liar = Liar(genesis_of(config))
    liar.page = lambda _: page_of(commit(config, **changes))
    error = await outcome(liar, tmp_path)
    assert isinstance(error, JournalCorruptError)
    with pytest.raises(JournalCorruptError, match=words):
        commit_of(encode_record(commit(config, **changes)), config)
    assert liar.asked == 1, "it is no use to ask again"


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {"seed_ranges": (RANGE,) * 64}),
        (SHARED, {"seed_ranges": (RANGE,)}),
        (POOL, {"seed_ranges": (SeedRange(0, (0.5,)),) * 8, "from_base": True}),
        (BUFFERED, {"seed_ranges": (RANGE,) * 2, "answers": (RoundSlot(3, 0), RoundSlot(6, 4095))}),
    ],
)
def test_a_commit_with_all_that_is_allowed_is_taken(
    config: RunConfig, changes: dict[str, Any]
) -> None:
    record = commit(config, config.rounds, **changes)
    assert commit_of(encode_record(record), config).commit == record


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(lambda _: page_of(commit(CONFIG)), id="the same page for ever"),
        pytest.param(
            lambda r: page_of(commit(CONFIG, max(1, 4 - r.from_round))), id="pages backwards"
        ),
        pytest.param(lambda _: wire.ReadJournalResponse(next_seqno=9), id="no page for ever"),
    ],
)
async def test_pages_that_lead_nowhere_are_given_up(
    page: Callable[[Any], wire.ReadJournalResponse], copy: bool, tmp_path: Path
) -> None:
    liar = Liar(genesis_of(CONFIG))
    liar.page = page
    error = await outcome(liar, tmp_path, copy=copy)
    assert isinstance(error, UnavailableError)
    assert liar.asked < 50


async def test_records_of_another_kind_are_no_commits(tmp_path: Path) -> None:
    liar = Liar(genesis_of(CONFIG))
    liar.page = lambda _: page_of(commit(CONFIG), Started(1))
    error = await outcome(liar, tmp_path)
    assert isinstance(error, JournalCorruptError)
    assert "A Started record came where a commit must" in str(error)


@pytest.mark.parametrize("steps", [0, 3, 2**32 - 1])
def test_no_more_steps_are_measured_than_the_contract_has(steps: int) -> None:
    with pytest.raises(ProtocolError, match=f"{steps} steps of 1 probes were assigned"):
        assigned_from_pb(wire.Assign(steps=steps), CONFIG)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "{text}" + "x" * 4_000_000}, "use at most 65536 characters"),
        ({"verbalizers": {str(n): "x" for n in range(20_000)}}, "use at most 10000 items"),
        ({"template": "{text}" * 300}, "names columns 300 times"),
    ],
)
async def test_a_contract_beyond_the_bounds_is_refused_at_once(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    task = CONFIG.task.model_copy(update=changes)
    liar = Liar(genesis_of(CONFIG.model_copy(update={"task": task})))
    error = await outcome(liar, tmp_path)
    assert isinstance(error, JournalCorruptError)
    assert words in str(error)
    assert len(str(error)) < 600
    assert liar.asked == 0


@pytest.mark.parametrize("said", [{"checkpoint_key": b"key"}, {"head": b"head"}])
async def test_a_key_or_head_of_another_length(said: dict[str, Any], tmp_path: Path) -> None:
    error = await outcome(Liar(genesis_of(CONFIG), **said), tmp_path)
    assert isinstance(error, ProtocolError)
    assert "bytes long, not 32" in str(error)


async def test_a_journal_that_never_goes_on_is_an_error() -> None:
    liar = Liar(genesis_of(CONFIG))
    liar.page = lambda request: page_of(commit(CONFIG), next_seqno=min(request.from_seqno + 1, 3))
    async with serving(liar) as address, CoordinatorClient(address) as client:
        with pytest.raises(ProtocolError, match="sent records from 3 on, and said that record 3"):
            async for _ in client.journal_pages():
                pass
    assert liar.asked == 4


async def download(liar: Liar, folder: Path) -> None:
    async with (
        serving(liar) as address,
        CoordinatorClient(address) as client,
        asyncio.timeout(PATIENCE_S),
        downloaded(client, "r", SNAPSHOT, folder=folder, weights_bytes=1000, give_up_after_s=0.5),
    ):
        pass


async def test_a_snapshot_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SNAPSHOT_SILENCE_S", 0.2)
    liar = Liar(genesis_of(CONFIG))
    about = wire.ReadSnapshotResponse(snapshot=snapshot_to_pb(SNAPSHOT))

    async def descriptions() -> AsyncIterator[wire.ReadSnapshotResponse]:
        while True:
            yield about

    async def too_much() -> AsyncIterator[wire.ReadSnapshotResponse]:
        yield about
        while True:
            yield wire.ReadSnapshotResponse(data=b"x" * 300)

    async def silence() -> AsyncIterator[wire.ReadSnapshotResponse]:
        yield about
        await asyncio.sleep(PATIENCE_S)

    async def nothing() -> AsyncIterator[wire.ReadSnapshotResponse]:
        return
        yield

    for pieces, kind, words in (
        (descriptions, SnapshotError, "a piece of a snapshot without bytes"),
        (too_much, SnapshotDamagedError, "More than the 1000 bytes"),
        (silence, UnavailableError, r"Nothing of the snapshot came for 0\.2 s"),
        (nothing, UnavailableError, "ended the stream early"),
    ):
        liar.pieces = pieces
        with pytest.raises(kind, match=words):
            await download(liar, tmp_path)
