"""Exported folders: complete, loadable, and the same weights."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter, export_model
from fedmezo_core.zo.model.loading import load_model
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.model.weight_digest import base_digest, tokenizer_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import MODEL_KINDS

TARGETS = {"llama-tied": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


def _move(model: nn.Module, adapters_only: bool = False, train: Sequence[str] = ()) -> None:
    weights = Weights(
        model,
        manifest_of(model, adapters_only=adapters_only, train=train),
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
    )
    commit = Commit(
        np.arange(3, dtype=np.uint64), np.array([1e-2, -2e-2, 1e-3], dtype=np.float32), 1
    )
    weights.apply(1, [commit])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_from_pretrained_gives_the_same_weights(
    kind: str,
    dtype: torch.dtype,
    tmp_path: Path,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = model_of(kind).to(dtype)
    _move(model)
    before = base_digest(model)
    export_model(model, tokenizer, tmp_path / "deep" / "out")
    assert capfd.readouterr() == ("", "")
    assert base_digest(model) == before
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out", dtype="auto")
    assert base_digest(back) == before
    # By its own class: AutoTokenizer picks one by the model's type, which this tokenizer isn't of.
    read: Any = type(tokenizer).from_pretrained(tmp_path / "deep" / "out")
    assert tokenizer_digest(read) == tokenizer_digest(tokenizer)
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kind", "train", "moved"),
    [
        ("llama-tied", ["lm_head"], {"model.embed_tokens.weight"}),
        ("llama", ["layers.1.mlp.down_proj"], {"model.layers.1.mlp.down_proj.weight"}),
        ("gpt2", ["h.1.ln_2"], {"transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias"}),
    ],
)
def test_only_what_was_trained_has_moved(
    kind: str,
    train: list[str],
    moved: set[str],
    tmp_path: Path,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    _move(model, train=train)
    export_model(model, tokenizer, tmp_path / "out")
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert base_digest(back) == base_digest(model), "tied weights are tied still"
    before = model_of(kind).state_dict()
    different = {name for name, value in back.named_parameters() if not value.equal(before[name])}
    assert different == moved


@pytest.mark.parametrize("kind", list(TARGETS))
def test_lora_merged_and_alone(
    kind: str,
    tmp_path: Path,
    folder_of: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    import peft

    lora = LoraConfig(rank=4, alpha=16, target_modules=TARGETS[kind])
    model = load_model(str(folder_of(kind)), lora=lora, run_seed=3).model
    _move(model, adapters_only=True)
    before = base_digest(model)
    export_model(model, tokenizer, tmp_path / "merged")
    export_adapter(model, tmp_path / "adapter", "the-base")
    assert base_digest(model) == before, "merging leaves the live model alone"

    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        merged = load_model(str(tmp_path / "merged")).model(ids).logits
        base: Any = AutoModelForCausalLM.from_pretrained(folder_of(kind))
        unchanged = base(ids).logits
        # peft itself still asks transformers for something deprecated.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        alone = adapted(ids).logits
    assert torch.allclose(merged, expected, atol=2e-5)
    assert torch.equal(alone, expected)
    assert not torch.allclose(unchanged, expected, atol=1e-2)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    for path in [*(tmp_path / "adapter").iterdir(), *(tmp_path / "merged").iterdir()]:
        assert str(folder_of(kind)).encode() not in path.read_bytes(), path
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "the-base"
    assert "base_model: the-base" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_what_the_umask_says(
    umask: int,
    tmp_path: Path,
    folder_of: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lora = LoraConfig(rank=2, alpha=4, target_modules=TARGETS["gpt2"])
    model = load_model(str(folder_of("gpt2")), lora=lora).model
    before = os.umask(umask)
    try:
        export_model(model, tokenizer, tmp_path / "merged")
        export_adapter(model, tmp_path / "adapter", "the-base")
    finally:
        os.umask(before)
    for name in ("merged", "adapter"):
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir()} == {
            0o666 & ~umask
        }
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask


def test_folders_that_are_in_the_way(
    tmp_path: Path, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match="no LoRA adapter to export"):
        export_adapter(model, tmp_path / "adapter", "the-base")
    (tmp_path / "empty").mkdir()
    export_model(model, tokenizer, tmp_path / "empty")
    for taken in ("empty", "empty/config.json"):
        with pytest.raises(ModelError, match="exists and is not empty"):
            export_model(model, tokenizer, tmp_path / taken)
    with pytest.raises(ModelError, match=r"cannot be written to .*Not a directory"):
        export_model(model, tokenizer, tmp_path / "empty" / "config.json" / "deeper")


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"cannot be written .*No space left on device"):
        export_model(model_of("llama"), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
