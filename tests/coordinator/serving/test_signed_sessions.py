"""Workers that sign, over real gRPC and a real journal, and what can be checked afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_coordinator.programs.fedmezo_command import journal_app
from fedmezo_coordinator.programs.signature_audit import SignatureAudit
from fedmezo_core.errors import FedMezoError, JournalCorruptError, SignatureError
from fedmezo_core.events import SendAnswer, Ticket
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import COMMITTED, Journal, MemoryStore
from fedmezo_core.journal.party_copy import JournalCopy
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import STATE_VERSION, state_of, state_to_pb
from fedmezo_core.records import Admitted, Answered, Committed, Record, Scalars
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.messages import answer_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import (
    ScriptedWorker,
    answer_to,
    config_of,
    genesis_of,
    records_of,
    scripted_workers,
    served,
)

GENESIS = genesis_of(config_of(rounds=3, local_steps=3, workers_min=2, quorum=2))
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2)]


def signer_of(hand: ScriptedWorker, key: int = 0) -> AnswerSigner:
    return AnswerSigner(KEYS[key], hand.head)


def signed(assign: wire.Assign, head: bytes, signer: AnswerSigner) -> wire.Answer:
    given = assign.ticket
    ticket = Ticket(given.epoch, given.round, given.slot)
    sound = answer_to(assign)
    digest64 = sound.weights_digest64 if sound.HasField("weights_digest64") else None
    scalars = Scalars(tuple(sound.projected_grads), None, digest64)
    return answer_to_pb(SendAnswer(ticket, scalars, None, head), signer).answer


async def run_of(journal: Path) -> list[Record]:
    """Round 1 is answered by w1, who signs, and w2, who does not; round 2 after a restart."""
    for round_ in (1, 2):
        async with (
            served(journal, GENESIS) as at,
            scripted_workers(at.address, GENESIS, "w1", "w2") as (one, two),
        ):
            heads = [at.daemon._index.head_at(r) for r in range(round_)]
            hands = {"round": round_ - 1, "head": heads[-1]}
            await one.open(signing_key=signer_of(one).public_key, **hands)
            await two.open(**hands)
            assign = await one.assigned()
            await one.send(answer=signed(assign, heads[round_ - 1], signer_of(one)))
            await two.answer(await two.assigned())
            await one.next("commit")
    return records_of(journal)


async def test_the_key_comes_once_before_the_first_answer_that_it_signed(tmp_path: Path) -> None:
    found = await run_of(tmp_path / "journal.db")
    answers = [record for record in found if isinstance(record, Answered)]
    assert sorted(len(answer.signature) for answer in answers) == [0, 0, 64, 64]
    admitted = [n for n, record in enumerate(found) if isinstance(record, Admitted)]
    assert [found[n] for n in admitted] == [Admitted("w1", KEYS[0].public_key().public_bytes_raw())]
    first = next(n for n, r in enumerate(found) if isinstance(r, Answered) and r.signature)
    assert admitted == [first - 1]


@pytest.mark.parametrize("what", ["unsigned", "altered", "another ticket's", "another key's"])
async def test_an_answer_that_its_worker_did_not_sign_ends_the_session(
    tmp_path: Path, what: str
) -> None:
    journal = tmp_path / "journal.db"
    async with (
        served(journal, GENESIS) as at,
        scripted_workers(at.address, GENESIS, "w1", "w2") as (one, two),
    ):
        await one.open(signing_key=signer_of(one).public_key)
        await two.open()
        assign = await one.assigned()
        answer = signed(assign, one.head, signer_of(one))
        match what:
            case "unsigned":
                answer.signature = b""
            case "altered":
                answer.projected_grads[1] += 1.0
            case "another ticket's":
                answer.ticket.slot += 1
            case _:
                answer = signed(assign, one.head, signer_of(one, key=1))
        await one.send(answer=answer)
        error = await one.ended()
        assert type(error) is SignatureError, error
        assert "worker w1's answer to round 1" in str(error)
    assert not any(isinstance(record, (Answered, Admitted)) for record in records_of(journal))


# ---------------------------------------------------------------- offline


def verify(journal: Path, capsys: pytest.CaptureFixture[str]) -> str:
    try:
        journal_app(["verify", str(journal), "--signatures"], standalone_mode=False)
    except FedMezoError as error:
        return f"{type(error).__name__}: {error}"
    return capsys.readouterr().out


async def test_signatures_are_checked_from_the_journal_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await run_of(tmp_path / "journal.db")
    said = verify(tmp_path / "journal.db", capsys)
    assert "answers: 2 signed and checked, 2 unsigned" in said
    key = KEYS[0].public_key().public_bytes_raw()
    assert f"w1: 2 answers signed with key {key.hex()}" in said
    place = max(n for n, r in enumerate(found) if isinstance(r, Answered) and r.signature)
    true = found[place]
    assert isinstance(true, Answered)
    first = next(r for r in found if isinstance(r, Answered) and r.signature)
    other = true.scalars._replace(projected_grads=(0.5, 0.5, 0.25))
    lies: dict[str, Record] = {
        "other numbers": true._replace(scalars=other),
        "the first answer's signature": true._replace(signature=first.signature),
    }
    for name, lie in lies.items():
        forged = tmp_path / f"{name}.db"
        rewritten = Journal(SqliteStore(forged))
        rewritten.append([encode_record(lie if n == place else r) for n, r in enumerate(found)])
        rewritten.close()
        said = verify(forged, capsys)
        assert said.startswith(
            f"JournalCorruptError: Record {place}, worker w1's answer to round 2"
        )
    nameless = Journal(SqliteStore(tmp_path / "nameless.db"))
    nameless.append([encode_record(r) for r in found if not isinstance(r, Admitted)])
    nameless.close()
    said = verify(tmp_path / "nameless.db", capsys)
    assert "no record before it names a key of w1" in said
    copy = Journal(SqliteStore(tmp_path / "copy.db"))
    list(JournalCopy(copy).begin(encode_record(found[0]), 1, b""))
    copy.append([encode_record(r) for r in found if isinstance(r, Committed)])
    copy.close()
    said = verify(tmp_path / "copy.db", capsys)
    assert said.startswith("ConfigError: The journal holds no answers, as in a worker's own copy")


async def test_signatures_after_dropped_records_are_checked_with_what_is_left(
    tmp_path: Path,
) -> None:
    await run_of(tmp_path / "journal.db")
    entries = list(Journal(SqliteStore(tmp_path / "journal.db")).load())
    cut = next(n for n, entry in enumerate(entries) if entry.row.kind == COMMITTED) + 1
    state = RunState()
    for entry in entries[:cut]:
        state.apply(decode_record(entry.row.body))
    last, genesis = entries[cut - 1], entries[0].row.body
    sealed = SealedState(
        cut, last.row.chain, last.head, genesis, state_to_pb(state), STATE_VERSION, {}
    )
    store = MemoryStore()
    store.append([entry.row for entry in entries])
    left = Journal(store)
    left.drop_before(seal(sealed))
    origin = left.origin()
    assert origin is not None
    folded, audit = state_of(origin), SignatureAudit(origin)
    for entry in left.load():
        record = decode_record(entry.row.body)
        folded.apply(record)
        audit.take(entry, record, folded)
    assert next(audit.lines()) == "answers: 1 signed and checked, 1 unsigned"


def test_a_signature_has_64_bytes() -> None:
    body = encode_record(Answered(1, 0, Scalars((0.5,), None, None), b"s" * 63))
    with pytest.raises(JournalCorruptError, match="63 bytes long, not 64"):
        decode_record(body)
