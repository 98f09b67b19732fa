"""What the journal holds: one dataclass for each kind of record. No logic but arithmetic on seeds.

None is ever changed. `Answered` and `SeedRange` are tuples, because a start makes one for every answer and
pair run of the journal, and a frozen dataclass takes eight times as long to make.

`codec` gives their bytes, `journal` chains and stores them, `rounds` and `session` fold them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from fedmezo_core.config import RunConfig


class ModelDigests(Protocol):
    """What names a party's model: a genesis, a loaded model and a worker's hello all have it."""

    @property
    def manifest_digest(self) -> bytes:
        """Digest of the trainable tensors' names, shapes and order (32 bytes)."""

    @property
    def base_digest(self) -> bytes:
        """Digest of the base weights (32 bytes)."""

    @property
    def tokenizer_digest(self) -> bytes:
        """Digest of the tokenizer (32 bytes)."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """Record 0: what the run is."""

    config: RunConfig
    manifest_digest: bytes
    base_digest: bytes
    tokenizer_digest: bytes
    trainable_elements: int
    trainable_bytes: int

    def differences(self, other: ModelDigests) -> list[tuple[str, str]]:
        """What differs in a party's model from the run's: names, each with both digests as text."""
        pairs = (
            ("tokenizer", other.tokenizer_digest, self.tokenizer_digest),
            ("manifest (the trainable tensors)", other.manifest_digest, self.manifest_digest),
            ("base weights", other.base_digest, self.base_digest),
        )
        return [
            (what, f"digest {theirs.hex()[:16]} instead of {ours.hex()[:16]}")
            for what, theirs, ours in pairs
            if theirs != ours
        ]


@dataclass(frozen=True, slots=True)
class Started:
    """A coordinator start. Invariant: epochs are 1, 2, 3, ... in journal order."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A round's cohort (`first_slot` 0), or more slots for the open round."""

    round: int
    first_slot: int
    workers: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    """One for each of `workers`; empty where all have the contract's."""
    eps: float | None = None
    """The round's; None where it is the contract's."""


class RoundSlot(NamedTuple):
    """A slot of a round: what one measurement was assigned to. Places sort by age, oldest first."""

    round: int
    slot: int


class Answered(NamedTuple):
    """An accepted answer; the scalars are binary32 values held as floats."""

    round: int
    slot: int
    projected_grads: tuple[float, ...]
    mean_loss: float | None
    weights_digest64: int | None
    rows: int | None = None
    """Rows of the worker's data; only in runs that weight answers by them."""


class SeedRange(NamedTuple):
    """Pairs (first_seed + k, coefficients[k]); coefficients are binary32 values held as floats."""

    first_seed: int
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """A closed round's pairs in slot order, or by seed where seeds are shared.

    Invariant: rounds are 1, 2, 3, ... in journal order.
    """

    round: int
    seed_ranges: tuple[SeedRange, ...]
    rounding_seed: int
    decay: float = 1.0
    """What every weight is multiplied by first: a binary32 value in (0, 1]."""
    from_base: bool = False
    """Applied to the base instead of to the weights so far, of which it holds everything."""

    answers: tuple[RoundSlot, ...] = ()
    """Of a buffered round: the answers that it is made of, in the order of `seed_ranges` where each has its
    own. How old one is, is `round` minus its place's. Empty where they are the round's own."""

    @property
    def pairs(self) -> int:
        """Count of pairs."""
        return sum(len(run.coefficients) for run in self.seed_ranges)


@dataclass(frozen=True, slots=True)
class Diverged:
    """A party's weights after `round` are not the run's."""

    round: int
    party: str
    found_digest64: int
    expected_digest64: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out result of the weights after `round`."""

    round: int
    loss: float
    accuracy: float
    rows: int
    weights_digest: bytes
    auc: float | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """The run was stopped after `round` for a person to look at."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """A person let a paused run go on, with learning rates `rate_factor` times what they were."""

    rate_factor: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run ended after `round`, before the last one of its contract."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """The coordinator holds a file of the trained weights after `round`, agreed to be the run's."""

    round: int
    weights_digest: bytes
    file_sha256: bytes
    file_bytes: int


@dataclass(frozen=True, slots=True)
class SignedHead:
    """In a party's own copy of the run: what the coordinator had said, and signed, of its history."""

    epoch: int
    round: int
    head: bytes
    key: bytes = b""
    """The coordinator's public key; empty if it signs nothing."""
    signature: bytes = b""


Record = (
    Genesis
    | Started
    | Opened
    | Answered
    | Committed
    | Diverged
    | Evaluated
    | Paused
    | Resumed
    | Stopped
    | Snapshotted
    | SignedHead
)


@lru_cache(maxsize=8192)  # Asked for at an assignment, and again at the commit.
def first_seed_of(run_seed: int, round_: int, slot: int) -> int:
    """Seed of the first pair of `slot` in `round_`; probe p of local step h uses this + h * probes + p.

    The low 16 bits are zero, so that the seeds of one assignment (at most 4,096) never carry into
    another's; the upper 48 come from SHA-256, so that runs, rounds and slots share no direction.
    """
    return _hash64("fedmezo seed v1", run_seed, round_, slot) & ~0xFFFF


def rounding_seed_of(run_seed: int, round_: int) -> int:
    """Key of the stochastic rounding at the commit of `round_`."""
    return _hash64("fedmezo rounding v1", run_seed, round_)


def digest64_of(digest: bytes) -> int:
    """First 8 bytes of a digest as a little-endian integer: what an answer carries."""
    return int.from_bytes(digest[:8], "little")


def _hash64(domain: str, *numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.sha256(domain.encode() + b"\0" + words).digest()[:8], "little")
