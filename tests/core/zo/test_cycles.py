"""Low precision does not drift: measuring never writes, and a step of zero changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.events import Work
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.measurements import local_steps
from fedmezo_core.zo.weights import Weights


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=384,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval().to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "cycles"), [(torch.bfloat16, 1000), (torch.float16, 200)], ids=str
)
def test_cycles_of_learning_rate_zero_change_nothing(
    dtype: torch.dtype, cycles: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = _model(dtype)
    manifest = manifest_of(model)
    task = Task(
        TaskConfig(kind="classification", template="{text}", verbalizers={"0": " a", "1": " b"}),
        tokenizer,
        384,
    )
    batch = task.collate(
        task.encode([Example({"text": "It was", "label": "1"}, "data", 1)]).examples, "x"
    )
    options: Any = {
        "distribution": Distribution.RADEMACHER,
        "rounding": Rounding.STOCHASTIC,
        "threads": 1,
    }
    estimator = Estimator(model, manifest, task, **options)
    config = RunConfig(run_id="cycles", model="none", task=task.config)
    weights = Weights(model, manifest, **options)
    before, seen = weights.digest(), set()
    for cycle in range(cycles):
        [measured] = local_steps(
            estimator,
            lambda _: batch,
            Work((cycle << 16,), learning_rate=0.0, eps=1e-3, want_digest=False),
            config,
        )
        seen.add(measured.projected_grad)
        coefficients = np.float32(-0.0) * np.array([measured.projected_grad], np.float32)
        pairs = np.array([cycle << 16], np.uint64), coefficients
        weights.apply(cycle + 1, [Commit(*pairs, cycle)])
    assert weights.digest() == before
    assert len(seen) > cycles // 10, "they were measurements"
