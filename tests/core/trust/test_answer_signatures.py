"""A signature fits one answer, ticket, run and history, and no other."""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import ProtocolError
from fedmezo_core.events import Ticket
from fedmezo_core.records import Scalars
from fedmezo_core.trust.answer_signatures import (
    AnswerSigner,
    answer_text,
    check_signing_key,
    is_signed,
)

RUN, HEAD = b"r" * 32, b"h" * 32
SIGNER = AnswerSigner(Ed25519PrivateKey.from_private_bytes(b"k" * 32), RUN)
PRIME = 2**255 - 19

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
binary32 = st.floats(width=32, allow_nan=False)
heads = st.binary(min_size=32, max_size=32)
tickets = st.builds(Ticket, u32, u64, u32)
scalars_of = st.builds(
    Scalars,
    st.lists(binary32, min_size=0, max_size=5).map(tuple),
    st.none() | binary32,
    st.none() | u64,
    st.none() | u64,
)
answers = st.tuples(heads, tickets, heads, scalars_of)


def content(answer: tuple[bytes, Ticket, bytes, Scalars]) -> Any:
    run, ticket, head, scalars = answer
    grads = [struct.pack("<f", grad) for grad in scalars.projected_grads]
    loss = None if scalars.mean_loss is None else struct.pack("<f", scalars.mean_loss)
    return run, ticket, head, grads, loss, scalars.weights_digest64, scalars.rows


@given(answers, answers)
@settings(max_examples=200)
def test_two_answers_have_one_text_only_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (answer_text(*one) == answer_text(*other)) == (content(one) == content(other))


@given(answers, st.data())
@settings(max_examples=100)
def test_another_value_of_one_field_has_another_text(answer: Any, data: st.DataObject) -> None:
    run, ticket, head, scalars = answer
    others = [
        (data.draw(heads), ticket, head, scalars),
        (run, ticket, data.draw(heads), scalars),
        (run, Ticket(data.draw(u32), ticket.round, ticket.slot), head, scalars),
        (run, Ticket(ticket.epoch, data.draw(u64), ticket.slot), head, scalars),
        (run, Ticket(ticket.epoch, ticket.round, data.draw(u32)), head, scalars),
        (run, ticket, head, scalars._replace(mean_loss=data.draw(st.none() | binary32))),
        (run, ticket, head, scalars._replace(weights_digest64=data.draw(st.none() | u64))),
        (run, ticket, head, scalars._replace(rows=data.draw(st.none() | u64))),
        (run, ticket, head, scalars._replace(projected_grads=(*scalars.projected_grads, 0.0))),
    ]
    for other in others:
        assert (answer_text(*answer) == answer_text(*other)) == (content(answer) == content(other))


@given(st.data())
@settings(max_examples=100)
def test_a_changed_bit_of_text_signature_or_key_does_not_fit(data: st.DataObject) -> None:
    ticket, scalars = data.draw(tickets), data.draw(scalars_of)
    parts = [
        SIGNER.public_key,
        answer_text(RUN, ticket, HEAD, scalars),
        SIGNER.sign(ticket, HEAD, scalars),
    ]
    assert is_signed(*parts)
    which = data.draw(st.integers(0, 2))
    changed = bytearray(parts[which])
    place = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[place // 8] ^= 1 << place % 8
    parts[which] = bytes(changed)
    assert not is_signed(*parts)


@given(st.binary(max_size=100), st.binary(max_size=100))
@settings(max_examples=50)
def test_any_bytes_may_come_as_key_and_signature(key: bytes, signature: bytes) -> None:
    assert not is_signed(key, b"text", signature)


def test_forms_that_libsodium_refuses_mean_what_openssl_says() -> None:
    """Signatures and keys with points of small order, which some journals may have."""
    neutral, order_2 = bytes([1]) + bytes(31), (2**255 - 20).to_bytes(32, "little")
    found = []
    for key, start in product((neutral, order_2, SIGNER.public_key), (neutral, order_2)):
        for n in range(8):
            signature, text = start + bytes(32), bytes([n])
            found.append(is_signed(key, text, signature))
            assert found[-1] == _says_openssl(key, text, signature)
    assert {True, False} == set(found)


def _says_openssl(key: bytes, text: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
    except InvalidSignature:
        return False
    return True


def test_a_key_that_fits_anyones_signature_is_refused() -> None:
    """Points of small order: 8 times each of them is the neutral point."""
    points = [_point(y) for y in range(1, 80)]
    order = 2**252 + 27742317777372353535851937790883648493
    small = {_times(order, point) for point in points if point is not None}
    assert len(small) == 8
    for x, y in small:
        for encoded in {y, y + PRIME if y < 19 else y}:
            for sign in {x % 2, 1}:
                key = (encoded + sign * 2**255).to_bytes(32, "little")
                with pytest.raises(ProtocolError, match="that anyone can make"):
                    check_signing_key(key)
    with pytest.raises(ProtocolError, match="has 32 bytes, not 31"):
        check_signing_key(b"k" * 31)
    check_signing_key(SIGNER.public_key)


# ---------------------------------------------------------------- the curve, by its formulas

D = -121665 * pow(121666, -1, PRIME) % PRIME


def _point(y: int) -> tuple[int, int] | None:
    """A point of the curve with this y, if there is one."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if (x * x - square) % PRIME:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    return None if (x * x - square) % PRIME else (x, y)


def _times(count: int, point: tuple[int, int]) -> tuple[int, int]:
    total = (0, 1)
    while count:
        if count & 1:
            total = _sum(total, point)
        point, count = _sum(point, point), count >> 1
    return total


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = one, other
    product = D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, PRIME)
    y = (y1 * y2 + x1 * x2) * pow(1 - product, -1, PRIME)
    return x % PRIME, y % PRIME
