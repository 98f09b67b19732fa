"""The estimator against a model whose weights really are perturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import MeasurementError, ModelError, NumericError
from fedmezo_core.events import Work
from fedmezo_core.zo import devices
from fedmezo_core.zo import estimator as estimator_module
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.forward import forward as forward_module
from fedmezo_core.zo.materialize import materialize, materialize_fan
from fedmezo_core.zo.model.loading import add_adapter
from fedmezo_core.zo.model.manifest import manifest_of, tensor_ids, trained_tensors
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.measurements import Pair, local_steps
from tests.core.zo.conftest import MODEL_KINDS, SENTENCES
from tests.core.zo.forward.frozen_parts import estimator_on

EPS = 1e-2
LOCAL: list[Pair] = [(11, 0.02), (12, -0.03)]
LOW_RANK = [distribution for distribution in Distribution if distribution.rank]


def _task(tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[Task, Batch]:
    config = TaskConfig(
        kind="classification" if kind == "classification" else "instruction",
        template="{text} All in all, it was",
        verbalizers={"0": " terrible", "1": " great"},
        response_column="text",
        tokens_max=64,
    )
    task = Task(config, tokenizer, 384)
    rows = [
        Example({"text": text, "label": str(index % 2)}, "data.jsonl", index + 1)
        for index, text in enumerate(SENTENCES)
    ]
    return task, task.collate(task.encode(rows).examples, "the test")


def _naive_loss(
    model: nn.Module,
    manifest: Manifest,
    task: Task,
    batch: Batch,
    pairs: Sequence[Pair],
    rounding_seed: int,
    distribution: Distribution,
) -> float:
    """The loss of a copy of the model whose weights are the base plus `pairs`."""
    moved = copy.deepcopy(model)
    commit = Commit(
        np.array([pair[0] for pair in pairs], dtype=np.uint64),
        np.array([pair[1] for pair in pairs], dtype=np.float32),
        rounding_seed,
    )
    for entry, tensor in zip(manifest, trained_tensors(moved, manifest), strict=True):
        operands = Operands(entry.tensor_id, distribution, Rounding.STOCHASTIC)
        materialize(tensor, tensor, [commit], operands)
    return task.loss(moved, batch)


def _assert_equals_naive(
    model: nn.Module,
    manifest: Manifest,
    task: Task,
    batch: Batch,
    tolerance: float,
    distribution: Distribution = Distribution.RADEMACHER,
) -> None:
    estimator = estimator_on(model, manifest, task, distribution)
    measured = estimator.measure(batch, LOCAL, [99], EPS)[0]
    plus, minus = (
        _naive_loss(model, manifest, task, batch, [*LOCAL, (99, step)], 99, distribution)
        for step in (EPS, -EPS)
    )
    assert measured.loss_plus == pytest.approx(plus, rel=tolerance)
    assert measured.loss_other == pytest.approx(minus, rel=tolerance)
    assert abs(plus - minus) > 100 * tolerance, "the perturbation shows"
    assert measured.projected_grad == np.float32(
        (measured.loss_plus - measured.loss_other) / (2 * EPS)
    )


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_losses_equal_those_of_really_perturbed_weights(
    kind: str,
    blocks: bool,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if blocks:
        monkeypatch.setattr(forward_module, "LINEAR_BLOCK_BYTES", 1000)
        monkeypatch.setattr(forward_module, "CONV1D_BLOCK_BYTES", 1000)
    model = model_of(kind)
    for task_kind in ("classification", "instruction"):
        task, batch = _task(tokenizer, task_kind)
        _assert_equals_naive(model, manifest_of(model), task, batch, 2e-6)
    assert not caplog.records, "both losses came from one pass"


@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "mixtral"])
def test_many_probes_measure_what_each_would_alone(
    kind: str,
    one_sided: bool,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimator_module, "POINTS_MAX", 5)
    model = model_of(kind)
    task, batch = _task(tokenizer, "classification")
    manifest = manifest_of(model)
    estimator = estimator_on(model, manifest, task, one_sided=one_sided)
    seeds = [99, 7, 3, 1 << 63]
    measured = estimator.measure(batch, LOCAL, seeds, EPS)
    for seed, measurement in zip(seeds, measured, strict=True):
        ends = [[(seed, EPS)], [] if one_sided else [(seed, -EPS)]]
        plus, other = (
            _naive_loss(model, manifest, task, batch, [*LOCAL, *end], 99, Distribution.RADEMACHER)
            for end in ends
        )
        distance = EPS if one_sided else 2 * EPS
        assert measurement.loss_plus == pytest.approx(plus, rel=2e-6)
        assert measurement.loss_other == pytest.approx(other, rel=2e-6)
        assert measurement.projected_grad == pytest.approx((plus - other) / distance, rel=1e-2)
        assert measurement.loss == pytest.approx(
            other if one_sided else (plus + other) / 2, rel=2e-6
        )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_only_the_experts_that_tokens_go_to_are_built(
    kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = model_of(kind)
    experts = model.model.layers[0].mlp.experts
    manifest = manifest_of(model)
    ids = tensor_ids(model, manifest)
    down_proj = ids["model.layers.0.mlp.experts.down_proj"]
    built: list[int] = []
    fan = materialize_fan

    def seen(
        outs: Sequence[torch.Tensor],
        base: torch.Tensor,
        commits: Sequence[Commit],
        operands: Operands,
        threads: int,
    ) -> None:
        if operands.tensor_id == down_proj:
            built.append(operands.start // base.numel())
        assert all(out.dim() < 3 for out in outs), "never all experts at once"
        fan(outs, base, commits, operands, threads=threads)

    monkeypatch.setattr(forward_module, "materialize_fan", seen)
    # To experts 0 and 1 alone.
    experts.register_forward_pre_hook(lambda _, args: (args[0], args[1] % 2, args[2]))
    task, batch = _task(tokenizer, "classification")
    estimator = estimator_on(model, manifest, task)
    estimator.measure(batch, [], [5], EPS)
    assert set(built) == {0, 1}


class _Unsliced(nn.Module):
    """Experts that are a class of transformers but for a forward that takes all at once."""

    def _apply_gate(self) -> None:
        """What marks such classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 384))
        self.stack = nn.Parameter(torch.randn(2, 1, 384))

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum(0) + torch.sum(self.stack, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x)

    forward.__wrapped__ = plain  # type: ignore[attr-defined]  # as functools.wraps leaves it


