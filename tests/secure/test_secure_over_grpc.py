"""Runs with secure aggregation over gRPC: real models, and workers that keep rows private."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo import Session
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_coordinator.serving import loop
from fedmezo_core.errors import ConfigError
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.records import Answered, Genesis, Masked, Opened, Summed
from fedmezo_core.trust.secure_aggregation import unmasking
from fedmezo_core.trust.secure_aggregation.fixed_point import quantised
from fedmezo_core.trust.secure_aggregation.unmasking import Unmasking
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    at_round,
    config_of,
    entries_of,
    genesis_of,
    records_of,
    relayed,
    served,
)
from tests.integration.support.parties import Workers
from tests.library.light_engine import LightEngine

ROUNDS = 4
CONTRACT = {
    "secure_aggregation": True,
    "seed_policy": "shared",
    "aggregation": "mean",
    "clip_median_factor": 0.0,
    "report_losses": False,
    "rounds": ROUNDS,
    "workers_min": 3,
    "quorum": 3,
    "deadline_ms": 20_000,
}
NAMES = ("a", "b", "c", "d")


async def test_sums_are_of_what_ledgers_hold_and_go_on_without_a_worker_that_leaves(
    tiny_genesis: Callable[..., Genesis],
    data_files: list[Path],
    workers: Workers,
    tmp_path: Path,
) -> None:
    """Each worker's ledger has the noisy numbers; the journal has nothing but their sums."""
    journal, genesis = tmp_path / "journal.db", tiny_genesis(**CONTRACT)
    async with (
        served(journal, genesis) as coordinator,
        CoordinatorClient(coordinator.address) as client,
    ):
        parties = {
            name: workers.start(
                coordinator.address,
                name,
                data_files[number],
                privacy_epsilon=8.0,
                privacy_delta=1e-3,
                privacy_clip=1.0,
                privacy_ledger=tmp_path / name,
            )
            for number, name in enumerate(NAMES)
        }
        await at_round(client, 2)
        parties["d"].task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await parties["d"].task
        await asyncio.gather(*(parties[name].task for name in "abc"))
        status = await client.get_status()
    assert status.round == ROUNDS
    digests = {digest.party: digest.weights_digest for digest in status.digests}
    assert digests["a"] == digests["b"] == digests["c"]

    ledgers = {
        name: {
            line["round"]: line["projected_grads"]
            for line in map(json.loads, (tmp_path / name).read_text().splitlines()[1:])
        }
        for name in NAMES
    }
    cohorts: dict[int, list[str]] = {}
    masked: dict[int, list[str]] = {}
    sums: dict[int, tuple[int, ...]] = {}
    for record in records_of(journal):
        match record:
            case Opened(round_, _, names):
                cohorts.setdefault(round_, []).extend(names)
            case Answered():
                assert record.projected_grads == ()
            case Masked(round_, slots):
                masked[round_] = [cohorts[round_][slot] for slot in slots]
            case Summed(round_, found):
                sums[round_] = found
    assert list(sums) == list(range(1, ROUNDS + 1))
    for round_, summands in masked.items():
        columns = zip(
            *(quantised(ledgers[name][round_], genesis.config) for name in summands), strict=True
        )
        assert sums[round_] == tuple(map(sum, columns))


async def _takes_part(address: str, genesis: Genesis, name: str, key: Ed25519PrivateKey) -> bytes:
    """A worker that signs, over a stream of its own; returns the digest that it ends with."""
    engine = LightEngine(name)
    session = Session(genesis, name, engine, signing_key=key)
    async with CoordinatorClient(address) as client:
        stream = client.session()
        ups = session.connect()
        while True:
            for up in ups:
                await stream.send(wire.SessionRequest.FromString(up))
            if session.finished:
                await stream.end()
                return engine.digest()
            message = await stream.receive()
            assert message is not None
            ups = session.receive(message.SerializeToString())


async def test_workers_that_sign_make_sums_and_their_answers_stay_checkable(tmp_path: Path) -> None:
    """As in a fleet, where every worker signs: the daemon checks the keys of each step too."""
    genesis, journal = genesis_of(config_of(**CONTRACT)), tmp_path / "journal.db"
    async with served(journal, genesis) as coordinator:
        keys = (Ed25519PrivateKey.generate() for _ in "abc")
        digests = await asyncio.gather(
            *(
                _takes_part(coordinator.address, genesis, name, key)
                for name, key in zip("abc", keys, strict=True)
            )
        )
    assert len(set(digests)) == 1
    records = records_of(journal)
    sums = [record for record in records if isinstance(record, Summed)]
    assert len(sums) == ROUNDS
    assert all(record.sums for record in sums)
    audit, state = SignatureAudit(None), RunState()
    for entry, record in zip(entries_of(journal), records, strict=True):
        state.apply(record)
        audit.take(entry, record, state)
    assert next(audit.lines()) == f"answers: {3 * ROUNDS} signed and checked, 0 unsigned"


async def test_others_have_their_turn_while_the_masks_of_many_are_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the coordinator goes on with that by itself, without waiting for its next tick."""
    monkeypatch.setattr(unmasking, "MASKS_A_STEP", 1)
    monkeypatch.setattr(loop, "TICK_MS", 3_600_000)
    turns, between = 0, []
    work = Unmasking.work

    def noted(self: Unmasking) -> None:
        between.append((self, turns))
        work(self)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Unmasking, "work", noted)
    genesis = genesis_of(config_of(**CONTRACT))
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        other = asyncio.create_task(others())
        keys = (Ed25519PrivateKey.generate() for _ in "abc")
        digests = await asyncio.gather(
            *(
                _takes_part(coordinator.address, genesis, name, key)
                for name, key in zip("abc", keys, strict=True)
            )
        )
        other.cancel()
    assert len(set(digests)) == 1
    pairs = [
        (before, after)
        for (one, before), (other_one, after) in itertools.pairwise(between)
        if one is other_one
    ]
    assert len(pairs) == 3 * ROUNDS, "each mask, and the end, is a step of its own"
    assert all(before < after for before, after in pairs)


async def test_a_relay_serves_no_such_run(tmp_path: Path) -> None:
    """It would read the answers of its site one by one."""
    genesis = genesis_of(config_of(**CONTRACT))
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        with pytest.raises(ConfigError, match="a relay reads every answer"):
            async with relayed(coordinator.address, tmp_path, "site"):
                pass
