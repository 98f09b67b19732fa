"""How a party that is behind catches up: from the journal, or from a snapshot and the journal after it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fedmezo_core.wire.snapshots import SnapshotOffer, Suffix

INSTALL_BYTES_PER_S = 600e6
"""What one core reaches in hashing a snapshot's file, copying it into the weights and digesting those
(measured: decision 0019)."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a party is expected to reach; each above 0."""

    pair_elements_per_s: float
    """In applying pairs: pairs times trained elements a second."""
    download_bytes_per_s: float


def journal_s(missing: Suffix, elements: int, speeds: Speeds) -> float:
    """Seconds to read `missing` and apply it to `elements` trained elements."""
    return (
        missing.bytes / speeds.download_bytes_per_s
        + missing.pairs * elements / speeds.pair_elements_per_s
    )


def snapshot_s(offer: SnapshotOffer, elements: int, speeds: Speeds) -> float:
    """Seconds to download the snapshot, install it, and apply what comes after it."""
    size = offer.snapshot.file_bytes
    return (
        size / speeds.download_bytes_per_s
        + size / INSTALL_BYTES_PER_S
        + journal_s(offer.missing, elements, speeds)
    )


def takes_snapshot(
    missing: Suffix, offer: SnapshotOffer | None, elements: int, speeds: Speeds
) -> bool:
    """Whether the snapshot on offer, if any, is cheaper than all the commits that are missing."""
    return offer is not None and snapshot_s(offer, elements, speeds) < journal_s(
        missing, elements, speeds
    )
