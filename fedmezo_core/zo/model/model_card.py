"""The README.md of an exported model or adapter: what it is, and which run it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import metadata_load

_PROJECT: Final = "[FedMeZO](https://arxiv.org/abs/2402.05926)"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an exported folder tells of itself. It names no path of the machine that wrote it."""

    base: str
    """The run's name for its base model."""
    run_id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    """More rows of the card's table, by name: the round, the digest of the weights, ..."""

    def text(self, what: Literal["model", "adapter"], base_folder: Path) -> str:
        """The card as Markdown with the metadata that model hubs read.

        `base_folder` is where the base was loaded from; its own card says what its licence is.
        """
        licence = licence_of(base_folder)
        metadata = [
            f"base_model: {json.dumps(self.base, ensure_ascii=False)}",
            f"library_name: {'transformers' if what == 'model' else 'peft'}",
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
        is_what = "A LoRA adapter for" if what == "adapter" else "A language model made from"
        return "\n".join(
            [
                "---", *metadata, "---", "",
                f"# {_cell(self.run_id)}", "",
                f"{is_what} `{_cell(self.base)}`, fine-tuned by a federation with {_PROJECT}.", "",
                "| | |", "|---|---|",
                *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()), "",
            ]
        )  # fmt: skip


def licence_of(folder: Path) -> str | None:
    """The licence that the card of a model's folder names; None if it names none."""
    try:
        licence = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:
        return None  # The file is missing, or is no card. Its parser raises almost any type.
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
