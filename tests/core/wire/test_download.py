"""Downloading a snapshot from a real server that does what a test wants."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmezo_coordinator import snapshot_store as store_module
from fedmezo_core.errors import (
    NotReadyError,
    SnapshotDamagedError,
    SnapshotError,
    UnavailableError,
)
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.download import downloaded
from fedmezo_core.wire.snapshot_pieces import HEADER_BYTES_MAX
from fedmezo_core.wire.snapshots import Snapshot, file_name
from tests.coordinator.snapshot_runs import CHUNK_BYTES, Kept, kept_snapshot

DATA = bytes(range(256)) * 80 + b"the end"


@pytest.fixture
async def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kept]:
    monkeypatch.setattr(store_module, "SNAPSHOT_CHUNK_BYTES", CHUNK_BYTES)
    async with kept_snapshot(tmp_path, DATA) as running:
        yield running


@asynccontextmanager
async def downloading(
    kept: Kept, folder: Path, snapshot: Snapshot | None = None, **options: Any
) -> AsyncIterator[Path]:
    values: dict[str, Any] = {"weights_bytes": len(DATA), "give_up_after_s": 20.0}
    async with (
        CoordinatorClient(kept.address) as client,
        downloaded(
            client,
            kept.run_id,
            snapshot or kept.snapshot,
            folder=folder,
            **(values | options),
        ) as path,
    ):
        yield path


async def test_the_file_comes_whole_and_leaves_nothing_behind(kept: Kept, tmp_path: Path) -> None:
    folder = tmp_path / "worker"
    folder.mkdir()
    async with downloading(kept, folder) as path:
        assert path.read_bytes() == DATA
        assert not list(folder.iterdir()), "it has no name"
    assert kept.reads == [(0, len(DATA))]


@pytest.mark.parametrize("error", [UnavailableError("gone."), NotReadyError("full.")])
async def test_a_stream_that_breaks_is_taken_up_where_it_broke(
    kept: Kept, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    kept.breaks = [(3 * CHUNK_BYTES, error), (0, error), (CHUNK_BYTES, error)]
    with caplog.at_level(logging.WARNING):
        async with downloading(kept, tmp_path) as path:
            assert path.read_bytes() == DATA
    three, four = 3 * CHUNK_BYTES, 4 * CHUNK_BYTES
    assert kept.reads == [
        (0, three),
        (three, 0),
        (three, CHUNK_BYTES),
        (four, len(DATA) - four),
    ]
    assert sum(count for _, count in kept.reads) == len(DATA), "no byte twice"
    assert f"broke off after {three} of {len(DATA)} bytes" in caplog.text


async def test_it_gives_up_after_a_while_without_a_byte(kept: Kept, tmp_path: Path) -> None:
    kept.breaks = [(0, UnavailableError("gone."))] * 100
    with pytest.raises(UnavailableError, match="gone"):
        async with downloading(kept, tmp_path, give_up_after_s=0.0):
            pass


async def test_one_flipped_bit_is_an_error(kept: Kept, tmp_path: Path) -> None:
    path = kept.folder / file_name(kept.run_id, kept.snapshot.round)
    octets = bytearray(DATA)
    octets[1000] ^= 8
    path.write_bytes(octets)
    wrong = hashlib.sha256(octets).hexdigest()[:16]
    with pytest.raises(SnapshotDamagedError, match=f"is damaged: its SHA-256 begins {wrong}"):
        async with downloading(kept, tmp_path):
            pass


async def test_a_file_that_is_not_kept_or_another_one_is_an_error_at_once(
    kept: Kept, tmp_path: Path
) -> None:
    with pytest.raises(SnapshotError, match="No snapshot of round 9 is kept"):
        async with downloading(kept, tmp_path, replace(kept.snapshot, round=9)):
            pass
    with pytest.raises(SnapshotError, match="is another one than the coordinator offered"):
        async with downloading(kept, tmp_path, replace(kept.snapshot, head=b"x" * 32)):
            pass


async def test_a_size_that_no_weights_have_is_refused_before_room_is_made(
    kept: Kept, tmp_path: Path
) -> None:
    huge = replace(kept.snapshot, file_bytes=len(DATA) + HEADER_BYTES_MAX + 1)
    with pytest.raises(SnapshotDamagedError, match="check the coordinator"):
        async with downloading(kept, tmp_path, huge):
            pass
    assert not kept.reads


async def test_a_disk_without_room_is_named(kept: Kept, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=rf"needs {len(DATA)} bytes in .*(gone|TMPDIR)"):
        async with downloading(kept, tmp_path / "gone"):
            pass