class _Odd(nn.Module):
    """A large parameter in a kind of module that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1500, 384))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.mean(0)


class _With(nn.Module):
    def __init__(self, model: Any, extra: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.extra = extra

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = self.extra(output.logits)
        return output


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (_Unsliced, "it computes with all experts at once, in sum"),
        (_Odd, "weight has 2304000 bytes"),
    ],
)
def test_a_module_that_must_be_built_whole_is_named_once(
    extra: type[nn.Module],
    why: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(2)
    model = _With(model_of("llama"), extra()).eval()
    task, batch = _task(tokenizer, "instruction")
    for _ in range(2):
        _assert_equals_naive(model, manifest_of(model), task, batch, 2e-6)
    warning = (
        f"extra ({extra.__name__}) is not perturbed block by block but whole, once for each point, "
        f"which takes time and memory: {why}."
    )
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [warning] * 2, "once for each of two estimators"


class _Mixing(nn.Module):
    """Wraps a model; its own parameter meets all rows at once, in another order of dimensions."""

    def __init__(self, model: Any, *, silently: bool) -> None:
        super().__init__()
        self.model = model
        self.gain = nn.Linear(384, 1)
        self.silently = silently

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        if self.silently:
            output.logits = output.logits * self.gain(output.logits).mean()
        else:
            output.logits = output.logits * self.gain(output.logits.transpose(0, 1)).transpose(0, 1)
        return output


@pytest.mark.parametrize("silently", [False, True])
def test_a_model_that_mixes_rows_is_measured_point_by_point(
    silently: bool,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(2)
    model = _Mixing(model_of("llama"), silently=silently).eval()
    task, batch = _task(tokenizer, "instruction")
    estimator = estimator_on(model, manifest_of(model), task)
    for _ in range(2):
        measured = estimator.measure(batch, LOCAL, [99], 0.1)[0]
        for loss, step in ((measured.loss_plus, 0.1), (measured.loss_other, -0.1)):
            pairs = [*LOCAL, (99, step)]
            assert loss == pytest.approx(
                _naive_loss(
                    model, manifest_of(model), task, batch, pairs, 99, Distribution.RADEMACHER
                ),
                rel=2e-6,
            )
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "one pass for each loss" in warning
    assert ("in one pass are" if silently else "gain (Linear) sees input of shape [") in warning


@pytest.mark.slow
@pytest.mark.parametrize("local_pairs", [0, 2, 20], ids="{}-local".format)
@pytest.mark.parametrize("distribution", LOW_RANK)
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "qwen2", "mixtral"])
def test_low_rank_directions(
    kind: str,
    distribution: Distribution,
    local_pairs: int,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Few or no local pairs are thin products; weights are built for pairs that fill the rank."""
    model = model_of(kind)
    manifest = manifest_of(model)
    task, batch = _task(tokenizer, "classification")
    local = [(40 + k, (-1) ** k * 0.01) for k in range(local_pairs)]
    for one_sided in (False, True):
        estimator = estimator_on(model, manifest, task, distribution, one_sided=one_sided)
        for seed, measured in zip(
            (99, 7), estimator.measure(batch, local, [99, 7], EPS), strict=True
        ):
            for loss, end in (
                (measured.loss_plus, [(seed, EPS)]),
                (measured.loss_other, [] if one_sided else [(seed, -EPS)]),
            ):
                naive = _naive_loss(model, manifest, task, batch, [*local, *end], 99, distribution)
                assert loss == pytest.approx(naive, rel=2e-6)
    assert not caplog.records, "all losses came from one pass"


