"""A LoRA run's frozen base in 8 or 4 bits: the adapter's bits stay, and measurements come close."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.party import Party, open_party
from tests.core.zo.conftest import SENTENCES

TARGETS = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Path]:
    """Gives the folder of a saved model whose layers fill whole blocks."""
    torch.manual_seed(7)
    vocabulary: Any = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 0}
    models: dict[str, Any] = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **vocabulary,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                pad_token_id=None,
                tie_word_embeddings=True,
            )
        ),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(**vocabulary, n_positions=128, n_embd=64, n_layer=2, n_head=4)
        ),
    }
    folders = {}
    for kind, model in models.items():
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders.__getitem__


def _party(folder: Path, kind: str, bits: int | None, dtype: Any = "float32") -> Party:
    config = RunConfig(
        run_id="r",
        model="m",
        dtype=dtype,
        lora=LoraConfig(rank=4, alpha=16, target_modules=TARGETS[kind]),
        task=TaskConfig(
            kind="classification",
            template="{text} All in all, it was",
            verbalizers={"0": " terrible", "1": " great"},
        ),
    )
    return open_party(config, str(folder), threads=1, frozen_base_bits=bits)


def _grads(party: Party) -> list[float]:
    rows = [
        Example({"text": text, "label": "01"[k % 2]}, "d", k) for k, text in enumerate(SENTENCES)
    ]
    batch = party.task.collate(party.task.encode(rows).examples, "the test")
    estimator = Estimator(
        party.loaded.model,
        party.loaded.manifest,
        party.task,
        distribution=party.distribution,
        rounding=party.rounding,
        threads=1,
    )
    # Away from the adapter's start, where B is 0 and A has no effect.
    return [
        measured.projected_grad
        for measured in estimator.measure(batch, [(77, 0.05)], range(10), 1e-2)
    ]


def test_a_contract_that_lists_forms_must_list_the_compressed_one(
    folder_of: Callable[[str], Path],
) -> None:
    config = _party(folder_of("llama"), "llama", None).config
    listed = config.model_copy(update={"base_forms": ("8-bit",)})
    party = open_party(listed, str(folder_of("llama")), threads=1, frozen_base_bits=8)
    assert party.base_form == "8-bit"
    assert open_party(config, str(folder_of("llama")), frozen_base_bits=4).base_form == ""
    with pytest.raises(ConfigError, match="the run admits the base itself and 8-bit, not 4-bit"):
        open_party(listed, str(folder_of("llama")), threads=1, frozen_base_bits=4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")]
)
def test_measurements_come_close_and_the_adapter_stays_exact(
    kind: str, dtype: str, bits: int, folder_of: Callable[[str], Path]
) -> None:
    full, small = (_party(folder_of(kind), kind, given, dtype) for given in (None, bits))
    assert small.base_digest == full.base_digest, "digested before it was compressed"
    assert small.genesis() == full.genesis()
    grads = [_grads(party) for party in (full, small)]
    assert np.corrcoef(grads[0], grads[1])[0, 1] > (0.9 if dtype == "float32" else 0.7)
    commit = Commit(np.array([5, 6], np.uint64), np.array([0.02, -0.01], np.float32), 1)
    for party in (full, small):
        party.weights.apply(1, [commit])
    assert small.weights.digest() == full.weights.digest()


def test_only_frozen_linear_layers_are_compressed(folder_of: Callable[[str], Path]) -> None:
    party = _party(folder_of("llama"), "llama", 4)
    model: Any = party.loaded.model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layer = "base_model.model.model.layers.0"
    assert kinds[f"{layer}.self_attn.q_proj.base_layer"] == "Linear4bit"
    assert kinds[f"{layer}.mlp.up_proj"] == "Linear4bit"
    assert kinds[f"{layer}.self_attn.q_proj.lora_A.default"] == "Linear"
    assert kinds["base_model.model.lm_head"] == "Linear"
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight, "still tied"
    sizes = {name: value.numel() for name, value in model.named_parameters() if "up_proj" in name}
    assert set(sizes.values()) == {64 * 128 // 2}


def test_what_cannot_be_compressed_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(folder_of("llama"))
    task = TaskConfig(kind="classification", template="{text}", verbalizers={"0": " a", "1": " b"})
    plain = RunConfig(run_id="r", model="m", task=task)
    with pytest.raises(ConfigError, match="this run trains no adapter"):
        open_party(plain, folder, frozen_base_bits=8)
    lora = LoraConfig(rank=4, alpha=16, target_modules=("q_proj",))
    config = RunConfig(run_id="r", model="m", task=task, lora=lora)
    with pytest.raises(ConfigError, match="a compressed base is not offloaded"):
        open_party(config, folder, frozen_base_bits=8, placement=Placement("cpu", None, tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        open_party(config, folder, frozen_base_bits=8)
