"""How a party catches up: from the journal, or from a snapshot and the journal after it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fedmezo_core.wire.snapshots import SnapshotOffer, Suffix

INSTALL_BYTES_PER_S = 600e6
"""Speed of one core that hashes a snapshot's file, copies it into the weights and digests these
(measured: decision 0019)."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """The expected speeds of a party; each is above 0."""

    pair_elements_per_s: float
    """Pairs times trained elements that it applies in a second."""
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
