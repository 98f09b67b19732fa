"""Reading data files: three formats, one result, and clear refusals."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import DataError
from fedmezo_core.zo.data.rows import read_examples, read_raw_examples

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.replace("\ufeff", "").strip()
)


def _write(path: Path, records: list[dict[str, str]]) -> None:
    names = list(records[0])
    if path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, names, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=5))
def test_the_three_formats_give_the_same_text(pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    records = [{"text": text, "other": "x", "label": label} for text, label in pairs]
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"data{suffix}"
        _write(path, records)
        rows = read_examples(path, ("label", "text"))
        assert [(row.values["text"], row.values["label"]) for row in rows] == pairs
        assert [row.number for row in rows] == list(range(1, len(pairs) + 1))


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    _write(tmp_path / "b.csv", [{"text": "2"}])
    _write(tmp_path / "a.parquet", [{"text": "1"}])
    _write(tmp_path / "c.jsonl", [{"text": "3"}])
    (tmp_path / "notes.txt").write_text("not data")
    assert [row.values["text"] for row in read_examples(tmp_path, ("text",))] == ["1", "2", "3"]


def test_values_become_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '\ufeff{"a": 1, "b": true, "c": 0.5}\n\n{"a": -2, "b": false, "c": 2}\n', encoding="utf-8"
    )
    rows = read_examples(path, ("a", "b", "c"))
    assert [list(row.values.values()) for row in rows] == [
        ["1", "true", "0.5"],
        ["-2", "false", "2"],
    ]
    assert rows[1].location == f"row 3 of {path}", "lines are counted, empty ones too"
    (tmp_path / "data.csv").write_text("\ufeffa,b\n007,1.50\n", encoding="utf-8")
    assert read_examples(tmp_path / "data.csv", ("a", "b"))[0].values == {"a": "007", "b": "1.50"}


def test_long_documents_in_csv(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    _write(tmp_path / "data.csv", [{"text": "x" * 200_000}])
    assert len(read_examples(tmp_path / "data.csv", ("text",))[0].values["text"]) == 200_000
    assert csv.field_size_limit() == limit


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("data.jsonl", lambda path: None, "There is no data file or folder"),
        ("data.jsonl", _bytes(b""), "has no rows"),
        ("data.jsonl", _bytes(b"\n\n"), "has no rows"),
        ("data.csv", _bytes(b""), "has no rows"),
        ("data.csv", _bytes(b"text,label\n"), "has no rows"),
        ("data.parquet", _bytes(b""), "not a readable Parquet file"),
        ("data.parquet", _bytes(b"PAR1 nonsense PAR1"), "not a readable Parquet file"),
        (
            "data.jsonl",
            _bytes(b'{"text": "a"}\n{"text": \n'),
            r"Line 2 of .*is not JSON \(Expecting",
        ),
        ("data.jsonl", _bytes(b"[1, 2]\n"), "Line 1 of .*is not a JSON object"),
        ("data.jsonl", _bytes(b"[" * 100_000), "Line 1 of .*is not JSON"),
        ("data.jsonl", _bytes(b'{"text": "\xff"}\n'), r"not UTF-8 text \(byte 10\)"),
        ("data.csv", _bytes(b"text,label\na\xff,b\n"), "not UTF-8"),
        ("data.csv", _bytes(b"text,label\na,b\nc\n"), r"Row 2 of .*\(line 3\) has 1 fields, but"),
        ("data.csv", _bytes(b'text,label\n"a,b\n'), "not valid CSV"),
        ("data.csv", _bytes(b"text;label\na, b;c\n"), "no column text; .* separated by ';'; save"),
        ("data.csv", _bytes(b"text\tlabel\na, b\tc\n"), r"separated by '\\t'; save it with comm"),
        ("data.csv", _bytes(b"text,text\na,b\n"), "names the column 'text' twice"),
        ("data.jsonl", _bytes(b'{"body": "a", "label": 1}\n'), "no column text; .* body, label"),
        ("data.csv", _bytes(b"body,label\na,b\n"), "no column text; .* body, label"),
        (
            "data.parquet",
            lambda path: _write(path, [{"body": "a", "label": "b"}]),
            "no column text; .* body, label",
        ),
        ("data.jsonl", _bytes(b'{"text": "a"}\n{"label": "b"}\n'), "Row 2 of .* has no text"),
        ("data.jsonl", _bytes(b'{"text": null}\n'), "Row 1 of .* has no text"),
        ("data.jsonl", _bytes(b'{"text": ["a"]}\n'), "Row 1 of .*: text is list, not text"),
        ("data.json", _bytes(b"{}"), r"is not a .jsonl, .csv or .parquet file.*with the ending"),
        ("data.txt", _bytes(b"a"), r"is not a .jsonl, .csv or .parquet file; convert it to one\."),
        ("data", lambda path: path.mkdir(), "holds no data"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    name: str, make: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError, match=sentence) as caught:
        read_examples(path, ("text",))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_whole_rows_keep_every_column_and_value(tmp_path: Path) -> None:
    lines = [
        '{"text": "Grüße", "label": 1, "tags": ["a", {"b": null}], "score": 0.1}',
        '{"other": true, "half": "\\ud800"}',
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    rows = read_raw_examples(path)
    assert [row.json_line().decode() for row in rows] == [f"{line}\n" for line in lines]
    assert rows[0].text("label") == "1"
    with pytest.raises(DataError, match=r"Row 3 of .*data\.jsonl has no label"):
        rows[1].text("label")


def test_whole_rows_of_the_three_formats_are_the_same(tmp_path: Path) -> None:
    records = [{"text": 'a,\n"b"', "label": "x"}, {"text": "\u2028b", "label": "y"}]
    lines = []
    for suffix in (".jsonl", ".csv", ".parquet"):
        _write(tmp_path / f"data{suffix}", records)
        lines.append([row.json_line() for row in read_raw_examples(tmp_path / f"data{suffix}")])
    assert lines[0] == lines[1] == lines[2]
    (tmp_path / "again.jsonl").write_bytes(b"".join(lines[0]))
    assert [
        row.values for row in read_examples(tmp_path / "again.jsonl", ("text", "label"))
    ] == records


def test_what_json_has_no_type_for(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.UTC)
    path = tmp_path / "data.parquet"
    table = {"day": [moment.date()], "at": [moment], "price": [decimal.Decimal("1.50")]}
    pq.write_table(pa.table(table), path)
    assert json.loads(read_raw_examples(path)[0].json_line()) == {
        "day": "2024-05-06",
        "at": "2024-05-06T07:08:00+00:00",
        "price": "1.50",
    }
    for value, written in (
        (b"bytes", "bytes"),
        (b"\xff\xd8", "/9g="),
        (float("nan"), None),
        ([float("inf"), 1.5], [None, 1.5]),
        (datetime.timedelta(seconds=90), "0:01:30"),
    ):
        pq.write_table(pa.table({"text": ["a"], "odd": [value]}), path)
        assert json.loads(read_raw_examples(path)[0].json_line()) == {"text": "a", "odd": written}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_other_columns_are_kept_where_they_are_text_or_numbers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    _write(path, [{"text": "a", "source": "page 1", "grade": "3"}])
    (row,) = read_examples(path, ("text",), keep_others=True)
    assert row.values == {"text": "a", "source": "page 1", "grade": "3"}
    assert read_examples(path, ("text",))[0].values == {"text": "a"}


def test_other_columns_that_are_neither_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "n": 3, "yes": true, "none": null, "list": [1]}\n')
    (row,) = read_examples(path, ("text",), keep_others=True)
    assert row.values == {"text": "a", "n": "3", "yes": "true"}
