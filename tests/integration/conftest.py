"""A tiny model and data, once a session; programs and workers that end with their test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmezo_core.records import Genesis
from fedmezo_core.zo.party import open_party
from tests.integration.support.harness import Programs, config_of
from tests.integration.support.parties import Workers, save_model, write_rows

__all__ = [
    "data_files",
    "heldout_file",
    "model_folder",
    "one_torch_thread",
    "programs",
    "tiny_genesis",
    "workers",
]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 10 k parameters; not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five workers' rows, skewed differently."""
    folder = tmp_path_factory.mktemp("data")
    return [write_rows(folder / f"w{k}.jsonl", skew=k) for k in range(5)]


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("heldout") / "heldout.jsonl", count=10)


@pytest.fixture(scope="session")
def tiny_genesis(model_folder: Path) -> Callable[..., Genesis]:
    """The genesis of a run on the tiny model, with changes to its contract."""
    bases: dict[str, Genesis] = {}

    def genesis(**changes: Any) -> Genesis:
        config = config_of(**changes)
        key = f"{config.dtype} {config.task}"
        if key not in bases:
            bases[key] = open_party(config, str(model_folder), threads=1).genesis()
        return replace(bases[key], config=config)

    return genesis


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.end()


@pytest.fixture
async def workers(model_folder: Path) -> AsyncIterator[Workers]:
    started = Workers(model_folder)
    yield started
    await started.end()
