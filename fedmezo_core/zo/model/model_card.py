"""The README.md of an exported model or adapter: what it is, and which run it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import metadata_load

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.zo.model.run_file import RUN_FILE, ExportedEvaluation, RunFile

ExportKind = Literal["model", "adapter", "gguf"]

_PROJECT: Final = "[FedMeZO](https://arxiv.org/abs/2402.05926)"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LIBRARIES: Final = {"model": "transformers", "adapter": "peft", "gguf": "gguf"}
_EVALUATIONS_MAX: Final = 20
"""Rows of the table of evaluations; of more, some in between are left out."""
_SETTINGS: Final = (
    "learning_rate", "eps", "probes", "estimator", "local_steps", "batch_size", "distribution",
    "seed_policy", "aggregation", "normalized_step", "schedule", "weight_decay", "weighting",
    "dtype", "train", "seed",
)  # fmt: skip
"""Settings of a contract that a card names, in this order."""

GGUF_ADAPTER_FILE: Final = "adapter.gguf"
"""Name of the file that llama.cpp reads, in a folder of that kind."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an exported folder tells of itself. It names no path of the machine that wrote it."""

    base: str
    """The run's name for its base model."""
    run_id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    """More rows of the card's table, by name: the round, the digest of the weights, ..."""
    run: RunFile | None = None
    """The run as a program reads it, which the folder gets too; None before a run has begun."""

    def text(self, what: ExportKind, base_folder: Path) -> str:
        """The card as Markdown with the metadata that model hubs read.

        `base_folder` is where the base was loaded from; its own card says what its licence is.
        """
        licence = licence_of(base_folder)
        relation = "finetune" if what == "model" else "adapter"
        metadata = [
            f"base_model: {json.dumps(self.base, ensure_ascii=False)}",
            f"base_model_relation: {relation}",
            f"library_name: {_LIBRARIES[what]}",
            "pipeline_tag: text-generation",
            *([] if licence is None else [f"license: {licence}"]),
            "tags: [federated-learning, zeroth-order-optimization]",
        ]
        rows = {
            "Base model": f"`{self.base}`",
            "Licence of the base": licence or "see the base model",
            "Run": self.run_id,
            **self.facts,
        }
        is_what = "A language model made from" if what == "model" else "A LoRA adapter for"
        return "\n".join(
            [
                "---", *metadata, "---", "",
                f"# {_cell(self.run_id)}", "",
                f"{is_what} `{_cell(self.base)}`, fine-tuned by a federation with {_PROJECT}.", "",
                *_table(rows),
                *([] if self.run is None else self._sections(self.run, what)),
            ]
        )  # fmt: skip

    def _sections(self, run: RunFile, what: ExportKind) -> Iterator[str]:
        if run.evaluations:
            yield from ("## Evaluation", "", "Of the run itself, on its held-out rows.", "")
            yield from _curve(run.evaluations)
        yield from ("## Settings", "", *_table(_settings(run.contract)))
        yield from (
            f"`{RUN_FILE}` has the whole contract, with the template of a row.", "",
            "The run's journal does not know how much of their privacy a worker's rows have given",
            "away. The account is that worker's own, if its operator set a budget.", "",
        )  # fmt: skip
        yield from ("## How to use it", "", *_usage(what, self.base, run.contract.task))
        if what != "gguf":
            base = "" if what == "model" else " --model BASE"
            yield from (
                "With the run's own template, on rows like its own:", "",
                "```sh",
                f'fedmezo generate FOLDER "a text"{base}',
                f"fedmezo evaluate FOLDER --data rows.jsonl{base}",
                "```", "",
            )  # fmt: skip
        yield from (
            "## How to rebuild it", "",
            "The weights follow from the base and the run's journal. Whoever has a copy of it,",
            "such as `fedmezo export --as journal` writes, gets the same digest with:", "",
            "```sh",
            f"fedmezo rebuild JOURNAL --model BASE --round {run.round} --out FOLDER",
            "```", "",
        )  # fmt: skip


def licence_of(folder: Path) -> str | None:
    """The licence that the card of a model's folder names; None if it names none."""
    try:
        licence = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:
        return None  # The file is missing, or is no card. Its parser raises almost any type.
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def _usage(what: ExportKind, base: str, task: TaskConfig) -> Iterator[str]:
    name = json.dumps(base, ensure_ascii=False)
    yield "```sh" if what == "gguf" else "```python"
    match what:
        case "model":
            yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
            yield ""
            yield 'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")'
            yield 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        case "adapter":
            yield "from peft import PeftModel"
            yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
            yield ""
            yield f"base = AutoModelForCausalLM.from_pretrained({name})"
            yield 'model = PeftModel.from_pretrained(base, "FOLDER")'
            yield f"tokenizer = AutoTokenizer.from_pretrained({name})"
        case "gguf":
            yield f"llama-cli -m BASE.gguf --lora FOLDER/{GGUF_ADAPTER_FILE}"
    if what != "gguf" and task.kind == "classification" and not task.objective:
        yield from _classifying(task)
    yield "```"
    yield ""


def _classifying(task: TaskConfig) -> Iterator[str]:
    """Lines of Python that name the class of a row, as the run did.

    They compare the first tokens in which the words of the classes differ.
    """
    columns = task.columns()
    if not all(re.fullmatch(r"[\w -]+", column) for column in columns):
        return  # `format` would take more than a name from these.
    row = dict.fromkeys(columns, "A gripping film.")
    yield from (
        "",
        "import torch",
        "",
        f"words = {task.verbalizers!r}",
        f"# The run cut rows to {task.tokens_max} tokens.",
        f"prompt = {task.template!r}.format(**{row!r})",
        "rows = [tokenizer(prompt + word).input_ids for word in words.values()]",
        "place = next(k for k, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1)",
        "with torch.no_grad():",
        "    logits = model(torch.tensor([rows[0][:place]])).logits[0, -1]",
        "label = max(zip(words, rows), key=lambda one: logits[one[1][place]])[0]",
        "print(label)",
    )


def _settings(contract: RunConfig) -> dict[str, str]:
    rows = {name: _shown(getattr(contract, name)) for name in _SETTINGS}
    if contract.lora is not None:
        rows |= {f"lora.{name}": _shown(value) for name, value in contract.lora}
    return {f"`{name}`": value for name, value in rows.items() if value}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _curve(evaluations: Sequence[ExportedEvaluation]) -> Iterator[str]:
    """A table of the evaluations: the first, the best, the last, and some in between."""
    last = len(evaluations) - 1
    count = min(len(evaluations), _EVALUATIONS_MAX)
    chosen = {round(index * last / max(count - 1, 1)) for index in range(count)}
    best = min(range(len(evaluations)), key=lambda index: evaluations[index].loss)
    has_auc = any(one.auc is not None for one in evaluations)
    yield "| Round | Loss | Accuracy |" + (" AUC |" if has_auc else "")
    yield "|---:|---:|---:|" + ("---:|" if has_auc else "")
    for index in sorted(chosen | {best}):
        one = evaluations[index]
        auc = "" if not has_auc else " |" if one.auc is None else f" {one.auc:.4f} |"
        mark = " (best)" if index == best else ""
        yield f"| {one.round}{mark} | {one.loss:.4f} | {100 * one.accuracy:.1f} % |{auc}"
    yield ""


def _table(rows: Mapping[str, str]) -> list[str]:
    cells = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return ["| | |", "|---|---|", *cells, ""]


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
