"""Sealed states: the same state to the last bit, or an error."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_core.errors import JournalCorruptError, ProtocolError
from fedmezo_core.journal.codec import decode_record, encode_record, encode_records
from fedmezo_core.journal.journal import Entry, Journal, MemoryStore
from fedmezo_core.journal.party_copy import verified
from fedmezo_core.journal.sealed import SealedState, StoredState, seal, unseal
from fedmezo_core.journal.signed_heads import Signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import STATE_VERSION, state_of, state_to_pb
from fedmezo_core.records import Answered, Evaluated, Opened, Paused, Started, Stopped
from fedmezo_proto.v1 import origin_pb2 as pb
from tests.core.journal.test_golden_journals import JOURNALS
from tests.core.machines.rounds_driver import RoundsDriver
from tests.sim.world import World

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(b"what dropped records came to; k."))


def journal_of(seed: int) -> list[Entry]:
    """What a simulated federation left."""
    world = World(seed)
    world.run()
    return list(Journal(world.store).load())


def state_after(entries: list[Entry]) -> RunState:
    """What these entries, the first of a journal, come to."""
    state = RunState()
    for entry in entries:
        state.apply(decode_record(entry.row.body))
    return state


def sealed_after(entries: list[Entry]) -> SealedState:
    """The same, to be sealed."""
    row, head = entries[-1]
    state = state_to_pb(state_after(entries))
    body = entries[0].row.body
    return SealedState(row.seqno + 1, row.chain, head, body, state, STATE_VERSION, {3: 2**64 - 1})


def store_of(entries: list[Entry]) -> MemoryStore:
    store = MemoryStore()
    store.append([entry.row for entry in entries])
    return store


@pytest.mark.parametrize("seed", range(40))
def test_a_fold_goes_on_from_a_sealed_state_as_from_the_records(seed: int) -> None:
    entries = journal_of(seed)
    rng = random.Random(seed)
    whole = state_after(entries)
    for cut in sorted({1, len(entries) - 1, *(rng.randrange(1, len(entries)) for _ in range(6))}):
        sealed = sealed_after(entries[:cut])
        stored = seal(sealed)
        again = unseal(stored)
        assert again == sealed
        assert seal(again) == stored
        state = state_of(again)
        assert state == state_after(entries[:cut])
        for entry in entries[cut:]:
            state.apply(decode_record(entry.row.body))
        assert state == whole
        assert again == sealed, "the caller's copy is its own"


def test_what_no_simulated_run_has_comes_back_too() -> None:
    driver = RoundsDriver(report_losses=True, personal_rate="mean_loss", workers_min=1, quorum=1)
    state = driver.machine.state
    driver.ready("w1", "w2")
    driver.answer("w1", loss=0.1)
    state.evaluations.append(Evaluated(1, 0.5, 0.25, 4, b"w" * 32, 0.75))
    state.health.evaluated(state.evaluations[-1], driver.config)
    state.health.training.see(1, 1e300, driver.config, 1)
    state.health.training.high_since = 1
    state.losses["w1"].append(0.1) if "w1" in state.losses else None
    state.distances["w2"] = 1 / 3
    state.rate_factor = 0.1
    state.paused = Paused(0, "why")
    state.stopped = Stopped(0, "because")
    state.copied = True
    body = encode_record(driver.records[0])
    sealed = SealedState(9, b"c" * 32, b"h" * 32, body, state_to_pb(state))
    assert state_of(unseal(seal(sealed))) == state


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_a_journal_begins_at_its_origin(signer: Signer | None) -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    store = store_of(entries)
    Journal(store).drop_before(seal(sealed_after(entries[:cut]), signer))
    journal = Journal(store)
    assert [entry for entry, _ in verified(journal)] == entries[cut:]
    assert (len(journal), journal.begins) == (len(entries), cut)
    assert (journal.chain, journal.head) == (entries[-1].row.chain, entries[-1].head)
    origin = journal.origin()
    assert origin is not None
    assert origin.key == (b"" if signer is None else signer.public_key)
    # And goes on from there.
    [entry] = journal.append(encode_records([Started(99)]))
    assert entry.row.seqno == len(entries)


def damaged(sealed: SealedState) -> list[tuple[StoredState, str]]:
    """Sealed states that are not what was written, each with a word of what is wrong."""
    good = seal(sealed, SIGNER)
    flipped = bytearray(good.sealed)
    flipped[len(flipped) // 2] ^= 1
    message = pb.SealedOrigin.FromString(good.sealed)
    message.signature = bytes(64)
    cut = sealed.seqno
    return [
        (replace(good, sealed=bytes(flipped)), "its hash does not match"),
        (replace(good, digest=bytes(32)), "its hash does not match"),
        (StoredState.of(cut + 1, good.sealed), f"record {cut} follows, not {cut + 1}"),
        (StoredState.of(cut, message.SerializeToString()), "signature is not of key"),
        (StoredState.of(cut, b"nonsense"), "cannot be read"),
        (StoredState.of(cut, b""), "cannot be read"),
    ]


def test_another_origin_than_was_written_is_refused() -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    sealed = sealed_after(entries[:cut])
    # With another chain, the next record says that others came before it.
    for stored, words in [
        *damaged(sealed),
        (seal(replace(sealed, chain=bytes(32))), "hash does not match"),
    ]:
        store = store_of(entries)
        store.drop_before(stored)
        with pytest.raises(JournalCorruptError, match=words):
            list(verified(Journal(store)))


def test_a_sealed_state_that_is_not_of_the_journals_records_is_refused() -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    sealed = sealed_after(entries[:cut])
    journal = Journal(store_of(entries))
    assert journal.unsealed(seal(sealed)) == sealed
    for stored, words in [
        *damaged(sealed),
        (seal(replace(sealed, chain=bytes(32))), "of other records"),
        (seal(replace(sealed, seqno=len(entries) + 1)), "of other records"),
    ]:
        with pytest.raises(ProtocolError, match=words):
            journal.unsealed(stored)


def test_an_origin_that_a_coordinator_sends_is_checked() -> None:
    sealed = sealed_after(journal_of(3)[:9])
    good = seal(sealed, SIGNER)
    assert StoredState.received(good.sealed) == good
    for stored, words in damaged(sealed)[3:]:
        with pytest.raises(JournalCorruptError, match=f"cannot be used .*{words}"):
            StoredState.received(stored.sealed)


def test_a_changed_way_of_folding_needs_a_new_version() -> None:
    """If this fails, raise `STATE_VERSION` and write the new digest here."""
    found = hashlib.sha256()
    for path in JOURNALS:
        if "compacted" not in path.stem:
            with tempfile.TemporaryDirectory() as folder:
                entries = list(Journal(SqliteStore(Path(shutil.copy(path, folder)))).load())
            state = state_to_pb(state_after(entries))
            found.update(state.SerializeToString(deterministic=True))
    assert (STATE_VERSION, found.hexdigest()[:16]) == (3, "68902f0a4680d1ab")


def test_rows_that_are_missing_behind_an_origin_are_found() -> None:
    entries = journal_of(3)
    cut = len(entries) // 2
    store = MemoryStore()
    store.drop_before(seal(sealed_after(entries[:cut])))
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
    sealed = SealedState(4, b"c" * 32, b"h" * 32, body, state_to_pb(state))
    again = state_of(unseal(seal(sealed)))
    assert again.open == state.open
    assert again.outstanding() == state.outstanding() != {}
