"""What a snapshot's file says of itself, before its weights are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from fedmezo_core.errors import SnapshotDamagedError
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo.plain.entries import Manifest

_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_snapshot_header(file: Any, manifest: Manifest, snapshot: Snapshot) -> None:
    """Raise `SnapshotDamagedError` if an opened safetensors file is not that of `snapshot`."""
    metadata = file.metadata() or {}
    wanted = {
        "round": str(snapshot.round),
        "head": snapshot.head.hex(),
        "weights_digest": snapshot.weights_digest.hex(),
        "manifest_digest": manifest.digest().hex(),
    }
    names = set(file.keys())
    differ = [key for key, value in wanted.items() if metadata.get(key) != value]
    differ += [] if names == {entry.name for entry in manifest} else ["names of the tensors"]
    if not differ:
        for entry in manifest:
            part = file.get_slice(entry.name)
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found != (_DTYPES[entry.dtype], entry.shape):
                differ.append(entry.name)
    if differ:
        raise SnapshotDamagedError(
            f"The snapshot of round {snapshot.round} differs from what the coordinator says of it "
            f"({', '.join(differ[:4])}); read the journal instead."
        )


def sha256_of(path: Path) -> bytes:
    """SHA-256 of a file (32 bytes), which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_snapshot(path: Path, run_id: str) -> Snapshot:
    """What the file at `path` says of itself, if `write_snapshot` wrote it for the run `run_id`.

    The weights in it are not checked. Raises `SnapshotDamagedError` for any other file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        if metadata.get("run_id") != run_id:
            raise ValueError(f"it is of run {metadata.get('run_id')}, not of {run_id}")
        return Snapshot(
            round=int(metadata["round"]),
            head=bytes.fromhex(metadata["head"]),
            weights_digest=bytes.fromhex(metadata["weights_digest"]),
            file_sha256=sha256_of(path),
            file_bytes=path.stat().st_size,
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SnapshotDamagedError(
            f"{path} is no file of saved weights that can be used here ({error}); give one of "
            f"run {run_id}, or begin from the base."
        ) from None
