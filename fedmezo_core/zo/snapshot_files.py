"""Snapshot files: trained weights to disk, and from disk into a party's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmezo_core.errors import SnapshotDamagedError, SnapshotError
from fedmezo_core.folders import sync
from fedmezo_core.program import long_step
from fedmezo_core.wire.snapshots import Snapshot, file_name, partial_name
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.snapshot_header import check_snapshot_header, sha256_of
from fedmezo_core.zo.weights import Weights


def write_snapshot(
    folder: Path, weights: Weights, *, run_id: str, head: bytes, weights_digest: bytes
) -> Snapshot:
    """Write `weights` as a safetensors file into `folder`, durably, whole or not at all.

    weights_digest: the digest of `weights` (32 bytes). head: the journal's after their round (32
    bytes). Raises `SnapshotError` if the disk refuses.
    """
    path = folder / file_name(run_id, weights.round)
    partial = path.with_name(partial_name(path.name))
    tensors = trained_tensors(weights.model, weights.manifest)
    metadata = {
        "run_id": run_id,
        "round": str(weights.round),
        "head": head.hex(),
        "weights_digest": weights_digest.hex(),
        "manifest_digest": weights.manifest.digest().hex(),
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_file(
            {entry.name: t for entry, t in zip(weights.manifest, tensors, strict=True)},
            partial,
            metadata,
        )
        sync(partial)
        size, sha256 = partial.stat().st_size, sha256_of(partial)
        partial.rename(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # safetensors reports a full disk as its own exception, with the system's words in it.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split("\n", 1)[0].split())
        raise SnapshotError(
            f"The snapshot of round {weights.round} cannot be written to {folder} ({reason}); make "
            "room there, or set another folder in snapshots."
        ) from error
    return Snapshot(weights.round, head, weights_digest, sha256, size)


def install_snapshot(path: Path, weights: Weights, snapshot: Snapshot) -> None:
    """Replace `weights` by those in the file at `path`, and check them against the digest.

    Reads one tensor at a time. Raises `SnapshotDamagedError` if the file, or the weights in it, are
    not those of `snapshot`. `weights` may then be unusable, and the base must be loaded again.
    """
    try:
        with (
            long_step(f"taking the weights of the snapshot of round {snapshot.round}"),
            safe_open(path, framework="pt") as file,
        ):
            check_snapshot_header(file, weights.manifest, snapshot)
            weights.restore(
                snapshot.round, _tensors(file, weights.manifest), snapshot.weights_digest
            )
    except (OSError, SafetensorError) as error:
        raise SnapshotDamagedError(
            f"The snapshot of round {snapshot.round} is no safetensors file that can be read "
            f"({error}); read the journal instead."
        ) from None


def _tensors(file: Any, manifest: Manifest) -> Iterator[torch.Tensor]:
    for entry in manifest:
        yield file.get_tensor(entry.name)
