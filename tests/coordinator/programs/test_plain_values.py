"""The one shape of what the commands print as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fedmezo_coordinator.programs.plain_values import json_line, message_values, record_values
from fedmezo_core.journal.codec import config_to_pb
from fedmezo_core.journal.journal import Row
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Record,
    Scalars,
    SeedRange,
    SignedHead,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb
from tests.integration.support.harness import config_of, genesis_of

DIGEST = bytes(range(32))
DIGEST64 = int.from_bytes(DIGEST[:8], "little")


def read(values: dict[str, Any]) -> dict[str, Any]:
    """What a program reads."""
    found: dict[str, Any] = json.loads(json_line(values))
    return found


def record_of(record: Record) -> dict[str, Any]:
    return read(record_values(Row(7, b"", DIGEST), record))


def keys_of(value: Any) -> set[str]:
    """The keys of objects at any depth."""
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in keys_of(item)}
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item)}
    return set()


STATUS = wire.GetStatusResponse(
    config=config_to_pb(config_of()),
    phase=wire.PHASE_OPEN,
    round=2**40,
    head=DIGEST,
    workers=[wire.WorkerStatus(worker="w1", bytes_up=2**63, mean_loss=0.5)],
    evaluations=[pb.Evaluated(round=1, loss=float("nan"), weights_digest=DIGEST)],
    divergences=[pb.Diverged(round=1, party="w1", found_digest64=DIGEST64)],
    digests=[wire.PartyDigest(party="w1", round=1, weights_digest=DIGEST)],
)


def test_a_status_has_numbers_words_and_hex() -> None:
    values = read(message_values(STATUS))
    assert values["phase"] == "open"
    assert values["round"] == 2**40
    assert values["head"] == values["digests"][0]["weights_digest"] == DIGEST.hex()
    [worker] = values["workers"]
    assert (worker["bytes_up"], worker["mean_loss"], worker["learning_rate"]) == (2**63, 0.5, None)
    assert worker["connected"] is False
    assert values["evaluations"][0]["loss"] is None
    assert values["divergences"][0]["found_digest64"] == DIGEST.hex()[:16]


def test_a_status_and_a_journal_spell_alike() -> None:
    status = read(message_values(STATUS))
    assert status["config"] == record_of(genesis_of(config_of()))["config"]
    evaluated = record_of(Evaluated(1, float("nan"), 0.0, 0, DIGEST))
    assert status["evaluations"][0].items() <= evaluated.items()
    assert status["divergences"][0].items() <= record_of(Diverged(1, "w1", DIGEST64, 0)).items()


@pytest.mark.parametrize(
    "values",
    [
        message_values(STATUS),
        *(
            record_values(Row(7, b"", DIGEST), record)
            for record in (
                genesis_of(config_of()),
                Answered(1, 0, Scalars((0.5,), None, DIGEST64)),
                Committed(1, (SeedRange(2**63, (0.5,)),), 3, 1.0),
                SignedHead(1, 2, DIGEST),
            )
        ),
    ],
)
def test_every_key_is_snake_case(values: dict[str, Any]) -> None:
    assert all(re.fullmatch("[a-z][a-z0-9_]*", key) for key in keys_of(read(values)))


def test_records_keep_their_names() -> None:
    assert record_of(SignedHead(1, 2, DIGEST))["kind"] == "checkpoint"
    committed = record_of(Committed(1, (SeedRange(2**63, (0.5,)),), 3, 1.0))
    assert committed["runs"] == [{"first_seed": 2**63, "coefficients": [0.5]}]
    answered = record_of(Answered(1, 0, Scalars((0.5,), None, DIGEST64)))
    assert answered["weights_digest64"] == DIGEST.hex()[:16]
    assert answered["mean_loss"] is None
