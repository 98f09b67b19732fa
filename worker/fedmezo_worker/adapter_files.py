"""The adapter that a run begins from, downloaded from the coordinator and kept in a cache."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from fedmezo_core.errors import (
    MismatchError,
    ModelError,
    NotReadyError,
    PolicyError,
    UnavailableError,
)
from fedmezo_core.folders import cache_home
from fedmezo_core.program import LongStep, long_step
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES
from fedmezo_worker.adapter_cache import AdapterCache, Partial

log = logging.getLogger("fedmezo.download")

CONFIG_BYTES_MAX: Final = 1 << 20
"""Largest settings of an adapter; peft writes about a kilobyte."""
_OF_ADAPTER: Final = "adapter/"


class OfferedFile(Protocol):
    """A file as the coordinator describes it."""

    @property
    def name(self) -> str:
        """`adapter/` and one of `ADAPTER_FILES`, or another file of the run."""

    @property
    def sha256(self) -> bytes:
        """Digest of its bytes, 32 bytes."""

    @property
    def file_bytes(self) -> int:
        """Its size in bytes."""


def adapter_in(offered: Sequence[OfferedFile]) -> dict[str, OfferedFile]:
    """The files of the adapter among those offered, by their names; empty if there is none."""
    named = {file.name.removeprefix(_OF_ADAPTER): file for file in offered if _is_of_adapter(file)}
    return {name: named[name] for name in ADAPTER_FILES} if named.keys() >= {*ADAPTER_FILES} else {}


def _is_of_adapter(file: OfferedFile) -> bool:
    return file.name.startswith(_OF_ADAPTER)


@contextlib.asynccontextmanager
async def downloaded_adapter(
    client: CoordinatorClient,
    run_id: str,
    files: dict[str, OfferedFile],
    *,
    disk_max_bytes: int,
    give_up_after_s: float,
    may_go_on: Callable[[], bool] = lambda: True,
    cache: Path | None = None,
) -> AsyncIterator[Path]:
    """The folder with the adapter that `files`, from `adapter_in`, describe, during the block.

    It lies in `cache`, by default this user's, readable by its owner only; the adapters there take
    at most `disk_max_bytes`. Files that are there are used if their digests are right; others are
    downloaded. Raises `PolicyError` for files that are larger than `disk_max_bytes` together,
    `MismatchError` for bytes that are not what was offered, `ModelError` if the cache cannot be
    written to, and `NotReadyError` if others use all of it now. What a retry may help is tried
    again; its `UnavailableError` or `NotReadyError` is raised once `may_go_on` says no, or after
    `give_up_after_s` seconds without a byte.
    """
    _check_sizes(files, disk_max_bytes)
    digest = hashlib.sha256(b"".join(file.sha256 for file in files.values())).hexdigest()
    adapters = AdapterCache((cache or cache_home()) / "adapters", disk_max_bytes)
    async with adapters.kept(digest) as folder:
        for name, file in files.items():
            path = folder / name
            if await asyncio.to_thread(_digest_of, path) == file.sha256:
                continue
            with long_step(f"downloading {file.name}", file.file_bytes, "bytes") as step:
                await _download(
                    client, run_id, file, path, adapters, step, give_up_after_s, may_go_on
                )
            log.info("downloaded %s, %d bytes", file.name, file.file_bytes)
        yield folder


def _check_sizes(files: dict[str, OfferedFile], disk_max_bytes: int) -> None:
    total = sum(file.file_bytes for file in files.values())
    if total > disk_max_bytes:
        raise PolicyError(
            f"The run's adapter has {total} bytes, more than the {disk_max_bytes} that this worker "
            "allows; raise policy.disk_max in its settings."
        )
    config_bytes = files[ADAPTER_FILES[0]].file_bytes
    if config_bytes > CONFIG_BYTES_MAX:
        raise PolicyError(
            f"The run's {ADAPTER_FILES[0]} has {config_bytes} bytes, more than "
            f"{CONFIG_BYTES_MAX}; offer an adapter as peft writes it."
        )


async def _download(
    client: CoordinatorClient,
    run_id: str,
    file: OfferedFile,
    path: Path,
    adapters: AdapterCache,
    step: LongStep,
    give_up_after_s: float,
    may_go_on: Callable[[], bool],
) -> None:
    """Download one file to `path`, which appears whole and right or not at all.

    What is there when an attempt ends without it stays, and the next one goes on from there.
    """
    reconnecting = Reconnecting(log, give_up_after_s=give_up_after_s)
    try:
        partial = await asyncio.to_thread(adapters.begin, path, file.file_bytes)
        offset = kept_bytes = partial.begun_bytes
        step.advance(offset)
        try:
            while offset < file.file_bytes:
                before = offset
                try:
                    pieces = client.read_run_file(run_id, file.name, offset)
                    async with contextlib.aclosing(pieces):
                        async for piece in pieces:
                            offset += len(piece)
                            if offset > file.file_bytes:
                                raise _is_another(run_id, file, f"has more than {file.file_bytes}")
                            await asyncio.to_thread(partial.out.write, piece)
                            kept_bytes = offset
                            step.advance(len(piece))
                    if offset < file.file_bytes:
                        raise UnavailableError("The coordinator ended the file early.")
                except (UnavailableError, NotReadyError) as error:
                    if not may_go_on():
                        raise
                    if offset > before:
                        reconnecting.reached()
                    await reconnecting.wait_after(error)
            written = await asyncio.to_thread(_written, partial, file.file_bytes)
            if written != file.sha256:
                if partial.begun_bytes:
                    raise UnavailableError(
                        f"What an earlier attempt left of {file.name} is damaged; it begins anew."
                    )
                begins = f"begins {written.hex()[:16]} instead of {file.sha256.hex()[:16]}"
                raise _is_another(run_id, file, f"is damaged: its SHA-256 {begins}")
            partial.path.replace(path)
        except (MismatchError, OSError):
            kept_bytes = 0
            raise
        finally:
            partial.leave(kept_bytes)
    except OSError as error:
        raise ModelError(
            f"{path.parent} cannot be written to ({error.strerror}); make room there, or name "
            "another cache folder in XDG_CACHE_HOME."
        ) from None


def _written(partial: Partial, file_bytes: int) -> bytes:
    """The digest of the file as it is on the disk, once all is written."""
    partial.out.flush()
    partial.out.truncate(file_bytes)
    os.fsync(partial.out.fileno())
    return _digest_of(partial.path)


def _is_another(run_id: str, file: OfferedFile, how: str) -> MismatchError:
    return MismatchError(
        f"The file {file.name} of run {run_id} {how}; check the coordinator's disk, or create the "
        "run again."
    )


def _digest_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""
