"""`fedmezo split`: the files, the table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.data.rows import read_examples

DOMAINS = ["films", "films", "films", "Product Reviews", "Product Reviews", "news"]


def records(count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "text": f"Text {number}.",
            "label": "positive" if number % 2 else "negative",
            "domain": DOMAINS[number % 6],
            "more": {"number": number},
        }
        for number in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    return path


def split(*arguments: str | Path, columns: int = 80) -> str:
    """Run the command in this process; what it printed."""
    result = CliRunner().invoke(
        client_cli.app,
        ["split", *map(str, arguments)],
        catch_exceptions=False,
        env={"COLUMNS": str(columns)},
    )
    assert result.exit_code == 0, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "how",
    [
        ["--workers", "4"],
        ["--workers", "4", "--by", "label"],
        ["--workers", "4", "--splitter", "dirichlet", "--by", "label", "--alpha", "0.3"],
        ["--workers", "2", "--splitter", "category", "--by", "domain"],
    ],
)
def test_every_row_lands_once_with_all_its_columns(
    data: Path, tmp_path: Path, how: list[str]
) -> None:
    split(data, "--out", tmp_path / "a", *how)
    found = [record for path in (tmp_path / "a").iterdir() for record in read(path)]
    assert sorted(found, key=lambda record: record["more"]["number"]) == records()
    assert len(read(tmp_path / "a/heldout.jsonl")) == 6
    workers = int(how[1])
    names = {f"worker-{number}.train.jsonl" for number in range(1, workers + 1)}
    assert set(contents(tmp_path / "a")) == names | {"heldout.jsonl"}
    # The same again, byte for byte; another seed gives another split of the same rows.
    split(data, "--out", tmp_path / "b", *how)
    split(data, "--out", tmp_path / "c", *how, "--seed", "2")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_the_held_out_rows_are_the_same_for_every_splitter(data: Path, tmp_path: Path) -> None:
    by = ["--by", "domain", "--heldout", "12"]
    split(data, "--out", tmp_path / "a", "--workers", "4", *by)
    split(data, "--out", tmp_path / "b", "--workers", "7", "--splitter", "dirichlet", *by)
    split(data, "--out", tmp_path / "c", "--splitter", "category", *by)
    held = [contents(tmp_path / name)["heldout.jsonl"] for name in "abc"]
    assert held[0] == held[1] == held[2]
    domains = [record["domain"] for record in read(tmp_path / "a/heldout.jsonl")]
    assert [domains.count(name) for name in ("films", "Product Reviews", "news")] == [6, 4, 2]


def test_one_worker_a_category_is_named_after_it(data: Path, tmp_path: Path) -> None:
    said = split(data, "--out", tmp_path / "a", "--splitter", "category", "--by", "domain")
    assert set(contents(tmp_path / "a")) == {
        "films.train.jsonl",
        "news.train.jsonl",
        "product-reviews.train.jsonl",
        "heldout.jsonl",
    }
    assert [line.split() for line in said.splitlines()[:5]] == [
        ["worker", "rows", "Product", "Reviews", "films", "news"],
        ["product-reviews", "18", "18", "0", "0"],
        ["films", "27", "0", "27", "0"],
        ["news", "9", "0", "0", "9"],
        ["held-out", "6", "2", "3", "1"],
    ]
    names = ["--names", "clinic-a, clinic-b,clinic-c"]
    split(data, "--out", tmp_path / "b", "--splitter", "category", "--by", "domain", *names)
    assert "clinic-b.train.jsonl" in contents(tmp_path / "b")


def test_many_classes_are_named_where_a_table_has_no_room(data: Path, tmp_path: Path) -> None:
    how = ["--workers", "2", "--by", "text", "--heldout", "0"]
    said = split(data, "--out", tmp_path / "a", *how)
    assert "of each class, largest first" in said
    assert "26 more" in said
    assert "heldout.jsonl" not in contents(tmp_path / "a")


def test_rows_that_were_moved_are_said(data: Path, tmp_path: Path) -> None:
    how = ["--workers", "5", "--splitter", "dirichlet", "--by", "label", "--alpha", "1e-6"]
    said = split(data, "--out", tmp_path / "a", *how, "--rows-min", "4")
    assert "rows were taken from the largest shares" in said
    assert min(len(read(path)) for path in (tmp_path / "a").glob("worker-*")) == 4


def test_csv_parquet_and_folders_become_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    plain = [{"text": f"{number}, yes", "label": "x"} for number in range(6)]
    (folder / "a.csv").write_text(
        "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in plain[:3])
    )
    pq.write_table(pa.Table.from_pylist(plain[3:]), folder / "b.parquet")
    split(folder, "--out", tmp_path / "out", "--workers", "2", "--heldout", "2")
    found = read_examples(tmp_path / "out", ("text", "label"))
    assert sorted((row.values for row in found), key=lambda row: row["text"]) == plain


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("--workers 2 --by domian", "There is no column domian to split by; the columns are text,"),
        ("--workers 61", "61 workers are too many for 54 rows"),
        ("--workers 4 --splitter category --by domain", "4 workers are more than the 3 categories"),
        ("--workers 2 --splitter dirichlet --by label --alpha 0", "--alpha = 0 is not allowed"),
        ("--workers 2 --splitter dirichlet", "--splitter dirichlet needs --by"),
        ("--splitter category", "--splitter category needs --by"),
        ("--workers 2 --alpha 1", "--alpha is for --splitter dirichlet only"),
        ("--workers 2 --rows-min 1", "--rows-min is for --splitter dirichlet only"),
        ("--workers 0", "--workers = 0 is not allowed"),
        ("--heldout 5", "The number of workers is missing; give --workers or --names"),
        ("--names a,b --workers 3", "--workers 3 does not fit the 2 names"),
        ("--names a,B", "--names: 'B' is not allowed"),
        ("--workers 2 --heldout much", "--heldout = 'much' is not allowed"),
        ("--workers 2 --heldout 60", "--heldout 60 leaves none of the 60 rows"),
        ("--workers 2 --by more", "Row 1 of .*all.jsonl: more is dict, not text or a number"),
    ],
)
def test_what_cannot_be_done_is_refused_and_writes_nothing(
    data: Path, tmp_path: Path, how: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        split(data, "--out", tmp_path / "out", *how.split())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_folder_that_is_not_empty_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    split(data, "--out", tmp_path / "out", "--workers", "2")
    before = contents(tmp_path / "out")
    for out in (tmp_path / "out", data, "/"):
        with pytest.raises(ConfigError, match="exists and is not empty; name another folder"):
            split(data, "--out", out, "--workers", "3")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match=r"cannot be written .*; choose another --out"):
        split(data, "--out", "/proc/no/where", "--workers", "2")


@pytest.mark.parametrize(
    ("name", "words"), [("empty.jsonl", "has no rows"), ("gone.csv", "There is no data file")]
)
def test_a_refusal_is_one_sentence_and_status_2(
    tmp_path: Path,
    name: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").touch()
    arguments = ["split", str(tmp_path / name), "--out", str(tmp_path / "out"), "--workers", "2"]
    monkeypatch.setattr("sys.argv", ["fedmezo", *arguments])
    assert client_cli.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("fedmezo: ")
    assert words in said
    assert said.count("\n") == 1


def test_careless_rows_are_split_as_workers_read_them(tmp_path: Path) -> None:
    labels = ["1", "1.0", "true", "true", '"True"', "0", "0.0", "0"]
    lines = [
        f'{{"text": "ok \\ud83d", "label": {label}, "x": NaN, "y": [1e400], "z": {"1" * 5000}}}\n'
        for label in labels
    ]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    options = ["--splitter", "category", "--by", "label", "--heldout", "0"]
    split(tmp_path / "all.jsonl", "--out", tmp_path / "a", *options)
    assert {path.name: len(read(path)) for path in (tmp_path / "a").iterdir()} == {
        "0.train.jsonl": 3,
        "1.train.jsonl": 2,
        "true.train.jsonl": 3,
    }
    for path in (tmp_path / "a").iterdir():
        for row in read_examples(path, ["text", "z"]):
            assert row.values == {"text": "ok \ufffd", "z": "1" * 5000}
        assert all((record["x"], record["y"]) == (None, [None]) for record in read(path))
    (tmp_path / "odd.csv").write_text("text,label\na,b\n,\nc,\n")
    with pytest.raises(ConfigError, match=r"Row 3 of .*odd\.csv has an empty label"):
        split(tmp_path / "odd.csv", "--out", tmp_path / "b", *options)
