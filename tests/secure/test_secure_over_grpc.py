"""Runs with secure aggregation over gRPC: real models, and workers that keep rows private."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from fedmezo_core.records import Answered, Genesis, Masked, Opened, Summed
from fedmezo_core.trust.secure_aggregation.fixed_point import quantised
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import at_round, records_of, served
from tests.integration.support.parties import Workers

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
