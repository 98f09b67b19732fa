"""Between our dataclasses and `fedmezo.v1` messages: journal records and the contract.

Decoding is strict. A missing or unknown kind, an unset enum, a digest of the wrong length or a
value that is no finite number is a `ProtocolError` (for a record, `JournalCorruptError`), never a
default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig, sentence_of
from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Paused,
    Record,
    Resumed,
    RoundSlot,
    Scalars,
    SeedRange,
    SignedHead,
    Snapshotted,
    Started,
    Stopped,
)
from fedmezo_proto.v1 import journal_pb2 as pb

DIGEST_BYTES = 32

_DISTRIBUTION = {
    "rademacher": pb.DISTRIBUTION_RADEMACHER,
    "gaussian": pb.DISTRIBUTION_GAUSSIAN,
    "low_rank_1": pb.DISTRIBUTION_LOW_RANK_1,
    "low_rank_2": pb.DISTRIBUTION_LOW_RANK_2,
    "low_rank_4": pb.DISTRIBUTION_LOW_RANK_4,
}
_ESTIMATOR = {"two_sided": pb.ESTIMATOR_TWO_SIDED, "one_sided": pb.ESTIMATOR_ONE_SIDED}
_DTYPE = {
    "float32": pb.WEIGHT_TYPE_FLOAT32,
    "bfloat16": pb.WEIGHT_TYPE_BFLOAT16,
    "float16": pb.WEIGHT_TYPE_FLOAT16,
}
_ROUNDING = {"stochastic": pb.ROUNDING_STOCHASTIC, "nearest": pb.ROUNDING_NEAREST}
_SCHEDULE = {
    "constant": pb.SCHEDULE_CONSTANT,
    "linear": pb.SCHEDULE_LINEAR,
    "cosine": pb.SCHEDULE_COSINE,
}
_WEIGHTING = {"uniform": pb.WEIGHTING_UNIFORM, "rows": pb.WEIGHTING_ROWS}
_PERSONAL_RATE = {
    "frozen": pb.PERSONAL_RATE_FROZEN,
    "last_loss": pb.PERSONAL_RATE_LAST_LOSS,
    "mean_loss": pb.PERSONAL_RATE_MEAN_LOSS,
    "update_distance": pb.PERSONAL_RATE_UPDATE_DISTANCE,
    "random": pb.PERSONAL_RATE_RANDOM,
}
_SEED_POLICY = {
    "per_worker": pb.SEED_POLICY_PER_WORKER,
    "shared": pb.SEED_POLICY_SHARED,
    "pool": pb.SEED_POLICY_POOL,
}
_POOL_SAMPLING = {
    "uniform": pb.POOL_SAMPLING_UNIFORM,
    "weighted": pb.POOL_SAMPLING_WEIGHTED,
}
_OPTIONAL: Mapping[str, Mapping[str, int] | None] = {
    "probes": None,
    "estimator": _ESTIMATOR,
    "normalized_step": None,
    "schedule": _SCHEDULE,
    "warmup_rounds": None,
    "final_rate_fraction": None,
    "eps_follows_rate": None,
    "weight_decay": None,
    "weighting": _WEIGHTING,
    "personal_rate": _PERSONAL_RATE,
    "personal_rate_amplitude": None,
    "seed_policy": _SEED_POLICY,
    "pool_size": None,
    "pool_sampling": _POOL_SAMPLING,
    "rebase_every_rounds": None,
    "pause_loss_factor": None,
    "pause_rounds": None,
    "early_stop_evaluations": None,
    "buffer_answers": None,
    "staleness_max_rounds": None,
    "staleness_exponent": None,
}
"""Fields that the message leaves out at their defaults, so that the bytes of a contract stay the
same when a new version adds a field; for enums, with the number of each name."""
_TASK_KIND = {
    "classification": pb.TASK_KIND_CLASSIFICATION,
    "instruction": pb.TASK_KIND_INSTRUCTION,
}
_FIRST_BYTES = {field.name: field.number << 3 | 2 for field in pb.Record.DESCRIPTOR.fields}
"""Kind of a record -> the byte that its body begins with: the tag of its field in `Record`."""


# ---------------------------------------------------------------- configuration


def config_to_pb(config: RunConfig) -> pb.RunConfig:
    """A run's contract as a message."""
    message = pb.RunConfig(
        run_id=config.run_id,
        model=config.model,
        task=pb.TaskConfig(
            kind=_TASK_KIND[config.task.kind],
            template=config.task.template,
            label_column=config.task.label_column,
            verbalizers=[
                pb.Verbalizer(label=label, word=word)
                for label, word in config.task.verbalizers.items()
            ],
            response_column=config.task.response_column,
            tokens_max=config.task.tokens_max,
            objective=config.task.objective or None,
            generated_tokens_max=config.task.generated_tokens_max or None,
        ),
        seed=config.seed,
        rounds=config.rounds,
        local_steps=config.local_steps,
        batch_size=config.batch_size,
        distribution=_DISTRIBUTION[config.distribution],
        eps=config.eps,
        learning_rate=config.learning_rate,
        projected_grad_abs_max=config.projected_grad_abs_max,
        dtype=_DTYPE[config.dtype],
        rounding=_ROUNDING[config.rounding],
        workers_min=config.workers_min,
        quorum=config.quorum,
        cohort_size_max=config.cohort_size_max,
        deadline_ms=config.deadline_ms,
        digest_every_rounds=config.digest_every_rounds,
        report_losses=config.report_losses,
        train=config.train,
    )
    for name, numbers in _OPTIONAL.items():
        value = getattr(config, name)
        if value != RunConfig.model_fields[name].default:
            setattr(message, name, value if numbers is None else numbers[value])
    if config.lora is not None:
        message.lora.CopyFrom(
            pb.LoraConfig(
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                target_modules=config.lora.target_modules,
                freeze_a=config.lora.freeze_a or None,
            )
        )
    return message


