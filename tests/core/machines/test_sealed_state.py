"""What a journal begins with once records were dropped: the same state to the last bit, or an error."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_core.errors import JournalCorruptError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import Entry, Journal, MemoryStore, StoredOrigin
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.sealed_state import Origin, seal, unseal
from fedmezo_core.records import Answered, Evaluated, Opened, Paused, Started, Stopped
from fedmezo_proto.v1 import origin_pb2 as pb
from tests.core.machines.rounds_driver import RoundsDriver
from tests.sim.world import World

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(b"what dropped records came to; k."))


def journal_of(seed: int) -> list[Entry]:
    """What a simulated federation left."""
    world = World(seed)
    world.run()
    return list(Journal(world.store).load())


def origin_after(entries: list[Entry]) -> Origin:
    """What these entries, the first of a journal, came to."""
    state = RunState()
    for entry in entries:
        state.apply(entry.record)
    last = entries[-1]
    return Origin(last.row.seqno + 1, last.row.chain, last.head, entries[0].row.body, state)


def store_of(entries: list[Entry]) -> MemoryStore:
    store = MemoryStore()
    store.append([entry.row for entry in entries])
    return store


@pytest.mark.parametrize("seed", range(40))
def test_a_fold_goes_on_from_an_origin_as_from_the_records(seed: int) -> None:
    entries = journal_of(seed)
    rng = random.Random(seed)
    whole = origin_after(entries).state
    for cut in sorted({1, len(entries) - 1, *(rng.randrange(1, len(entries)) for _ in range(6))}):
        origin = origin_after(entries[:cut])
        sealed = seal(origin)
        again = unseal(sealed)
        assert again == origin
        assert seal(again) == sealed
        for entry in entries[cut:]:
            again.state.apply(entry.record)
        assert again.state == whole


def test_what_no_simulated_run_has_comes_back_too() -> None:
    driver = RoundsDriver(report_losses=True, personal_rate="mean_loss", workers_min=1, quorum=1)
    state = driver.machine.state
    driver.ready("w1", "w2")
    driver.answer("w1", loss=0.1)
    state.evaluations.append(Evaluated(1, 0.5, 0.25, 4, b"w" * 32, 0.75))
    state.health.evaluated(state.evaluations[-1], 3.0)
    state.health.training.see(1, 1e300, 3.0)
    state.health.training.high_since = 1
    state.losses["w1"].append(0.1) if "w1" in state.losses else None
    state.distances["w2"] = 1 / 3
    state.rate_factor = 0.1
    state.paused = Paused(0, "why")
    state.stopped = Stopped(0, "because")
    state.copied = True
    body = encode_record(driver.records[0])
    origin = Origin(9, b"c" * 32, b"h" * 32, body, state)
    assert unseal(seal(origin)) == origin


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_a_journal_begins_at_its_origin(signer: Signer | None) -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    sealed = seal(origin_after(entries[:cut]), signer)
    store = store_of(entries)
    Journal(store).drop_before(StoredOrigin.of(cut, sealed))
    journal = Journal(store)
    assert list(verified(journal)) == entries[cut:]
    assert (len(journal), journal.begins) == (len(entries), cut)
    assert (journal.chain, journal.head) == (entries[-1].row.chain, entries[-1].head)
    origin = journal.origin()
    assert origin is not None
    assert origin.key == (b"" if signer is None else signer.public_key)
    # And goes on from there.
    [entry] = journal.append([Started(99)])
    assert entry.row.seqno == len(entries)


def test_another_origin_than_was_written_is_refused() -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    origin = origin_after(entries[:cut])
    sealed = seal(origin, SIGNER)
    good = StoredOrigin.of(cut, sealed)
    flipped = bytearray(sealed)
    flipped[len(flipped) // 2] ^= 1
    message = pb.SealedOrigin.FromString(sealed)
    message.signature = bytes(64)
    for stored, words in [
        (replace(good, sealed=bytes(flipped)), "not what was written"),
        (replace(good, digest=bytes(32)), "not what was written"),
        (StoredOrigin.of(cut + 1, sealed), "its origin says"),
        (StoredOrigin.of(cut, message.SerializeToString()), "signature of the journal's origin"),
        (StoredOrigin.of(cut, b"nonsense"), "cannot be read"),
        (StoredOrigin.of(cut, b""), "cannot be read"),
        # The chain says that other records came before.
        (StoredOrigin.of(cut, seal(replace(origin, chain=bytes(32)))), "hash does not match"),
    ]:
        store = store_of(entries)
        store.drop_before(stored)
        with pytest.raises(JournalCorruptError, match=words):
            list(verified(Journal(store)))


def test_rows_that_are_missing_behind_an_origin_are_found() -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    store = MemoryStore()
    store.drop_before(StoredOrigin.of(cut, seal(origin_after(entries[:cut]))))
    store._rows.extend(entry.row for entry in entries[cut + 1 :])
    with pytest.raises(JournalCorruptError, match=f"jumps from record {cut - 1} to {cut + 1}"):
        list(Journal(store).load())


def test_an_open_round_is_kept_with_its_answers() -> None:
    driver = RoundsDriver(workers_min=2, quorum=2, cohort_size_max=2)
    driver.ready("w1", "w2")
    driver.answer("w1")
    state = driver.machine.state
    assert [type(record) for record in driver.records[-2:]] == [Opened, Answered]
    body = encode_record(driver.records[0])
    again = unseal(seal(Origin(4, b"c" * 32, b"h" * 32, body, state))).state
    assert again.open == state.open
    assert again.outstanding() == state.outstanding() != {}
