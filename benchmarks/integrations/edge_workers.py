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
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.figures import Figure
from benchmarks.integrations.gguf_models import QWEN_HALF_BILLION, write_llama, write_random
from fedmezo_core.config import parse_run
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.zo.assignment import open_estimator
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
from fedmezo_core.zo.party import Party, open_party

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / "build" / "cache"
MODEL: Final = CACHE / "models" / "smollm2-135m"
ROWS: Final = CACHE / "data" / "vader" / "movies.train.jsonl"
GGUF_TYPES: Final = ("Q4_1", "F16", "Q8_0", "Q4_0")
SAME_BASE: Final = {"ONNX Runtime, float32", "llama.cpp, Q4_1", "llama.cpp, F16"}
"""Forms that hold `MODEL`'s own weights: it is what a GGUF of Q4_1 holds, as float32, and F16 keeps
them but for their last bits. The others differ by what their types keep."""
BATCHES: Final = 4
BATCH_ROWS: Final = 2
SEEDS: Final = {"0.001": 4, "0.01": 4, "0.1": 4}
"""Directions of each batch, by eps."""
SMALL_SEEDS: Final = {"0.01": 1}


def figures(small: bool) -> Iterator[Figure]:
    """Correlations with torch float32, and memory and time of a half-billion model's worker."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if _has("llama_cpp"):
            yield from _half_billion(Path(name), measurements=1 if small else 3)
        if MODEL.is_dir() and ROWS.is_file():
            yield from _forms(Path(name), small)


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _half_billion(folder: Path, measurements: int) -> Iterator[Figure]:
    file = folder / "half.gguf"
    write_random(QWEN_HALF_BILLION, file)
    yield Figure("half-billion GGUF: size", file.stat().st_size / 1e6, "MB")
    module = "benchmarks.integrations.edge_memory"
    found = _in_a_process(module, {}, str(file), str(measurements))
    what = "half-billion llama.cpp worker"
    yield Figure(f"{what}: peak resident memory", found["peak_mb"], "MB", "at most 1000")
    yield Figure(f"{what}: forward pass, 8 rows of 32 tokens", found["pass_s"], "s of CPU")
    yield Figure(f"{what}: the same pass, products by 8 bits", found["rounded_pass_s"], "s of CPU")
    ratio = found["measurement_s"] / found["pass_s"]
    yield Figure(f"{what}: measurement / forward pass", ratio, "x", "at most 2.3")


def _forms(folder: Path, small: bool) -> Iterator[Figure]:
    """What each form of one base costs, and how close its gradients come to the base's in torch."""
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
    seeds = SMALL_SEEDS if small else SEEDS
    names = dict(_exported(party, folder))
    genesis = replace(
        party, config=config.model_copy(update={"base_forms": tuple(names.values())})
    ).genesis()
    asked = {
        "genesis": encode_record(genesis).hex(),
        "rows": str(ROWS),
        "batch_rows": BATCH_ROWS,
        "batches": BATCHES,
        "seeds": seeds,
    }
    examples = party.task.encode(read_rows(ROWS, config.task)[: BATCHES * BATCH_ROWS]).examples
    estimator = open_estimator(party, threads=1)
    begin_s = time.process_time()
    torchs = {
        eps: [
            [
                estimator.measure(
                    party.task.collate(examples[first : first + BATCH_ROWS], "b"),
                    [],
                    [seed],
                    float(eps),
                )[0].projected_grad
                for seed in range(count)
            ]
            for first in range(0, len(examples), BATCH_ROWS)
        ]
        for eps, count in seeds.items()
    }
    spent_s = time.process_time() - begin_s
    yield Figure(
        "torch float32: measurement", spent_s / (BATCHES * sum(seeds.values())), "s of CPU"
    )
    del estimator, party
    for form in names:
        size = sum(path.stat().st_size for path in (folder / form).glob("model*"))
        yield Figure(f"{form}: model files", size / 1e6, "MB")
        found = _in_a_process(
            "benchmarks.integrations.edge_form", asked | {"folder": str(folder / form)}
        )
        yield Figure(f"{form}: peak resident memory", found["peak_mb"], "MB")
        yield Figure(f"{form}: measurement", found["measurement_s"], "s of CPU")
        for eps in seeds:
            ours, theirs = np.ravel(found["gradients"][eps]), np.ravel(torchs[eps])
            yield Figure(
                f"{form}: correlation with torch float32 at eps = {eps}",
                float(np.corrcoef(ours, theirs)[0, 1]),
                "",
                "at least 0.99" if form in SAME_BASE else "",
            )
            yield Figure(
                f"{form}: noise of a loss at eps = {eps}",
                float(np.std(ours - theirs) * float(eps) * 2**0.5),
                "nats",
            )


def _exported(party: Party, folder: Path) -> Iterator[tuple[str, str]]:
    """Each form's own name, which is its folder's too, and its name in a contract."""
    if _has("onnx", "onnxscript", "onnxruntime"):
        yield "ONNX Runtime, float32", export_onnx_form(party, folder / "ONNX Runtime, float32")
    if not _has("llama_cpp", "gguf"):
        return
    base = LlamaForCausalLM.from_pretrained(MODEL)
    for type_name in GGUF_TYPES:
        file, form = folder / "base.gguf", f"llama.cpp, {type_name}"
        write_llama(base, file, type_name=type_name)
        yield form, export_gguf_form(party, folder / form, file)


def _in_a_process(module: str, asked: dict[str, Any], *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps(asked),
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])
