"""Between our dataclasses and `fedmezo.v1` messages: journal records and the contract.

Decoding is strict. A missing or unknown kind, an unset enum, a digest of the wrong length or a
value that is no finite number is a `ProtocolError` (for a record, `JournalCorruptError`), never a
default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableSequence
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import DecodeError, Message
from pydantic import BaseModel, ValidationError

from fedmezo_core.config import RunConfig, sentence_of
from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.records import (
    SIGNATURE_BYTES,
    Admitted,
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Excluded,
    Genesis,
    Masked,
    Opened,
    Paused,
    Readmitted,
    Record,
    Resumed,
    RoundSlot,
    Scalars,
    SeedRange,
    SignedHead,
    Snapshotted,
    Started,
    Stopped,
    Summed,
)
from fedmezo_proto.v1 import journal_pb2 as pb

DIGEST_BYTES = 32
MessageT = TypeVar("MessageT", bound=Message)

_FIRST_BYTES = {field.name: field.number << 3 | 2 for field in pb.Record.DESCRIPTOR.fields}
"""Kind of a record -> the byte that its body begins with: the tag of its field in `Record`."""


# ---------------------------------------------------------------- configuration


def config_to_pb(config: RunConfig) -> pb.RunConfig:
    """A run's contract as a message.

    `optional` fields are left out at their defaults, so that the bytes of a contract stay the same
    when a new version adds a field.
    """
    message = pb.RunConfig()
    _fill(message, config)
    return message


def config_from_pb(message: pb.RunConfig) -> RunConfig:
    """A run's contract from a message; `ProtocolError` if a value is not allowed."""
    try:
        return RunConfig(**_values_in(message))
    except ValidationError as error:
        raise ProtocolError(sentence_of(error, "the run's configuration")) from None


def _fill(message: Any, model: BaseModel) -> None:
    """Set each field of `message` from the field of `model` that has its name."""
    for field in message.DESCRIPTOR.fields:
        name, value = field.name, getattr(model, field.name)
        if isinstance(value, BaseModel):
            _fill(getattr(message, name), value)
        elif field.message_type is pb.Verbalizer.DESCRIPTOR:
            message.verbalizers.extend(pb.Verbalizer(label=k, word=v) for k, v in value.items())
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
        elif not field.has_presence or value != type(model).model_fields[name].default:
            setattr(
                message, name, _numbers_of(field.enum_type)[value] if field.enum_type else value
            )


def _values_in(message: Any) -> dict[str, Any]:
    """What `_fill` set; the defaults of fields that are left out are the model's."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        name, value = field.name, getattr(message, field.name)
        if field.message_type is pb.Verbalizer.DESCRIPTOR:
            values[name] = {one.label: one.word for one in value}
        elif isinstance(value, MutableSequence):
            values[name] = tuple(value)
        elif not field.has_presence or message.HasField(name):
            if field.message_type:
                value = _values_in(value)
            values[name] = (
                _name_of(_numbers_of(field.enum_type), value) if field.enum_type else value
            )
    return values


def _numbers_of(enum: EnumDescriptor) -> dict[str, int]:
    """The contract's word for each value of an enum but the unset one, with its number."""
    unset, *values = enum.values
    prefix = unset.name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix).lower(): value.number for value in values}


# ---------------------------------------------------------------- records


def encode_record(record: Record) -> bytes:
    """The bytes of a record, its body.

    A record is encoded once. Its body is hashed as it was written and never encoded again.
    """
    return _record_to_pb(record).SerializeToString(deterministic=True)


def encode_records(records: Iterable[Record]) -> list[bytes]:
    """The bodies of several records, in their order."""
    return [encode_record(record) for record in records]


