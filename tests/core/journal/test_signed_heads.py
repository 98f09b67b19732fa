"""What the coordinator signs, and what others make of it."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedmezo_core.errors import ConfigError, DivergedError, JournalCorruptError
from fedmezo_core.journal.codec import decode_record, encode_record, encode_records
from fedmezo_core.journal.journal import Entry, Journal, MemoryStore
from fedmezo_core.journal.party_copy import JournalCopy, verified
from fedmezo_core.journal.signed_heads import Signer, Witness, open_signer, signed_head_text
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Committed, SeedRange, SignedHead, Started
from tests.integration.support.harness import config_of, genesis_of

GENESIS = genesis_of(config_of())
RUN = GENESIS.config.run_id


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return open_signer(tmp_path / "journal.db.key")


def commit(round_: int) -> Committed:
    return Committed(round_, (SeedRange(round_ << 16, (0.5, -0.25)),), 7)


def test_the_text_that_is_signed_is_written_down_for_ever() -> None:
    text = signed_head_text("tiny-run", 12, bytes(range(32)))
    assert text == b"fedmezo.v1/tiny-run\n12\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"


def test_a_key_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.db.key"

    def another_is_faster(partial: Path, target: Path) -> None:
        assert not target.exists()
        target.write_bytes(Path(partial).read_bytes())
        raise FileExistsError(target)

    with monkeypatch.context() as patch:
        patch.setattr("fedmezo_core.journal.signed_heads.os.fsync", _full)
        with pytest.raises(ConfigError, match="No space left"):
            open_signer(path)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("fedmezo_core.journal.signed_heads.os.link", another_is_faster)
        signer = open_signer(path)
    assert list(tmp_path.iterdir()) == [path]
    assert open_signer(path).public_key == signer.public_key


def _full(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = open_signer(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = open_signer(path)
    assert again.public_key == first.public_key
    assert again.sign(RUN, 3, b"h" * 32) == first.sign(RUN, 3, b"h" * 32)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"\xff\x00"])
def test_a_file_that_is_no_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no unencrypted Ed25519 private key"):
        open_signer(path)
    with pytest.raises(ConfigError, match="cannot be made"):
        open_signer(tmp_path / "nowhere" / "key")


@pytest.mark.parametrize("change", ["run", "round", "head", "signature", "key"])
def test_a_signature_holds_for_one_run_round_head_and_key(signer: Signer, change: str) -> None:
    head, signature = b"h" * 32, signer.sign(RUN, 3, b"h" * 32)
    Witness(RUN, signer.public_key).check(3, head, signature)
    other = Signer.__new__(Signer)
    witness = Witness("other" if change == "run" else RUN, signer.public_key)
    if change == "key":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        other.__init__(Ed25519PrivateKey.generate())  # type: ignore[misc]
        witness = Witness(RUN, other.public_key)
    if change == "signature":
        signature = bytes([signature[0] ^ 1]) + signature[1:]
    with pytest.raises(DivergedError, match="signature for round"):
        witness.check(
            4 if change == "round" else 3, b"i" * 32 if change == "head" else head, signature
        )


# ---------------------------------------------------------------- copies


def followed(signer: Signer, rounds: int = 3) -> tuple[MemoryStore, list[Entry]]:
    """A copy of a run of some rounds, each signed; and the coordinator's entries."""
    original = Journal(MemoryStore())
    entries = original.append(encode_records([GENESIS, *(commit(k) for k in range(1, rounds + 1))]))
    store = MemoryStore()
    copy = JournalCopy(Journal(store))
    assert list(copy.begin(entries[0].row.body, 1, signer.public_key)) == []
    for entry in entries[1:]:
        record = decode_record(entry.row.body)
        assert isinstance(record, Committed)
        round_ = record.round
        signature = signer.sign(RUN, round_, entry.head)
        signed = SignedHead(1, round_, entry.head, signer.public_key, signature)
        copy.add([entry.row.body], signed)
    return store, entries


def test_a_copy_has_the_runs_heads_and_is_a_journal_that_a_coordinator_can_go_on_from(
    signer: Signer,
) -> None:
    store, entries = followed(signer)
    journal, machine = Journal(store), RoundMachine()
    for _, record in verified(journal):
        machine.apply(record)
    assert journal.head == entries[-1].head
    assert (machine.round, machine.epoch) == (3, 1)
    ready = machine.start()
    assert ready.records == (Started(2),), "tickets of before cannot be mistaken for new ones"
    journal.append(encode_records(ready.records))
    with pytest.raises(JournalCorruptError, match="once open"):
        machine.apply(commit(4))


def test_a_copy_that_is_opened_again_gives_its_commits_and_goes_on(signer: Signer) -> None:
    store, entries = followed(signer)
    copy = JournalCopy(Journal(store))
    found = list(copy.begin(entries[0].row.body, 1, signer.public_key))
    assert [entry.row.body for entry in found] == [entry.row.body for entry in entries[1:]]
    assert copy.round == 3
    copy.add([encode_record(commit(4))])
    assert sum(1 for _ in verified(Journal(store))) == len(store)


def test_a_copy_is_of_one_run_and_of_one_key(signer: Signer, tmp_path: Path) -> None:
    store, entries = followed(signer)
    other = encode_record(genesis_of(config_of(seed=8)))
    with pytest.raises(DivergedError, match="another run"):
        list(JournalCopy(Journal(store)).begin(other, 1, signer.public_key))
    stranger = open_signer(tmp_path / "other.key").public_key
    with pytest.raises(DivergedError, match="signs with key"):
        list(JournalCopy(Journal(store)).begin(entries[0].row.body, 1, stranger))


@pytest.mark.parametrize("field", ["head", "signature"])
def test_a_checkpoint_that_does_not_fit_the_commits_is_found(signer: Signer, field: str) -> None:
    store, _ = followed(signer)
    journal = Journal(store)
    last = [decode_record(entry.row.body) for entry in journal.load()][-1]
    assert isinstance(last, SignedHead)
    wrong = replace(last, head=bytes(32)) if field == "head" else replace(last, signature=bytes(64))
    journal.append(encode_records([wrong]))
    with pytest.raises(JournalCorruptError, match=r"checkpoint of round 3|signature for round 3"):
        list(verified(Journal(store)))


@pytest.mark.parametrize(
    ("epoch", "round_"), [(1, 1), (0, 0)], ids=["of a round to come", "of an epoch before"]
)
def test_a_checkpoint_out_of_place_is_refused(epoch: int, round_: int) -> None:
    machine = RoundMachine()
    machine.apply(GENESIS)
    machine.apply(SignedHead(1, 0, b"h" * 32))
    with pytest.raises(JournalCorruptError, match="checkpoint of epoch"):
        machine.apply(SignedHead(epoch, round_, b"h" * 32))
