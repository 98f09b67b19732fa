"""Creating a run from a settings file: which files it names, sending them, waiting for it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmezo_coordinator.runs.run_folder import ONE_FILE
from fedmezo_coordinator.runs.uploads import PIECE_BYTES_MAX
from fedmezo_core.config import how_to_name_a_copy, is_folder_name
from fedmezo_core.errors import ConfigError, NotReadyError, UnavailableError
from fedmezo_core.layered_settings import expanded, toml_text, toml_values
from fedmezo_core.program import long_step
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES
from fedmezo_proto.v1 import runs_pb2 as wire

log = logging.getLogger("fedmezo.command")

LOOK_EVERY_S = 0.5
"""Period in which a new run is looked at."""
RECONNECT_S = 60.0
"""How long a coordinator that restarts meanwhile is waited for."""


def files_of(config: Path) -> tuple[str, dict[str, Path]]:
    """The text of a settings file, and the files that it names, by their names in the run.

    Raises `ConfigError` for one that is not there.
    """
    text = toml_text(config)
    values = toml_values(text, str(config))
    keys = (*ONE_FILE, "adapter")
    return text, {name: path for key in keys for name, path in _named(key, values)}


def _named(key: str, values: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    given = values.get(key)
    if given is None:
        return
    if not isinstance(given, str):
        raise ConfigError(f"{key} = {given!r} is not allowed: use the path of a file.")
    try:
        path = Path(expanded(given))
    except ValueError as error:
        raise ConfigError(f"{key} = {given} is not allowed: {error}.") from None
    if key in ONE_FILE:
        if not path.is_file():
            raise ConfigError(f"{key} = {given} is no file here; check the path.")
        yield f"{key}{path.suffix}", path
        return
    for name in ADAPTER_FILES:
        if not (path / name).is_file():
            raise ConfigError(f"{key} = {given} is no folder with {name} here; check the path.")
        yield f"{key}/{name}", path / name


async def upload(client: CoordinatorClient, name: str, path: Path) -> wire.RunFile:
    """Send a file, from where an earlier attempt ended; returns what it is to the run.

    Raises `ConfigError` for a file that is empty, that cannot be read or that changes meanwhile.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()
            size = file.seek(0, 2)
            if not size:
                raise ConfigError(f"{path} is empty; a run has no use for it.")
            request = wire.UploadFileRequest(sha256=sha256, file_bytes=size)
            with long_step(f"sending {path}", size, "bytes") as step:
                while (offset := await client.upload_file(request)) < size:
                    step.done = offset
                    file.seek(offset)
                    request.offset, request.data = offset, file.read(PIECE_BYTES_MAX)
                    if not request.data:
                        raise ConfigError(f"{path} got shorter while it was sent; send it again.")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check it.") from None
    return wire.RunFile(name=name, sha256=sha256, file_bytes=size)


async def serves(client: CoordinatorClient, run_id: str) -> wire.RunSummary:
    """Wait until a new run serves workers; raises `ConfigError` with the reason if it fails.

    Says what workers need if its model may be a folder, which they are never sent.
    Raises `UnavailableError` if the coordinator is gone for `RECONNECT_S`.
    """
    reconnecting = Reconnecting(log, give_up_after_s=RECONNECT_S)
    with long_step(f"creating run {run_id}") as step:
        while True:
            run = await _looked_at(client, run_id, reconnecting)
            if run.phase == wire.RUN_PHASE_FAILED:
                raise ConfigError(
                    f"Run {run_id} could not begin: {run.reason}; mend that and say: fedmezo run "
                    f"resume {run_id}, or: fedmezo run delete {run_id}"
                )
            if run.phase != wire.RUN_PHASE_CREATING:
                break
            step.what = f"creating run {run_id}: {run.reason}"
            await asyncio.sleep(LOOK_EVERY_S)
    if run.phase == wire.RUN_PHASE_RUNNING and is_folder_name(run.model):
        log.info(
            "if model %r is a folder of the coordinator, each worker needs a copy: %s",
            run.model,
            how_to_name_a_copy(run.model),
        )
    return run


async def taken_up(client: CoordinatorClient, run_id: str, within_s: float) -> wire.RunSummary:
    """Wait until a worker takes part in a run; says meanwhile who does not, and why.

    Raises `NotReadyError` with those reasons if none does `within_s`, and `UnavailableError` if the
    coordinator is gone for `RECONNECT_S`.
    """
    reconnecting = Reconnecting(log, give_up_after_s=RECONNECT_S)
    end_s, told = time.monotonic() + within_s, dict[str, str]()
    with long_step(f"waiting for a worker of run {run_id}"):
        while True:
            run = await _looked_at(client, run_id, reconnecting)
            for declined in run.declined:
                if told.get(declined.worker) != declined.reason:
                    told[declined.worker] = declined.reason
                    log.info("%s does not take part: %s", declined.worker, declined.reason)
            if run.workers or run.round or run.phase != wire.RUN_PHASE_RUNNING:
                return run
            if time.monotonic() >= end_s:
                declines = "; ".join(
                    f"{worker}: {reason.rstrip('.')}" for worker, reason in told.items()
                )
                raise NotReadyError(
                    f"No worker takes part in run {run_id} after {within_s:g} s: "
                    f"{declines or 'none has come'}."
                )
            await asyncio.sleep(LOOK_EVERY_S)


async def _looked_at(
    client: CoordinatorClient, run_id: str, reconnecting: Reconnecting
) -> wire.RunSummary:
    """The run as it is now, once the coordinator can be reached."""
    while True:
        try:
            [run] = await client.list_runs(run_id)
        except UnavailableError as error:
            try:
                await reconnecting.wait_after(error)
            except UnavailableError:
                raise UnavailableError(
                    f"{error} Run {run_id} is created there; the same command again waits for it."
                ) from None
        else:
            reconnecting.reached()
            return run
