"""The tiny model, two sites' rows, and the same run over gRPC to compare with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmezo_core.journal.codec import encode_record
from fedmezo_core.records import Genesis
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.party import open_party
from tests.integration.support.harness import config_of, records_of, run_values, served
from tests.integration.support.parties import Workers, save_model, write_rows

SITES = ("site-1", "site-2")
RUN: dict[str, Any] = {"workers_min": 2, "quorum": 2, "rounds": 8}
"""Both sites in every round, so that who is slow does not change the numbers."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    head: str
    digest: str
    records: list[bytes]


@pytest.fixture(scope="session")
def contract() -> dict[str, Any]:
    return run_values(**RUN)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for skew, site in enumerate(SITES):
        write_rows(folder / f"{site}.jsonl", skew=skew)
    return folder


@pytest.fixture(scope="session")
def genesis(model_folder: Path) -> Genesis:
    config = config_of(**RUN)
    return replace(open_party(config, str(model_folder), threads=1).genesis(), config=config)


def sorted_records(journal: Path) -> list[bytes]:
    """The records of a journal, as they are written in it; answers come in any order."""
    return sorted(map(encode_record, records_of(journal)))


@pytest.fixture(scope="session")
def over_grpc(
    tmp_path_factory: pytest.TempPathFactory,
    genesis: Genesis,
    model_folder: Path,
    rows_folder: Path,
) -> Ended:
    """The run with a coordinator and workers of our own."""
    journal = tmp_path_factory.mktemp("grpc") / "journal.db"

    async def run() -> Ended:
        workers = Workers(model_folder)
        async with (
            served(journal, genesis) as coordinator,
            CoordinatorClient(coordinator.address) as client,
        ):
            try:
                started = [
                    workers.start(coordinator.address, site, rows_folder / f"{site}.jsonl")
                    for site in SITES
                ]
                await asyncio.gather(*(worker.task for worker in started))
                head = (await client.get_run()).round_head
                digests = {d.weights_digest for d in (await client.get_status()).digests}
            finally:
                await workers.end()
        (digest,) = digests
        return Ended(head.hex(), digest.hex(), sorted_records(journal))

    return asyncio.run(run())
