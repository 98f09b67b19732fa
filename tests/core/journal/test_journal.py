"""The journal over the reference store: chains, corruption, codec round trips."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import Journal, JournalStore, MemoryStore, Row
from fedmezo_core.records import (
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Record,
    Scalars,
    SeedRange,
    Started,
    first_seed_of,
    rounding_seed_of,
)
from tests.core.journal.store_conformance import StoreConformance

u64 = st.integers(0, 2**64 - 1)
f32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32)
rounds = st.integers(1, 2**63)

configs = st.builds(
    RunConfig,
    run_id=names,
    model=st.text(min_size=1, max_size=20),
    task=st.just(TaskConfig(verbalizers={"0": " bad", "1": " good"})),
    lora=st.none() | st.just(LoraConfig(rank=4, alpha=8.0, target_modules=("q", "v"))),
    seed=u64,
    distribution=st.sampled_from(["rademacher", "gaussian"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    report_losses=st.booleans(),
)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Genesis, configs, digests, digests, digests, u64, u64),
    st.builds(Started, st.integers(1, 2**31)),
    st.builds(Opened, rounds, st.integers(0, 4095), st.lists(names, max_size=5).map(tuple)),
    st.builds(
        Answered,
        rounds,
        st.integers(0, 4095),
        st.builds(
            Scalars,
            st.lists(f32, max_size=40).map(tuple),
            st.none() | f32,
            st.none() | u64,
            st.none() | st.integers(0, 2**40),
        ),
    ),
    st.builds(
        Committed,
        rounds,
        st.lists(st.builds(SeedRange, u64, st.lists(f32, max_size=9).map(tuple)), max_size=4).map(
            tuple
        ),
        u64,
    ),
    st.builds(Diverged, rounds, names, u64, u64),
    st.builds(Evaluated, rounds, f32, f32, st.integers(0, 2**31), digests, st.none() | f32),
)


FIRST = 0x9042D03CD6A10000
ROUNDING = 0xAF217483051B40AF


class TestMemoryStore(StoreConformance):
    """The reference conforms."""

    durable = False

    def open(self) -> JournalStore:
        return MemoryStore()


@given(records)
def test_every_record_survives_its_bytes(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


@given(st.binary(max_size=64))
def test_bytes_that_are_no_record_are_refused(body: bytes) -> None:
    """Whatever the bytes, it is a record or our error, never another exception."""
    with contextlib.suppress(JournalCorruptError):
        decode_record(body)


@given(st.lists(records, min_size=1, max_size=6), st.data())
def test_one_flipped_bit_is_found(history: list[Record], data: st.DataObject) -> None:
    store = MemoryStore()
    Journal(store).append(history)
    rows = list(store.read(0, 100))
    place = data.draw(st.integers(0, len(rows) - 1))
    victim = rows[place]
    field = data.draw(st.sampled_from(["body", "chain"]))
    old: bytes = getattr(victim, field)
    if not old:
        return
    bit = data.draw(st.integers(0, 8 * len(old) - 1))
    new = bytearray(old)
    new[bit // 8] ^= 1 << bit % 8
    rows[place] = (
        victim._replace(body=bytes(new)) if field == "body" else victim._replace(chain=bytes(new))
    )
    damaged = MemoryStore()
    damaged.append(rows)
    with pytest.raises(JournalCorruptError, match=f"record {place} "):
        list(Journal(damaged).load())


def test_a_missing_or_swapped_row_is_found() -> None:
    store = MemoryStore()
    Journal(store).append([Started(1), Started(2), Started(3)])
    first, second, third = store.read(0, 3)
    for rows in ([second, third], [first, third], [first, third, second]):
        with pytest.raises(JournalCorruptError):
            list(Journal(_Raw(rows)).load())


class _Raw(MemoryStore):
    """A store that somebody else has written to."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self._rows = rows


@given(u64, st.integers(1, 2**40), st.integers(0, 4095))
def test_seeds_of_an_assignment_never_carry_into_another(run: int, round_: int, slot: int) -> None:
    seed = first_seed_of(run, round_, slot)
    assert seed % 65536 == 0
    assert 0 <= seed < 2**64
    assert seed != first_seed_of(run, round_, slot + 1)
    assert seed != first_seed_of(run, round_ + 1, slot)
    assert rounding_seed_of(run, round_) != rounding_seed_of(run, round_ + 1)


def test_seeds_are_frozen() -> None:
    """These values are in every journal there is."""
    assert first_seed_of(1, 1, 0) == FIRST
    assert rounding_seed_of(1, 1) == ROUNDING


def test_coefficients_keep_their_bits() -> None:
    tiny = struct.unpack("<f", struct.pack("<I", 1))[0]
    commit = Committed(1, (SeedRange(0, (tiny, -0.0)),), 0)
    back = decode_record(encode_record(commit))
    assert isinstance(back, Committed)
    assert struct.pack("<2f", *back.seed_ranges[0].coefficients) == struct.pack("<2f", tiny, -0.0)


@pytest.mark.parametrize("count", [0, 1, 28, 29, 30, 31, 32, 500, 4093, 4096])
def test_an_answer_of_any_length_is_read_as_any_other_record(count: int) -> None:
    answer = Answered(3, 2, Scalars(tuple(float(k) for k in range(count)), 0.5, 2**64 - 1, 7))
    body = encode_record(answer)
    assert decode_record(body) == answer
    # A record of more than the answer goes the long way; protobuf takes the last of a oneof.
    assert decode_record(body + encode_record(Started(9))) == Started(9)
    with pytest.raises(JournalCorruptError):
        decode_record(body[:-1])
