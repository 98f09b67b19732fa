"""Read the rows of a user's JSONL, CSV or Parquet files."""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.program import long_step

log = logging.getLogger("fedmezo.data")

_CSV_FIELD_CHARACTERS_MAX = 1 << 28
"""Longest field of a CSV file: 256 Mi characters."""
_NAMES_SHOWN_MAX = 5
"""Files that are passed over and named in the log."""
_ROWS_NAMED_MAX = 5
"""Rows that are wrong and named after the first."""
_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BARE_KEY = re.compile("[A-Za-z0-9_-]+")
"""A key that TOML takes without quotes."""
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]+)\.0+")


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

        Dates and times of a Parquet file become ISO 8601 text, decimal numbers and other values
        become text, and bytes that are not UTF-8 become base64. NaN and infinities, which JSON does
        not have, become null. Raises `DataError` for values that are nested too deep.
        """
        try:
            try:
                line = _json(self.values)
            except ValueError:
                line = _json(_finite(self.values))
        except RecursionError as error:
            raise DataError(
                f"Row {self.number} of {self.file} holds a value that is nested too deep; flatten "
                "it or remove its column."
            ) from error
        # UTF-8 has no lone surrogates. Python escapes them as JSON does.
        return line.encode("utf-8", "backslashreplace") + b"\n"


def label_form(label: str) -> str:
    """The one form of all spellings of a label.

    It is in Unicode's form NFC and without byte-order marks. `1.0` becomes `1`, as software writes
    whole numbers with a gap between them, and `True` and `TRUE` become `true`, as in JSON.
    """
    label = _composed(label)
    if label.lower() in ("true", "false"):
        return label.lower()
    whole = _WHOLE_NUMBER.fullmatch(label)
    return whole[1] if whole else label


def shown(text: str) -> str:
    """`text` in quotes for a message; what cannot be seen on a screen is escaped."""
    return repr(text) if text == _composed(text) else ascii(text)


def shown_columns(names: Iterable[str]) -> str:
    """Names of columns for a message, in quotes where a plain name would mislead."""
    texts = [name if name and shown(name)[1:-1] == name else shown(name) for name in names]
    return ", ".join(texts) or "(none)"


def spelling_in(names: Iterable[str], column: str) -> str:
    """How `names` spell `column`: they may differ in Unicode form and byte-order marks."""
    names = list(names)
    if column in names:
        return column
    return next((name for name in names if _composed(name) == _composed(column)), column)


def read_raw_examples(path: str | Path) -> list[RawExample]:
    """Read all columns of a .jsonl, .csv or .parquet file, or of all such files in a folder.

    Raises `DataError` as `read_examples` does for a file that it cannot read.
    """
    with long_step(f"reading {path}"):
        return [
            RawExample(record, file, number)
            for file in _files(Path(path).expanduser())
            for number, record in _records_of(file, (), keep_others=True)
        ]


def read_rows(
    path: str | Path,
    task: TaskConfig,
    *,
    keep_others: bool = False,
    names: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read the columns that `task` needs, as `read_examples` does, by the rules of its run.

    Raises `ConfigError` if `names` put the answer into the prompt.
    """
    _check_names(task, names or {})
    return read_examples(
        path,
        task.data_columns,
        keep_others=keep_others,
        plain_numbers=task.columns_are_plain,
        names=names,
    )


def _check_names(task: TaskConfig, names: Mapping[str, str]) -> None:
    """Refuse names with which a prompt would give its answer away, as a contract is refused."""
    answer = names.get(task.answer_column, task.answer_column)
    for column in task.columns():
        own = names.get(column, column)
        if column != task.answer_column and own == answer and not task.objective:
            raise ConfigError(
                f"columns takes the run's {shown_columns([column])} from "
                f"{shown_columns([answer])}, the column with the answer, so every prompt would "
                "give its answer away; name another column."
            )


