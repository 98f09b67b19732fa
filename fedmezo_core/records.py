"""What the journal holds: one immutable value for each kind of record, and arithmetic on seeds.

`Scalars`, `Answered` and `SeedRange` are named tuples: every answer makes one of each, and a frozen
dataclass takes several times as long to make.

`journal.codec` gives their bytes, `journal.journal` chains and stores them, and
`machines.run_state` and `machines.session` fold them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from fedmezo_core.config import COHORT_MAX, RunConfig
from fedmezo_core.errors import JournalCorruptError

SIGNATURE_BYTES = 64
"""Size of an Ed25519 signature."""
TOKENIZER_PARTS = (
    "vocabulary",
    "normalizer",
    "pre-tokenizer",
    "added tokens",
    "tokens before a prompt",
    "end-of-text token",
    "decoder",
)
"""The parts of a tokenizer, in the order of `Genesis.tokenizer_parts`."""


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
    tokenizer_parts: tuple[bytes, ...] = ()
    """Digest of each of `TOKENIZER_PARTS` (32 bytes), which `tokenizer_digest` is over. Empty in
    runs whose `tokenizer_digest` is one over the whole tokenizer."""

    def differences(
        self, other: ModelDigests, tokenizer_parts: Sequence[bytes] = ()
    ) -> list[tuple[str, str]]:
        """What differs in a party's model from the run's: names, each with both digests as text.

        With the party's `tokenizer_parts`, a different tokenizer's name includes the parts. A form
        of the base that the run admits does not differ.
        """
        forms = map(self.form_digest, self.config.base_forms)
        base = other.base_digest if other.base_digest in forms else self.base_digest
        parts = zip(TOKENIZER_PARTS, tokenizer_parts, self.tokenizer_parts, strict=False)
        named = ", ".join(name for name, theirs, ours in parts if theirs != ours)
        tokenizer = f"tokenizer (its {named})" if named else "tokenizer"
        pairs = (
            (tokenizer, other.tokenizer_digest, self.tokenizer_digest),
            ("manifest (the trainable tensors)", other.manifest_digest, self.manifest_digest),
            ("base weights", other.base_digest, base),
        )
        return [
            (what, f"digest {theirs.hex()[:16]} instead of {ours.hex()[:16]}")
            for what, theirs, ours in pairs
            if theirs != ours
        ]

    def form_digest(self, form: str) -> bytes:
        """What a worker's hello has as `base_digest` if it measures with `form`: 32 bytes.

        form: as in `RunConfig.base_forms`, or empty for the base itself. `onnx:` and `gguf:` go
        before the digest in hex. For a base that the worker compresses to 8 or 4 bits, it is the
        SHA-256 of `fedmezo base 8-bit` (or 4-bit), a newline, and the digest of the base.
        """
        if not form:
            return self.base_digest
        _, _, digest = form.partition(":")
        if digest:
            return bytes.fromhex(digest)
        return hashlib.sha256(f"fedmezo base {form}\n".encode() + self.base_digest).digest()


@dataclass(frozen=True, slots=True)
class Started:
    """The coordinator was started. Invariant: epochs are 1, 2, 3, ... in journal order."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A round's cohort (`first_slot` 0), or more slots for the open round."""

    round: int
    first_slot: int
    workers: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    """Learning rate of each of `workers`; empty where all have the contract's."""
    eps: float | None = None
    """Perturbation scale of the round; None where it is the contract's."""


class RoundSlot(NamedTuple):
    """One slot of one round: what a measurement is assigned to. Sorts by round, then by slot."""

    round: int
    slot: int


class Scalars(NamedTuple):
    """What one measurement comes to: all that travels from a worker into the journal."""

    projected_grads: tuple[float, ...]
    """One for each seed of the assignment. In the journal these are binary32 values."""
    mean_loss: float | None
    """Mean loss over the measurement, in nats; None where losses stay with the worker."""
    weights_digest64: int | None
    """First 64 bits of the digest of the weights measured on; None outside digest rounds."""
    rows: int | None = None
    """Rows of the worker's data; None in runs that do not weight answers by rows."""


class Answered(NamedTuple):
    """An accepted answer, its floats rounded to binary32."""

    round: int
    slot: int
    scalars: Scalars
    signature: bytes = b""
    """The worker's signature (`trust.answer_signatures`), 64 bytes; empty if it does not sign. It
    is of the newest key that was admitted for the slot's worker."""

    @property
    def projected_grads(self) -> tuple[float, ...]:
        """The answer's projected gradients, one for each seed of its assignment."""
        return self.scalars.projected_grads

    @property
    def mean_loss(self) -> float | None:
        """The answer's mean loss in nats, if it carries one."""
        return self.scalars.mean_loss

    @property
    def weights_digest64(self) -> int | None:
        """First 64 bits of the digest of the weights measured on, in digest rounds."""
        return self.scalars.weights_digest64

    @property
    def rows(self) -> int | None:
        """Rows of the worker's data, if the run weights answers by rows."""
        return self.scalars.rows


