"""Exported folders: complete, loadable, and the same weights."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.zo import export
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter, export_model
from fedmezo_core.zo.model.loading import load_model
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.weight_digest import base_digest, tokenizer_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import MODEL_KINDS

CARD = ModelCard("the-base", "a-run", {"Round": "3 of 9"})
TARGETS = {"llama-tied": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


TIED = {
    "llama-tied": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen2": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
}


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return settings


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_from_pretrained_gives_the_same_weights(
    kind: str,
    dtype: Literal["float32", "bfloat16"],
    tmp_path: Path,
    folder_of: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded = load_model(str(folder_of(kind)), dtype=dtype)
    _move(loaded.model)
    before = base_digest(loaded.model)
    capfd.readouterr()
    export_model(loaded, tmp_path / "deep" / "out", CARD)
    assert capfd.readouterr() == ("", "")
    assert base_digest(loaded.model) == before
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out", dtype="auto")
    assert base_digest(back) == before
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "deep" / "out")
    assert tokenizer_digest(read) == tokenizer_digest(loaded.tokenizer)
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
    folder_of: Callable[[str], Path],
) -> None:
    loaded = load_model(str(folder_of(kind)), train=train)
    _move(loaded.model, train=train)
    export_model(loaded, tmp_path / "out", CARD)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert base_digest(back) == base_digest(loaded.model), "tied weights are tied still"
    before = load_model(str(folder_of(kind))).model.state_dict()
    different = {name for name, value in back.named_parameters() if not value.equal(before[name])}
    assert different == moved


@pytest.mark.parametrize("kind", list(TARGETS))
def test_lora_merged_and_alone(
    kind: str,
    tmp_path: Path,
    folder_of: Callable[[str], Path],
) -> None:
    import peft

    lora = LoraConfig(rank=4, alpha=16, target_modules=TARGETS[kind])
    loaded = load_model(str(folder_of(kind)), lora=lora, run_seed=3)
    model = loaded.model
    _move(model, adapters_only=True)
    before = base_digest(model)
    export_model(loaded, tmp_path / "merged", CARD)
    export_adapter(loaded, tmp_path / "adapter", CARD)
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
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        metadata = metadata_load(tmp_path / name / "README.md")
        assert metadata is not None
        assert (metadata["base_model"], metadata["library_name"]) == ("the-base", library)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen2"])
def test_an_adapter_of_a_tied_head(
    kind: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    """The head is no longer the embeddings, which the export's settings must say."""
    lora = LoraConfig(rank=4, alpha=16, target_modules=("lm_head",))
    loaded = load_model(str(folder_of(kind)), lora=lora)
    export_model(loaded, tmp_path / "untrained", CARD)
    tied = _settings(tmp_path / "untrained").get("tie_word_embeddings", True)
    assert tied, "an adapter that changes nothing leaves them tied"
    _move(loaded.model, adapters_only=True)
    export_model(loaded, tmp_path / "merged", CARD)
    assert _settings(tmp_path / "merged")["tie_word_embeddings"] is False
    head, embeddings = TIED[kind]
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(tensors[head], tensors[embeddings]), "every version finds both"
    ids = torch.arange(20)[None]
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base: Any = AutoModelForCausalLM.from_pretrained(folder_of(kind))
    with torch.inference_mode():
        expected = loaded.model(ids).logits
        assert torch.allclose(back(ids).logits, expected, atol=2e-5)
        assert not torch.allclose(base(ids).logits, expected, atol=1e-2)


