"""Files that the demo hands to the product's programs: workers' rows, texts to fit to, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo_core.config import TaskConfig
from fedmezo_core.errors import ConfigError, DataError, ModelError
from fedmezo_core.zo.data.rows import Example, read_rows

DATA_SUFFIXES = ("jsonl", "csv", "parquet")
"""Endings of the data files that workers read."""

SET_ASIDE_SHARE = 10
"""One row of this many is set aside for the fit, if the folder has no texts of its own."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Files that the run reads, and what became of the user's rows."""

    workers: Mapping[str, Path]
    """Worker's name -> its private rows."""
    rows: Mapping[str, int]
    """Worker's name -> how many rows it trains on."""
    rows_found: int
    """Rows of all workers' files, used or not."""
    heldout: Path
    texts: Path
    """What the adapter is fitted to."""
    text_count: int
    texts_are_set_aside: bool
    """Whether the texts come from the workers' files, because the folder has none of its own."""


def write_inputs(
    data: Path, task: TaskConfig, folder: Path, *, rows_max: int, texts_max: int
) -> Inputs:
    """Read a folder of data and write to `folder` what each worker and the fit get of it.

    `data` holds `<worker>.train.*` for each worker, `heldout.*`, and perhaps `texts.*`. A worker
    trains on its first `rows_max` rows. Without `texts.*`, the last tenth of each worker's rows, at
    most `texts_max` of all workers, is set aside for the fit and not trained on. Raises
    `ConfigError` for a folder that lacks a file and `DataError` for a file that cannot be read.
    """
    trained = {_worker_name(path): path for path in _files(data, "*.train")}
    heldout = _files(data, "heldout")
    if not trained or not heldout:
        raise ConfigError(
            f"{data} must hold a heldout.jsonl (or .csv, .parquet) and one <worker>.train.jsonl "
            "for each worker; see docs/data.md."
        )
    own_texts = _files(data, "texts")
    texts = [row for path in own_texts for row in read_rows(path, task)][:texts_max]
    workers: dict[str, Path] = {}
    counts: dict[str, int] = {}
    found = 0
    for name, path in trained.items():
        rows = read_rows(path, task)
        found += len(rows)
        if not own_texts:
            share = max(1, texts_max // len(trained))
            kept = len(rows) - min(share, len(rows) // SET_ASIDE_SHARE)
            texts += rows[kept:]
            rows = rows[:kept]
        workers[name] = _write_rows(folder / f"{name}.jsonl", rows[:rows_max])
        counts[name] = min(rows_max, len(rows))
    if not texts:
        raise DataError(
            f"{data} has fewer than {SET_ASIDE_SHARE} rows for each worker; give more, or a "
            "texts.jsonl with rows like theirs that the adapter can be fitted to."
        )
    # Rows of like length share a batch of the fit, so little of it is padding.
    texts.sort(key=lambda row: sum(map(len, row.values.values())))
    return Inputs(
        workers=workers,
        rows=counts,
        rows_found=found,
        heldout=heldout[0],
        texts=_write_rows(folder / "texts.jsonl", texts),
        text_count=len(texts),
        texts_are_set_aside=not own_texts,
    )


def _files(folder: Path, stem: str) -> list[Path]:
    return [path for suffix in DATA_SUFFIXES for path in sorted(folder.glob(f"{stem}.{suffix}"))]


def _worker_name(path: Path) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", path.name.split(".")[0].lower()).strip("-")[:64] or "worker"


def _write_rows(path: Path, rows: Sequence[Example]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
    return path


def last_widening_layer(model: str) -> tuple[str, int]:
    """Name and input width of the last linear layer of `model` that has more outputs than inputs.

    In a decoder it is the up-projection of the last layer's MLP; the head does not count. Only the
    model's configuration is read. Raises `ModelError` if that fails or there is no such layer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedmezo_core.zo.model.loading import quiet
    from fedmezo_core.zo.model.selection import linear_shapes

    auto_model: Any = AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            empty = auto_model.from_config(AutoConfig.from_pretrained(model))
    except Exception as error:
        # transformers raises almost any type here.
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise ModelError(
            f"The configuration of {model} cannot be read ({reason}); give the name or the folder "
            "of a causal language model."
        ) from error
    for name, (inputs, outputs) in reversed(linear_shapes(empty).items()):
        if outputs > inputs:
            return name, inputs
    raise ModelError(
        f"{model} has no layer that the demo could adapt; name some in deploy/demo/demo.toml, as "
        "target_modules of [run.lora]."
    )


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as a coordinator's TOML file; a mapping becomes a table."""
    path.write_text("\n".join(_toml_lines(settings, "")) + "\n", encoding="utf-8")


def _toml_lines(table: Mapping[str, Any], name: str) -> list[str]:
    lines = [f"\n[{name}]"] if name else []
    for key, value in table.items():
        if not isinstance(value, Mapping):
            # JSON's strings, numbers, booleans and lists are TOML's, too.
            lines.append(f"{_toml_key(key)} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _toml_lines(value, f"{name}.{_toml_key(key)}" if name else _toml_key(key))
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
