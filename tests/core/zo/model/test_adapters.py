"""Beginning from an adapter that is there already, and writing the one that a run has trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, MismatchError, ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter
from fedmezo_core.zo.model.loading import load_model, quiet
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.party import Party, open_party

TARGETS = {"llama-tied": ("q_proj", "layers.1.mlp.down_proj"), "gpt2": ("c_attn", "c_proj")}
TASK = TaskConfig(template="{text}", verbalizers={"0": " a", "1": " b"})
CARD = ModelCard("m", "a-run")


def _party(folder: Path, kind: str, adapter: Path | None, dtype: Any = "float32") -> Party:
    lora = LoraConfig(rank=4, alpha=16, target_modules=TARGETS[kind])
    config = RunConfig(run_id="r", model="m", task=TASK, dtype=dtype, lora=lora)
    return open_party(config, str(folder), adapter=adapter, threads=1)


def _commit(number: int) -> Commit:
    return Commit(
        np.arange(3, dtype=np.uint64) + 10 * number,
        np.array([1e-2, -2e-2, 1e-3], dtype=np.float32),
        number,
    )


def _logits_in_peft(folder: Path, adapter: Path, dtype: Any) -> torch.Tensor:
    import peft

    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # peft itself still asks transformers for something deprecated.
    with quiet(), torch.inference_mode():
        adapted = peft.PeftModel.from_pretrained(base, str(adapter))
        return adapted(torch.arange(20)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_one_runs_adapter_is_the_next_ones_base(
    kind: str, dtype: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(kind)
    first = _party(folder, kind, None, dtype)
    first.weights.apply(1, [_commit(1)])
    export_adapter(first.loaded, tmp_path / "first", CARD)

    second = _party(folder, kind, tmp_path / "first", dtype)
    assert second.manifest_digest == first.manifest_digest
    assert second.base_digest == base_digest(first.loaded.model) != first.base_digest
    with pytest.raises(
        MismatchError, match=r"base weights .* begin from the same adapter, or none"
    ):
        _party(folder, kind, None, dtype).check_same_base(second.genesis())

    genesis = second.genesis()
    assert genesis.trainable_bytes == 4 * genesis.trainable_elements, "an adapter is float32"

    second.weights.apply(1, [_commit(2)])
    export_adapter(second.loaded, tmp_path / "second", CARD)
    with torch.inference_mode():
        expected = second.loaded.model(torch.arange(20)[None]).logits
    assert torch.equal(_logits_in_peft(folder, tmp_path / "second", dtype), expected)
    assert not torch.equal(_logits_in_peft(folder, tmp_path / "first", dtype), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_that_peft_has_written(
    dtype: torch.dtype, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    import peft

    folder = folder_of("llama-tied")
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=r".*\.(q_proj|1\.mlp\.down_proj)", lora_dropout=0.1
    )
    with quiet():
        model: Any = peft.get_peft_model(base, config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value).to(dtype)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    party = _party(folder, "llama-tied", tmp_path / "adapter")
    with torch.inference_mode():
        ours = party.loaded.model(torch.arange(20)[None]).logits
    assert torch.equal(_logits_in_peft(folder, tmp_path / "adapter", "float32"), ours)


@pytest.fixture
def adapter(tmp_path: Path, folder_of: Callable[[str], Path]) -> Path:
    """An adapter of a small model that a test may spoil."""
    party = _party(folder_of("llama-tied"), "llama-tied", None)
    export_adapter(party.loaded, tmp_path / "adapter", CARD)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 8}, r"has r = 8, the run has lora\.rank = 4; give the run the adapter's value"),
        ({"lora_alpha": 4}, r"has lora_alpha = 4, the run has lora\.alpha = 16"),
        ({"use_rslora": True}, "has use_rslora = True, which"),
        ({"rank_pattern": {"q_proj": 2}}, r"has rank_pattern = \{'q_proj': 2\}"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save = \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights = 'pissa'"),
        ({"bias": "all"}, "has bias = 'all'"),
        ({"peft_type": "IA3"}, "has peft_type = 'IA3'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    changes: dict[str, Any], sentence: str, adapter: Path, folder_of: Callable[[str], Path]
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=sentence):
        _party(folder_of("llama-tied"), "llama-tied", adapter)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("q_proj",), r"also has weights for model\.layers\.1\.mlp\.down_proj, other than"),
        (
            ("q_proj", "v_proj", "layers.1.mlp.down_proj"),
            r"lacks weights for .*0.*v_proj and 1 more",
        ),
    ],
)
def test_an_adapter_on_other_modules_is_refused(
    targets: tuple[str, ...], sentence: str, adapter: Path, folder_of: Callable[[str], Path]
) -> None:
    lora = LoraConfig(rank=4, alpha=16, target_modules=targets)
    with pytest.raises(ConfigError, match=sentence):
        load_model(str(folder_of("llama-tied")), lora=lora, adapter=adapter)


def test_folders_that_hold_no_adapter(
    adapter: Path, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("llama-tied")

    def refuses(path: Path, sentence: str, kind: type[Exception] = ModelError) -> None:
        with pytest.raises(kind, match=sentence) as caught:
            _party(folder, "llama-tied", path)
        assert "\n" not in str(caught.value)

    refuses(tmp_path / "absent", r"no adapter in .*absent: it has no adapter_config\.json")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(4, 7)}, weights)
    refuses(adapter, r"has shape \[4, 7\], the run's is \[4, \d+\]", ConfigError)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, weights)
    refuses(adapter, f"damaged: {name} holds a NaN")
    weights.write_bytes(b"what")
    refuses(adapter, r"adapter_model\.safetensors cannot be read")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    refuses(adapter, r"adapter_model\.safetensors is a Git LFS pointer: fetch the file")
    weights.unlink()
    refuses(adapter, r"has no adapter_model\.safetensors")
    torch.save({}, adapter / "adapter_model.bin")
    refuses(adapter, "pickle file")
    for text in ("{", "[]"):
        (adapter / "adapter_config.json").write_text(text)
        refuses(adapter, r"adapter_config\.json in .* (cannot be read|is no JSON object)")


def test_a_run_without_lora_begins_from_no_adapter(
    adapter: Path, folder_of: Callable[[str], Path]
) -> None:
    config = RunConfig(run_id="r", model="m", task=TASK)
    with pytest.raises(ConfigError, match="adapter: this run trains no adapter; leave it out"):
        open_party(config, str(folder_of("llama-tied")), adapter=adapter)
