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


RoundMessage = Assign | Ack | Refuse | Expel | Finish


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
class SendUnable:
    """Say that the measurement could not be made."""

    ticket: Ticket
    reason: str


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


SessionAction = SendHello | ApplyCommit | Measure | SendAnswer | SendUnable | ReportWeights | Leave
