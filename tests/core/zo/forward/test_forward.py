"""What is frozen and runs before anything trained computes one copy of a batch, for all points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig
from fedmezo_core.zo import estimator as estimator_module
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.forward.forward import Forward
from fedmezo_core.zo.model.loading import add_adapter
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution, Rounding
from tests.core.zo.conftest import MODEL_KINDS
from tests.core.zo.forward.frozen_parts import (
    EPS,
    LOCAL,
    RowsSeen,
    batch_of,
    estimator_on,
    last_layer,
    losses_of,
    task_of,
)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize("kind", [*MODEL_KINDS, "mamba"])
def test_losses_are_those_of_every_copy_computed(
    kind: str,
    task_kind: str,
    rows: int,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model, train=[last_layer(kind)])
    task = task_of(tokenizer, task_kind)
    batch = batch_of(task, rows)
    once, every = (estimator_on(model, manifest, task, once=on) for on in (True, False))
    # Twice: the second pass knows which modules run first.
    for _ in range(2):
        ours, theirs = (
            losses_of(estimator.measure(batch, LOCAL, [99, 7], EPS)) for estimator in (once, every)
        )
        assert ours == pytest.approx(theirs, rel=2e-6)
        assert len(set(ours)) == 4, "the perturbation shows"
    assert once._forward.frozen.share > 0.2 > every._forward.frozen.share == 0
    warnings = [record.getMessage() for record in caplog.records if "one pass" in record.message]
    assert not warnings


@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "mixtral"])
def test_frozen_layers_see_one_copy(
    kind: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    last = last_layer(kind) if kind != "gpt2" else "transformer.h.1"
    first = last.replace(".1", ".0")
    rows = {name: RowsSeen(model.get_submodule(name)) for name in (first, last)}
    manifest = manifest_of(model, train=[f"{last}.mlp"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    estimator = estimator_on(model, manifest, task, distribution, one_sided=True)
    estimator.measure(batch, LOCAL, [5], EPS)
    for seen in rows.values():
        seen.taken()
    for _ in range(2):
        measured = estimator.measure(batch, LOCAL, [5, 6, 7], EPS)
        assert rows[first].taken() == [4], "one copy"
        assert rows[last].taken() == [16], "as many as there are points"
    every = estimator_on(model, manifest, task, distribution, once=False, one_sided=True)
    assert losses_of(every.measure(batch, LOCAL, [5, 6, 7], EPS)) == pytest.approx(
        losses_of(measured), rel=2e-6
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])
def test_a_cache_has_all_copies(kind: str, model_of: Callable[[str], nn.Module]) -> None:
    """What a frozen layer keeps must fit what it gets later in the same pass, as in generating."""
    model: Any = model_of(kind)
    manifest = manifest_of(model, train=[last_layer(kind)])
    options: dict[str, Any] = {
        "distribution": Distribution.RADEMACHER,
        "rounding": Rounding.STOCHASTIC,
        "threads": 1,
    }
    points = [
        Commit(np.array([5], np.uint64), np.array([step], np.float32), 1) for step in (EPS, -EPS)
    ]
    ids = torch.arange(20).view(2, 10)
    # From 5.24 on transformers calls it `cache`.
    name = "cache" if hasattr(model(ids), "cache") else "past_key_values"

    def kept(result: Any) -> dict[str, Any]:
        return {name: getattr(result, name)}

    together = Forward(model, manifest, **options)
    with torch.inference_mode():
        for _ in range(2):
            with together.at(points, 2, 10):
                first = model(ids.repeat(2, 1), use_cache=True)
                second = model(ids[:, :1].repeat(2, 1), **kept(first))
            alone = []
            for point in points:
                with Forward(model, manifest, **options).at([point], 2, 10):
                    one = model(ids, use_cache=True)
                    alone.append(model(ids[:, :1], **kept(one)).logits)
            assert torch.allclose(second.logits, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("train", [["wte"], ["h.0.ln_1"], []])
def test_what_is_trained_first_leaves_nothing_to_compute_once(
    train: list[str], model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("gpt2")
    rows = RowsSeen(model.get_submodule("transformer.h.1"))
    task = task_of(tokenizer)
    estimator = estimator_on(model, manifest_of(model, train=train), task)
    estimator.measure(batch_of(task), [], [5], EPS)
    rows.taken()
    estimator.measure(batch_of(task), [], [5], EPS)
    assert rows.taken() == [8]
    assert estimator._forward.frozen.share == 0


@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_2])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_on_the_last_layer(
    kind: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    base: Any = model_of(kind)
    target = "h.1.attn.c_attn" if kind == "gpt2" else "layers.1.self_attn.q_proj"
    model = add_adapter(base, LoraConfig(rank=4, alpha=16, target_modules=(target,)), 5)
    (layer,) = (module for module in model.modules() if hasattr(module, "base_layer"))
    rows: Any = RowsSeen(layer.base_layer)  # type: ignore[arg-type]
    manifest = manifest_of(model, adapters_only=True)
    task = task_of(tokenizer)
    batch = batch_of(task)
    once, every = (
        estimator_on(model, manifest, task, distribution, once=on) for on in (True, False)
    )
    once.measure(batch, LOCAL, [99, 7], EPS)
    rows.taken()
    ours = losses_of(once.measure(batch, LOCAL, [99, 7], EPS))
    assert rows.taken() == [4], "even the layer that the adapter is on"
    assert ours == pytest.approx(losses_of(every.measure(batch, LOCAL, [99, 7], EPS)), rel=2e-6)
    assert rows.taken()[-1] == 16


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_an_offloaded_model(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, moved = model_of(kind), model_of(kind)
    manifest = manifest_of(plain, train=[last_layer(kind)])
    cpu_offload(moved, execution_device=torch.device("cpu"))
    task = task_of(tokenizer)
    batch = batch_of(task)
    ours, theirs = (estimator_on(model, manifest, task) for model in (plain, moved))
    for _ in range(2):
        assert ours.measure(batch, LOCAL, [3, 4], EPS) == theirs.measure(batch, LOCAL, [3, 4], EPS)
    assert ours._forward.frozen.share == theirs._forward.frozen.share > 0.2


def test_bfloat16(model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of("llama").to(torch.bfloat16)
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer, "instruction")
    ours, theirs = (
        losses_of(
            estimator_on(model, manifest, task, once=on).measure(batch_of(task), LOCAL, [3, 4], EPS)
        )
        for on in (True, False)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


class _Odd(nn.Module):
    """A frozen layer whose result says nothing of rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.append(len(x))
        return _Result(self.inner(x).transpose(0, 1))