def test_low_rank_in_low_precision(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Factors are not rounded into the weights: bfloat16's estimate is close to float32's."""
    fine = model_of("llama").to(torch.bfloat16).float()
    coarse = copy.deepcopy(fine).to(torch.bfloat16)
    task, batch = _task(tokenizer, "instruction")
    grads = [
        [
            estimator_on(model, manifest_of(model), task, Distribution.LOW_RANK_1)
            .measure(batch, [], [seed], EPS)[0]
            .projected_grad
            for seed in range(12)
        ]
        for model in (fine, coarse)
    ]
    assert np.corrcoef(grads[0], grads[1])[0, 1] > 0.9


def test_low_rank_lora(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    base: Any = model_of("llama")
    lora = LoraConfig(rank=4, alpha=16, target_modules=("q_proj", "v_proj"))
    model = add_adapter(base, lora, 5)
    manifest = manifest_of(model, adapters_only=True)
    task, batch = _task(tokenizer, "classification")
    _assert_equals_naive(model, manifest, task, batch, 2e-6, Distribution.LOW_RANK_2)


def test_gaussian_directions(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama-tied")
    task, batch = _task(tokenizer, "classification")
    _assert_equals_naive(model, manifest_of(model), task, batch, 2e-6, Distribution.GAUSSIAN)


def test_bfloat16(model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of("llama").to(torch.bfloat16)
    task, batch = _task(tokenizer, "instruction")
    # Blocks may sum in another order than one product does, and bfloat16 keeps 8 bits.
    _assert_equals_naive(model, manifest_of(model), task, batch, 1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
def test_lora(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    base: Any = model_of(kind)
    targets = ("c_attn", "c_proj") if kind == "gpt2" else ("q_proj", "v_proj")
    model = add_adapter(base, LoraConfig(rank=4, alpha=16, target_modules=targets), 5)
    manifest = manifest_of(model, adapters_only=True)
    task, batch = _task(tokenizer, "classification")
    _assert_equals_naive(model, manifest, task, batch, 2e-6)


def test_nothing_is_written_even_if_the_forward_pass_raises(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("gpt2")
    task, batch = _task(tokenizer, "classification")
    estimator = estimator_on(model, manifest_of(model), task)
    before = base_digest(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    calm = estimator.measure(batch, LOCAL, [3], EPS)

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "layer_norm", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            estimator.measure(batch, LOCAL, [3], EPS)
    assert base_digest(model) == before
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert estimator.measure(batch, LOCAL, [3], EPS) == calm


def test_a_loss_that_is_not_finite_is_refused_by_name(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("llama")
    task, batch = _task(tokenizer, "classification")
    model.model.norm.weight.mul_(1e38)
    model.lm_head.weight.mul_(1e38)
    with pytest.raises(
        MeasurementError, match=r"loss at \+eps is (nan|inf) on the batch of the test"
    ):
        estimator_on(model, manifest_of(model), task).measure(batch, [], [1], EPS)


class _Direct(nn.Module):
    """Wraps a model and reads one of its layers' weights without calling that layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.extra = nn.Linear(4, 4)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
    ) -> Any:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )
        output.logits = output.logits + self.extra.weight.sum()
        return output


