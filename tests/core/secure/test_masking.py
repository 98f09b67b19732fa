"""Keys and masks of a hidden sum: published vectors, and what depends on what."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest

from fedmezo_core.events import Peer
from fedmezo_core.trust.secure_aggregation.masking import (
    MODULUS,
    MemberSecrets,
    SumContext,
    agreed,
    expanded,
    is_public_key,
    keystream,
    mask_of,
    pair_mask_key,
    public_key_of,
    self_mask_key,
    transcript_of,
)

CONTEXT = SumContext(b"r" * 32, 1, 2, 3, 64)


def member(number: int) -> tuple[MemberSecrets, Peer]:
    secrets = MemberSecrets(bytes([number]) * 32)
    return secrets, Peer(number, f"w{number}", secrets.keys)


def test_x25519_vectors_of_rfc_7748() -> None:
    """Section 5.2, the first vector, and section 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    result = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert agreed(scalar, point).hex() == result
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert public_key_of(alice).hex() == public
    assert agreed(bob, public_key_of(alice)).hex() == shared
    assert agreed(alice, public_key_of(bob)).hex() == shared


def test_hkdf_vector_of_rfc_5869() -> None:
    """Appendix A.3: SHA-256 without salt and info; the first 32 of its 42 bytes."""
    found = expanded(b"\x0b" * 22, b"")
    assert found.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_chacha20_vector_of_rfc_8439() -> None:
    """Appendix A.1, the first vector: a key, a nonce and a counter of zeros."""
    assert keystream(bytes(32), 64).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert mask_of(bytes(32), 2) == (0xADE0B876, 0x903DF1A0)


def test_points_of_small_order_are_no_keys() -> None:
    """RFC 7748, section 6.1: a shared secret of zeros would be known to everyone."""
    assert is_public_key(public_key_of(b"\x05" * 32))
    for point in (bytes(32), b"\x01" + bytes(31)):
        assert not is_public_key(point)


def test_both_members_agree_on_a_mask_and_others_have_another() -> None:
    (one, first), (two, second) = member(1), member(2)
    transcript = transcript_of(CONTEXT, [first, second])
    private = [secrets._mask_private for secrets in (one, two)]
    keys = {
        pair_mask_key(private[0], second.keys.mask_key, transcript, 1, 2),
        pair_mask_key(private[1], first.keys.mask_key, transcript, 2, 1),
    }
    assert len(keys) == 1
    assert pair_mask_key(private[0], second.keys.mask_key, transcript, 1, 3) not in keys


@pytest.mark.parametrize(
    "change",
    [
        {"run_digest": b"s" * 32},
        {"epoch": 2},
        {"round": 3},
        {"attempt": 4},
        {"directions": 65},
    ],
)
def test_every_part_of_the_context_gives_other_masks(change: dict[str, Any]) -> None:
    (one, first), (_, second) = member(1), member(2)
    found = []
    for context in (CONTEXT, dataclasses.replace(CONTEXT, **change)):
        transcript = transcript_of(context, [first, second])
        found.append(one.masked([0] * 64, transcript, 1, [first, second]))
    assert found[0] != found[1]


def test_other_names_slots_or_keys_give_other_masks() -> None:
    (one, first), (_, second) = member(1), member(2)
    others = [
        second,
        dataclasses.replace(second, worker="other"),
        dataclasses.replace(second, slot=3),
        dataclasses.replace(second, keys=member(3)[1].keys),
    ]
    found = {
        one.masked([0] * 8, transcript_of(CONTEXT, [first, other]), 1, [first, other])
        for other in others
    }
    assert len(found) == len(others)


def test_shares_are_sealed_for_one_member_of_one_attempt() -> None:
    (one, first), (two, second), (three, third) = member(1), member(2), member(3)
    transcript = transcript_of(CONTEXT, [first, second, third])
    sealed = one.seal(b"s" * 66, transcript, 1, second)
    assert two.unseal(sealed, transcript, 2, first) == b"s" * 66
    assert three.unseal(sealed, transcript, 3, first) is None
    assert two.unseal(sealed, transcript, 2, third) is None
    assert two.unseal(sealed, bytes(32), 2, first) is None
    altered = bytes([sealed[0] ^ 1]) + sealed[1:]
    assert two.unseal(altered, transcript, 2, first) is None


def test_masked_numbers_are_uniform_whatever_they_hide() -> None:
    """The top byte of what one member sends: chi squared, 255 degrees of freedom."""
    for value in (0, 2**31 - 1):
        counts = [0] * 256
        for number in range(1, 65):
            secrets = MemberSecrets(struct.pack("<I", number) * 8)
            peers = [Peer(1, "w1", secrets.keys), member(200)[1]]
            transcript = transcript_of(CONTEXT, peers)
            for masked in secrets.masked([value] * 64, transcript, 1, peers):
                counts[masked >> 24] += 1
        chi2 = sum((count - 16) ** 2 / 16 for count in counts)
        assert 160 < chi2 < 360


def test_self_mask_and_pair_masks_are_what_is_sent() -> None:
    (one, first), (two, second) = member(1), member(2)
    transcript = transcript_of(CONTEXT, [first, second])
    sums = [
        (a + b) % MODULUS
        for a, b in zip(
            one.masked([5] * 4, transcript, 1, [first, second]),
            two.masked([7] * 4, transcript, 2, [first, second]),
            strict=True,
        )
    ]
    own = [mask_of(self_mask_key(m._self_mask, transcript, n), 4) for n, m in ((1, one), (2, two))]
    assert sums == [(12 + a + b) % MODULUS for a, b in zip(*own, strict=True)]
