"""What an open session takes of signed answers: only what its worker signed for this very place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import ProtocolError, SignatureError, StaleTicketError
from fedmezo_core.events import AnswerReceived, SendAnswer, Ticket
from fedmezo_core.records import Scalars, digest64_of
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.secure_aggregation.masking import run_digest_of
from fedmezo_core.wire.admission import Signing, event_from_request, signing_of
from fedmezo_core.wire.messages import answer_to_pb, hello_to_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of

GENESIS = genesis_of(config_of(digest_every_rounds=3))
RUN = b"r" * 32
HEADS = [bytes([n]) * 32 for n in range(5)]
SIGNER = AnswerSigner(Ed25519PrivateKey.from_private_bytes(b"k" * 32), RUN)
SIGNING = Signing(SIGNER.public_key, GENESIS.config, RUN, run_digest_of(GENESIS))


def head_at(round_: int) -> bytes:
    return HEADS[round_] if round_ < len(HEADS) else b""


def answer_of(round_: int = 2, **changes: Any) -> SendAnswer:
    head = HEADS[round_ - 1]
    scalars = Scalars((0.5, -0.25), 0.75, None, 7)
    return replace(SendAnswer(Ticket(1, round_, 3), scalars, digest64_of(head), head), **changes)


def taken(message: wire.SessionRequest, signing: Signing | None = SIGNING) -> AnswerReceived:
    event = event_from_request("w1", message, 4, head_at, signing)
    assert isinstance(event, AnswerReceived)
    return event


def test_a_signed_answer_is_taken_with_its_signature_and_key() -> None:
    message = answer_to_pb(answer_of(), SIGNER)
    event = taken(message)
    assert event.scalars == answer_of().scalars
    assert (event.signature, event.key) == (message.answer.signature, SIGNER.public_key)


def test_numbers_are_signed_as_the_message_holds_them() -> None:
    message = answer_to_pb(answer_of(scalars=Scalars((0.1, 1e-50), 0.7, None)), SIGNER)
    taken(message)


def test_a_digest_that_nobody_wants_is_not_in_the_journal_and_is_not_signed() -> None:
    wanted = answer_of(1, scalars=Scalars((0.5,), None, 9), head64=None)
    assert taken(answer_to_pb(wanted, SIGNER)).scalars.weights_digest64 == 9
    unwanted = answer_of(2, scalars=Scalars((0.5,), None, 9), head64=None)
    with pytest.raises(SignatureError):
        taken(answer_to_pb(unwanted, SIGNER))


@given(st.data())
@settings(max_examples=100)
def test_an_answer_with_another_value_in_one_field_is_refused(data: st.DataObject) -> None:
    message = answer_to_pb(answer_of(), SIGNER)
    answer = message.answer
    number = data.draw(st.integers(0, 2**32 - 1))
    binary32 = data.draw(st.floats(width=32, allow_nan=False))
    before = answer.SerializeToString()
    match data.draw(st.integers(0, 7)):
        case 0:
            answer.ticket.epoch = number
        case 1:
            answer.ticket.slot = number
        case 2:
            answer.projected_grads[data.draw(st.integers(0, 1))] = binary32
        case 3:
            answer.projected_grads.append(binary32)
        case 4:
            answer.mean_loss = binary32
        case 5:
            answer.ClearField(data.draw(st.sampled_from(["mean_loss", "rows"])))
        case 6:
            answer.rows = number
        case _:
            answer.signature = data.draw(st.binary(min_size=1, max_size=70))
    if answer.SerializeToString() == before:
        return
    with pytest.raises(SignatureError, match="worker w1's answer to round 2"):
        taken(message)


@pytest.mark.parametrize(
    ("told", "signing", "signer"),
    [
        ("another run", replace(SIGNING, genesis_head=b"s" * 32), SIGNER),
        ("another key", replace(SIGNING, key=b"q" * 32), SIGNER),
        ("no signature", SIGNING, None),
        ("no key", None, SIGNER),
    ],
)
def test_another_run_or_key_or_none_is_refused(
    told: str, signing: Signing | None, signer: AnswerSigner | None
) -> None:
    with pytest.raises(SignatureError):
        taken(answer_to_pb(answer_of(), signer), signing)


def test_an_answer_is_good_for_one_round_and_one_history() -> None:
    message = answer_to_pb(answer_of(2, head64=None), SIGNER)
    message.answer.ticket.round = 3
    with pytest.raises(SignatureError):
        taken(message)
    elsewhere = answer_of(2, head=b"x" * 32, head64=None)
    with pytest.raises(SignatureError, match="head 0101010101010101"):
        taken(answer_to_pb(elsewhere, SIGNER))


@pytest.mark.parametrize("round_", [0, 6, 2**64 - 1])
def test_an_answer_to_a_round_that_nobody_can_know_is_never_taken_unchecked(round_: int) -> None:
    message = answer_to_pb(answer_of(2, head64=None), SIGNER)
    message.answer.ticket.round = round_
    with pytest.raises(StaleTicketError, match="cannot be checked"):
        taken(message)


# ---------------------------------------------------------------- which key


def hello_with(key: bytes) -> wire.Hello:
    hello = hello_to_pb(GENESIS, "w1", 0, RUN).hello
    hello.signing_key = key
    return hello


def test_anyone_may_sign_and_need_not() -> None:
    assert signing_of(hello_with(b""), Caller.ANYONE, GENESIS, RUN) is None
    key = SIGNER.public_key
    assert signing_of(hello_with(key), Caller.ANYONE, GENESIS, RUN) == SIGNING
    with pytest.raises(ProtocolError, match="has 32 bytes, not 5"):
        signing_of(hello_with(b"short"), Caller.ANYONE, GENESIS, RUN)
    with pytest.raises(ProtocolError, match="that anyone can make"):
        signing_of(hello_with(bytes(32)), Caller.ANYONE, GENESIS, RUN)


def test_a_member_signs_with_the_key_that_it_joined_with() -> None:
    key = SIGNER.public_key
    member = Caller(Role.WORKER, "w1", b"f" * 32, key)
    assert signing_of(hello_with(key), member, GENESIS, RUN) == SIGNING
    for other in (b"", b"k" * 32):
        with pytest.raises(SignatureError, match="start it with the state folder"):
            signing_of(hello_with(other), member, GENESIS, RUN)
    with pytest.raises(SignatureError, match="without a signing key"):
        signing_of(hello_with(key), replace(member, signing_key=b""), GENESIS, RUN)
