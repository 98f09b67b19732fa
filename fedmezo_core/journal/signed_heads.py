"""Signed heads: who the coordinator is, and what it says the run's history is.

A signed head, or checkpoint, is a note in the manner of C2SP's tlog-checkpoint, three lines that
anyone can rebuild:

    fedmezo.v1/<run id>
    <round>
    <head after it, base64>

signed with Ed25519 (RFC 8032), so the signature alone travels. The coordinator signs one for each
commit. Two valid signatures of different heads for one round prove that it told two histories.

A sealed state (`sealed`) is signed in the same manner, in a note that no run's id can turn into one
of the above:

    fedmezo.v1/<run id>/origin
    <round>
    <SHA-256 of its bytes, base64>

and so is the high-water mark of a journal (`high_water`):

    fedmezo.v1/journal/mark
    <records>
    <chain after the last of them, base64>
"""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedmezo_core.errors import ConfigError, DivergedError
from fedmezo_core.folders import sync
from fedmezo_core.journal.key_bytes import UNREADABLE


def signed_head_text(run_id: str, round_: int, head: bytes) -> bytes:
    """What is signed: the run, a round, and the 32-byte head after it."""
    return f"fedmezo.v1/{run_id}\n{round_}\n{base64.b64encode(head).decode()}\n".encode()


def origin_text(run_id: str, round_: int, body: bytes) -> bytes:
    """What is signed of a sealed state: the run, its round, and the hash of its bytes."""
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return f"fedmezo.v1/{run_id}/origin\n{round_}\n{digest}\n".encode()


def mark_text(records: int, chain: bytes) -> bytes:
    """What is signed of a journal's length: the count of records, and the 32-byte chain."""
    return f"fedmezo.v1/journal/mark\n{records}\n{base64.b64encode(chain).decode()}\n".encode()


class Signer:
    """The coordinator's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        """32 bytes: what workers check signatures with."""

    def sign(self, run_id: str, round_: int, head: bytes) -> bytes:
        """The signature of the head after a round, 64 bytes; equal for equal arguments."""
        return self._key.sign(signed_head_text(run_id, round_, head))

    def sign_origin(self, run_id: str, round_: int, body: bytes) -> bytes:
        """The signature of a sealed state's bytes, 64 bytes; equal for equal arguments."""
        return self._key.sign(origin_text(run_id, round_, body))

    def sign_mark(self, records: int, chain: bytes) -> bytes:
        """The signature of a journal's length and chain, 64 bytes; equal for equal arguments."""
        return self._key.sign(mark_text(records, chain))


def open_signer(path: Path) -> Signer:
    """The key in a PEM file, made there (readable by its owner only) if there is none.

    Raises `ConfigError` if the file cannot be written, or holds no unencrypted Ed25519 key.
    """
    if path.exists():
        return Signer(_read(path))
    key = Ed25519PrivateKey.generate()
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            with os.fdopen(
                os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb"
            ) as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
                file.flush()
                os.fsync(file.fileno())
            # Whole or not there, and never in place of another's.
            os.link(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError:
        return Signer(_read(path))
    except OSError as error:
        raise ConfigError(
            f"The key {path} that signs this run's checkpoints cannot be made ({error.strerror}); "
            "make its folder writable, or set signing_key."
        ) from None
    return Signer(key)


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"The key {path} cannot be read ({error.strerror}); check signing_key."
        ) from None
    except UNREADABLE:
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"{path} holds no unencrypted Ed25519 private key in PEM; check signing_key, or move "
            "the file away so that a new key is made."
        )
    return key


class Witness:
    """Checks what a coordinator signs for one run; `key` is its public key, 32 bytes."""

    def __init__(self, run_id: str, key: bytes) -> None:
        self.run_id = run_id
        self.key = key
        self._key = Ed25519PublicKey.from_public_bytes(key)

    def check(self, round_: int, head: bytes, signature: bytes) -> None:
        """Raises `DivergedError` unless `signature` is the key's for this round and head."""
        try:
            self._key.verify(signature, signed_head_text(self.run_id, round_, head))
        except InvalidSignature:
            raise DivergedError(
                f"The coordinator's signature for round {round_} is not of key {self.key.hex()} "
                f"over the history that this party holds (head {head.hex()[:16]}); find out who "
                f"serves run {self.run_id}, and which journal it serves."
            ) from None

    def check_origin(self, round_: int, body: bytes, signature: bytes) -> None:
        """Raises `DivergedError` unless `signature` is the key's for a sealed state's bytes."""
        try:
            self._key.verify(signature, origin_text(self.run_id, round_, body))
        except InvalidSignature:
            raise DivergedError(
                f"The signature of the state after round {round_} is not of key {self.key.hex()} "
                "over what it holds; take another party's copy."
            ) from None