@dataclass(frozen=True, slots=True)
class Admitted:
    """From here on a worker's answers are signed with `key`, or not at all."""

    worker: str
    key: bytes
    """Ed25519 public key, 32 bytes."""


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
    """The slots whose answers the commit of a buffered round holds, in the order of `seed_ranges`
    if each answer has its own seeds. An answer's age is `round` minus its slot's round. Empty in
    synchronous runs."""

    @property
    def pairs(self) -> int:
        """Count of pairs."""
        return sum(len(run.coefficients) for run in self.seed_ranges)

    def check_within(self, config: RunConfig) -> None:
        """Raise `JournalCorruptError` for a commit that no run of this contract can have."""
        for what in self._beyond(config):
            raise JournalCorruptError(
                f"The commit of round {self.round} {what} in run {config.run_id}; find out who "
                "serves that run, or restore the journal from a copy."
            )

    def _beyond(self, config: RunConfig) -> Iterator[str]:
        match config.seed_policy:
            case "per_worker":
                ranges_max, pairs_max = config.answers_max, config.pairs_per_answer
            case "shared":
                ranges_max, pairs_max = 1, config.pairs_per_answer
            case "pool":
                ranges_max = pairs_max = config.pool_size
        if not 1 <= self.round <= config.rounds:
            yield f"is beyond the {config.rounds} rounds"
        if len(self.seed_ranges) > ranges_max:
            count = len(self.seed_ranges)
            yield f"has {count} ranges of seeds, where there are at most {ranges_max}"
        for run in self.seed_ranges:
            if len(run.coefficients) > pairs_max:
                yield (
                    f"has {len(run.coefficients)} pairs in one range, where there are at most "
                    f"{pairs_max}"
                )
            if run.first_seed + len(run.coefficients) > 2**64:
                yield "holds a seed of 2^64 or more"
        if self.from_base and config.seed_policy != "pool":
            yield "starts from the base, which only a pool's does"
        answers_max = config.answers_max if config.buffer_answers else 0
        if len(self.answers) > answers_max:
            yield f"names {len(self.answers)} answers, where there are at most {answers_max}"
        for answer in self.answers:
            if self.round - answer.round > config.staleness_max or answer.slot >= COHORT_MAX:
                yield f"holds an answer to slot {answer.slot} of round {answer.round}"


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
class Excluded:
    """After `round`, a person took a worker out of the run, with its answers that no commit held.

    Its answers in commits stay. It takes no part until a `Readmitted` names it.
    """

    round: int
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Readmitted:
    """After `round`, a person let an excluded worker take part again."""

    round: int
    worker: str


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked answers of these slots came, and what unmasks their sum is about to be asked for.

    A round has at most one such record, because two sums could be subtracted.
    """

    round: int
    slots: tuple[int, ...]
    """Ascending."""


@dataclass(frozen=True, slots=True)
class Summed:
    """The sum of the answers that a `Masked` names; the round's commit follows."""

    round: int
    sums: tuple[int, ...]
    """For each direction, the sum of the integers that stand for projected gradients; empty if it
    could not be unmasked, and the round is committed without a step."""


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """The coordinator holds a file of the trained weights after `round`, agreed to be the run's."""

    round: int
    weights_digest: bytes
    file_sha256: bytes
    file_bytes: int


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head that the coordinator named and signed. Only in a party's own copy of the run."""

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
    | Admitted
    | Excluded
    | Readmitted
    | Masked
    | Summed
)


@lru_cache(maxsize=8192)  # Asked for at an assignment, and again at the commit.
def first_seed_of(run_seed: int, round_: int, slot: int) -> int:
    """Seed of the first pair of `slot` in `round_`.

    Probe p of local step h uses this + h * probes + p. The low 16 bits are zero, so that the seeds
    of one assignment (at most 4,096) never carry into another's; the upper 48 come from SHA-256, so
    that runs, rounds and slots share no direction.
    """
    return _hash64("fedmezo seed v1", run_seed, round_, slot) & ~0xFFFF


def rounding_seed_of(run_seed: int, round_: int) -> int:
    """Key of the stochastic rounding at the commit of `round_`."""
    return _hash64("fedmezo rounding v1", run_seed, round_)


def digest64_of(digest: bytes) -> int:
    """First 8 bytes of a digest as a little-endian integer: what an answer carries."""
    return int.from_bytes(digest[:8], "little")


def digest64_hex(digest64: int) -> str:
    """The first 8 bytes of a digest, as `digest64_of` gives them, as the digest's hex begins."""
    return digest64.to_bytes(8, "little").hex()


def _hash64(domain: str, *numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.sha256(domain.encode() + b"\0" + words).digest()[:8], "little")
