"""The high-water mark: how far a journal has come, in a small signed file beside it.

A log that was cut, an older back-up, or an empty file in a journal's place looks sound in itself:
all hashes match, and only the newest records are missing. The mark names the newest record that was
on the disk, so a start can tell. It is a note like that of a signed head (`signed_heads`), with the
key and the signature below it:

    fedmezo.v1/journal/mark
    <records>
    <chain after the last of them, base64>
    <public key, hexadecimal>
    <signature of the first three lines, base64>

The file holds it twice. The first place is on the disk before the file gets its name, and stays as
it is. The second is written after each append and not synced, because it says nothing that is not
on the disk already. So a kill costs the mark nothing, and a power cut costs it what the system had
not written yet. It never names a record that is not on the disk.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmezo_core.errors import JournalCorruptError, JournalError
from fedmezo_core.folders import sync
from fedmezo_core.journal.signed_heads import Signer, mark_text

SLOT_BYTES = 512
"""A disk writes at least so many bytes in one go."""
PLACES = (0, 4096)
"""Offsets of the two notes, in pages of their own."""


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
    found = [_mark_in(content[place : place + SLOT_BYTES]) for place in PLACES]
    marks = [mark for mark in found if mark is not None]
    if not marks:
        raise JournalCorruptError(
            f"The journal's mark {path} is damaged, so nobody can tell whether the journal is "
            "whole; restore both from a copy, or move the mark away to take the journal as it is."
        )
    return max(marks)


class HighWaterMark:
    """Keeps the mark of one journal that is appended to; it follows through `Journal.keep_mark`."""

    def __init__(self, path: Path, signer: Signer) -> None:
        self._path = path
        self._signer = signer
        self._file: int | None = None

    def begin(self, records: int, chain: bytes) -> None:
        """Write the file anew, durably, in place of an earlier one.

        Raises `JournalError` if that fails.
        """
        note = self._note(records, chain)
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            self._file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            for place in PLACES:
                os.pwrite(self._file, note, place)
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
        try:
            os.pwrite(self._file, self._note(records, chain), PLACES[1])
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _note(self, records: int, chain: bytes) -> bytes:
        signature = base64.b64encode(self._signer.sign_mark(records, chain))
        key = self._signer.public_key.hex().encode()
        note = b"%s%s\n%s\n" % (mark_text(records, chain), key, signature)
        return note.ljust(SLOT_BYTES, b"\n")

    def _failed(self, error: OSError) -> JournalError:
        return JournalError(
            f"The journal's mark {self._path} could not be written ({error.strerror}); check the "
            "disk, and that the folder is writable, then start again."
        )


def _mark_in(note: bytes) -> Mark | None:
    """The mark that a note holds; None if it is damaged."""
    lines = note.split(b"\n")
    try:
        records, chain = int(lines[1]), base64.b64decode(lines[2], validate=True)
        key = bytes.fromhex(lines[3].decode())
        signature = base64.b64decode(lines[4], validate=True)
        text = mark_text(records, chain)
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text)
    except (IndexError, ValueError, binascii.Error, InvalidSignature):
        return None
    return Mark(records, chain, key) if note.startswith(text) else None
