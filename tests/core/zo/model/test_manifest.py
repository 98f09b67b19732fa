"""Manifest, digests, and the weights' holder."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ConfigError, DivergedError, MismatchError, ModelError, NumericError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.model.loading import add_adapter
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.weight_digest import (
    base_digest,
    tensors_digest,
    tokenizer_digest,
    weights_digest,
)
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.digest_tree import CHUNK_BYTES
from fedmezo_core.zo.plain.entries import Entry, Manifest
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import MODEL_KINDS, make_tokenizer


class _Small(nn.Module):
    """Two tied matrices, a buffer, and parameters registered against the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2, bias=False)
        self.a = nn.Linear(3, 2, bias=False)
        self.a.weight = self.b.weight
        self.register_buffer("running", torch.zeros(5))
        self.register_buffer("table", torch.zeros(5), persistent=False)


def test_sorted_by_name_tied_once_buffers_out() -> None:
    manifest = manifest_of(_Small())
    assert [(entry.tensor_id, entry.name, entry.shape) for entry in manifest] == [
        (0, "a.weight", (2, 3)),
        (1, "z.bias", (2,)),
        (2, "z.weight", (2, 3)),
    ]
    assert manifest.element_count == 14


def test_canonical_bytes_are_as_written_down() -> None:
    manifest = Manifest((Entry(0, "a.ä", (2, 3), "float32"), Entry(1, "b", (), "bfloat16")))
    text = b'fedmezo manifest 1\n0\t"a.\\u00e4"\tfloat32\t2x3\n1\t"b"\tbfloat16\t\n'
    assert manifest.canonical_bytes() == text
    assert manifest.digest() == hashlib.sha256(text).digest()


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_parameter_of_real_architectures_once(
    kind: str, model_of: Callable[[str], nn.Module]
) -> None:
    model = model_of(kind)
    manifest = manifest_of(model)
    assert manifest.element_count == sum(value.numel() for value in model.parameters())
    names = [entry.name for entry in manifest]
    assert names == sorted(set(names))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert manifest_of(model) == manifest, "requires_grad plays no part"


def test_lora_manifest_holds_the_adapter_alone(model_of: Callable[[str], nn.Module]) -> None:
    base: Any = model_of("llama")
    lora = LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
    model = add_adapter(base, lora, 1)
    manifest = manifest_of(model, adapters_only=True)
    assert len(manifest) == 2 * 2 * 2
    assert all(".lora_A." in entry.name or ".lora_B." in entry.name for entry in manifest)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("model.layers.1.mlp",), r"model\.layers\.1\.mlp\..*"),
        (("layers.1.mlp", "norm"), r"model\.(layers\.1\.mlp\..*|norm\.weight)"),
        (("q_proj",), r"model\.layers\.\d\.self_attn\.q_proj\.weight"),
        (("layers.*.mlp.*_proj",), r"model\.layers\.\d\.mlp\..*"),
        (("model",), r"model\..*"),
        (("lm_head", "model.layers.0.*norm"), r"(lm_head|model\.layers\.0\.\w+norm)\.weight"),
    ],
)
def test_only_named_modules_are_trained(
    names: tuple[str, ...], expected: str, model_of: Callable[[str], nn.Module]
) -> None:
    model = model_of("llama")
    every = [entry.name for entry in manifest_of(model)]
    manifest = manifest_of(model, train=names)
    assert [entry.tensor_id for entry in manifest] == list(range(len(manifest)))
    found = [entry.name for entry in manifest]
    assert found == [name for name in every if re.fullmatch(expected, name)]
    assert 0 < len(found) < len(every)