def decode_record(body: bytes) -> Record:
    """The record in a body; `JournalCorruptError` if it holds none, or more than one.

    The journal takes a record's kind from the first byte of its body, while protobuf takes the last
    of several kinds. So a body whose first byte says another kind is refused.
    """
    try:
        message = pb.Record.FromString(body)
        kind = message.WhichOneof("kind")
        if kind is None or body[0] != _FIRST_BYTES[kind]:
            raise ProtocolError("its kind is not known to this version")
        return _record_from_pb(message, kind)
    except (DecodeError, ProtocolError) as error:
        raise JournalCorruptError(
            f"A journal record of {len(body)} bytes cannot be read ({error}); "
            "restore the journal from a copy, or check that the versions match."
        ) from None


def decode_commit(body: bytes) -> Committed:
    """The commit in a body; `JournalCorruptError` if it holds another record or none."""
    record = decode_record(body)
    if not isinstance(record, Committed):
        raise JournalCorruptError(
            f"A {type(record).__name__} record came where a commit must; use the same FedMeZO "
            "version."
        )
    return record


def pairs_in_commit(body: bytes) -> tuple[int, bool]:
    """How many pairs a commit holds, and whether it starts from the base; `body` is a commit's.

    Takes a third of the time of `decode_record`.
    """
    commit = pb.Record.FromString(body).committed
    return sum([len(run.coefficients) for run in commit.runs]), commit.from_base


def _record_to_pb(record: Record) -> pb.Record:
    match record:
        case Genesis():
            genesis = _as(pb.Genesis, record, config=config_to_pb(record.config))
            return pb.Record(genesis=genesis)
        case Started():
            return pb.Record(started=_as(pb.Started, record))
        case Opened():
            return pb.Record(opened=_as(pb.Opened, record))
        case Answered():
            return pb.Record(answered=answered_to_pb(record))
        case Committed():
            return pb.Record(
                committed=pb.Committed(
                    round=record.round,
                    runs=[
                        pb.PairRun(first_seed=run.first_seed, coefficients=run.coefficients)
                        for run in record.seed_ranges
                    ],
                    rounding_seed=record.rounding_seed,
                    decay=None if record.decay == 1.0 else record.decay,
                    from_base=record.from_base,
                    staleness=[record.round - answer.round for answer in record.answers],
                    slots=[answer.slot for answer in record.answers],
                )
            )
        case Diverged():
            return pb.Record(diverged=diverged_to_pb(record))
        case Evaluated():
            return pb.Record(evaluated=evaluated_to_pb(record))
        case Paused():
            return pb.Record(paused=_as(pb.Paused, record))
        case Resumed():
            return pb.Record(resumed=_as(pb.Resumed, record))
        case Stopped():
            return pb.Record(stopped=_as(pb.Stopped, record))
        case Excluded():
            return pb.Record(excluded=excluded_to_pb(record))
        case Readmitted():
            return pb.Record(readmitted=_as(pb.Readmitted, record))
        case SignedHead():
            return pb.Record(checkpoint=_as(pb.Checkpoint, record))
        case Snapshotted():
            return pb.Record(snapshotted=_as(pb.Snapshotted, record))
        case Admitted():
            return pb.Record(admitted=admitted_to_pb(record))
        case Masked():
            return pb.Record(masked=masked_to_pb(record))
        case Summed():
            return pb.Record(summed=summed_to_pb(record))


