"""What a snapshot's file must say of itself before its weights are read."""

from __future__ import annotations

from typing import Any, Final

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
