"""The two kinds of record that nearly all of a journal consists of, read without protobuf.

A start reads a million of them, and protobuf's way to a dataclass is three times as long. Only bytes laid
out as this version writes them are read here; for any others the answer is None, and `codec` decodes them.
What comes out is what protobuf's way gives, to the last bit (tested against it, also with changed bytes).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import lru_cache, partial

from fedmezo_core.records import Answered, Committed, Scalars, SeedRange

ANSWERED = 0x22
"""First byte of an `Answered` record: field 4 of `Record`, with a length."""
COMMITTED = 0x2A
"""Of a `Committed` one: field 5."""

# A byte that says which field follows, by the number in the .proto file and how it is written.
_VARINT_1, _VARINT_2 = 0x08, 0x10
_BYTES_2, _BYTES_3 = 0x12, 0x1A
_FIXED64_1, _FIXED64_3, _FIXED64_5 = 0x09, 0x19, 0x29
_FIXED32_4 = 0x25

_TAILS = {14: ("BfBQ", 3), 9: ("BQ", 2), 5: ("Bf", 1), 0: ("", 0)}
"""What an answer may end with, by its size: loss and digest, a digest, a loss, nothing."""
LAYOUTS_MAX = 16
"""Sizes of answers whose layout is remembered."""
_SEED = struct.Struct("<xQ")
_SEED_AND_DECAY = struct.Struct("<xQxf")


class _OtherLayoutError(Exception):
    """Left to protobuf."""


class AnswerLayout:
    """Of answers that differ in numbers only, as those of a run nearly do: one step reads each."""

    def __init__(self, like: bytes) -> None:
        """As in this answer's record; raises `_OtherLayoutError` if it is not laid out as usual."""
        length, at = _varint(like, 1)
        if like[0] != ANSWERED or length != len(like) - at or like[at] != _VARINT_1:
            raise _OtherLayoutError
        round_at = at + 1
        round_, tag_at = _varint(like, round_at)
        slot_at = at = tag_at + (like[tag_at] == _VARINT_2)
        if slot_at > tag_at:
            _, at = _varint(like, slot_at)
        self._slot_bytes = at - slot_at
        size, grads_at = _varint(like, at + 1)
        tail, self._kind = _TAILS.get(len(like) - grads_at - size, ("", -1))
        if self._slot_bytes > 2 or like[at] != _BYTES_3 or size & 3 or self._kind < 0:
            raise _OtherLayoutError
        # What must be the same around the numbers, and the last round that was read.
        self._prefix, self._tag, self._middle = (
            like[:round_at],
            like[tag_at:slot_at],
            like[at:grads_at],
        )
        self._round = (like[round_at:tag_at], round_)
        count = size >> 2
        self._struct = struct.Struct(
            f"<{round_at}s{tag_at - round_at}s{slot_at - tag_at}s{'B' * self._slot_bytes}"
            f"{grads_at - at}s{count}f{tail}"
        )
        self._grads = slice(4 + self._slot_bytes, 4 + self._slot_bytes + count)

    def read(self, body: bytes) -> Answered | None:
        """The record, if it is laid out so; `body` is as long as what the layout was made of."""
        found = self._struct.unpack(body)
        slot_bytes = self._slot_bytes
        if (
            found[0] != self._prefix
            or found[2] != self._tag
            or found[3 + slot_bytes] != self._middle
        ):
            return None
        round_bytes, round_ = self._round
        if found[1] != round_bytes:
            round_, behind = _varint(found[1], 0)
            if behind != len(round_bytes):
                return None
            self._round = (found[1], round_)
        slot = 0
        if slot_bytes == 1:
            slot = found[3]
            if slot > 127:
                return None
        elif slot_bytes == 2:
            slot = (found[3] & 127) + (found[4] << 7)
            if found[3] < 128 or found[4] > 127:
                return None
        grads = found[self._grads]
        mean_loss = digest64 = None
        match self._kind:
            case 3:
                loss_tag, mean_loss, digest_tag, digest64 = found[-4:]
                if loss_tag != _FIXED32_4 or digest_tag != _FIXED64_5:
                    return None
            case 2:
                digest_tag, digest64 = found[-2:]
                if digest_tag != _FIXED64_5:
                    return None
            case 1:
                loss_tag, mean_loss = found[-2:]
                if loss_tag != _FIXED32_4:
                    return None
            case _:
                pass
        return Answered(round_, slot, _scalars_of((grads, mean_loss, digest64, None)))


_scalars_of: Callable[[tuple[object, ...]], Scalars] = partial(tuple.__new__, Scalars)
_run_of: Callable[[tuple[object, ...]], SeedRange] = partial(tuple.__new__, SeedRange)


class AnswerReader:
    """Reads answers that come one after the other."""

    def __init__(self) -> None:
        self._layouts: dict[int, AnswerLayout] = {}

    def read(self, body: bytes) -> Answered | None:
        """The record, if it is an answer without a count of rows, laid out as usual."""
        try:
            layout = self._layouts.get(len(body))
            if layout is not None:
                answer = layout.read(body)
                if answer is not None:
                    return answer
            layout = AnswerLayout(body)
            answer = layout.read(body)
        except (IndexError, struct.error, _OtherLayoutError):
            return None
        if len(self._layouts) >= LAYOUTS_MAX:
            self._layouts.clear()
        self._layouts[len(body)] = layout
        return answer


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
            runs.append(_run_of((found[1], coefficients)))
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
def _run(head_bytes: int, middle_bytes: int, count: int) -> struct.Struct:
    return struct.Struct(f"<{head_bytes}sQ{middle_bytes}s{count}f")
