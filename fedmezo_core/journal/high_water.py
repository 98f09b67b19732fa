"""The high-water mark: how far a journal has come, in a small signed file beside it.

A log that was cut, an older back-up, or an empty file in a journal's place looks sound in itself:
all hashes match, and only the newest records are missing. The mark names the newest record that was
on the disk, so a start can tell. The file begins with a note like that of a signed head
(`signed_heads`), with the key and the signature below it:

    fedmezo.v1/journal/mark
    <records>
    <chain after the last of them, base64>
    <public key, hexadecimal>
    <signature of the first three lines, base64>

A start writes it, and it is on the disk before the file gets its name. After each append a second
note follows in a page of its own: the same three lines, and the SHA-256 of the first note and
these. It is not synced, because it says nothing that is not on the disk already, and not signed,
because signing costs as much as half of an append. So a kill costs the mark nothing, and a power
cut costs it what the system had not written yet. It never names a record that is not on the disk.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmezo_core.errors import JournalCorruptError, JournalError
from fedmezo_core.folders import sync
from fedmezo_core.journal.signed_heads import Signer, mark_text

NOTE_BYTES = 512
"""A disk writes at least so many bytes in one go."""
SECOND_OFFSET = 4096
"""Where the second note is: in a page of its own."""


class Mark(NamedTuple):
    """What a high-water mark says."""

    records: int
    """Count of records that were on the disk, dropped ones included."""

    chain: bytes
    """Chain after the last of them, 32 bytes."""

    key: bytes
    """Public key of the coordinator that signed it, 32 bytes."""


def read_mark(path: Path) -> Mark | None:
    """The mark in a file; None if there is no file.

    Raises `JournalCorruptError` if it holds no mark with a valid signature, and `JournalError` if
    it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(
            f"The journal's mark {path} cannot be read ({error.strerror}); make it readable."
        ) from None
    first = content[:NOTE_BYTES]
    mark = _signed_in(first)
    if mark is None:
        raise JournalCorruptError(
            f"The journal's mark {path} is damaged, so nobody can tell whether the journal is "
            "whole; restore both from a copy, or move the mark away to take the journal as it is."
        )
    return _followed_in(content[SECOND_OFFSET:], first, mark) or mark


class HighWaterMark:
    """Keeps the mark of one journal that is appended to; it follows through `Journal.keep_mark`."""

    def __init__(self, path: Path, signer: Signer) -> None:
        self._path = path
        self._signer = signer
        self._file: int | None = None
        self._first = b""

    def begin(self, records: int, chain: bytes) -> None:
        """Write the file anew, durably, in place of an earlier one.

        Raises `JournalError` if that fails.
        """
        text = mark_text(records, chain)
        signature = base64.b64encode(self._signer.sign_mark(records, chain))
        self._first = _note(text, self._signer.public_key.hex().encode(), signature)
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            self._file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            os.pwrite(self._file, self._first, 0)
            os.pwrite(self._file, bytes(NOTE_BYTES), SECOND_OFFSET)
            os.fsync(self._file)
            partial.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise self._failed(error) from None

    def move(self, records: int, chain: bytes) -> None:
        """Name records that are on the disk by now; `begin` comes first.

        Raises `JournalError` if that fails.
        """
        assert self._file is not None
        text = mark_text(records, chain)
        try:
            os.pwrite(self._file, _note(text, _digest(self._first, text)), SECOND_OFFSET)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _failed(self, error: OSError) -> JournalError:
        return JournalError(
            f"The journal's mark {self._path} could not be written ({error.strerror}); check the "
            "disk, and that the folder is writable, then start again."
        )


def _note(text: bytes, *lines: bytes) -> bytes:
    return b"\n".join((text.rstrip(), *lines)).ljust(NOTE_BYTES, b"\n")


def _digest(first: bytes, text: bytes) -> bytes:
    return hashlib.sha256(first + text).hexdigest().encode()


def _signed_in(note: bytes) -> Mark | None:
    """The mark that the first note holds; None if it is damaged."""
    try:
        _, records, chain, key, signature, *_ = note.split(b"\n")
        mark = Mark(int(records), base64.b64decode(chain), bytes.fromhex(key.decode()))
        text = mark_text(mark.records, mark.chain)
        Ed25519PublicKey.from_public_bytes(mark.key).verify(base64.b64decode(signature), text)
    except (ValueError, InvalidSignature):
        return None
    return mark


def _followed_in(note: bytes, first: bytes, mark: Mark) -> Mark | None:
    """The mark that the second note holds; None if it is damaged or not written yet."""
    try:
        _, records, chain, digest, *_ = note.split(b"\n")
        later = mark._replace(records=int(records), chain=base64.b64decode(chain))
    except ValueError:
        return None
    return later if digest == _digest(first, mark_text(later.records, later.chain)) else None