class _Result:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class _Outer(nn.Module):
    def __init__(self, odd: _Odd) -> None:
        super().__init__()
        self.odd = odd
        self.gain = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain(self.odd(x).value.transpose(0, 1))  # type: ignore[no-any-return]


def test_a_result_that_cannot_be_repeated_is_computed_for_every_copy(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(3)
    model: Any = model_of("llama")
    odd = _Odd(model.model.layers[1].mlp)
    model.model.layers[1].mlp = _Outer(odd)
    manifest = manifest_of(model, train=["gain"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    once, every = (estimator_on(model, manifest, task, once=on) for on in (True, False))
    for _ in range(2):
        odd.calls.clear()
        ours = losses_of(once.measure(batch, LOCAL, [99, 7], EPS))
        assert ours == pytest.approx(losses_of(every.measure(batch, LOCAL, [99, 7], EPS)), rel=2e-6)
    assert odd.calls == [16, 16], "tried once, not again"
    assert once._forward.frozen.share > 0.2, "the layers before it"
    assert not caplog.records


@pytest.mark.parametrize("distribution", [Distribution.LOW_RANK_1, Distribution.RADEMACHER])
def test_many_points_take_several_passes_but_the_frozen_part_runs_once(
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    frozen = RowsSeen(model.get_submodule("model.layers.0"))
    after = RowsSeen(model.get_submodule("model.norm"))
    task = task_of(tokenizer)
    batch = batch_of(task)
    manifest = manifest_of(model, train=["layers.1.mlp"])
    every = estimator_on(model, manifest, task, distribution, once=False)
    expected = losses_of(every.measure(batch, LOCAL, range(40), EPS))
    estimator = estimator_on(model, manifest, task, distribution)
    estimator.measure(batch, LOCAL, [1], EPS)

    def passes() -> list[int]:
        """Points in each pass, of 80."""
        frozen.taken(), after.taken()
        assert losses_of(estimator.measure(batch, LOCAL, range(40), EPS)) == pytest.approx(
            expected, rel=2e-6
        )
        assert frozen.taken() == [4], "one copy, once"
        return [rows // 4 for rows in after.taken()]

    assert passes() == [16] * 5, "one layer of two, and a head: passes stay large"
    monkeypatch.setattr(estimator_module, "FROZEN_SHARE_MIN", 0.2)
    estimator = estimator_on(
        model, manifest, task, distribution, pass_tokens_max=5 * batch.input_ids.numel()
    )
    estimator.measure(batch, LOCAL, [1], EPS)
    assert passes() == ([16] * 5 if distribution is Distribution.RADEMACHER else [5] * 16)
    estimator = estimator_on(model, manifest, task, distribution, pass_tokens_max=1)
    estimator.measure(batch, LOCAL, [1], EPS)
    assert min(passes()) >= 2, "a single point would compute the frozen part again"


def test_another_batch_is_not_taken_for_the_one_before(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, task = model_of("llama"), task_of(tokenizer)
    manifest = manifest_of(model, train=["layers.1.mlp"])
    monkeypatch.setattr(estimator_module, "POINTS_MAX", 2)
    monkeypatch.setattr(estimator_module, "FROZEN_POINTS_MAX", 2)
    once, every = (estimator_on(model, manifest, task, once=on) for on in (True, False))
    first = batch_of(task)
    other = dataclasses.replace(first, input_ids=first.input_ids.flip(1))
    for batch in (first, other, first):
        assert losses_of(once.measure(batch, LOCAL, [9, 8, 7], EPS)) == pytest.approx(
            losses_of(every.measure(batch, LOCAL, [9, 8, 7], EPS)), rel=2e-6
        )


class _Counting(nn.Module):
    """A frozen layer whose result depends on how many rows it sees."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) * (1.0 if len(ids) == 4 else 1.5)  # type: ignore[no-any-return]


def test_a_layer_that_looks_at_the_number_of_rows(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Computed once it does what it does for each point alone; for all copies it would not."""
    model: Any = model_of("llama")
    model.model.embed_tokens = _Counting(model.model.embed_tokens)
    manifest = manifest_of(model, train=["layers.1"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    estimator_on(model, manifest, task).measure(batch, LOCAL, [99], EPS)
    assert not caplog.records
    estimator_on(model, manifest, task, once=False).measure(batch, LOCAL, [99], EPS)
    assert "one pass for each loss" in caplog.records[-1].getMessage()


class _Table(nn.Module):
    """A frozen table with as many entries, by chance, as a batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table.to(x.dtype)


class _Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = _Table()
        self.gain = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain(x + self.table(x).sum(0))  # type: ignore[no-any-return]


def test_a_result_that_only_looks_like_rows_is_found_out(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(3)
    model: Any = model_of("llama")
    model.model.layers[1].mlp = _Biased()
    manifest = manifest_of(model, train=["gain"])
    task = task_of(tokenizer)
    batch = batch_of(task)
    once, every = (estimator_on(model, manifest, task, once=on) for on in (True, False))
    ours, theirs = (losses_of(e.measure(batch, LOCAL, [99, 7], EPS)) for e in (once, every))
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert once._forward.frozen.share == 0
    assert not caplog.records, "one pass for all points still"
