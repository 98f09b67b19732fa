"""Data sets by name, in a worker's own settings file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, DataError, PolicyError
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.zo.data.rows import read_rows, rows_of
from fedmezo_worker.worker_command import main
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import TASK, config_of, genesis_of


def load(tmp_path: Path, text: str, *flags: str) -> WorkerSettings:
    file = tmp_path / "worker.toml"
    file.write_text('name = "w1"\n' + text)
    return load_settings(WorkerSettings, ["--config", str(file), *flags], program="fedmezo-worker")


TWO = """
[data.reviews]
path = "~/reviews.jsonl"
columns = { text = "body", label = "stars" }
heldout = "own.csv"
privacy_epsilon = 4
privacy_clip = 1
privacy_ledger = "reviews.ledger"

[data.x-rays]
path = "x-rays"
objective = "macro-f1"
"""


def test_a_run_gets_the_data_set_that_it_asks_for(tmp_path: Path) -> None:
    settings = load(tmp_path, TWO)
    ours = settings.for_run(genesis_of(config_of(model="a/b", data_set="reviews")))
    assert ours.rows == Path.home() / "reviews.jsonl"
    assert ours.columns == {"text": "body", "label": "stars"}
    assert ours.heldout == Path("own.csv")
    assert ours.privacy_budget is not None
    assert ours.privacy_budget.ledger == Path("reviews.ledger")
    scored = config_of(model="a/b", data_set="x-rays", task={**TASK, "objective": "macro-f1"})
    other = settings.for_run(genesis_of(scored))
    assert (other.rows, other.heldout, other.privacy_budget) == (Path("x-rays"), None, None)


@pytest.mark.parametrize(
    ("data_set", "words"),
    [
        ("songs", r"for the data set songs, and this worker has none of that name; add \[data.s"),
        ("", "names no data set, and this worker has several"),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, data_set: str, words: str) -> None:
    changes = {"data_set": data_set} if data_set else {}
    with pytest.raises(PolicyError, match=words) as caught:
        load(tmp_path, TWO).for_run(genesis_of(config_of(model="a/b", **changes)))
    assert "reviews" not in str(caught.value)


def test_rows_without_a_name_are_for_runs_that_name_none(tmp_path: Path) -> None:
    settings = load(tmp_path, 'data = "rows.jsonl"\ncolumns = { text = "body" }\n')
    ours = settings.for_run(genesis_of(config_of(model="a/b")))
    assert (ours.rows, ours.columns) == (Path("rows.jsonl"), {"text": "body"})
    with pytest.raises(PolicyError, match="for the data set reviews, and this worker has none"):
        settings.for_run(genesis_of(config_of(model="a/b", data_set="reviews")))


def test_a_flag_comes_before_the_tables(tmp_path: Path) -> None:
    assert load(tmp_path, TWO, "--data", "other.jsonl").data == Path("other.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "data is missing; set it"),
        ("data = 5\n", "data.file = 5 is not allowed: use the path of a file or folder"),
        ("[data.reviews]\n", "data.reviews.path is missing; set it"),
        ("[data.Reviews]\npath = 'x'\n", "data.Reviews"),
        ("[data.a]\npth = 'x'\npath = 'x'\n", "data.a.pth is not .*; write path, or remove"),
        ("[data.a]\npath = 'x'\nprivacy_clip = 1\n", "privacy_clip needs privacy_epsilon"),
        ("[data.a]\npath = 'x'\nevaluations = 'x'\n", "evaluations needs heldout"),
        (
            "[data.a]\npath = 'x'\nheldout = 'h'\nevaluations = './x'\n",
            "evaluations = 'x' would be written among the rows of path; name another file",
        ),
        ("[data.a]\npath = ''\n", "data.a.path = '' is not allowed: it is empty: write a path"),
        ("[data]\n", "data is not allowed: it is empty: name a file or folder of rows"),
        (
            "heldout = 'x'\n[data.a]\npath = 'x'\n",
            r"heldout belongs to one data set; write it into that one's \[data.NAME\]",
        ),
        (
            "serve = 'x.sock'\nmodel = 'm'\n[data.a]\npath = 'x'\nheldout = 'x'\n",
            "heldout has no meaning with serve",
        ),
        (
            "base_form = 'form'\n[data.a]\npath = 'x'\nobjective = 'macro-f1'\n",
            "base_form leaves no use for objective",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data.a]\npath = '{gone}'\n", "There is no data file or folder {gone}; check the path."),
        (
            "data = '{here}'\nmodels = {{ x = '{gone}' }}\n",
            "There is no folder {gone}; check models, at 'x'.",
        ),
    ],
)
def test_a_path_in_a_table_is_checked_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    names = {"gone": tmp_path / "gone", "here": tmp_path}
    (file := tmp_path / "worker.toml").write_text('name = "w1"\n' + text.format(**names))
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err == f"fedmezo-worker: {words.format(**names)}\n"


# ---------------------------------------------------------------- columns

TASK_CONFIG = TaskConfig(**TASK)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"body": "Good.", "stars": "positive", "text": "not this"}\n'),
        ("rows.csv", "body,stars,text\nGood.,positive,not this\n"),
    ],
)
def test_columns_of_other_names_are_read_under_those_of_the_run(
    tmp_path: Path, name: str, content: str
) -> None:
    (path := tmp_path / name).write_text(content)
    names = {"text": "body", "label": "stars"}
    [row] = read_rows(path, TASK_CONFIG, names=names)
    assert row.values == {"text": "Good.", "label": "positive"}
    [given] = rows_of([{"body": "Good.", "stars": "positive"}], TASK_CONFIG, names=names)
    assert given.values == row.values


def test_one_column_can_be_two_of_the_runs_but_no_prompt_its_answer(tmp_path: Path) -> None:
    (path := tmp_path / "rows.parquet.csv").write_text("body,label\nGood.,positive\n")
    two = TASK_CONFIG.model_copy(update={"template": "{title}: {text}"})
    [row] = read_rows(path, two, names={"text": "body", "title": "body"})
    assert row.values == {"text": "Good.", "title": "Good.", "label": "positive"}
    for names in ({"text": "label"}, {"text": "body", "label": "body"}, {"label": "text"}):
        with pytest.raises(ConfigError, match=r"run's text from .*, the column with the answer"):
            read_rows(path, TASK_CONFIG, names=names)
        with pytest.raises(ConfigError, match="give its answer away; name another column"):
            rows_of([{"body": "Good.", "label": "positive"}], TASK_CONFIG, names=names)


def test_a_column_that_is_not_there_is_named_as_in_the_data(tmp_path: Path) -> None:
    (path := tmp_path / "rows.jsonl").write_text('{"text": "Good.", "label": "positive"}\n')
    with pytest.raises(DataError, match="has no column body; its columns are text, label"):
        read_rows(path, TASK_CONFIG, names={"text": "body"})


@pytest.mark.parametrize(("column", "key"), [("text", "text"), ("the text", '"the text"')])
def test_the_setting_that_names_a_missing_column_is_told_where_it_exists(
    tmp_path: Path, column: str, key: str
) -> None:
    (path := tmp_path / "rows.jsonl").write_text('{"body": "Good.", "label": "positive"}\n')
    task = TASK_CONFIG.model_copy(update={"template": f"{{{column}}} It was"})
    with pytest.raises(DataError) as caught:
        read_rows(path, task, names={})
    remedy = f'its columns are body, label; if one of them holds it, set columns = {{ {key} = "its'
    assert remedy in str(caught.value)
    with pytest.raises(DataError, match=r"its columns are body, label\.$"):
        read_rows(path, task)
