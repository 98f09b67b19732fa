"""Files as people really have them: what is read, what is refused, and in which words."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.zo.data.rows import (
    Example,
    label_form,
    read_examples,
    read_raw_examples,
    read_rows,
)
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.party import open_party

COLUMNS = ("text", "label")
LONG = "1" * 5000


def written(path: Path, content: Any) -> Path:
    """`path`, which then holds `content`: text, bytes, or the columns of a Parquet file."""
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


def nanoseconds(count: int) -> Any:
    return pa.array([count], pa.timestamp("ns"))


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        pytest.param("a.csv", "text,label\na,b\n,\n , \nc,d\n", ["ab", "cd"], id="padding lines"),
        pytest.param("a.csv", "text,label,,\na,b,,\nc,d\n", ["ab", "cd"], id="padding columns"),
        pytest.param("a.csv", "text,label\na,b,,\n", ["ab"], id="padding fields"),
        pytest.param("a.csv", "text,x,label,x\na,1,b,2\n", ["ab"], id="unused columns of one name"),
        pytest.param(
            "a.jsonl", '{"text": "ok \\ud83d", "label": 1}', ["ok \ufffd1"], id="surrogate"
        ),
        pytest.param("a.jsonl", '{"text": "a", "label": 1, "x": NaN}', ["a1"], id="unused NaN"),
        pytest.param("a.jsonl", '{"text": "a", "label": 1, "x": 1e400}', ["a1"], id="unused 1e400"),
        pytest.param(
            "a.jsonl", f'{{"text": "a", "label": 1, "x": {LONG}}}', ["a1"], id="unused long integer"
        ),
        pytest.param(
            "a.jsonl", f'{{"text": "a", "label": {LONG}}}', ["a" + LONG], id="long integer"
        ),
        pytest.param("a.jsonl", '{"\ufefftext": "a", "label": 1}', ["a1"], id="mark in a name"),
        pytest.param(
            "a.parquet", {"text": [b"gr\xc3\xbcn"], "label": [1]}, ["gr\xfcn1"], id="bytes"
        ),
        pytest.param(
            "a.parquet",
            {"text": ["a"], "label": [decimal.Decimal("1.00")]},
            ["a1"],
            id="whole decimal",
        ),
        pytest.param(
            "a.parquet",
            {"text": [datetime.date(2024, 5, 6)], "label": [decimal.Decimal("1.50")]},
            ["2024-05-061.50"],
            id="date and decimal",
        ),
        pytest.param(
            "a.parquet",
            {"text": ["a"], "label": ["b"], "at": nanoseconds(1)},
            ["ab"],
            id="unused nanoseconds",
        ),
    ],
)
def test_what_is_read(name: str, content: Any, rows: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    found = read_examples(path, COLUMNS)
    assert ["".join(row.values[column] for column in COLUMNS) for row in found] == rows
    # An objective sees the other columns too, which stop nothing.
    assert len(read_examples(path, COLUMNS, keep_others=True)) == len(rows)
    # `fedmezo split` and training agree.
    split = tmp_path / "split.jsonl"
    split.write_bytes(b"".join(row.json_line() for row in read_raw_examples(path)))
    assert [row.values for row in read_examples(split, COLUMNS)] == [row.values for row in found]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "text,label\na,b\n,\nc,\n", r"Row 3 of .*a\.csv has an empty label"),
        ("a.csv", "text,label\na,b\n  ,b\n", r"Row 2 of .*a\.csv has an empty text"),
        ("a.csv", "text,label\n,b\na,b\na,\n", r"Row 1 .* remove the row\. Wrong, too: row 3\."),
        (
            "a.csv",
            "text,label\n" + 9 * ",b\n",
            r"Row 1 .* Wrong, too: rows 2, 3, 4, 5, 6 and 3 more\.",
        ),
        ("a.csv", "text,label\n,\n", "has no rows"),
        ("a.csv", "text,label,,\na,b,c,\n", "Row 1 of .* has 4 fields, but the header has 2"),
        ("a.jsonl", '{"text": " ", "label": 1}', r"Row 1 of .*a\.jsonl has an empty text"),
        ("a.jsonl", '{"text": "a", "label": 1, "text": "b"}', "Line 1 of .* key 'text' twice; rem"),
        ("a.jsonl", '{"text": "\\ufeff", "label": 1}', "Row 1 of .* has an empty text"),
        ("a.jsonl", '{"text": "a", "label": NaN}', "Row 1 of .* has no label"),
        ("a.jsonl", '{"text": Infinity, "label": 1}', "Row 1 of .*: text is infinite or too large"),
        ("a.jsonl", '{"text": -1e400, "label": 1}', "Row 1 of .*: text is infinite or too large"),
        ("a.parquet", {"text": ["a", ""], "label": [1, 2]}, "Row 2 of .* has an empty text"),
        ("a.parquet", {"text": ["a"], "label": [float("nan")]}, "Row 1 of .* has no label"),
        ("a.parquet", {"text": [b"\xff"], "label": [1]}, "Row 1 of .*: text is not UTF-8 text"),
        ("a.jsonl", '{"te\\u200bxt": 1, "label": 1}', r"columns are 'te\\u200bxt', label"),
    ],
)
def test_what_is_refused(name: str, content: Any, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=sentence) as caught:
        read_examples(path, COLUMNS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("content", "name", "texts"),
    [
        ('{"text": 5.0, "label": "a"}', "a.jsonl", ("5.0", "5")),
        ('{"text": -3.0, "label": "a"}', "a.jsonl", ("-3.0", "-3")),
        ('{"text": 5.5, "label": "a"}', "a.jsonl", ("5.5", "5.5")),
        ('{"text": 1e300, "label": "a"}', "a.jsonl", ("1e+300", "1e+300")),
        ("text,label\n5.0,a\n", "a.csv", ("5.0", "5.0")),
        ({"text": [5.0], "label": ["a"]}, "a.parquet", ("5.0", "5")),
    ],
)
def test_a_number_that_is_whole_is_written_as_whole(
    content: Any, name: str, texts: tuple[str, str], version: int, tmp_path: Path
) -> None:
    verbalizers = {"a": " bad", "b": " good"}
    task = TaskConfig(verbalizers=verbalizers, template="{text}", template_version=version)
    (row,) = read_rows(written(tmp_path / name, content), task)
    assert row.values["text"] == texts[version == 3]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_needed_column_that_is_named_twice_is_refused_also_after_a_split(
    column: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.csv", f"text,label,{column}\na,b,c\n")
    with pytest.raises(DataError, match=f"names the column '{column}' twice in its first line"):
        read_examples(path, COLUMNS)
    split = tmp_path / "split.jsonl"
    split.write_bytes(b"".join(row.json_line() for row in read_raw_examples(path)))
    named = rf"no column {column}; its columns are .*{column} \(1\).*{column} \(2\)"
    with pytest.raises(DataError, match=named):
        read_examples(split, COLUMNS)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_rows_beyond_the_positions_of_a_run_that_has_begun(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    """Rotary positions go on without end; others have a vector each, and there are no more."""
    task = TaskConfig(verbalizers={"a": " bad", "b": " good"}, tokens_max=200)
    config = RunConfig(run_id="x", model="base", task=task)
    party = open_party(config, str(folder_of(kind)), threads=1)
    rows = [Example({"text": "x" * 150, "label": "a"}, "a.csv", 1)]
    if kind != "llama":
        told = r"a\.csv has a row of 150 tokens, but base knows 128 .*; make the rows shorter"
        with pytest.raises(ConfigError, match=told):
            party.encode(Path("a.csv"), rows)
        rows = [Example({"text": "x" * 128, "label": "a"}, "a.csv", 1)]
    batch = party.task.collate(party.encode(Path("a.csv"), rows).examples, "x")
    assert math.isfinite(party.task.loss(party.loaded.model, batch))


def test_skipped_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_examples(written(tmp_path / "a.csv", "text,label\na,b\n,\n , \n"), COLUMNS)
    assert "a.csv: skipped 2 lines without any value" in caplog.text


@pytest.mark.parametrize(
    ("keys", "name", "content"),
    [
        (("0", "1"), "a.jsonl", '{"text": "a", "label": 1.0}'),
        (("0.0", "1.0"), "a.jsonl", '{"text": "a", "label": 1}'),
        (("0", "1"), "a.csv", "text,label\na,1.0\n"),
        (("0", "1"), "a.parquet", {"text": ["a"], "label": [1.0]}),
        (("false", "true"), "a.csv", "text,label\na,TRUE\n"),
        (("False", "True"), "a.jsonl", '{"text": "a", "label": true}'),
        (("false", "true"), "a.parquet", {"text": ["a"], "label": ["True"]}),
        (("schlecht", "scho\u0308n"), "a.csv", "text,label\na,sch\xf6n\n"),
        (("bad", "good"), "a.csv", "text,label\na,\ufeffgood\n"),
        # A label that is spelt as in the contract means what it always meant.
        (("1", "1.0"), "a.csv", "text,label\na,1.0\n"),
    ],
)
def test_a_label_has_one_meaning(
    keys: tuple[str, str],
    name: str,
    content: Any,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    config = TaskConfig(verbalizers={keys[0]: " terrible", keys[1]: " great"})
    path = written(tmp_path / name, content)
    (example,) = Task(config, tokenizer, 384).encode(read_examples(path, COLUMNS)).examples
    assert example.label == 1
    (raw,) = read_raw_examples(path)
    assert label_form(raw.text("label")) == label_form(keys[1])


def test_a_label_that_two_verbalizers_spell_is_refused_with_what_cannot_be_seen(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = TaskConfig(verbalizers={"True": " great", "TRUE": " terrible"})
    path = written(tmp_path / "a.csv", "text,label\na,true\nb,x\u200b\n")
    rows = read_examples(path, COLUMNS)
    task = Task(config, tokenizer, 384)
    with pytest.raises(DataError, match="label 'true' is not among"):
        task.encode(rows[:1])
    with pytest.raises(DataError, match=r"label 'x\\u200b' is not among"):
        task.encode(rows[1:])


def _spoil(folder: Path) -> None:
    (folder / "._rows.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    (folder / ".hidden.csv").write_text("text,label\nno,no\n")
    (folder / "more.json").write_text("{}")
    (folder / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    (folder / "older").mkdir()


@pytest.mark.parametrize("read", [lambda path: read_examples(path, COLUMNS), read_raw_examples])
def test_hidden_files_are_ignored_and_what_is_passed_over_is_said(
    read: Callable[[Path], list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "b"}) + "\n")
    assert len(read(tmp_path)) == 1
    assert not caplog.text
    _spoil(tmp_path)
    assert len(read(tmp_path)) == 1
    assert "passed over 'more.json', 'older/', 'rows.jsonl.gz'; only .jsonl" in caplog.text
    assert "rows.jsonl'" not in caplog.text
    assert "csv'" not in caplog.text
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no data but 'more.json', .*: put .jsonl"):
        read(tmp_path)


def test_nanoseconds_are_kept_by_split(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": ["a"], "at": nanoseconds(1)})
    (row,) = read_raw_examples(path)
    assert json.loads(row.json_line()) == {"text": "a", "at": "1970-01-01T00:00:00.000000001"}
