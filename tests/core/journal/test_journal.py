"""The journal over the reference store: chains, corruption, codec round trips."""

from __future__ import annotations

import contextlib
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.journal.codec import (
    decode_record,
    encode_record,
    encode_records,
    pairs_in_commit,
)
from fedmezo_core.journal.journal import (
    ANSWERED,
    COMMITTED,
    GENESIS,
    SNAPSHOTTED,
    Journal,
    JournalStore,
    MemoryStore,
    Row,
)
from fedmezo_core.records import (
    Admitted,
    Answered,
    Committed,
    Diverged,
    Evaluated,
    Genesis,
    Opened,
    Record,
    RoundSlot,
    Scalars,
    SeedRange,
    Snapshotted,
    Started,
    first_seed_of,
    rounding_seed_of,
)
from tests.core.journal.store_conformance import StoreConformance
from tests.integration.support.harness import config_of, environment, genesis_of

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
committed = st.builds(
    Committed,
    rounds,
    st.lists(st.builds(SeedRange, u64, st.lists(f32, max_size=9).map(tuple)), max_size=4).map(
        tuple
    ),
    u64,
    from_base=st.booleans(),
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
        st.just(b"") | st.binary(min_size=64, max_size=64),
    ),
    st.builds(Admitted, names, digests),
    committed,
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
    Journal(store).append(encode_records(history))
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
    Journal(store).append(encode_records([Started(1), Started(2), Started(3)]))
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


@given(records, records)
def test_the_first_byte_says_what_a_record_is(first: Record, second: Record) -> None:
    """protobuf would take the last of two kinds, so that a commit could look like an answer."""
    if type(first) is not type(second):
        with pytest.raises(JournalCorruptError, match="its kind"):
            decode_record(encode_record(first) + encode_record(second))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (Committed(1, (SeedRange(0, (0.5, math.nan)),), 0), "no number"),
        (Committed(1, (SeedRange(0, (math.inf, -math.inf)),), 0), "no number"),
        (Committed(1, (SeedRange(0, (0.5,)),), 0, decay=0.0), "multiplies the weights by 0.0"),
        (Committed(1, (SeedRange(0, (0.5,)),), 0, decay=1.5), "multiplies the weights by 1.5"),
        (Committed(3, (), 0, answers=(RoundSlot(0, 1),)), "slots of rounds"),
        (Opened(1, 0, ("w1", "w2"), (0.5,)), "1 learning rates for 2 workers"),
    ],
)
def test_a_record_that_means_nothing_is_refused(changed: Record, words: str) -> None:
    with pytest.raises(JournalCorruptError, match=words):
        decode_record(encode_record(changed))


def test_kinds_are_the_first_bytes_of_records() -> None:
    for kind, record in (
        (GENESIS, genesis_of(config_of())),
        (ANSWERED, Answered(1, 0, Scalars((0.5,), None, None))),
        (COMMITTED, Committed(1, (), 0)),
        (SNAPSHOTTED, Snapshotted(1, bytes(32), bytes(32), 1)),
    ):
        assert encode_record(record)[:1] == kind


def test_only_the_wanted_kinds_are_given_before_a_record() -> None:
    store = MemoryStore()
    commit = Committed(1, (SeedRange(5, (0.5,)),), 7)
    everything = Journal(store).append(encode_records([Started(1), commit, Started(2), Started(3)]))
    journal = Journal(store)
    assert list(journal.load(3, {COMMITTED})) == [everything[1], everything[3]]
    assert (journal.head, len(journal)) == (everything[-1].head, 4)


@given(committed)
def test_pairs_are_counted_as_the_record_says(record: Committed) -> None:
    assert pairs_in_commit(encode_record(record)) == (record.pairs, record.from_base)


@pytest.mark.parametrize("count", [0, 1, 28, 29, 30, 31, 32, 500, 4093, 4096])
def test_an_answer_of_any_length_is_read_as_any_other_record(count: int) -> None:
    answer = Answered(3, 2, Scalars(tuple(float(k) for k in range(count)), 0.5, 2**64 - 1, 7))
    body = encode_record(answer)
    assert decode_record(body) == answer
    with pytest.raises(JournalCorruptError):
        decode_record(body[:-1])


def test_who_reads_a_journal_loads_no_machine() -> None:
    code = (
        "import sys, fedmezo_core.wire.client, fedmezo_core.journal.party_copy; "
        "loaded = [name for name in sys.modules if name.startswith('fedmezo_core.machines')]; "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
