"""The adapter that a run begins from, for whoever rebuilds the run."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.stores.location import path_beside
from fedmezo_core.config import RunConfig
from fedmezo_core.errors import OneRunError, WrongRunError
from fedmezo_core.program import long_step
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES

if TYPE_CHECKING:
    from fedmezo_core.zo.model.loading import SharedBases


@contextlib.contextmanager
def start_adapter(
    given: Path | None,
    journal: str | None,
    run: RunConfig,
    client: Callable[[], CoordinatorClient] | None,
) -> Iterator[Path | None]:
    """The folder that is given, or the one beside the journal, or a copy of the coordinator's.

    None if there is none: most runs begin from a fresh adapter. Whether it is the right one says
    the digest of the base, which covers it.
    """
    if given is not None or run.lora is None:
        yield given
    elif journal is not None:
        beside = path_beside(journal, ".adapter")
        yield beside if beside.is_dir() else None
    elif client is not None:
        with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
            is_there = asyncio.run(_download(client, run.run_id, Path(folder)))
            yield Path(folder) if is_there else None
    else:
        yield None


@contextlib.contextmanager
def fitted_adapter(
    settings: CoordinatorSettings, run: RunConfig, threads: int | None, bases: SharedBases
) -> Iterator[Path | None]:
    """The folder of the adapter that the run of these settings begins from, or would.

    Before the run has begun, one is fitted for the time being; that takes torch, and the base,
    which is in `bases` then. Raises `ConfigError` if that base has no name.
    """
    folder, rows = settings.begins_from, settings.adapter_rows
    if folder is None or rows is None or folder.is_dir():
        yield folder
        return
    from fedmezo_core.zo.fitting import write_fitted_adapter

    with tempfile.TemporaryDirectory(prefix="fedmezo-") as temporary:
        fitted = Path(temporary) / "adapter"
        model = settings.base_model
        write_fitted_adapter(run, model, rows, fitted, threads=threads, bases=bases)
        yield fitted


async def _download(connect: Callable[[], CoordinatorClient], run_id: str, folder: Path) -> bool:
    """Copy what the coordinator offers of the adapter; returns whether it offers one."""
    async with connect() as client:
        for name in ADAPTER_FILES:
            try:
                with (
                    (folder / name).open("wb") as file,
                    long_step(f"reading {name} from the coordinator", unit="bytes") as step,
                ):
                    async for piece in client.read_run_file(run_id, f"adapter/{name}"):
                        file.write(piece)
                        step.advance(len(piece))
            except (WrongRunError, OneRunError):
                return False
    return True
