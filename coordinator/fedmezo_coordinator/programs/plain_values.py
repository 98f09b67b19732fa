"""What the commands print as JSON, in one shape: the status, records, and where a journal begins.

Keys are snake_case: the names in the .proto files. Numbers are JSON numbers, also those of 64 bits;
one that is not finite is null, and so is a value that is absent. Bytes and the 64 bits of a digest
are in hexadecimal, words of an enumeration in lower case.
"""

from __future__ import annotations

import json
import math
from collections.abc import MutableSequence
from typing import Annotated, Any

import typer
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from fedmezo_coordinator.programs.view import best_of
from fedmezo_core import records
from fedmezo_core.journal.codec import config_from_pb
from fedmezo_core.journal.journal import Row
from fedmezo_core.journal.sealed import SealedState
from fedmezo_core.layered_settings import OutputFormat
from fedmezo_proto.v1.coordinator_pb2 import GetStatusResponse
from fedmezo_proto.v1.journal_pb2 import RunConfig

_NAMES = {"seed_ranges": "runs", "signedhead": "checkpoint"}
"""Names in the code -> their names in the .proto files."""


Format = Annotated[
    OutputFormat,
    typer.Option("--format", help="text: for a person; json: an object on each line"),
]
AsJson = Annotated[bool, typer.Option("--json", help="the same as --format json")]


def chosen_format(format_: OutputFormat, as_json: bool) -> OutputFormat:
    """The format that the two options come to."""
    return OutputFormat.JSON if as_json else format_


def finite(given: float | None) -> float | None:
    """A number of the command line; raises `typer.BadParameter` for NaN and infinities."""
    if given is not None and not math.isfinite(given):
        raise typer.BadParameter(f"{given} is not allowed: use a number that is finite.")
    return given


def say(format_: OutputFormat, text: str, values: dict[str, Any]) -> None:
    """Print what a command did, as text or as a line of JSON."""
    print(json_line(values) if format_ is OutputFormat.JSON else text, flush=True)


def json_line(values: dict[str, Any]) -> str:
    """The values as JSON in one line; a number that is not finite becomes null."""
    return json.dumps(_plain(values), allow_nan=False)


def message_values(message: Message) -> dict[str, Any]:
    """All fields of a message from the wire, those with their default value included.

    A run's contract looks as in its genesis record.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, MutableSequence):
            values[field.name] = [_field_value(field, item) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            values[field.name] = None
        else:
            values[field.name] = _field_value(field, value)
    return values


def status_values(status: GetStatusResponse) -> dict[str, Any]:
    """All fields of a status, and `best`, the evaluation with the smallest loss so far."""
    best = best_of(status)
    return {**message_values(status), "best": None if best is None else message_values(best)}


def record_values(row: Row, record: records.Record) -> dict[str, Any]:
    """A record of a journal, with its place."""
    kind = type(record).__name__.lower()
    return {
        "seqno": row.seqno,
        "chain": row.chain.hex(),
        "kind": _NAMES.get(kind, kind),
        **_plain(record),
    }


def origin_values(origin: SealedState) -> dict[str, Any]:
    """What stands in a journal for the records that were dropped."""
    return {
        "seqno": origin.seqno,
        "chain": origin.chain.hex(),
        "kind": "origin",
        "round": origin.round,
        "head": origin.head.hex(),
        "key": origin.key.hex(),
    }


def _field_value(field: Any, value: Any) -> Any:
    if isinstance(value, RunConfig):
        return _plain(config_from_pb(value))
    if isinstance(value, Message):
        return message_values(value)
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    return _named(field.name, value)


def _word(kind: EnumDescriptor, number: int) -> str:
    """The word of an enumeration, without the prefix that all of them have: `open`."""
    found = kind.values_by_number.get(number)
    if found is None:
        return str(number)  # a newer coordinator's
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return found.name.removeprefix(prefix).lower()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, records.Answered):
        signature = {"signature": _plain(value.signature)}
        return {"round": value.round, "slot": value.slot, **_plain(value.scalars), **signature}
    if isinstance(value, (records.Scalars, records.SeedRange)):
        return {name: _named(name, item) for name, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump())
    if hasattr(value, "__dataclass_fields__"):
        names = value.__dataclass_fields__
        return {_NAMES.get(name, name): _named(name, getattr(value, name)) for name in names}
    return value


def _named(name: str, value: Any) -> Any:
    """A plain value; the name says whether a number is the beginning of a digest."""
    if name.endswith("digest64") and value is not None:
        return records.digest64_hex(value)
    return _plain(value)
