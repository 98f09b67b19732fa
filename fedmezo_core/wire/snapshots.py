"""Snapshots: the trained weights after a round, as a safetensors file. What names one; no numbers here."""

from __future__ import annotations

import re
from dataclasses import dataclass

SNAPSHOTS_KEPT = 2
"""Newest snapshots whose files are kept: who is reading the last one may finish while a new one comes."""
SNAPSHOT_CHUNK_BYTES = 1024 * 1024
"""Most bytes of a snapshot in one message."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot's file is, by the coordinator's journal."""

    round: int
    head: bytes
    """After that round, 32 bytes."""
    weights_digest: bytes
    """32 bytes."""
    file_sha256: bytes
    """32 bytes."""
    file_bytes: int


def file_name(run_id: str, round_: int) -> str:
    """How the file of a run's snapshot is called in its folder."""
    return f"{run_id}-{round_}.safetensors"


def partial_name(name: str) -> str:
    """How a file is called until it is whole."""
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
    """Of their records."""


@dataclass(frozen=True, slots=True)
class SnapshotOffer:
    """The newest snapshot, and what is to be done after it."""

    snapshot: Snapshot
    missing: Suffix