def test_a_parameter_read_behind_its_owners_back_is_refused(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = _Direct(model_of("llama")).eval()
    task, batch = _task(tokenizer, "classification")
    with pytest.raises(ModelError, match=r"reads parameter extra\.weight outside the module"):
        estimator_on(model, manifest_of(model), task).measure(batch, [], [1], EPS)


@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_2])
def test_a_parameter_that_the_module_around_its_owner_reads_is_built_there(
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Mamba's mixer computes with the weight of its convolution, which never runs."""
    model = model_of("mamba")
    task, batch = _task(tokenizer, "instruction")
    _assert_equals_naive(model, manifest_of(model), task, batch, 2e-6, distribution)
    ours = [record for record in caplog.records if record.name.startswith("fedmezo")]
    (warning,) = (record.getMessage() for record in ours)
    assert warning == (
        "backbone.layers.0.mixer (MambaMixer) is not perturbed block by block but whole, once for "
        "each point, which takes time and memory: it reads backbone.layers.0.mixer.conv1d.weight "
        "directly."
    )


class _Nested(nn.Module):
    """Owns a parameter, contains owners, and returns a view of its own parameter."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.randn(384))
        self.view = _View()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> Any:
        view = self.view()
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits + self.shift + view
        return output


class _View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(384))

    def forward(self) -> torch.Tensor:
        return self.weight[None]


def test_owners_inside_owners_and_views_of_parameters(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(1)
    model = _Nested(model_of("llama")).eval()
    task, batch = _task(tokenizer, "classification")
    _assert_equals_naive(model, manifest_of(model), task, batch, 2e-6)


def test_bfloat16_rounding_cancels_out_of_the_difference(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """With eps far below a weight's spacing, the plus and minus sides still agree elsewhere."""
    fine = model_of("llama").to(torch.bfloat16).float()
    task, batch = _task(tokenizer, "instruction")
    coarse = copy.deepcopy(fine).to(torch.bfloat16)
    exact = estimator_on(fine, manifest_of(fine), task)
    rough = estimator_on(coarse, manifest_of(coarse), task)
    grads = [
        (exact.measure(batch, [], [seed], EPS)[0], rough.measure(batch, [], [seed], EPS)[0])
        for seed in range(12)
    ]
    truth = np.array([pair[0].projected_grad for pair in grads])
    found = np.array([pair[1].projected_grad for pair in grads])
    assert np.corrcoef(truth, found)[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_2])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "opt", "mixtral", "gemma3"])
def test_away_from_the_cpu(
    kind: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs on another device, with the CPU standing for one that has no kernels."""
    model = model_of(kind)
    manifest = manifest_of(model)
    task, batch = _task(tokenizer, "classification")
    naive = {
        (seed, step): _naive_loss(
            model, manifest, task, batch, [*LOCAL, (seed, step)], 99, distribution
        )
        for seed in (99, 7)
        for step in (EPS, -EPS)
    }
    monkeypatch.setattr(devices, "elsewhere", lambda device: True)
    monkeypatch.setattr(devices, "kernels", lambda device: None)
    estimator = estimator_on(model, manifest, task, distribution)
    for seed, measured in zip((99, 7), estimator.measure(batch, LOCAL, [99, 7], EPS), strict=True):
        assert measured.loss_plus == pytest.approx(naive[seed, EPS], rel=2e-6)
        assert measured.loss_other == pytest.approx(naive[seed, -EPS], rel=2e-6)


def test_a_result_that_is_not_finite_is_named_at_the_end_of_a_pass_on_a_device(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = model_of("llama").half()
    model.model.layers[0].mlp.up_proj.weight[3, 1] = 65504.0
    task, batch = _task(tokenizer, "classification")
    monkeypatch.setattr(devices, "elsewhere", lambda device: True)
    monkeypatch.setattr(devices, "kernels", lambda device: None)
    with pytest.raises(NumericError, match=r"mlp.up_proj.weight\): element 97 is NaN or infinite"):
        estimator_on(model, manifest_of(model), task).measure(batch, [], [1], 64.0)


def test_local_steps_chain_their_own_pairs(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama-tied")
    task, batch = _task(tokenizer, "classification")
    estimator = estimator_on(model, manifest_of(model), task)
    first_seed = 1 << 40
    work = Work(tuple(range(first_seed, first_seed + 4)), 1e-3, EPS, want_digest=False)
    config = RunConfig(run_id="local", model="none", task=task.config, probes=2)
    steps = local_steps(estimator, lambda _: batch, work, config)
    assert len(steps) == 4
    local: list[Pair] = []
    for step in range(2):
        seeds = [(1 << 40) + 2 * step, (1 << 40) + 2 * step + 1]
        found = steps[2 * step : 2 * step + 2]
        assert found == estimator.measure(batch, local, seeds, EPS)
        local += [
            (seed, float(np.float32(-1e-3 * measurement.projected_grad / 2)))
            for seed, measurement in zip(seeds, found, strict=True)
        ]
    grads = np.array([measurement.projected_grad for measurement in steps])
    assert (grads == grads.astype(np.float32)).all()
    assert local_steps(estimator, lambda _: batch, work, config) == steps

    bound = float(np.abs(grads).min()) * 0.3
    narrow = config.model_copy(update={"projected_grad_abs_max": bound})
    clipped = local_steps(estimator, lambda _: batch, work, narrow)
    assert max(abs(measurement.projected_grad) for measurement in clipped) <= bound, (
        "a float32 inside the run's clip"
    )
    assert np.sign(clipped[0].projected_grad) == np.sign(grads[0])
