"""Signed answers: a worker's Ed25519 signature (RFC 8032) of what it measured, and when and where.

What is signed names the run, the ticket and the head of the weights that were measured on. So one
answer's signature is worth nothing for another run, ticket or history. The journal holds all that a
signature is over, so that anyone can check it there, without the worker and without a network.

Numbers are little-endian. `flags` is the sum of 1 if there is a mean loss, 2 if there is a digest,
4 if there is a count of rows; the value of what is not there is 0:

    "fedmezo answer v1", line feed       18 bytes
    head after the run's genesis         32 bytes
    epoch, round, slot                   u32, u64, u32
    head before the round                32 bytes
    flags                                u8
    mean loss                            binary32
    weights_digest64, rows               u64, u64
    count of projected gradients         u32
    projected gradients                  binary32 each
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from fedmezo_core.errors import ProtocolError
from fedmezo_core.events import Ticket
from fedmezo_core.records import SIGNATURE_BYTES, Scalars

KEY_BYTES = 32

_TAG = b"fedmezo answer v1\n"
_FORM = "<18s32sIQI32sBfQQI"
_SMALL_Y = int("7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7", 16)
_FIELD = 2**255 - 19
_OF_SMALL_ORDER = frozenset(
    {0, 1, _SMALL_Y, _FIELD - _SMALL_Y, _FIELD - 1, _FIELD, _FIELD + 1},
)
"""Points that are no one's key, as numbers without the bit of their sign: anyone can make a
signature that fits them."""


def answer_text(genesis_head: bytes, ticket: Ticket, head: bytes, scalars: Scalars) -> bytes:
    """What is signed of an answer; both heads have 32 bytes, and floats are binary32 values.

    `head` is the head after the round before the ticket's, at which the answer was measured.
    """
    loss, digest64, rows = scalars.mean_loss, scalars.weights_digest64, scalars.rows
    flags = (loss is not None) + 2 * (digest64 is not None) + 4 * (rows is not None)
    grads = scalars.projected_grads
    return struct.pack(
        f"{_FORM}{len(grads)}f",
        _TAG,
        genesis_head,
        ticket.epoch,
        ticket.round,
        ticket.slot,
        head,
        flags,
        0.0 if loss is None else loss,
        digest64 or 0,
        rows or 0,
        len(grads),
        *grads,
    )


def is_signed(key: bytes, text: bytes, signature: bytes) -> bool:
    """Whether `signature` is the key's for `text`; any other bytes give False."""
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        # libsodium takes half the time of OpenSSL.
        crypto_sign_open(signature + text, key)
        return True
    except BadSignatureError:
        pass
    # It also refuses signatures and keys of a few odd forms that only a forger makes. What counts
    # is what OpenSSL says, so that every journal's signatures keep their meaning.
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_signing_key(key: bytes) -> None:
    """Raise `ProtocolError` for a public key (32 bytes) that cannot sign for one worker alone."""
    if len(key) != KEY_BYTES:
        raise ProtocolError(
            f"A signing key has {KEY_BYTES} bytes, not {len(key)}; send an Ed25519 public key."
        )
    if int.from_bytes(key, "little") % 2**255 in _OF_SMALL_ORDER:
        raise ProtocolError(
            f"The signing key {key.hex()} has signatures that anyone can make; make a new key."
        )


class AnswerSigner:
    """A worker's key, for the answers of one run."""

    def __init__(self, key: Ed25519PrivateKey, genesis_head: bytes) -> None:
        """`genesis_head` is the head after the run's genesis, 32 bytes."""
        self._key = key
        self._genesis_head = genesis_head
        self.public_key = key.public_key().public_bytes_raw()
        """32 bytes: what others check the signatures with."""

    def sign(self, ticket: Ticket, head: bytes, scalars: Scalars) -> bytes:
        """The signature of an answer, 64 bytes; equal for equal arguments (see `answer_text`)."""
        return self.sign_text(answer_text(self._genesis_head, ticket, head, scalars))

    def sign_text(self, text: bytes) -> bytes:
        """The signature of a text that names its own purpose, 64 bytes."""
        return self._key.sign(text)
