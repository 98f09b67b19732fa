"""Models on a CUDA device, or larger than it: the CPU's digests, the same measurements."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedmezo_core.config import TaskConfig
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.model.loading import LoadedModel, load_model
from fedmezo_core.zo.model.offload import execution_device, stored_parameters
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.measurements import Measurement
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import SENTENCES, make_tokenizer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a CUDA device and compiled kernels; run make test-gpu where there is one",
)

COMMITS = [Commit(np.array([5, 6], np.uint64), np.array([0.02, -0.01], np.float32), 1)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 14 MB as float32."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=request.param,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer: Any = make_tokenizer()
    tokenizer.save_pretrained(path)
    return path


def _measured(loaded: LoadedModel) -> Measurement:
    config = TaskConfig(
        kind="classification",
        template="{text} All in all, it was",
        verbalizers={"0": " terrible", "1": " great"},
    )
    task = Task(config, loaded.tokenizer, 384)
    rows = [
        Example({"text": text, "label": "01"[k % 2]}, "data", k) for k, text in enumerate(SENTENCES)
    ]
    examples = task.encode(rows).examples
    estimator = Estimator(
        loaded.model,
        loaded.manifest,
        task,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
    )
    estimator._graphs = None  # offloaded models have none, and their batches no padding
    batch = task.collate(examples, "the test", execution_device(loaded.model))
    return estimator.measure(batch, [(11, 0.02)], [99], 1e-2)[0]


def _weights(loaded: LoadedModel, *, keeps_base: bool = False) -> Weights:
    return Weights(
        loaded.model,
        loaded.manifest,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        keeps_base=keeps_base,
    )


@pytest.mark.parametrize("offloads", [False, True], ids=["device", "memory"])
def test_a_commit_that_starts_from_the_base(offloads: bool, folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size // 2
    placement = Placement("cuda", size * 2 // 3 if offloads else None)
    pairs = np.array([7], np.uint64), np.array([0.03], np.float32)
    last = [Commit(*pairs, 2, decay=0.5, from_base=True), Commit(*pairs, 3)]
    digests = set()
    for where in (Placement("cpu"), placement):
        loaded = load_model(str(folder), dtype="bfloat16", placement=where)
        weights = _weights(loaded, keeps_base=True)
        weights.apply(1, COMMITS)
        weights.apply(2, last)
        digests.add(weights.digest())
    plain = load_model(str(folder), dtype="bfloat16")
    _weights(plain).apply(1, [Commit(*pairs, 2, decay=0.5), Commit(*pairs, 3)])
    assert digests == {_weights(plain).digest()}


@pytest.mark.parametrize("where", ["device", "memory", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wherever_the_weights_lie(
    dtype: Any, where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_bytes = (
        (folder / "model.safetensors").stat().st_size * (4 if dtype == "float32" else 2) // 4
    )
    placement = Placement("cuda", None if where == "device" else whole_bytes * 2 // 3)
    if where == "disk":
        placement = Placement("cuda", whole_bytes // 2, tmp_path / "offload")
        # No room in the machine's memory: the rest goes to the disk.
        memory_max = Placement._memory_max
        monkeypatch.setattr(
            Placement, "_memory_max", lambda self, device: {**memory_max(self, device), "cpu": 0}
        )
    on_cpu = load_model(str(folder), dtype=dtype)
    on_device = load_model(str(folder), dtype=dtype, placement=Placement("cuda"))
    loaded = load_model(str(folder), dtype=dtype, placement=placement)
    offloaded = [stored for stored in stored_parameters(loaded.model).values() if stored.offloaded]
    assert bool(offloaded) == (where != "device")
    assert execution_device(loaded.model).type == "cuda"
    assert base_digest(loaded.model) == base_digest(on_cpu.model)
    assert _measured(loaded) == _measured(on_device)
    for party in (on_cpu, on_device, loaded):
        _weights(party).apply(1, COMMITS)
    assert base_digest(loaded.model) == base_digest(on_cpu.model) == base_digest(on_device.model)
    measured = _measured(loaded)
    assert measured == _measured(on_device)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert measured.loss_plus == pytest.approx(_measured(on_cpu).loss_plus, rel=tolerance)
