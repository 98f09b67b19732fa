"""What goes into the machines and what comes out: dataclasses without logic, which nobody changes.

Those that every answer makes are not frozen: a frozen one takes three times as long to make.

Inputs are facts that a driver observed (a message came, time passed). Outputs are a `Ready`:
records to append durably FIRST, then messages to send.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmezo_core.records import Committed, Evaluated, Record, Scalars


@dataclass(slots=True, unsafe_hash=True)
class Ticket:
    """Names one measurement; the worker echoes it and anything else is stale.

    `epoch` counts coordinator starts: without it, an answer from before a crash could be credited
    to a seed that it was not measured on.
    """

    epoch: int
    round: int
    slot: int


@dataclass(slots=True, unsafe_hash=True)
class Work:
    """What an assignment asks for; the same from the coordinator's decision to the engine."""

    seeds: tuple[int, ...]
    """Probe p of local step h measures along the direction of seed h * probes + p of these."""
    learning_rate: float
    """Learning rate of the local steps."""
    eps: float
    """Perturbation scale."""
    want_digest: bool
    """Whether the answer carries the digest of the weights that it starts from."""


# ---------------------------------------------------------------- a sum that hides its terms
#
# What coordinator and workers say to each other for it. Down and up alternate: `KeysWanted`,
# `KeysGiven`; `PeersNamed`, `SharesGiven`; `SharesDelivered`, `MaskedGiven`; `UnmaskingWanted`,
# `SharesRevealed`. Members are named by their slots in the round.

SUM_KEY_BYTES = 32
"""Size of an X25519 public key, and of the hash of a self mask."""


@dataclass(frozen=True, slots=True)
class KeysWanted:
    """Make fresh keys for this attempt."""


@dataclass(frozen=True, slots=True)
class KeysGiven:
    """A member's public keys for one attempt."""

    cipher_key: bytes
    """X25519 public key (32 bytes) that shares for this member are encrypted to."""
    mask_key: bytes
    """X25519 public key (32 bytes) that masks are agreed on with."""
    self_mask_hash: bytes
    """SHA-256 of the member's self mask (32 bytes), which only shares can tell."""
    signature: bytes = b""
    """The worker's Ed25519 signature of them (64 bytes); empty if it does not sign."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One member of an attempt, as the others are told of it."""

    slot: int
    worker: str
    keys: KeysGiven
    signing_key: bytes = b""
    """Ed25519 public key (32 bytes) that the signature is of; empty without one."""


@dataclass(frozen=True, slots=True)
class PeersNamed:
    """All members of the attempt, the receiver included, in the order of their slots."""

    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class SharesGiven:
    """Slot of each other member -> the shares for it, encrypted, in the order of the slots."""

    sealed: tuple[tuple[int, bytes], ...]
    hashes: tuple[bytes, ...] = ()
    """`share_hashes` (32 bytes) of each member's pair of shares, the giver's own included, in the
    order of the slots; none from an older version."""


@dataclass(frozen=True, slots=True)
class SharesDelivered:
    """Slot of each other member that gave shares -> those for the receiver, encrypted."""

    sealed: tuple[tuple[int, bytes], ...]
    hashes: tuple[bytes, ...] = ()
    """What their givers said of them, 32 bytes each, in the same order; empty bytes from those that
    said nothing, and none at all if nobody did."""


@dataclass(frozen=True, slots=True)
class MaskedGiven:
    """The member's numbers and all its masks, added up modulo 2^32."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnmaskingWanted:
    """Slots of the members whose masked numbers came: those that the sum will be of."""

    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharesRevealed:
    """Slot of each member that gave shares -> the share of one of its two secrets.

    It is the self mask's for those in the sum, and the mask key's for the others.
    """

    shares: tuple[tuple[int, bytes], ...]


StepDown = KeysWanted | PeersNamed | SharesDelivered | UnmaskingWanted
StepUp = KeysGiven | SharesGiven | MaskedGiven | SharesRevealed


# ---------------------------------------------------------------- into the round machine


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker's session is open and every commit so far is on its way to it."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's session ended."""

    worker: str


@dataclass(slots=True, unsafe_hash=True)
class AnswerReceived:
    """A worker answered."""

    worker: str
    ticket: Ticket
    scalars: Scalars
    signature: bytes = b""
    """The worker's signature, checked already, 64 bytes; empty if it does not sign."""
    key: bytes = b""
    """The public key that the signature is of, 32 bytes; empty without a signature."""


@dataclass(frozen=True, slots=True)
class UnableReceived:
    """A worker could not measure."""

    worker: str
    ticket: Ticket
    reason: str
    useless_shares_of: tuple[int, ...] = ()
    """In a sum that hides its terms: slots of the members whose shares it says it cannot use."""


@dataclass(frozen=True, slots=True)
class SumReceived:
    """A worker took a step of a sum that hides its terms."""

    worker: str
    ticket: Ticket
    attempt: int
    step: StepUp
    key: bytes = b""
    """The public key that signed the keys of the step, checked already; empty without one."""


@dataclass(frozen=True, slots=True)
class WeightsReported:
    """A worker, or the coordinator's own replica, has digested its weights after `round`."""

    party: str
    round: int
    weights_digest: bytes
    """32 bytes."""