def config_from_pb(message: pb.RunConfig) -> RunConfig:
    """A run's contract from a message; `ProtocolError` if a value is not allowed."""
    optional = {
        name: value if numbers is None else _name_of(numbers, value)
        for name, numbers in _OPTIONAL.items()
        if message.HasField(name)  # type: ignore[arg-type]
        for value in [getattr(message, name)]
    }
    try:
        return RunConfig(
            run_id=message.run_id,
            model=message.model,
            task=TaskConfig(
                kind=_name_of(_TASK_KIND, message.task.kind),
                template=message.task.template,
                label_column=message.task.label_column,
                verbalizers={v.label: v.word for v in message.task.verbalizers},
                response_column=message.task.response_column,
                tokens_max=message.task.tokens_max,
                objective=message.task.objective,
                generated_tokens_max=message.task.generated_tokens_max,
            ),
            lora=(
                LoraConfig(
                    rank=message.lora.rank,
                    alpha=message.lora.alpha,
                    target_modules=tuple(message.lora.target_modules),
                    freeze_a=message.lora.freeze_a,
                )
                if message.HasField("lora")
                else None
            ),
            seed=message.seed,
            rounds=message.rounds,
            local_steps=message.local_steps,
            batch_size=message.batch_size,
            distribution=_name_of(_DISTRIBUTION, message.distribution),
            eps=message.eps,
            learning_rate=message.learning_rate,
            projected_grad_abs_max=message.projected_grad_abs_max,
            dtype=_name_of(_DTYPE, message.dtype),
            rounding=_name_of(_ROUNDING, message.rounding),
            workers_min=message.workers_min,
            quorum=message.quorum,
            cohort_size_max=message.cohort_size_max,
            deadline_ms=message.deadline_ms,
            digest_every_rounds=message.digest_every_rounds,
            report_losses=message.report_losses,
            train=tuple(message.train),
            **optional,
        )
    except ValidationError as error:
        raise ProtocolError(sentence_of(error, "the run's configuration")) from None


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


def pairs_in_commit(body: bytes) -> tuple[int, bool]:
    """How many pairs a commit holds, and whether it starts from the base; `body` is a commit's.

    Takes a third of the time of `decode_record`.
    """
    commit = pb.Record.FromString(body).committed
    return sum([len(run.coefficients) for run in commit.runs]), commit.from_base


def _record_to_pb(record: Record) -> pb.Record:
    match record:
        case Genesis():
            return pb.Record(
                genesis=pb.Genesis(
                    config=config_to_pb(record.config),
                    manifest_digest=record.manifest_digest,
                    base_digest=record.base_digest,
                    tokenizer_digest=record.tokenizer_digest,
                    trainable_elements=record.trainable_elements,
                    trainable_bytes=record.trainable_bytes,
                )
            )
        case Started():
            return pb.Record(started=pb.Started(epoch=record.epoch))
        case Opened():
            return pb.Record(
                opened=pb.Opened(
                    round=record.round,
                    first_slot=record.first_slot,
                    workers=record.workers,
                    learning_rates=record.learning_rates,
                    eps=record.eps,
                )
            )
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
            return pb.Record(paused=pb.Paused(round=record.round, reason=record.reason))
        case Resumed():
            return pb.Record(resumed=pb.Resumed(rate_factor=record.rate_factor))
        case Stopped():
            return pb.Record(stopped=pb.Stopped(round=record.round, reason=record.reason))
        case SignedHead():
            return pb.Record(
                checkpoint=pb.Checkpoint(
                    epoch=record.epoch,
                    round=record.round,
                    head=record.head,
                    key=record.key,
                    signature=record.signature,
                )
            )
        case Snapshotted():
            return pb.Record(
                snapshotted=pb.Snapshotted(
                    round=record.round,
                    weights_digest=record.weights_digest,
                    file_sha256=record.file_sha256,
                    file_bytes=record.file_bytes,
                )
            )


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
        case "checkpoint":
            found = message.checkpoint
            return SignedHead(
                epoch=found.epoch,
                round=found.round,
                head=digest_in(found.head, "head"),
                key=digest_in(found.key, "key") if found.key else b"",
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
    )


def answered_from_pb(message: pb.Answered) -> Answered:
    """An accepted answer from a message."""
    has = message.HasField
    return Answered(
        message.round,
        message.slot,
        Scalars(
            tuple(message.projected_grads[:]),  # a slice is made in one step
            message.mean_loss if has("mean_loss") else None,
            message.weights_digest64 if has("weights_digest64") else None,
            message.rows if has("rows") else None,
        ),
    )


def diverged_to_pb(record: Diverged) -> pb.Diverged:
    """A divergence as a message."""
    return pb.Diverged(
        round=record.round,
        party=record.party,
        found_digest64=record.found_digest64,
        expected_digest64=record.expected_digest64,
    )


def diverged_from_pb(message: pb.Diverged) -> Diverged:
    """A divergence from a message."""
    return Diverged(
        round=message.round,
        party=message.party,
        found_digest64=message.found_digest64,
        expected_digest64=message.expected_digest64,
    )


def evaluated_to_pb(record: Evaluated) -> pb.Evaluated:
    """An evaluation as a message."""
    return pb.Evaluated(
        round=record.round,
        loss=record.loss,
        accuracy=record.accuracy,
        rows=record.rows,
        weights_digest=record.weights_digest,
        auc=record.auc,
    )


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
