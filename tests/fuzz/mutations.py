"""Changes of valid inputs: of a message's fields, of a journal's records, and of any bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from google.protobuf.message import DecodeError, Message

from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2 as pb
from fedmezo_proto.v1 import origin_pb2
from tests.faults.hand_made import change
from tests.fuzz.targets import Target

SIZE_MAX = 65_536
"""Largest input; the coordinator refuses longer messages before they are read."""
_ODD_BYTES = (
    *(b"", b"\0", b"\xff", b"\x80", b"\x7f", b"\r\n", b"\xed\xa0\x80", b"\xff" * 9, b"{}[]"),
    *(b"[" * 3000, b'{"a":' * 3000, b"a." * 3000, b"9" * 5000, b"1e999", b"nan"),
)


def mutated(rng: random.Random, target: Target, data: bytes, others: Sequence[bytes]) -> bytes:
    """A changed input; `others` are valid ones, of which it may take parts."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.7:
            try:
                data = _with_changed_fields(rng, target, data, others)
                continue
            except DecodeError:
                pass
        data = _with_changed_bytes(rng, data, others)
    return data[:SIZE_MAX]


def _with_changed_fields(
    rng: random.Random, target: Target, data: bytes, others: Sequence[bytes]
) -> bytes:
    if target.methods is not None:
        if rng.random() < 0.05 or not data:
            return bytes([rng.randrange(256)]) + data[1:]
        kind = list(target.methods.values())[data[0] % len(target.methods)]
        return data[:1] + _changed(rng, kind, data[1:])
    if target.pieces is not None:
        return _with_changed_pieces(rng, target.pieces, data, others)
    if target.kind is origin_pb2.SealedOrigin:
        return _changed_seal(rng, data)
    if target.kind is not None:
        return _changed(rng, target.kind, data)
    return _with_changed_bytes(rng, data, others)


def _changed(rng: random.Random, kind: type[Message], data: bytes) -> bytes:
    message = kind.FromString(data)
    kinds = [oneof.name for oneof in message.DESCRIPTOR.oneofs]
    chosen = message.WhichOneof("kind") if "kind" in kinds else None
    change(rng, getattr(message, chosen) if chosen and rng.random() < 0.95 else message)
    return message.SerializeToString(deterministic=True)


def _with_changed_pieces(
    rng: random.Random, kind: type[Message], data: bytes, others: Sequence[bytes]
) -> bytes:
    page = wire.ReadJournalResponse.FromString(data)
    entries = list(page.entries)
    if not entries:
        return rng.choice(others)
    at = rng.randrange(len(entries))
    roll = rng.random()
    if roll < 0.7:
        entries[at].record = _changed(rng, kind, entries[at].record)
    elif roll < 0.75:
        entries[at].record = _with_changed_bytes(rng, entries[at].record, [])
    elif roll < 0.8:
        del entries[rng.randrange(1, len(entries) + 1) :]
    elif roll < 0.85:
        foreign = wire.ReadJournalResponse.FromString(rng.choice(others)).entries
        if foreign:
            entries[at] = rng.choice(foreign)
    elif roll < 0.9:
        entries.insert(at, rng.choice(entries))
    elif roll < 0.95:
        del entries[at]
    else:
        entries[at].chain = rng.randbytes(32)
    return wire.ReadJournalResponse(entries=entries).SerializeToString()


def _changed_seal(rng: random.Random, data: bytes) -> bytes:
    outer = origin_pb2.SealedOrigin.FromString(data)
    origin = origin_pb2.Origin.FromString(outer.body)
    roll = rng.random()
    if roll < 0.8:
        change(rng, origin.state)
    elif roll < 0.9:
        genesis = pb.Record.FromString(origin.genesis)
        change(rng, genesis.genesis)
        origin.genesis = genesis.SerializeToString(deterministic=True)
    else:
        change(rng, origin)
    outer.body = origin.SerializeToString(deterministic=True)
    if rng.random() < 0.05:
        change(rng, outer)
    return outer.SerializeToString(deterministic=True)


def _with_changed_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 100)))
    match rng.randrange(7):
        case 0:
            return data[:at] + rng.randbytes(to - at) + data[to:]
        case 1:
            return data[:at] + rng.choice(_ODD_BYTES) + data[at:]
        case 2:
            return data[:at] + data[to:]
        case 3 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 4:
            return data[:to] + data[at:]
        case 5 if others:
            other = rng.choice(others)
            return data[:at] + other[rng.randrange(len(other) + 1) :]
        case _:
            return data[:at]
