"""A llama.cpp worker of a half-billion model, alone in its process: memory and CPU seconds as JSON.

The weights are random, so its losses mean nothing; its shape, quantisation and adapter are real.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from benchmarks.integrations.gguf_models import QWEN_HALF_BILLION
from fedmezo_core.config import parse_run
from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.edge.array_losses import EdgeBatch, edge_batch
from fedmezo_core.zo.edge.array_weights import Adapter, ArrayWeights
from fedmezo_core.zo.edge.edge_engine import PASS_TOKENS_MAX
from fedmezo_core.zo.edge.float_products import FloatProducts
from fedmezo_core.zo.edge.llama_losses import LlamaLosses
from fedmezo_core.zo.plain.entries import Entry, Manifest
from fedmezo_core.zo.plain.measurements import points_of

ROWS: Final = 8
TOKENS: Final = 32
RANK: Final = 8


def main(gguf: Path, measurements: int) -> None:
    """Print one line of JSON."""
    shape, generator = QWEN_HALF_BILLION, np.random.default_rng(0)
    start: Adapter = {}
    for layer in range(shape.layers):
        for module, outputs in (("q_proj", shape.width), ("v_proj", shape.key_width)):
            place = f"model.layers.{layer}.self_attn.{module}"
            a = generator.normal(0, shape.width**-0.5, (RANK, shape.width))
            start[f"{place}.lora_A.default.weight"] = a.astype(np.float32)
            start[f"{place}.lora_B.default.weight"] = np.zeros((outputs, RANK), np.float32)
    trained = sorted(name for name in start if ".lora_B." in name)
    manifest = Manifest(
        tuple(Entry(k, name, start[name].shape, "float32") for k, name in enumerate(trained))
    )
    config = parse_run(
        {
            "run_id": "edge",
            "model": "half",
            "task": {"verbalizers": {"a": " a", "b": " b"}},
            "lora": {
                "rank": RANK, "alpha": 16, "target_modules": ["q_proj", "v_proj"],
                "freeze_a": True,
            },
        },
        "the benchmark's contract",
    )  # fmt: skip
    # What the losses ask of a form that was read from a folder.
    form: Any = SimpleNamespace(
        model_path=gguf,
        start=start,
        description=SimpleNamespace(vocabulary_size=shape.vocabulary, alpha=16.0),
        encoder=SimpleNamespace(verbalizer_ids=(5, 9), config=config.task),
    )
    losses = LlamaLosses(form, threads=1)
    weights = ArrayWeights(start, manifest, config, threads=1)
    examples = [
        EncodedExample(tuple(generator.integers(0, shape.vocabulary, TOKENS).tolist()), (), k % 2)
        for k in range(ROWS)
    ]
    batch = edge_batch(examples, "b", ROWS, shape.vocabulary, tokens_max=PASS_TOKENS_MAX)
    points = points_of([], [7], 1e-2, one_sided=False)

    def plain_pass(rows: EdgeBatch) -> None:
        """The base alone, without an adapter."""
        for part in rows.parts:
            losses._logits(part)

    def rounded_pass(rows: EdgeBatch) -> None:
        """The same with llama.cpp's own products alone."""
        with patch.object(FloatProducts, "_is_rounded", return_value=False):
            plain_pass(rows)

    seconds = {
        "pass_s": _least_cpu_s(measurements, plain_pass, batch),
        "rounded_pass_s": _least_cpu_s(measurements, rounded_pass, batch),
        "measurement_s": _least_cpu_s(
            measurements, lambda b: losses(map(weights.moved, points), b), batch
        ),
    }
    assert "torch" not in sys.modules
    losses.close()
    print(json.dumps({**seconds, "peak_mb": peak_resident_mb()}))


def peak_resident_mb() -> float:
    """The peak of this program's resident memory; `getrusage` has that of its starter too."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024 / 1e6


def _least_cpu_s(times: int, compute: Callable[[Any], object], batch: Any) -> float:
    compute(batch)
    spent = []
    for _ in range(times):
        begin_s = time.process_time()
        compute(batch)
        spent.append(time.process_time() - begin_s)
    return min(spent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