def _as(kind: type[MessageT], record: Any, **others: Any) -> MessageT:
    """A message with the fields of a record, under the same names, except for `others`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return kind(**values | others)


def _record_from_pb(message: pb.Record, kind: str) -> Record:
    match kind:
        case "answered":
            return answered_from_pb(message.answered)
        case "genesis":
            genesis = message.genesis
            return Genesis(
                config=config_from_pb(genesis.config),
                manifest_digest=digest_in(genesis.manifest_digest, "manifest_digest"),
                base_digest=digest_in(genesis.base_digest, "base_digest"),
                tokenizer_digest=digest_in(genesis.tokenizer_digest, "tokenizer_digest"),
                trainable_elements=genesis.trainable_elements,
                trainable_bytes=genesis.trainable_bytes,
                tokenizer_parts=tuple(
                    digest_in(part, "tokenizer_parts") for part in genesis.tokenizer_parts
                ),
            )
        case "started":
            return Started(epoch=message.started.epoch)
        case "opened":
            opened = message.opened
            if len(opened.learning_rates) not in (0, len(opened.workers)):
                raise ProtocolError(
                    f"round {opened.round} opens with {len(opened.learning_rates)} learning rates "
                    f"for {len(opened.workers)} workers"
                )
            return Opened(
                round=opened.round,
                first_slot=opened.first_slot,
                workers=tuple(opened.workers),
                learning_rates=tuple(positive(r, "learning rate") for r in opened.learning_rates),
                eps=positive(opened.eps, "eps") if opened.HasField("eps") else None,
            )
        case "committed":
            committed = message.committed
            seed_ranges = tuple(
                SeedRange(run.first_seed, tuple(run.coefficients[:])) for run in committed.runs
            )
            # A sum of finite binary32 values is finite in binary64; infinities and NaN stay in it.
            if not all(math.isfinite(sum(run.coefficients)) for run in seed_ranges):
                raise ProtocolError(
                    f"the commit of round {committed.round} holds a coefficient that is no number"
                )
            decay = committed.decay if committed.HasField("decay") else 1.0
            if not 0 < decay <= 1:
                raise ProtocolError(
                    f"the commit of round {committed.round} multiplies the weights by {decay!r}"
                )
            return Committed(
                round=committed.round,
                seed_ranges=seed_ranges,
                rounding_seed=committed.rounding_seed,
                decay=decay,
                from_base=committed.from_base,
                answers=_slots_of(committed),
            )
        case "diverged":
            return diverged_from_pb(message.diverged)
        case "evaluated":
            return evaluated_from_pb(message.evaluated)
        case "paused":
            return Paused(message.paused.round, message.paused.reason)
        case "resumed":
            return Resumed(positive(message.resumed.rate_factor, "rate factor"))
        case "stopped":
            return Stopped(message.stopped.round, message.stopped.reason)
        case "excluded":
            return excluded_from_pb(message.excluded)
        case "readmitted":
            return Readmitted(message.readmitted.round, message.readmitted.worker)
        case "checkpoint":
            found = message.checkpoint
            return SignedHead(
                epoch=found.epoch,
                round=found.round,
                head=digest_in(found.head, "head"),
                key=digest_in(found.key, "key") if found.key or found.signature else b"",
                signature=found.signature,
            )
        case "snapshotted":
            snapshotted = message.snapshotted
            return Snapshotted(
                round=snapshotted.round,
                weights_digest=digest_in(snapshotted.weights_digest, "weights_digest"),
                file_sha256=digest_in(snapshotted.file_sha256, "file_sha256"),
                file_bytes=snapshotted.file_bytes,
            )
        case "admitted":
            return admitted_from_pb(message.admitted)
        case "masked":
            return masked_from_pb(message.masked)
        case "summed":
            return summed_from_pb(message.summed)
        case _:
            raise ProtocolError("its kind is not known to this version")


def _slots_of(message: pb.Committed) -> tuple[RoundSlot, ...]:
    if len(message.staleness) != len(message.slots) or any(
        age >= message.round for age in message.staleness
    ):
        raise ProtocolError(
            f"the commit of round {message.round} names {len(message.slots)} slots of rounds that "
            f"are {list(message.staleness)} before it"
        )
    return tuple(
        RoundSlot(message.round - age, slot)
        for age, slot in zip(message.staleness, message.slots, strict=True)
    )


def answered_to_pb(record: Answered) -> pb.Answered:
    """An accepted answer as a message."""
    scalars = record.scalars
    return pb.Answered(
        round=record.round,
        slot=record.slot,
        projected_grads=scalars.projected_grads,
        mean_loss=scalars.mean_loss,
        weights_digest64=scalars.weights_digest64,
        rows=scalars.rows,
        signature=record.signature,
    )


def answered_from_pb(message: pb.Answered) -> Answered:
    """An accepted answer from a message.

    Raises `ProtocolError` if it holds a value that is no number, or bytes that are no signature.
    """
    has = message.HasField
    grads = tuple(message.projected_grads[:])  # a slice is made in one step
    # As for a commit's coefficients: infinities and NaN stay in the sum. An unset loss counts 0.
    if not math.isfinite(sum(grads) + message.mean_loss):
        raise ProtocolError(
            f"the answer to slot {message.slot} of round {message.round} holds what is no number"
        )
    if len(message.signature) not in (0, SIGNATURE_BYTES):
        raise ProtocolError(f"a signature is {len(message.signature)} bytes long, not 64")
    return Answered(
        message.round,
        message.slot,
        Scalars(
            grads,
            message.mean_loss if has("mean_loss") else None,
            message.weights_digest64 if has("weights_digest64") else None,
            message.rows if has("rows") else None,
        ),
        message.signature,
    )


def admitted_to_pb(record: Admitted) -> pb.Admitted:
    """A worker's key as a message."""
    return _as(pb.Admitted, record)