@pytest.mark.parametrize("names", [("lm_head",), ("model.embed_tokens",)])
def test_a_tied_tensor_is_trained_under_either_of_its_names(
    names: tuple[str, ...], model_of: Callable[[str], nn.Module]
) -> None:
    manifest = manifest_of(model_of("llama-tied"), train=names)
    assert [entry.name for entry in manifest] == ["lm_head.weight"], "its first name"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("norm", "layers.7"), r"train: the model has no module layers\.7; .*called .*q_proj.*"),
        (("proj",), r"no module proj;"),
        (("model.*.mlp",), r"no module model\.\*\.mlp;"),
        (("norm.weight", "wrong"), r"no module norm\.weight, wrong;"),
        (("act_fn",), r"train: act_fn has no parameters"),
    ],
)
def test_a_name_that_means_nothing_is_refused(
    names: tuple[str, ...], sentence: str, model_of: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        manifest_of(model_of("llama"), train=names)


def test_only_trained_tensors_are_refused() -> None:
    small = _Small()
    small.z.double()
    assert [entry.name for entry in manifest_of(small, train=["b"])] == ["a.weight"]
    shared = _Small()
    shared.z.weight = nn.Parameter(shared.b.weight.detach())
    with pytest.raises(ModelError, match=r"a\.weight and z\.weight share memory"):
        manifest_of(shared, train=["b"])


def test_what_cannot_be_trained_is_refused() -> None:
    double = _Small().double()
    with pytest.raises(ModelError, match=r"a\.weight is float64"):
        manifest_of(double)
    with pytest.raises(ModelError, match="no LoRA adapter matrices"):
        manifest_of(_Small(), adapters_only=True)
    strided = _Small()
    strided.z.weight = nn.Parameter(torch.zeros(3, 2).t())
    with pytest.raises(ModelError, match=r"z\.weight is not contiguous"):
        manifest_of(strided)
    shared = _Small()
    shared.z.weight = nn.Parameter(shared.b.weight.detach())
    with pytest.raises(ModelError, match=r"a\.weight and z\.weight share memory"):
        manifest_of(shared)
    partly = _Small()
    flat = torch.zeros(10)
    partly.z.weight = nn.Parameter(flat[:6].view(2, 3))
    partly.z.bias = nn.Parameter(flat[4:6])
    with pytest.raises(ModelError, match=r"z\.bias and z\.weight share memory"):
        manifest_of(partly)


def test_a_model_that_is_not_the_manifests_is_refused() -> None:
    manifest = manifest_of(_Small())
    with pytest.raises(MismatchError, match=r"has no parameter a\.weight"):
        trained_tensors(nn.Linear(3, 2), manifest)
    with pytest.raises(MismatchError, match=r"a\.weight is bfloat16 \[2, 3\]"):
        trained_tensors(_Small().to(torch.bfloat16), manifest)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_tensors_digest_is_as_written_down(
    sizes: list[int], threads: int, dtype: torch.dtype
) -> None:
    tensors = [torch.arange(size).to(dtype) for size in sizes]
    leaves = b"".join(
        hashlib.sha256(bytes(tensor.view(torch.uint8).tolist())).digest()
        for tensor in tensors
        if len(tensor)
    )
    expected = hashlib.sha256(b"header" + leaves).digest()
    assert tensors_digest(b"header", tensors, threads=threads) == expected


def test_chunks_are_leaves() -> None:
    tensor = torch.arange(CHUNK_BYTES // 4 + 100, dtype=torch.float32)
    octets = tensor.numpy().tobytes()
    leaves = b"".join(
        hashlib.sha256(part).digest() for part in (octets[:CHUNK_BYTES], octets[CHUNK_BYTES:])
    )
    assert tensors_digest(b"", [tensor]) == hashlib.sha256(leaves).digest()


def test_one_flipped_bit_shows(model_of: Callable[[str], nn.Module]) -> None:
    model = model_of("llama")
    manifest = manifest_of(model)
    weights, base = weights_digest(model, manifest), base_digest(model)
    assert weights_digest(model_of("llama"), manifest, threads=1) == weights
    tensor = trained_tensors(model, manifest)[3].view(torch.int32).view(-1)
    tensor[5] ^= 1
    assert weights_digest(model, manifest) != weights
    assert base_digest(model) != base
    tensor[5] ^= 1
    assert weights_digest(model, manifest) == weights


def test_base_digest_covers_frozen_tensors_and_persistent_buffers() -> None:
    torch.manual_seed(0)
    model = _Small()
    digest = base_digest(model)
    running: Any = model.running
    table: Any = model.table
    table[2] = 1.0
    assert base_digest(model) == digest, "a buffer that is computed, not stored"
    running[2] = 1.0
    assert base_digest(model) != digest


def test_tokenizer_digest_ignores_state_and_sees_changes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    digest = tokenizer_digest(tokenizer)
    other = make_tokenizer()
    other("one two", truncation=True, max_length=1)
    assert tokenizer_digest(other) == digest, "truncation is state of the last call"
    other.chat_template = "{{ messages }}"
    assert tokenizer_digest(other) != digest
    grown = make_tokenizer()
    grown.add_tokens(["unheard-of"])
    assert tokenizer_digest(grown) != digest


# ---------------------------------------------------------------------- the holder


def _commit(number: int, pairs: int = 3) -> Commit:
    rng = np.random.default_rng(number)
    return Commit(
        rng.integers(0, 2**63, pairs).astype(np.uint64),
        rng.normal(0, 1e-2, pairs).astype(np.float32),
        number,
    )


def _weights(model: nn.Module, threads: int | None = None) -> Weights:
    return Weights(
        model,
        manifest_of(model),
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=threads,
    )


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 5)), bfloat16=st.booleans())
def test_rounds_fused_or_one_by_one_give_the_same_digest(
    cuts: set[int], bfloat16: bool, model_of: Callable[[str], nn.Module]
) -> None:
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    commits = [_commit(number, pairs=number % 4) for number in range(6)]
    whole, pieces = _weights(model_of("gpt2").to(dtype)), _weights(model_of("gpt2").to(dtype), 2)
    start = whole.digest()
    whole.apply(1, commits)
    edges = [0, *sorted(cuts), len(commits)]
    for first, last in itertools.pairwise(edges):
        pieces.apply(first + 1, commits[first:last])
    assert pieces.digest() == whole.digest() != start
    assert pieces.round == whole.round == 6


def test_tied_weights_move_once(model_of: Callable[[str], nn.Module]) -> None:
    model: Any = model_of("llama-tied")
    before = model.lm_head.weight.clone()
    commit = Commit(np.array([1], dtype=np.uint64), np.array([0.5], dtype=np.float32), 0)
    _weights(model).apply(1, [commit])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose((model.lm_head.weight - before).abs(), torch.tensor(0.5), atol=1e-6)


def test_rounds_apply_in_order_and_damage_is_remembered(
    model_of: Callable[[str], nn.Module],
) -> None:
    weights = _weights(model_of("gpt2"))
    with pytest.raises(DivergedError, match="round 2 cannot be applied to weights at round 0"):
        weights.apply(2, [_commit(2)])
    weights.apply(1, [_commit(1)])
    with pytest.raises(DivergedError, match="round 1 cannot be applied to weights at round 1"):
        weights.apply(1, [_commit(1)])
    huge = Commit(np.array([1, 1], dtype=np.uint64), np.full(2, 3e38, dtype=np.float32), 0)
    with pytest.raises(NumericError, match=r"Tensor 0 \(.*element"):
        weights.apply(2, [huge])
    with pytest.raises(DivergedError, match="interrupted the commit of round 2"):
        weights.digest()
    assert weights.round == 1
