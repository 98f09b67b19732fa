"""The two kinds of record that nearly all of a journal consists of, read without protobuf.

A start reads a million of them, and protobuf's way to a dataclass is three times as long. Only bytes laid
out as this version writes them are read here; for any others the answer is None, and `codec` decodes them.
What comes out is what protobuf's way gives, to the last bit (tested against it, also with changed bytes).
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

from fedmezo_core.records import Answered, Committed, PairRun

ANSWERED = 0x22
"""First byte of an `Answered` record: field 4 of `Record`, with a length."""
COMMITTED = 0x2A
"""Of a `Committed` one: field 5."""

# A byte that says which field follows, by the number in the .proto file and how it is written.
_VARINT_1, _VARINT_2 = 0x08, 0x10
_BYTES_2, _BYTES_3 = 0x12, 0x1A
_FIXED64_1, _FIXED64_3, _FIXED64_5 = 0x09, 0x19, 0x29
_FIXED32_4 = 0x25

_LOSS_AND_DIGEST = struct.Struct("<xfxQ")
_LOSS = struct.Struct("<xf")
_DIGEST = struct.Struct("<xQ")
_SEED = struct.Struct("<xQ")
_SEED_AND_DECAY = struct.Struct("<xQxf")


class _OtherLayoutError(Exception):
    """Left to protobuf."""


def answered_in(body: bytes) -> Answered | None:
    """The record, if it is an answer without a count of rows, laid out as usual."""
    try:
        if body[0] != ANSWERED:
            return None
        length, at = (body[1], 2) if body[1] < 128 else _varint(body, 1)
        end = len(body)
        if length != end - at or body[at] != _VARINT_1:
            return None
        round_, at = (body[at + 1], at + 2) if body[at + 1] < 128 else _varint(body, at + 1)
        slot = 0
        if body[at] == _VARINT_2:
            slot, at = (body[at + 1], at + 2) if body[at + 1] < 128 else _varint(body, at + 1)
        if body[at] != _BYTES_3:
            return None
        size, at = (body[at + 1], at + 2) if body[at + 1] < 128 else _varint(body, at + 1)
        if size & 3:
            return None
        grads = _floats(size >> 2).unpack_from(body, at)
        at += size
        left = end - at
        if left == 14 and body[at] == _FIXED32_4 and body[at + 5] == _FIXED64_5:
            mean_loss, digest64 = _LOSS_AND_DIGEST.unpack_from(body, at)
            return Answered(round_, slot, grads, mean_loss, digest64)
        if left == 9 and body[at] == _FIXED64_5:
            return Answered(round_, slot, grads, None, _DIGEST.unpack_from(body, at)[0])
        if left == 5 and body[at] == _FIXED32_4:
            return Answered(round_, slot, grads, _LOSS.unpack_from(body, at)[0], None)
        return Answered(round_, slot, grads, None, None) if left == 0 else None
    except (IndexError, struct.error, _OtherLayoutError):
        return None


def committed_in(body: bytes) -> Committed | None:
    """The record, if it is a commit of runs that are all equally long, laid out as usual."""
    try:
        if body[0] != COMMITTED:
            return None
        length, at = _varint(body, 1)
        end = len(body)
        if length != end - at or body[at] != _VARINT_1:
            return None
        round_, at = _varint(body, at + 1)
        # The first run says how all of them must look.
        if body[at] != _BYTES_2:
            return None
        run_size, seed_at = _varint(body, at + 1)
        if body[seed_at] != _FIXED64_1 or body[seed_at + 9] != _BYTES_2:
            return None
        size, floats_at = _varint(body, seed_at + 10)
        if size & 3 or floats_at + size - seed_at != run_size:
            return None
        head, middle = body[at : seed_at + 1], body[seed_at + 9 : floats_at]
        run = _run(len(head), len(middle), size >> 2)
        left = end - at
        tail = _SEED if left % run.size == _SEED.size % run.size else _SEED_AND_DECAY
        count, rest = divmod(left - tail.size, run.size)
        if count < 1 or rest or body[end - tail.size] != _FIXED64_3:
            return None
        runs = []
        total = 0.0
        for found in run.iter_unpack(memoryview(body)[at : end - tail.size]):
            if found[0] != head or found[2] != middle:
                return None
            coefficients = found[3:]
            total += sum(coefficients)
            runs.append(PairRun(found[1], coefficients))
        # A sum of finite binary32 values is finite in binary64; infinities and NaN stay in it.
        if not math.isfinite(total):
            return None
        if tail is _SEED:
            return Committed(round_, tuple(runs), *tail.unpack_from(body, end - tail.size))
        if body[end - 5] != _FIXED32_4:
            return None
        rounding_seed, decay = tail.unpack_from(body, end - tail.size)
        return Committed(round_, tuple(runs), rounding_seed, decay) if 0 < decay <= 1 else None
    except (IndexError, struct.error, _OtherLayoutError):
        return None


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """A number of at most 28 bits, and the place behind it."""
    value = shift = 0
    for place in range(at, at + 4):
        byte = body[place]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + 1
        shift += 7
    raise _OtherLayoutError


@lru_cache(maxsize=256)
def _floats(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}f")


@lru_cache(maxsize=256)
def _run(head_bytes: int, middle_bytes: int, count: int) -> struct.Struct:
    return struct.Struct(f"<{head_bytes}sQ{middle_bytes}s{count}f")
