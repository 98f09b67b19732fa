"""Measuring on an offloaded model: the plain model's losses, and each weight copied once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import PrefixedDataset
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig, TaskConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.model.loading import load_model
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.model.offload import offload_hooks, stored_parameters
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.measurements import Measurement, Pair
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import SENTENCES

LOCAL: list[Pair] = [(11, 0.02), (12, -0.03)]
COMMIT = Commit(np.array([5, 6], np.uint64), np.array([0.02, -0.01], np.float32), 1)


class Copying(PrefixedDataset):  # type: ignore[misc]  # accelerate gives no types
    """Gives copies, as a device would have them, and counts them."""

    def __init__(self, weights: Any, prefix: str, counts: Counter[str]) -> None:
        super().__init__(weights, "")
        self._name = prefix
        self._counts = counts

    def __getitem__(self, key: str) -> torch.Tensor:
        self._counts[f"{self._name}.{key}"] += 1
        return self.dataset[key].clone()  # type: ignore[no-any-return]


def _copying(model: nn.Module) -> Counter[str]:
    """Let the weights of an offloaded model arrive as copies; counts which do."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        for hook in offload_hooks(module):
            hook.weights_map = Copying(hook.weights_map, name, counts)
    return counts


@pytest.fixture
def task(tokenizer: PreTrainedTokenizerBase) -> Task:
    config = TaskConfig(
        kind="classification",
        template="{text} All in all, it was",
        verbalizers={"0": " terrible", "1": " great"},
    )
    return Task(config, tokenizer, 384)


@pytest.fixture
def batch(task: Task) -> Batch:
    rows = [
        Example({"text": text, "label": "01"[k % 2]}, "data", k) for k, text in enumerate(SENTENCES)
    ]
    return task.collate(task.encode(rows).examples, "the test")


def _estimator(model: nn.Module, manifest: Manifest, task: Task, **options: Any) -> Estimator:
    return Estimator(
        model,
        manifest,
        task,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
        **options,
    )


def _weights(model: nn.Module, manifest: Manifest) -> Weights:
    return Weights(
        model,
        manifest,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
    )


def _measured_around_a_commit(
    model: nn.Module, manifest: Manifest, task: Task, batch: Batch, **options: Any
) -> list[Measurement]:
    estimator = _estimator(model, manifest, task, **options)
    before = estimator.measure(batch, LOCAL, [99, 100], 1e-2)
    _weights(model, manifest).apply(1, [COMMIT])
    return [*before, *estimator.measure(batch, LOCAL, [99, 100], 1e-2)]


@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied", "gemma2", "opt"])
def test_an_offloaded_model_measures_the_same_bits(
    kind: str, one_sided: bool, model_of: Callable[[str], nn.Module], task: Task, batch: Batch
) -> None:
    plain, moved = model_of(kind), model_of(kind)
    cpu_offload(moved, execution_device=torch.device("cpu"))
    _copying(moved)
    digest = base_digest(plain)
    ours, theirs = (
        _measured_around_a_commit(model, manifest_of(plain), task, batch, one_sided=one_sided)
        for model in (plain, moved)
    )
    assert ours == theirs
    assert base_digest(moved) == base_digest(plain) != digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_a_model_on_a_disk_measures_the_same_bits(
    kind: str,
    lora: bool,
    dtype: Any,
    folder_of: Callable[[str], Path],
    task: Task,
    batch: Batch,
    tmp_path: Path,
) -> None:
    folder = folder_of(kind)
    config = LoraConfig(rank=4, alpha=16, target_modules=("q_proj", "v_proj")) if lora else None
    size = (folder / "model.safetensors").stat().st_size * (4 if dtype == "float32" else 2) // 4
    placement = Placement("cpu", size // 2, tmp_path)
    plain = load_model(str(folder), dtype=dtype, lora=config)
    moved = load_model(str(folder), dtype=dtype, lora=config, placement=placement)
    assert any(stored.offloaded for stored in stored_parameters(moved.model).values())
    ours, theirs = (
        _measured_around_a_commit(loaded.model, loaded.manifest, task, batch)
        for loaded in (plain, moved)
    )
    assert ours == theirs
    assert base_digest(plain.model) == base_digest(moved.model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_weight_is_copied_once_a_measurement(
    kind: str, model_of: Callable[[str], nn.Module], task: Task, batch: Batch
) -> None:
    model = model_of(kind)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cpu_offload(model, execution_device=torch.device("cpu"))
    counts = _copying(model)
    estimator = _estimator(model, manifest_of(model), task)
    estimator.measure(batch, LOCAL, [99], 1e-2)
    counts.clear()
    estimator.measure(batch, LOCAL, [99, 100, 101], 1e-2)
    # Tied weights are two modules' own; transformers' device maps keep them on the device.
    assert counts == dict.fromkeys(names, 1)


def test_a_pass_that_raised_leaves_no_copy_behind(
    model_of: Callable[[str], nn.Module], task: Task, batch: Batch
) -> None:
    plain, model = model_of("llama"), model_of("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    _copying(model)
    manifest = manifest_of(plain)
    estimator = _estimator(model, manifest, task)
    estimator.measure(batch, LOCAL, [99], 1e-2)

    def fail(*_: Any) -> None:
        raise ValueError("in the middle")

    handle: Any = model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        estimator.measure(batch, LOCAL, [99], 1e-2)
    handle.remove()
    assert all(parameter.is_meta for parameter in model.parameters())
    for party in (plain, model):
        _weights(party, manifest).apply(1, [COMMIT])
    ours = _estimator(plain, manifest, task).measure(batch, LOCAL, [99], 1e-2)
    assert estimator.measure(batch, LOCAL, [99], 1e-2) == ours


def test_a_parameter_that_is_read_outside_its_module(
    model_of: Callable[[str], nn.Module], task: Task, batch: Batch
) -> None:
    model: Any = model_of("llama")
    projection = model.model.layers[1].mlp.down_proj

    class Reader(nn.Module):
        """What transformers' force_accelerate_hooks does for a layer whose weight another one
        reads."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hook: Any = self.inner._hf_hook
            hook.pre_forward(self.inner)
            result = functional.linear(x, self.inner.weight)
            hook.post_forward(self.inner, ())
            return result

    model.model.layers[1].mlp.down_proj = Reader(projection)
    cpu_offload(model, execution_device=torch.device("cpu"))
    _copying(model)
    with pytest.raises(ModelError, match=r"reads parameter .*down_proj\.inner\.weight outside"):
        _estimator(model, manifest_of(model), task).measure(batch, LOCAL, [99], 1e-2)
