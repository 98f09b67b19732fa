"""Prepared launches build the bits that `materialize` builds, and losses are the CPU path's.

The CPU stands in for a device: without kernels (plain torch operations), or with Triton's
interpreter, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import NumericError
from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.devices import Fan, Launch
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward import prepared as prepared_module
from fedmezo_core.zo.forward.forward import Forward
from fedmezo_core.zo.forward.prepared import is_elementwise
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.model.loading import add_adapter
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.model.modules import Owned
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.plain.measurements import Pair
from tests.core.zo.conftest import MODEL_KINDS
from tests.core.zo.forward.frozen_parts import (
    EPS,
    LOCAL,
    batch_of,
    last_layer,
    losses_of,
    task_of,
)
from tests.core.zo.test_devices import interpreted
from tests.core.zo.test_materialize import assert_same_bits

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

WIDTH = 40


@contextmanager
def on_a_device(*, by_kernels: bool = False) -> Iterator[None]:
    """While open, the CPU counts as another device."""
    with pytest.MonkeyPatch.context() as patch:
        found = interpreted() if by_kernels else None
        patch.setattr(devices, "elsewhere", lambda device: True)
        patch.setattr(devices, "kernels", lambda device: found)
        yield


class Scaled(nn.Module):
    """A norm without the norm: elementwise in its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Mixed(Scaled):
    """Each place of its result depends on all of its parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.softmax(-1) * self.weight.sum()


class Shifted(Scaled):
    """Elementwise in its parameter, but a row's tokens see the one before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, dims=-2) * self.weight


class Layers(nn.Module):
    """One of each kind that is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(9, WIDTH)
        self.biased = nn.Linear(WIDTH, WIDTH)
        self.plain = nn.Linear(WIDTH, WIDTH, bias=False)
        self.transposed = Conv1D(WIDTH, WIDTH)  # type: ignore[no-untyped-call]
        self.scaled = Scaled()
        self.norm = nn.LayerNorm(WIDTH)
        self.to(dtype).requires_grad_(False)


def commits_of(local: Sequence[Pair], ends: Sequence[Sequence[Pair]], bits: int) -> list[Commit]:
    return [
        Commit(
            np.array([seed for seed, _ in [*local, *end]], np.uint64),
            np.array([step for _, step in [*local, *end]], np.float32),
            bits,
        )
        for end in ends
    ]


pairs = st.tuples(st.integers(0, 2**64 - 1), st.floats(-1, 1, width=32))
points = st.builds(
    commits_of,
    st.lists(pairs, max_size=4),
    st.lists(st.lists(pairs, max_size=1), min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
)


def assert_built(
    model: Layers,
    forward: Forward,
    manifest: Manifest,
    at: list[Commit],
    *,
    by_kernels: bool = False,
) -> None:
    """What each module computes shows that it has the weights that `materialize` makes.

    Where it adds zeros, the sign of a zero does not show.
    """
    operands = {
        entry.name: Operands(k, forward._distribution, forward._rounding)
        for k, entry in enumerate(manifest)
    }

    def expected(name: str, point: Commit) -> torch.Tensor:
        base = model.get_parameter(name)
        out = torch.empty_like(base)
        materialize(out, base, [point], operands[name])
        return out

    dtype, count = model.plain.weight.dtype, len(at)
    unit = torch.eye(WIDTH, dtype=dtype).expand(count, WIDTH, WIDTH)
    zeros, ones = torch.zeros_like(unit), torch.ones_like(unit)
    ids = torch.tensor([[3, 0, 8], [3, 7, 7], [1, 2, 3], [4, 4, 4]])[:count]
    with on_a_device(by_kernels=by_kernels), torch.inference_mode(), forward.at(at, 1, WIDTH):
        rows, scaled = model.table(ids), model.scaled(ones)
        biased, normed = model.biased(zeros), model.norm(zeros)
        plain, transposed = model.plain(unit), model.transposed(unit)
    for k, point in enumerate(at):
        assert_same_bits(rows[k], expected("table.weight", point)[ids[k]])
        assert_same_bits(scaled[k, 0], expected("scaled.weight", point))
        assert torch.equal(biased[k, 0], expected("biased.bias", point))
        assert torch.equal(normed[k, 0], expected("norm.bias", point))
        bias = expected("transposed.bias", point)
        if not forward._distribution.rank:  # low rank builds no weights of matrices
            assert torch.equal(plain[k].t(), expected("plain.weight", point))
            total = expected("transposed.weight", point).float() + bias.float()
            assert torch.equal(transposed[k], total.to(dtype))


@contextmanager
def small_blocks(size_bytes: int) -> Iterator[None]:
    """While open, weights are built in several blocks, and small tensors in several launches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_module, "BLOCK_BYTES", size_bytes)
        patch.setattr(prepared_module, "GROUP_BYTES", size_bytes)
        yield


@settings(max_examples=20)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(list(Distribution)),
    st.sampled_from(list(Rounding)),
    st.lists(points, min_size=1, max_size=3),
    st.sampled_from([1 << 25, 1 << 10]),
)
def test_any_points_one_after_the_other(
    dtype: torch.dtype,
    distribution: Distribution,
    rounding: Rounding,
    series: list[list[Commit]],
    size_bytes: int,
) -> None:
    """Also for other numbers of points and of local pairs than those of the pass before."""
    model = Layers(dtype)
    manifest = manifest_of(model)
    forward = Forward(model, manifest, distribution=distribution, rounding=rounding)
    with small_blocks(size_bytes):
        for at in series:
            assert_built(model, forward, manifest, at)