def read_fit_rows(path: str | Path, config: RunConfig) -> list[Example]:
    """Read rows to fit a run's adapter to. They need no labels where the fit reads none.

    All rows then have the first label of the run. Raises as `read_rows` does.
    """
    task = config.task
    if config.fit_reads_answers:
        return read_rows(path, task)
    rows = read_examples(path, task.columns(), plain_numbers=task.columns_are_plain)
    label = {task.label_column: next(iter(task.verbalizers))}
    return [replace(row, values=label | row.values) for row in rows]


def read_examples(
    path: str | Path,
    columns: Sequence[str],
    *,
    keep_others: bool = False,
    plain_numbers: bool = False,
    names: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read `columns` of a .jsonl, .csv or .parquet file, or of all such files in a folder.

    With `keep_others`, examples also have the other columns that hold text or a number. Files of a
    folder are read in the order of their names. Values become text: JSON and Parquet strings as
    they are, integers in decimal, booleans as `true` and `false`, other numbers as Python writes
    them, dates and times in ISO 8601, bytes as UTF-8; a lone surrogate becomes U+FFFD. A UTF-8
    byte-order mark and lines without any value are skipped. NaN is a missing value. With
    `plain_numbers`, a number 5.0 becomes `5`, as software writes whole numbers with a gap between
    them. `names` maps columns to their names in the files, where these are others; None: the caller
    has no setting `columns` for that, so no message names it.

    Raises `DataError`, which names the file and row, if a file is not readable, not UTF-8,
    malformed or without rows, if no row has one of the columns, or if a row's value for one is
    missing, blank, infinite, or neither text nor a number.
    """
    rows: list[Example] = []
    with long_step(f"reading {path}"):
        for file in _files(Path(path).expanduser()):
            own = names or {}
            written = list(dict.fromkeys(own.get(column, column) for column in columns))
            records = _records_of(file, written, keep_others)
            rows.extend(_examples_of(file, records, columns, keep_others, plain_numbers, names))
    return rows


def rows_of(
    records: Iterable[Mapping[str, Any]],
    task: TaskConfig,
    *,
    keep_others: bool = False,
    names: Mapping[str, str] | None = None,
    source: str = "the data given",
) -> list[Example]:
    """Rows that a program holds, such as a list of dicts or a `datasets.Dataset`, as `read_rows`.

    `source` is their name in messages. Raises as `read_rows` does.
    """
    _check_names(task, names or {})
    numbered: list[tuple[int, dict[str, Any]]] = []
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(
                f"Row {number} of {source} is {type(record).__name__}, not a mapping of column "
                'names to values; give rows like {"text": "...", "label": "..."}.'
            )
        numbered.append((number, dict(record)))
    if not numbered:
        raise DataError(f"There are no rows in {source}; give at least one.")
    plain_numbers = task.columns_are_plain
    return _examples_of(source, numbered, task.data_columns, keep_others, plain_numbers, names)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.iterdir(), key=lambda file: file.name)
        seen = [file for file in found if not file.name.startswith(".")]
        files = [file for file in seen if file.suffix.lower() in _READERS and file.is_file()]
        others = [file.name + "/" * file.is_dir() for file in seen if file not in files]
        more = len(others) - _NAMES_SHOWN_MAX
        passed_over = ", ".join(map(shown, others[:_NAMES_SHOWN_MAX]))
        passed_over += f" and {more} more" if more > 0 else ""
        if not files:
            raise DataError(
                f"{path} holds no data{' but ' if others else ''}{passed_over}: put .jsonl, .csv "
                "or .parquet files there."
            )
        if others:
            log.warning(
                "%s: passed over %s; only .jsonl, .csv and .parquet files are read",
                path,
                passed_over,
            )
        return files
    if not path.exists():
        raise DataError(f"There is no data file or folder {path}; check the path.")
    if path.suffix.lower() not in _READERS:
        hint = " (one JSON object in each line, with the ending .jsonl)" * (path.suffix == ".json")
        raise DataError(f"{path} is not a .jsonl, .csv or .parquet file; convert it to one{hint}.")
    return [path]


def _records_of(
    file: Path, columns: Sequence[str], keep_others: bool
) -> list[tuple[int, dict[str, Any]]]:
    """The numbered records of `file`, with at least `columns`, or with all columns."""
    try:
        records = list(_READERS[file.suffix.lower()](file, columns, keep_others))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        ) from error
    if not records:
        raise DataError(f"{file} has no rows; give a file with at least one, or remove it.")
    return records


def _examples_of(
    file: Path | str,
    records: Sequence[tuple[int, dict[str, Any]]],
    columns: Sequence[str],
    keep_others: bool,
    plain_numbers: bool,
    names: Mapping[str, str] | None,
) -> list[Example]:
    """Numbered records with `columns` as text; `file` is their file, or their name in messages."""
    if plain_numbers:
        records = [
            (number, {name: _whole(value) for name, value in record.items()})
            for number, record in records
        ]
    present = dict.fromkeys(name for _, record in records for name in record)
    own = names or {}
    spelling = {column: spelling_in(present, own.get(column, column)) for column in columns}
    for column in columns:
        if spelling[column] not in present:
            key = column if _BARE_KEY.fullmatch(column) else json.dumps(column)
            remedy = f'; if one of them holds it, set columns = {{ {key} = "its name" }}'
            raise DataError(
                f"{file} has no column {shown_columns([spelling[column]])}; its columns are "
                f"{shown_columns(present)}{'' if names is None else remedy}."
            )

    def values(number: int, record: dict[str, Any]) -> dict[str, str]:
        needed = {name: _text(file, number, record, spelling[name]) for name in columns}
        if not keep_others:
            return needed
        others: dict[str, str] = {}
        for column, value in record.items():
            if column not in needed and (text := _text_of(value)) is not None:
                others[column] = text
        return needed | others

    examples: list[Example] = []
    wrong: list[tuple[int, DataError]] = []
    for number, record in records:
        try:
            examples.append(Example(values(number, record), str(file), number))
        except DataError as error:
            wrong.append((number, error))
    if wrong:
        [(_, first), *others] = wrong
        raise DataError(f"{first}{_other_rows([number for number, _ in others])}")
    return examples


def _other_rows(numbers: Sequence[int]) -> str:
    """The sentence that names rows which are wrong, too; empty if there are none."""
    if not numbers:
        return ""
    named = ", ".join(map(str, numbers[:_ROWS_NAMED_MAX]))
    more = len(numbers) - _ROWS_NAMED_MAX
    named += f" and {more} more" if more > 0 else ""
    return f" Wrong, too: row{'s' if len(numbers) > 1 else ''} {named}."


def _text(file: Path | str, number: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    text = _text_of(value)
    name = shown_columns([column])
    if text is not None and text.replace(_BYTE_ORDER_MARK, "").strip():
        return text
    if text is not None:
        raise DataError(
            f"Row {number} of {file} has an empty {name}; fill it in or remove the row."
        )
    if _is_missing(value):
        raise DataError(f"Row {number} of {file} has no {name}; fill it in or remove the row.")
    if isinstance(value, float):
        raise DataError(
            f"Row {number} of {file}: {name} is infinite or too large a number; correct it or "
            "remove the row."
        )
    if isinstance(value, bytes):
        raise DataError(
            f"Row {number} of {file}: {name} is not UTF-8 text; convert it or name another column."
        )
    raise DataError(
        f"Row {number} of {file}: {name} is {type(value).__name__}, not text or a number; "
        "flatten it or name another column."
    )


def _whole(value: Any) -> Any:
    """A float that is a whole number as an integer, unless Python writes it with an exponent."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e16
    return int(value) if is_whole else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text_of(value: Any) -> str | None:
    """A value of a file as text; None if it is missing or has no text."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return _plain(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace(_BYTE_ORDER_MARK, ""))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _finite(value: Any) -> Any:
    """`value` with None in place of all NaN and infinities in it."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    """A value that JSON has no type for, as text."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        is_whole = value.is_finite() and value == value.to_integral_value()
        return format(value.to_integral_value() if is_whole else value, "f")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def _integer(digits: str) -> int | decimal.Decimal:
    # Python refuses to make an int of thousands of digits, because that takes quadratic time.
    try:
        return int(digits)
    except ValueError:
        return decimal.Decimal(digits)


class _TwiceError(ValueError):
    """An object has a key twice; the argument is the key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json takes the last of equal keys, without a word.
    made = dict(pairs)
    if len(made) < len(pairs):
        [(key, _), *_] = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(key)
    return made


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _read_jsonl(
    file: Path, _columns: Sequence[str], _keep_others: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = _DECODER.decode(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise DataError(f"Line {number} of {file} is not JSON ({reason}).") from error
            except _TwiceError as error:
                raise DataError(
                    f"Line {number} of {file} has the key {shown(error.args[0])} twice; remove one."
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"Line {number} of {file} is not a JSON object; write each row as one line "
                    'like {"text": "...", "label": "..."}.'
                )
            yield number, record


def _read_csv(
    file: Path, columns: Sequence[str], _keep_others: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines, _long_csv_fields():
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            # A spreadsheet's empty columns at the end have no names.
            while header and not header[-1].strip():
                header.pop()
            # What spreadsheets write where the comma is the decimal mark.
            other = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), None)
            if other and columns and spelling_in(header, columns[0]) not in header:
                raise DataError(
                    f"{file} has no column {shown_columns(columns[:1])}; its first line is "
                    f"{shown(header[0])}, so it seems to be separated by {shown(other)}; save it "
                    "with commas."
                )
            written, counts = Counter(header), Counter[str]()
            for index, name in enumerate(header):
                counts[name] += 1
                if written[name] > 1 and name in columns:
                    raise DataError(
                        f"{file} names the column {shown(name)} twice in its first line; rename "
                        "one."
                    )
                # Without columns to look for, all are kept, and none may pass for a single one.
                if counts[name] > 1 or (written[name] > 1 and not columns):
                    header[index] = f"{name} ({counts[name]})"
            number = empty_count = 0
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if not any(map(str.strip, fields)):
                    empty_count += 1
                    continue
                if len(fields) < len(header) or any(map(str.strip, fields[len(header) :])):
                    raise DataError(
                        f"Row {number} of {file} (line {reader.line_num}) has {len(fields)} "
                        f"fields, but the header has {len(header)}; quote fields that contain "
                        "commas."
                    )
                yield number, dict(zip(header, fields, strict=False))
            if empty_count:
                lines_shown = f"{empty_count} line{'s' * (empty_count > 1)}"
                log.warning("%s: skipped %s without any value", file, lines_shown)
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
    file: Path, columns: Sequence[str], keep_others: bool
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
            forms = set(map(_composed, columns))
            wanted = [name for name in names if keep_others or _composed(name) in forms]
            # Only the wanted columns are read, but a message can list them all.
            blank = dict.fromkeys(names)
            if not wanted and parquet.metadata.num_rows:
                yield 1, blank
                return
            number = 0
            for batch in parquet.iter_batches(columns=wanted):
                values = [_values_of(column, pyarrow.string()) for column in batch.columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, blank | dict(zip(batch.schema.names, row, strict=True))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise DataError(f"{file} is not a readable Parquet file ({reason}).") from error


def _values_of(column: Any, text_type: Any) -> list[Any]:
    """The values of an Arrow array, as Python's; what Python has no type for becomes text."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        return [_value_of(scalar, text_type) for scalar in column]
    return values


def _value_of(scalar: Any, text_type: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object
    except (ValueError, OverflowError):
        try:
            # Nanoseconds, and years after 9999. Arrow writes them like ISO 8601, with a space.
            return str(scalar.cast(text_type).as_py()).replace(" ", "T", 1)
        except (ValueError, NotImplementedError):
            return None


_Reader = Callable[[Path, Sequence[str], bool], Iterable[tuple[int, dict[str, Any]]]]
_READERS: dict[str, _Reader] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