def admitted_from_pb(message: pb.Admitted) -> Admitted:
    """A worker's key from a message; `ProtocolError` if it is not 32 bytes long."""
    return Admitted(message.worker, digest_in(message.key, "key"))


def masked_to_pb(record: Masked) -> pb.Masked:
    """The slots of a sum that is about to be unmasked, as a message."""
    return _as(pb.Masked, record)


def masked_from_pb(message: pb.Masked) -> Masked:
    """The slots of a sum that is about to be unmasked, from a message."""
    return Masked(message.round, tuple(message.slots))


def summed_to_pb(record: Summed) -> pb.Summed:
    """A sum as a message."""
    return _as(pb.Summed, record)


def summed_from_pb(message: pb.Summed) -> Summed:
    """A sum from a message."""
    return Summed(message.round, tuple(message.sums))


def diverged_to_pb(record: Diverged) -> pb.Diverged:
    """A divergence as a message."""
    return _as(pb.Diverged, record)


def diverged_from_pb(message: pb.Diverged) -> Diverged:
    """A divergence from a message."""
    return Diverged(
        round=message.round,
        party=message.party,
        found_digest64=message.found_digest64,
        expected_digest64=message.expected_digest64,
    )


def excluded_to_pb(record: Excluded) -> pb.Excluded:
    """An exclusion as a message."""
    return _as(pb.Excluded, record)


def excluded_from_pb(message: pb.Excluded) -> Excluded:
    """An exclusion from a message."""
    return Excluded(message.round, message.worker, message.reason)


def evaluated_to_pb(record: Evaluated) -> pb.Evaluated:
    """An evaluation as a message."""
    return _as(pb.Evaluated, record)


def evaluated_from_pb(message: pb.Evaluated) -> Evaluated:
    """An evaluation from a message."""
    return Evaluated(
        round=message.round,
        loss=message.loss,
        accuracy=message.accuracy,
        rows=message.rows,
        weights_digest=digest_in(message.weights_digest, "weights_digest"),
        auc=message.auc if message.HasField("auc") else None,
    )


# ---------------------------------------------------------------- small pieces


def digest_in(value: bytes, field: str) -> bytes:
    """`value`, if it is 32 bytes long; `ProtocolError`, which names the `field`, otherwise."""
    if len(value) != DIGEST_BYTES:
        raise ProtocolError(f"{field} is {len(value)} bytes long, not {DIGEST_BYTES}")
    return value


def positive(value: float, what: str) -> float:
    """`value`, if it is finite and above 0; `ProtocolError`, which calls it `what`, otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise ProtocolError(f"a {what} of {value!r} is not finite and above 0")
    return value


def _name_of(names: Mapping[str, int], value: int) -> Any:
    for name, number in names.items():
        if number == value:
            return name
    raise ProtocolError(f"value {value} is none of {', '.join(names)} in this version")