def test_settings_are_the_bases_own(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    """A version that writes them in its own way would be misunderstood by others."""
    base = Path(shutil.copytree(folder_of("llama"), tmp_path / "base"))
    settings = _settings(base)
    for name in ("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"):
        settings.pop(name, None)
    settings |= {"rope_theta": 500000.0, "torch_dtype": "float32", "_name_or_path": str(base)}
    settings |= {"auto_map": {"AutoConfig": "code.Config"}}
    (base / "config.json").write_text(json.dumps(settings))
    # Strict versions refuse to write these: a temperature, and no sampling.
    generation = {"do_sample": False, "temperature": 0.6, "max_length": 40}
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    (base / "LICENSE").write_text("the licence's text")
    (base / "notes.txt").write_text("somebody's own")
    loaded = load_model(str(base), dtype="bfloat16")
    _move(loaded.model)
    export_model(loaded, tmp_path / "out", CARD)

    del settings["_name_or_path"], settings["auto_map"]
    assert _settings(tmp_path / "out") == settings | {"torch_dtype": "bfloat16"}
    for name in ("generation_config.json", "LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert metadata is not None
    assert metadata["license"] == "apache-2.0"
    assert "| Run | a-run |" in card
    assert "| Round | 3 of 9 |" in card
    assert str(tmp_path) not in card


def test_a_tokenizer_with_files_that_only_its_class_knows(
    tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    base = Path(shutil.copytree(folder_of("llama"), tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_model(str(base))
    assert set(loaded.tokenizer.chat_template or ()) == {"default", "tools"}
    export_model(loaded, tmp_path / "out", CARD)
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer_digest(read) == tokenizer_digest(loaded.tokenizer)


@pytest.mark.parametrize(
    ("file", "spoil", "sentence"),
    [
        ("model.safetensors", "model.norm.weight", "model.norm.weight loads to other values"),
        ("model.safetensors", "lm_head.weight", "lm_head.weight loads to other values"),
        ("config.json", "rms_norm_eps", "the setting rms_norm_eps loads as 0.25"),
        ("config.json", "num_hidden_layers", "it does not load: The checkpoint of"),
    ],
)
def test_what_does_not_load_to_what_was_trained_is_not_handed_over(
    file: str,
    spoil: str,
    sentence: str,
    tmp_path: Path,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_model(str(folder_of("llama")))
    check = export._check_model

    def spoiled(target: Path, *others: Any) -> None:
        if file == "config.json":
            change = {"rms_norm_eps": 0.25} if spoil == "rms_norm_eps" else {spoil: 3}
            (target / file).write_text(json.dumps(_settings(target) | change))
        else:
            tensors = load_file(target / file)
            name = next(name for name in tensors if name.endswith(spoil))
            tensors[name][-1] += 1
            save_file(tensors, target / file, metadata={"format": "pt"})
        check(target, *others)

    monkeypatch.setattr(export, "_check_model", spoiled)
    with pytest.raises(ModelError, match=f"is not what was trained.*{sentence}"):
        export_model(loaded, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_not_written_whole(
    tmp_path: Path, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(rank=4, alpha=16, target_modules=("q_proj",))
    loaded = load_model(str(folder_of("llama")), lora=lora)
    model: Any = loaded.model
    save = model.save_pretrained

    def spoiled(target: Path, **given: Any) -> None:
        save(target, **given)
        tensors = load_file(target / "adapter_model.safetensors")
        tensors.popitem()
        save_file(tensors, target / "adapter_model.safetensors")

    monkeypatch.setattr(model, "save_pretrained", spoiled)
    with pytest.raises(ModelError, match=r"is not what was trained.*lora_B\.weight loads to oth"):
        export_adapter(loaded, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_what_the_umask_says(
    umask: int,
    tmp_path: Path,
    folder_of: Callable[[str], Path],
) -> None:
    lora = LoraConfig(rank=2, alpha=4, target_modules=TARGETS["gpt2"])
    loaded = load_model(str(folder_of("gpt2")), lora=lora)
    before = os.umask(umask)
    try:
        export_model(loaded, tmp_path / "merged", CARD)
        export_adapter(loaded, tmp_path / "adapter", CARD)
    finally:
        os.umask(before)
    for name in ("merged", "adapter"):
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir()} == {
            0o666 & ~umask
        }
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask


def test_folders_that_are_in_the_way(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    loaded = load_model(str(folder_of("llama")))
    with pytest.raises(ModelError, match="no LoRA adapter to export"):
        export_adapter(loaded, tmp_path / "adapter", CARD)
    (tmp_path / "empty").mkdir()
    export_model(loaded, tmp_path / "empty", CARD)
    for taken in ("empty", "empty/config.json"):
        with pytest.raises(ModelError, match="exists and is not empty"):
            export_model(loaded, tmp_path / taken, CARD)
    with pytest.raises(ModelError, match=r"cannot be written to .*Not a directory"):
        export_model(loaded, tmp_path / "empty" / "config.json" / "deeper", CARD)


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    loaded = load_model(str(folder_of("llama")))
    monkeypatch.setattr(loaded.model, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"cannot be written .*No space left on device"):
        export_model(loaded, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []
