"""Conversions between our dataclasses and the session messages of `fedmezo.v1`.

Decoding is strict: a missing field or an impossible value is a `ProtocolError`, never a default.
"""

from __future__ import annotations

from collections.abc import Callable

from fedmezo_core.config import PROTOCOL_VERSION, SECURE_COHORT_MAX, RunConfig
from fedmezo_core.errors import FedMezoError, ProtocolError, UnavailableError
from fedmezo_core.events import (
    Ack,
    Acknowledged,
    AnswerReceived,
    AskSum,
    Assign,
    Assigned,
    CommitReceived,
    Finish,
    FinishedByCoordinator,
    Refuse,
    RefusedByCoordinator,
    SendAnswer,
    SendUnable,
    SessionEvent,
    Ticket,
    UnableReceived,
    Welcomed,
    Work,
)
from fedmezo_core.journal.codec import decode_commit, digest_in, positive
from fedmezo_core.journal.journal import Row
from fedmezo_core.records import Genesis, Scalars
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.grpc_status import error_from
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.wire.sum_messages import ask_to_pb, asked_from_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire

# ---------------------------------------------------------------- snapshots


def snapshot_to_pb(snapshot: Snapshot) -> wire.Snapshot:
    """A snapshot as a message."""
    return wire.Snapshot(
        round=snapshot.round,
        head=snapshot.head,
        weights_digest=snapshot.weights_digest,
        file_sha256=snapshot.file_sha256,
        file_bytes=snapshot.file_bytes,
    )


def snapshot_from_pb(message: wire.Snapshot) -> Snapshot:
    """A snapshot from a message."""
    return Snapshot(
        round=message.round,
        head=digest_in(message.head, "head"),
        weights_digest=digest_in(message.weights_digest, "weights_digest"),
        file_sha256=digest_in(message.file_sha256, "file_sha256"),
        file_bytes=message.file_bytes,
    )


# ---------------------------------------------------------------- session messages


def ticket_to_pb(ticket: Ticket) -> wire.Ticket:
    """A ticket as a message."""
    return wire.Ticket(epoch=ticket.epoch, round=ticket.round, slot=ticket.slot)


def ticket_from_pb(message: wire.Ticket) -> Ticket:
    """A ticket from a message."""
    return Ticket(epoch=message.epoch, round=message.round, slot=message.slot)


def assign_to_pb(assign: Assign, config: RunConfig) -> wire.SessionResponse:
    """An assignment as a session message, without the values that the contract has already."""
    work = assign.work
    first_seed = min(work.seeds)
    offsets = [seed - first_seed for seed in work.seeds]
    return wire.SessionResponse(
        assign=wire.Assign(
            ticket=ticket_to_pb(assign.ticket),
            first_seed=first_seed,
            steps=len(work.seeds) // config.probes,
            want_digest=work.want_digest,
            deadline_ms=assign.deadline_ms,
            learning_rate=None
            if work.learning_rate == config.learning_rate
            else work.learning_rate,
            eps=None if work.eps == config.eps else work.eps,
            seed_offsets=() if offsets == list(range(len(offsets))) else offsets,
        )
    )


def assigned_from_pb(message: wire.Assign, config: RunConfig) -> Assigned:
    """An assignment as an event for the session machine; raises `ProtocolError`."""
    count = message.steps * config.probes
    is_within = 1 <= message.steps <= config.local_steps
    if not is_within or len(message.seed_offsets) not in (0, count):
        raise ProtocolError(
            f"{message.steps} steps of {config.probes} probes were assigned with "
            f"{len(message.seed_offsets)} seed offsets in a run of {config.local_steps} local "
            "steps; use the same FedMeZO version."
        )
    offsets = message.seed_offsets or range(count)
    if message.first_seed + max(offsets) >= 2**64:
        raise ProtocolError("A seed of 2^64 or more was assigned; use the same FedMeZO version.")
    rate = message.learning_rate if message.HasField("learning_rate") else config.learning_rate
    return Assigned(
        ticket=ticket_from_pb(message.ticket),
        work=Work(
            seeds=tuple(message.first_seed + offset for offset in offsets),
            learning_rate=positive(rate, "learning rate"),
            eps=positive(message.eps if message.HasField("eps") else config.eps, "eps"),
            want_digest=message.want_digest,
        ),
        deadline_ms=message.deadline_ms,
    )


def answer_to_pb(answer: SendAnswer, signer: AnswerSigner | None = None) -> wire.SessionRequest:
    """An answer as a session message, signed if there is a `signer`."""
    scalars = answer.scalars
    message = wire.Answer(
        ticket=ticket_to_pb(answer.ticket),
        projected_grads=scalars.projected_grads,
        mean_loss=scalars.mean_loss,
        weights_digest64=scalars.weights_digest64,
        rows=scalars.rows,
        head64=answer.head64,
    )
    if signer is not None:
        # The message's floats are binary32 values, and those are signed.
        message.signature = signer.sign(answer.ticket, answer.head, _scalars_in(message))
    return wire.SessionRequest(answer=message)


def answer_from_pb(worker: str, message: wire.Answer) -> AnswerReceived:
    """A worker's answer as an event for the round machine, without its signature."""
    return AnswerReceived(worker, ticket_from_pb(message.ticket), _scalars_in(message))


def _scalars_in(message: wire.Answer) -> Scalars:
    has = message.HasField
    return Scalars(
        projected_grads=tuple(message.projected_grads),
        mean_loss=message.mean_loss if has("mean_loss") else None,
        weights_digest64=message.weights_digest64 if has("weights_digest64") else None,
        rows=message.rows if has("rows") else None,
    )


def unable_to_pb(unable: SendUnable) -> wire.SessionRequest:
    """A worker's inability to measure as a session message; the reason is cut to 512 characters."""
    return wire.SessionRequest(
        unable=wire.Unable(
            ticket=ticket_to_pb(unable.ticket),
            reason=unable.reason[:512],
            useless_shares_of=unable.useless_shares_of,
        )
    )


def unable_from_pb(worker: str, message: wire.Unable) -> UnableReceived:
    """A worker's inability to measure as an event, without control characters in its reason."""
    reason = "".join(c if c.isprintable() else " " for c in message.reason[:512])
    useless = tuple(message.useless_shares_of[:SECURE_COHORT_MAX])
    return UnableReceived(worker, ticket_from_pb(message.ticket), reason, useless)


def hello_to_pb(
    genesis: Genesis,
    worker: str,
    round_: int,
    head: bytes,
    *,
    base_form: str = "",
    signer: AnswerSigner | None = None,
) -> wire.SessionRequest:
    """The hello of `worker`, which holds the run's model, at the round and head that it holds.

    base_form: the form of the base that it measures with, as `Genesis.form_digest` takes it.
    signer: what signs its answers, if they are signed.
    """
    config = genesis.config
    return wire.SessionRequest(
        hello=wire.Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=config.run_id,
            worker=worker,
            manifest_digest=genesis.manifest_digest,
            base_digest=genesis.form_digest(base_form),
            tokenizer_digest=genesis.tokenizer_digest,
            recipe=config.recipe,
            round=round_,
            head=head,
            signing_key=b"" if signer is None else signer.public_key,
        )
    )


def commit_of(record_bytes: bytes, config: RunConfig, head_before: bytes = b"") -> CommitReceived:
    """A commit as an event for the session machine.

    Raises `JournalCorruptError` for another record, or a commit beyond what the contract allows.
    """
    record = decode_commit(record_bytes)
    record.check_within(config)
    return CommitReceived(record, record_bytes, head_before)


def commits_in(
    page: wire.ReadJournalResponse,
    config: RunConfig,
    round_: int,
    *,
    from_newest_base: bool = False,
) -> list[CommitReceived]:
    """The commits of a page that was asked for from the round after `round_` on; may be empty.

    With `from_newest_base` it may begin with a later commit that starts from the base. Raises as
    `commit_of`, and `UnavailableError` for a page that leads no further: read again and again, it
    would be read for ever.
    """
    commits = [
        commit_of(entry.record, config, page.head_before if from_newest_base and not n else b"")
        for n, entry in enumerate(page.entries)
    ]
    if commits and commits[-1].commit.round <= round_:
        raise UnavailableError(
            f"The coordinator sent commits up to round {commits[-1].commit.round} to a party that "
            f"holds round {round_} and asked for later ones; check the coordinator."
        )
    return commits


def event_from_pb(message: wire.SessionResponse, config: RunConfig) -> SessionEvent:
    """A message from the coordinator as an event for the session machine.

    Raises the error with which the coordinator ended the session, if the message says so, and
    otherwise as `commit_of` and `assigned_from_pb`.
    """
    match message.WhichOneof("kind"):
        case "welcome":
            welcome = message.welcome
            return Welcomed(welcome.epoch, welcome.round, welcome.head)
        case "commit":
            return commit_of(message.commit.record, config)
        case "assign":
            return assigned_from_pb(message.assign, config)
        case "ack":
            return Acknowledged(ticket_from_pb(message.ack.ticket), message.ack.head)
        case "refused":
            refused = message.refused
            return RefusedByCoordinator(
                ticket_from_pb(refused.ticket), refused.reason, refused.message
            )
        case "finished":
            return FinishedByCoordinator(message.finished.round)
        case "sum_ask":
            return asked_from_pb(message.sum_ask)
        case "ended":
            raise error_from("", message.ended.reason, message.ended.message)
        case _:
            pass
    raise ProtocolError(
        "The coordinator sent a message that this version does not know; "
        "use the same FedMeZO version."
    )


def message_to_pb(
    message: Assign | Ack | Refuse | Finish | AskSum,
    config: RunConfig,
    head_at: Callable[[int], bytes],
) -> wire.SessionResponse:
    """A message from the round machine to a worker, as a session message."""
    match message:
        case Assign():
            return assign_to_pb(message, config)
        case Ack(_, ticket):
            head = head_at(ticket.round - 1)
            return wire.SessionResponse(ack=wire.Ack(ticket=ticket_to_pb(ticket), head=head))
        case Refuse(_, ticket, reason, sentence):
            return wire.SessionResponse(
                refused=wire.Refused(ticket=ticket_to_pb(ticket), reason=reason, message=sentence)
            )
        case Finish(_, round_):
            return wire.SessionResponse(finished=wire.Finished(round=round_))
        case AskSum():
            return ask_to_pb(message)


def error_to_pb(error: FedMezoError) -> wire.SessionResponse:
    """The error that ends a session, as its last message, for transports without statuses."""
    return wire.SessionResponse(ended=wire.Ended(reason=type(error).__name__, message=str(error)))


def commit_to_pb(row: Row, signature: bytes = b"") -> wire.SessionResponse:
    """A commit's row of the journal as a session message, with the signature of its head."""
    return wire.SessionResponse(commit=wire.CommitNotice(record=row.body, signature=signature))
