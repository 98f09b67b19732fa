"""The members and tokens on disk as lines of JSON, of which the newest for a name counts.

A change is one line at the end, which is on the disk before it counts: a row, or a list of rows
that count together. A line that a crash cut off never counted. A start writes the file anew,
without the lines that newer ones replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from fedmezo_core.errors import ConfigError
from fedmezo_core.folders import write_private
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.members import Member, Members, Row, Token


class MembersFile:
    """The file of one state folder, which this process alone writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._lock: int | None = None

    def open(self, now_s: int) -> Members:
        """Read the table, and keep every other process from writing it.

        Raises `ConfigError` if another process has it, or if it cannot be read.
        """
        folder = self._path.parent
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"Another coordinator uses the state folder {folder}; stop it, or make a folder "
                "for this one."
            ) from None
        self._lock = lock
        members = read_members(self._path)
        members.forget_tokens_before(now_s)
        write_members(self._path, members.rows())
        self._file = self._path.open("ab", buffering=0)
        return members

    def append(self, rows: Sequence[Row]) -> None:
        """Return as soon as the rows are on the disk; raises `OSError` if they are not.

        They are one change: no crash leaves some of them.
        """
        assert self._file is not None, "open() comes first"
        left = memoryview(_line(rows))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            # The next line must not follow half of this one.
            self._file.truncate(size)
            raise

    def close(self) -> None:
        """Let other processes have the file."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            os.close(self._lock)
        self._file = self._lock = None


def write_members(path: Path, rows: Iterable[Row]) -> None:
    """Write the file anew, whole and durably."""
    write_private(path, b"".join(_line([row]) for row in rows))


def read_members(path: Path) -> Members:
    """The table in a file; raises `ConfigError` if it cannot be read."""
    members = Members()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"The members file {path} cannot be read ({error.strerror}); restore it from a copy."
        ) from None
    for number, line in enumerate(lines[:-1], start=1):  # The last one is empty or cut off.
        try:
            for row in _rows(json.loads(line)):
                members.apply(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ConfigError(
                f"Line {number} of {path} is damaged; restore the file from a copy."
            ) from None
    return members


_KINDS: dict[str, type[Member] | type[Token]] = {"member": Member, "token": Token}


def _line(rows: Sequence[Row]) -> bytes:
    shown = [_shown(row) for row in rows]
    return json.dumps(shown if len(shown) > 1 else shown[0]).encode() + b"\n"


def _shown(row: Row) -> dict[str, Any]:
    kind = "token" if isinstance(row, Token) else "member"
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    shown = {key: v.hex() if isinstance(v, bytes) else v for key, v in values.items()}
    return {kind: shown}


def _rows(values: Any) -> list[Row]:
    if values == []:
        raise ValueError("a change without a row")
    return [_row(one) for one in (values if isinstance(values, list) else [values])]


def _row(values: Any) -> Row:
    [(kind, shown)] = dict(values).items()
    types = {field.name: field.type for field in fields(_KINDS[kind])}
    return _KINDS[kind](**{key: _value(types[key], value) for key, value in shown.items()})


def _value(kind: object, value: Any) -> Any:
    if kind == "bytes":
        return bytes.fromhex(value)
    return Role(value) if kind == "Role" else value