@dataclass(frozen=True, slots=True)
class ReplicaEvaluated:
    """The coordinator's own replica was evaluated on held-out rows."""

    evaluation: Evaluated


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; `now_ms` is monotonic and has no other meaning."""

    now_ms: int


RoundEvent = (
    WorkerReady
    | WorkerLost
    | AnswerReceived
    | UnableReceived
    | SumReceived
    | WeightsReported
    | ReplicaEvaluated
    | Tick
)


# ---------------------------------------------------------------- out of the round machine


@dataclass(slots=True, unsafe_hash=True)
class Assign:
    """Send work to a worker."""

    worker: str
    ticket: Ticket
    work: Work
    deadline_ms: int


@dataclass(slots=True, unsafe_hash=True)
class Ack:
    """Tell a worker that its answer is durable."""

    worker: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a worker that its message was refused; `reason` is a class name in `errors`."""

    worker: str
    ticket: Ticket
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Expel:
    """End a worker's session; `reason` is a class name in `errors`.

    Its weights are not the run's, or the operator has excluded it.
    """

    worker: str
    message: str
    reason: str = "DivergedError"


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell a worker that the run is over after `round`."""

    worker: str
    round: int


@dataclass(frozen=True, slots=True)
class AskSum:
    """Ask a worker for its next step of a sum that hides its terms."""

    worker: str
    ticket: Ticket
    attempt: int
    step: StepDown


RoundMessage = Assign | Ack | Refuse | Expel | Finish | AskSum


@dataclass(slots=True, unsafe_hash=True)
class Ready:
    """What the driver owes: make `records` durable, BEFORE it sends `messages`.

    Every `Committed` among the records also goes to every connected worker, before `messages`.
    """

    records: tuple[Record, ...] = ()
    messages: tuple[RoundMessage, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences for the log."""


# ---------------------------------------------------------------- the worker's session machine


@dataclass(frozen=True, slots=True)
class Connected:
    """The stream to the coordinator is open."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The stream broke."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The coordinator took the hello."""

    epoch: int
    round: int
    head: bytes = b""
    """Head after `round`, which the commits that follow must lead to; empty if unknown."""


@dataclass(frozen=True, slots=True)
class CommitReceived:
    """A commit came, live or in catching up; `record_bytes` as written to the journal."""

    commit: Committed
    record_bytes: bytes
    head_before: bytes = b""
    """Set where the commits before are left out, because this one is taken from the base."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """Work came."""

    ticket: Ticket
    work: Work
    deadline_ms: int = 0
    """Time until a commit without the answer may make it worthless."""


@dataclass(frozen=True, slots=True)
class SumAsked:
    """The next step of a sum that hides its terms is asked for."""

    ticket: Ticket
    attempt: int
    step: StepDown
    entropy: bytes = b""
    """32 random bytes that the driver adds; they may become this worker's secrets."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The answer to `ticket` is in the journal."""

    ticket: Ticket
    head: bytes = b""
    """The coordinator's head after the round before the ticket's; empty if it did not say."""


@dataclass(frozen=True, slots=True)
class RefusedByCoordinator:
    """The message about `ticket` was refused."""

    ticket: Ticket
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class FinishedByCoordinator:
    """The run is over after `round`."""

    round: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The engine finished what `Measure` asked for."""

    ticket: Ticket
    scalars: Scalars
    """They hold the mean loss and the count of rows, whether or not the run asks for them."""


@dataclass(frozen=True, slots=True)
class MeasureFailed:
    """The engine could not measure."""

    ticket: Ticket
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    """The weights were replaced by those after a later round, from a snapshot."""

    round: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Vouched:
    """The coordinator above a relay names its epoch, its last round and the head after that."""

    epoch: int
    round: int
    head: bytes
    finished: bool = False
    """Whether no more rounds follow."""


@dataclass(frozen=True, slots=True)
class SentAway:
    """The coordinator above ended the relay's session: its answer's weights are not the run's."""

    message: str


SessionEvent = (
    Connected
    | Disconnected
    | Welcomed
    | CommitReceived
    | Assigned
    | SumAsked
    | Acknowledged
    | RefusedByCoordinator
    | FinishedByCoordinator
    | Measured
    | MeasureFailed
    | Restored
)


@dataclass(frozen=True, slots=True)
class SendHello:
    """Introduce this worker at the round and head it holds."""

    round: int
    head: bytes


@dataclass(frozen=True, slots=True)
class ApplyCommit:
    """Fold a commit into the weights. Comes strictly in round order."""

    commit: Committed


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure on the weights as they are after every `ApplyCommit` so far."""

    ticket: Ticket
    work: Work


@dataclass(frozen=True, slots=True)
class SendAnswer:
    """Send a measurement; its `mean_loss` and `rows` are None unless the run asks for them."""

    ticket: Ticket
    scalars: Scalars
    head64: int | None = None
    """First 64 bits of the head that it was measured at; None if it carries a weights digest."""
    head: bytes = field(default=b"", compare=False)
    """Head that it was measured at, 32 bytes, which a signature covers. All answers to a ticket
    have the same."""


@dataclass(frozen=True, slots=True)
class SendSumStep:
    """Send this worker's step of a sum that hides its terms."""

    ticket: Ticket
    attempt: int
    step: StepUp
    text_to_sign: bytes = b""
    """What a worker that signs must sign of its keys; empty in the other steps."""


@dataclass(frozen=True, slots=True)
class SendUnable:
    """Say that the measurement could not be made."""

    ticket: Ticket
    reason: str
    useless_shares_of: tuple[int, ...] = ()
    """In a sum that hides its terms: slots of the members whose shares this worker cannot use."""


@dataclass(frozen=True, slots=True)
class ReportWeights:
    """Digest the weights after `round` and report it."""

    round: int


@dataclass(frozen=True, slots=True)
class ReportDigest:
    """Report the digest that a relay's workers have of the weights after `round`."""

    round: int
    weights_digest: bytes


@dataclass(frozen=True, slots=True)
class Leave:
    """The run is over; end cleanly."""


SessionAction = (
    SendHello
    | ApplyCommit
    | Measure
    | SendAnswer
    | SendSumStep
    | SendUnable
    | ReportWeights
    | Leave
)
