"""Read the rows of a user's JSONL, CSV or Parquet files."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_core.errors import DataError

_CSV_FIELD_CHARACTERS_MAX = 1 << 28
"""Longest field of a CSV file: 256 Mi characters."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data, with all values as text."""

    values: dict[str, str]
    file: str
    """Path of the file that holds the row, for messages."""
    number: int
    """Row number in the file, from 1 (a CSV header is not counted)."""

    @property
    def location(self) -> str:
        """The row and its file in words, for messages."""
        return f"row {self.number} of {self.file}"


@dataclass(frozen=True, slots=True)
class RawExample:
    """One row of data with all its columns, and values of the types that the file gives them."""

    values: dict[str, Any]
    file: Path
    """Path of the file that holds the row, for messages."""
    number: int
    """Row number in the file, from 1 (a CSV header is not counted)."""

    def text(self, column: str) -> str:
        """The row's value of `column` as text; raises `DataError` as `read_examples` does."""
        return _text(self.file, self.number, self.values, column)

    def json_line(self) -> bytes:
        """The row as one line of a JSONL file, in UTF-8.

        Dates and times of a Parquet file become ISO 8601 text, and decimal numbers become text.
        Raises `DataError` for values that JSON cannot hold: binary values, NaN and infinities.
        """
        try:
            line = _json(self.values)
        except (TypeError, ValueError) as error:
            column = next(name for name, value in self.values.items() if not _is_json(value))
            raise DataError(
                f"Row {self.number} of {self.file}: {column} holds a value that JSON cannot hold "
                f"({error}); convert it or remove the column."
            ) from error
        # UTF-8 has no lone surrogates. Python escapes them as JSON does.
        return line.encode("utf-8", "backslashreplace") + b"\n"


def read_raw_examples(path: str | Path) -> list[RawExample]:
    """Read all columns of a .jsonl, .csv or .parquet file, or of all such files in a folder.

    Raises `DataError` as `read_examples` does for a file that it cannot read.
    """
    return [
        RawExample(record, file, number)
        for file in _files(Path(path).expanduser())
        for number, record in _records_of(file, None)
    ]


def read_examples(
    path: str | Path, columns: Sequence[str], *, keep_others: bool = False
) -> list[Example]:
    """Read `columns` of a .jsonl, .csv or .parquet file, or of all such files in a folder.

    With `keep_others`, examples also have the other columns that hold text or a number. Files of a
    folder are read in the order of their names. Values become text: JSON and Parquet strings as
    they are, integers in decimal, booleans as `true` and `false`, other numbers as Python writes
    them. A UTF-8 byte order mark and empty lines are skipped.

    Raises `DataError`, which names the file and row, if a file is not readable, not UTF-8,
    malformed or without rows, if no row has one of the columns, or if a row has no value for one.
    """
    rows: list[Example] = []
    for file in _files(Path(path).expanduser()):
        rows.extend(_rows_of(file, columns, keep_others))
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(
            (file for file in path.iterdir() if file.suffix.lower() in _READERS and file.is_file()),
            key=lambda file: file.name,
        )
        if not files:
            raise DataError(f"{path} holds no data: put .jsonl, .csv or .parquet files there.")
        return files
    if not path.exists():
        raise DataError(f"There is no data file or folder {path}; check the path.")
    if path.suffix.lower() not in _READERS:
        hint = " (one JSON object in each line, with the ending .jsonl)" * (path.suffix == ".json")
        raise DataError(f"{path} is not a .jsonl, .csv or .parquet file; convert it to one{hint}.")
    return [path]


def _records_of(file: Path, columns: Sequence[str] | None) -> list[tuple[int, dict[str, Any]]]:
    """The numbered records of `file`, with at least `columns`, or with all columns."""
    try:
        records = list(_READERS[file.suffix.lower()](file, columns))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from error
    if not records:
        raise DataError(f"{file} has no rows; give a file with at least one, or remove it.")
    return records


def _rows_of(file: Path, columns: Sequence[str], keep_others: bool) -> list[Example]:
    records = _records_of(file, None if keep_others else columns)
    present = dict.fromkeys(name for _, record in records for name in record)
    for column in columns:
        if column not in present:
            raise DataError(
                f"{file} has no column {column}; its columns are {', '.join(present) or '(none)'}."
            )

    def values(number: int, record: dict[str, Any]) -> dict[str, str]:
        needed = {column: _text(file, number, record, column) for column in columns}
        if not keep_others:
            return needed
        others = {
            column: _text(file, number, record, column)
            for column, value in record.items()
            if column not in needed and isinstance(value, (str, int, float))
        }
        return needed | others

    return [Example(values(number, record), str(file), number) for number, record in records]


def _text(file: Path, number: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if value is None:
        raise DataError(f"Row {number} of {file} has no {column}; fill it in or remove the row.")
    raise DataError(
        f"Row {number} of {file}: {column} is {type(value).__name__}, not text or a number; "
        "flatten it or name another column."
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _is_json(value: Any) -> bool:
    try:
        _json(value)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> str:
    """A value that JSON has no type for, as text."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _read_jsonl(file: Path, _columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise DataError(f"Line {number} of {file} is not JSON ({reason}).") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"Line {number} of {file} is not a JSON object; write each row as one line "
                    'like {"text": "...", "label": "..."}.'
                )
            yield number, record


def _read_csv(file: Path, _columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines, _long_csv_fields():
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{file} names a column twice in its first line; rename one.")
            number = 0
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if len(fields) != len(header):
                    raise DataError(
                        f"Row {number} of {file} (line {reader.line_num}) has {len(fields)} "
                        f"fields, but the header has {len(header)}; quote fields that contain "
                        "commas."
                    )
                yield number, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(
                f"Line {reader.line_num} of {file} is not valid CSV ({error}); check its quotes."
            ) from error


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """While open, a CSV field may be longer than the csv module's default of 128 KiB."""
    limit = csv.field_size_limit(_CSV_FIELD_CHARACTERS_MAX)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(
    file: Path, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    # Slow to import, and only Parquet files need it.
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file} needs the package pyarrow, which is missing; install fedmezo[worker]."
        ) from error

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = [name for name in names if columns is None or name in columns]
            # Only the wanted columns are read, but a message can list them all.
            blank = dict.fromkeys(names)
            if not wanted and parquet.metadata.num_rows:
                yield 1, blank
                return
            number = 0
            for batch in parquet.iter_batches(columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield number, blank | record
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise DataError(f"{file} is not a readable Parquet file ({reason}).") from error


_Reader = Callable[[Path, Sequence[str] | None], Iterable[tuple[int, dict[str, Any]]]]
_READERS: dict[str, _Reader] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