def test_a_pass_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording of it writes there, also after larger passes, and other launches for this one."""
    model = Layers(torch.float32)
    forward = Forward(
        model, manifest_of(model), distribution=Distribution.RADEMACHER, rounding=Rounding.NEAREST
    )
    addresses: list[int] = []
    prepared_fan = devices.prepared_fan

    def noted(fan: Fan, *others: Any) -> list[Launch]:
        addresses.append(fan.outs[0].data_ptr())
        return prepared_fan(fan, *others)

    def run(count: int) -> set[int]:
        at = commits_of([], [[(seed, EPS)] for seed in range(count)], 1)
        addresses.clear()
        with on_a_device(), torch.inference_mode(), forward.at(at, 1, WIDTH):
            model.plain(torch.zeros(count, WIDTH, WIDTH))
        return set(addresses)

    run(2)
    with monkeypatch.context() as patch:
        patch.setattr(devices, "prepared_fan", noted)
        model.plain.forward = model.plain.forward  # type: ignore[method-assign]
        first, larger = run(2), run(4)
        del model.plain.__dict__["forward"]
        assert first == run(2)
        assert not first & larger


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "distribution"),
    [(torch.bfloat16, Distribution.RADEMACHER), (torch.float32, Distribution.LOW_RANK_2)],
)
def test_the_kernels(dtype: torch.dtype, distribution: Distribution) -> None:
    interpreted()
    model = Layers(dtype)
    manifest = manifest_of(model)
    forward = Forward(model, manifest, distribution=distribution, rounding=Rounding.STOCHASTIC)
    for seed in (5, 2**64 - 1):
        at = commits_of([(1, 0.1)], [[(seed, EPS)], []], seed)
        assert_built(model, forward, manifest, at, by_kernels=True)


def measured(
    model: nn.Module,
    manifest: Manifest,
    task: Any,
    distribution: Distribution,
    local_pairs: Sequence[Sequence[Pair]],
    *,
    one_sided: bool = True,
) -> list[float]:
    """The losses of a few measurements, one after the other."""
    estimator = Estimator(
        model, manifest, task, distribution=distribution, rounding=Rounding.STOCHASTIC,
        one_sided=one_sided, threads=1,
    )  # fmt: skip
    batch = batch_of(task)
    losses: list[float] = []
    for seed, local in enumerate(local_pairs):
        losses += losses_of(estimator.measure(batch, local, [99 + seed, 7 + seed], EPS))
    return losses


LOCAL_PAIRS: list[list[Pair]] = [[], LOCAL, [(3, 0.01)], [(k, 0.01) for k in range(9)]]


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [(kind, Distribution.RADEMACHER) for kind in (*MODEL_KINDS, "mamba")]
    + [(kind, Distribution.LOW_RANK_2) for kind in ("gpt2", "llama-tied", "mixtral")],
)
def test_losses_are_the_cpu_paths(
    kind: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model)
    task = task_of(tokenizer, "instruction")
    expected = measured(model, manifest, task, distribution, LOCAL_PAIRS)
    with on_a_device():
        losses = measured(model, manifest, task, distribution, LOCAL_PAIRS)
    assert losses == pytest.approx(expected, rel=3e-6)
    assert not [record for record in caplog.records if "one pass" in record.message]


@pytest.mark.parametrize("distribution", [Distribution.RADEMACHER, Distribution.LOW_RANK_1])
@pytest.mark.parametrize("how", ["frozen", "adapter", "offloaded", "offloaded, tied"])
def test_models_of_which_parts_are_elsewhere(
    how: str,
    distribution: Distribution,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of("llama-tied" if "tied" in how else "qwen2")
    train = [last_layer("qwen2")] if how == "frozen" else []
    if how == "adapter":
        base: Any = model
        model = add_adapter(base, LoraConfig(rank=4, alpha=16, target_modules=("q_proj",)), 5)
    manifest = manifest_of(model, train=train, adapters_only=how == "adapter")
    if "offloaded" in how:
        cpu_offload(model, torch.device("cpu"))
    task = task_of(tokenizer)
    expected = measured(model, manifest, task, distribution, LOCAL_PAIRS, one_sided=False)
    with on_a_device():
        losses = measured(model, manifest, task, distribution, LOCAL_PAIRS, one_sided=False)
    assert losses == pytest.approx(expected, rel=3e-6)


def test_what_is_not_finite_is_named(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also after a measurement that went well, and before one."""
    model: Any = model_of("llama")
    manifest, task = manifest_of(model), task_of(tokenizer)
    weight = model.model.layers[1].mlp.up_proj.weight
    estimator = Estimator(
        model, manifest, task, distribution=Distribution.RADEMACHER, rounding=Rounding.STOCHASTIC
    )
    with on_a_device():
        first = estimator.measure(batch_of(task), LOCAL, [5], EPS)
        kept, weight[3, 2] = float(weight[3, 2]), float("inf")
        with pytest.raises(
            NumericError, match=r"layers\.1\.mlp\.up_proj.*element 98 is NaN or inf"
        ):
            estimator.measure(batch_of(task), LOCAL, [6], EPS)
        weight[3, 2] = kept
        assert estimator.measure(batch_of(task), LOCAL, [5], EPS) == first


def test_which_modules_run_once_for_all_points() -> None:
    modules = (Scaled(), Mixed(), Shifted(), nn.LayerNorm(WIDTH))
    for module, expected in zip(modules, (True, False, False, False), strict=True):
        module.requires_grad_(False)
        owned = [Owned(module, name, k) for k, name in enumerate(sorted(module._parameters))]
        assert is_elementwise(module.forward, owned, WIDTH) == expected
