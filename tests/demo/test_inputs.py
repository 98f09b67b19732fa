"""What the demo makes of a folder of data and of a model."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import pytest

from deploy.demo.__main__ import plan
from deploy.demo.inputs import last_widening_layer, write_inputs, write_settings
from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, DataError, ModelError
from fedmezo_core.zo.data.rows import read_examples
from tests.integration.support.parties import save_model

TASK = TaskConfig(template="{text} It was", verbalizers={"bad": " bad", "good": " good"})


def write(path: Path, count: int) -> None:
    """`count` rows, numbered; the file's ending says how."""
    rows = [{"text": f"{path.name} {n}", "label": "good"} for n in range(count)]
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts_of(path: Path) -> list[str]:
    return [row.values["text"] for row in read_examples(path, ["text", "label"])]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two workers of 30 and 50 rows, and held-out rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "Clinic A.train.csv", 30)
    write(folder / "b.train.jsonl", 50)
    write(folder / "heldout.jsonl", 4)
    return folder


def test_the_last_tenth_of_the_rows_is_set_aside_for_the_fit(data: Path, tmp_path: Path) -> None:
    made = write_inputs(data, TASK, tmp_path / "out", rows_max=40, texts_max=100)
    assert made.rows == {"b": 40, "clinic-a": 27}
    assert made.rows_found == 80
    assert made.texts_are_set_aside
    assert made.text_count == 8
    texts, rows = texts_of(made.texts), [texts_of(path) for path in made.workers.values()]
    assert not set(texts) & {text for own in rows for text in own}
    assert {text.rpartition(" ")[2] for text in texts} == {str(n) for n in range(27, 50)} - {
        str(n) for n in range(30, 45)
    }


def test_no_more_texts_are_set_aside_than_the_fit_takes(data: Path, tmp_path: Path) -> None:
    made = write_inputs(data, TASK, tmp_path / "out", rows_max=1000, texts_max=4)
    assert made.text_count == 4
    assert made.rows == {"b": 48, "clinic-a": 28}


def test_texts_of_the_folders_own_leave_the_workers_rows_whole(data: Path, tmp_path: Path) -> None:
    write(data / "texts.jsonl", 9)
    made = write_inputs(data, TASK, tmp_path / "out", rows_max=1000, texts_max=100)
    assert made.rows == {"b": 50, "clinic-a": 30}
    assert not made.texts_are_set_aside
    assert len(texts_of(made.texts)) == 9


def test_too_few_rows_to_fit_to_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.train.jsonl", 9)
    write(tmp_path / "heldout.jsonl", 4)
    with pytest.raises(DataError, match=r"texts\.jsonl"):
        write_inputs(tmp_path, TASK, tmp_path / "out", rows_max=10, texts_max=10)


def test_a_folder_without_the_files_is_refused_with_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold a heldout\.jsonl"):
        write_inputs(tmp_path, TASK, tmp_path / "out", rows_max=10, texts_max=10)


def test_the_layer_to_adapt_is_the_last_that_widens(tmp_path: Path) -> None:
    save_model(tmp_path / "tiny", layers=2)
    name, width = last_widening_layer(str(tmp_path / "tiny"))
    assert name == "transformer.h.1.mlp.c_fc"
    assert width == 16


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        last_widening_layer(str(tmp_path))


def test_settings_are_read_back_as_they_were(tmp_path: Path) -> None:
    settings = {
        "model": 'C:\\a "b" \U0001f600',
        "run": {
            "eps": 1e-5,
            "lora": {"freeze_a": True, "target_modules": ["a", "b"]},
            "task": {"verbalizers": {"very good": " g"}},
        },
    }
    write_settings(tmp_path / "c.toml", settings)
    assert tomllib.loads((tmp_path / "c.toml").read_text(encoding="utf-8")) == settings


def test_a_users_own_folder_needs_two_values_only(data: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "tiny")
    given = argparse.Namespace(model=str(tmp_path / "tiny"), data=str(data), seed=7, rounds=None)
    made = plan(given, tmp_path / "out")
    run = made.coordinator["run"]
    assert set(made.inputs.workers) == {"clinic-a", "b"}
    assert made.inputs.heldout == data / "heldout.jsonl"
    assert run["seed"] == 7
    assert run["workers_min"] == run["quorum"] == 2
    assert run["lora"]["target_modules"] == ["transformer.h.0.mlp.c_fc"]
    assert run["lora"]["rank"] == run["lora"]["alpha"] == 4
    assert not made.is_default
