"""Names and descriptions of snapshots: the trained weights after a round, in a safetensors file."""

from __future__ import annotations

import re
from dataclasses import dataclass

SNAPSHOTS_KEPT = 2
"""Snapshots that are kept; more than one, so that a reader can finish when a newer one comes."""
SNAPSHOT_CHUNK_BYTES = 1024 * 1024
"""Most bytes of a snapshot in one message."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as the coordinator's journal describes it."""

    round: int
    head: bytes
    """Head after that round, 32 bytes."""
    weights_digest: bytes
    """Digest of the trained weights, 32 bytes."""
    file_sha256: bytes
    """SHA-256 of the file, 32 bytes."""
    file_bytes: int


def file_name(run_id: str, round_: int) -> str:
    """The file name of a run's snapshot."""
    return f"{run_id}-{round_}.safetensors"


def partial_name(name: str) -> str:
    """The name of a file until it is complete."""
    return f"{name}.partial"


def round_in(name: str, run_id: str) -> int | None:
    """The round in the name of a whole or partial snapshot of this run; None for any other file."""
    found = re.fullmatch(rf"{re.escape(run_id)}-([0-9]{{1,20}})\.safetensors(\.partial)?", name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Suffix:
    """Commits to read and apply, counted from the newest one that starts from the base."""

    pairs: int
    bytes: int
    """Bytes of their records."""


@dataclass(frozen=True, slots=True)
class SnapshotOffer:
    """The newest snapshot, and the commits to apply after it."""

    snapshot: Snapshot
    missing: Suffix
