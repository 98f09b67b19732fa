"""Tiny random models of several architectures, and a tokenizer trained on a few sentences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SENTENCES = [
    "A gripping, beautifully acted film that is great from start to end.",
    "The plot is terrible and the jokes are worse; an evening wasted.",
    "It was not bad. All in all, it was good, and the music is lovely!",
    "positive negative terrible great Review: Sentiment: question answer",
]


def make_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructor without types
    return cast("PreTrainedTokenizerBase", fast(tokenizer_object=tokenizer, eos_token="<eos>"))


def make_model(kind: str) -> nn.Module:
    """A random model with 384 embeddings; the same weights for the same `kind`."""
    torch.manual_seed(7)
    llama: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    makers: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=384,
                n_positions=128,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=False)),
        "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**llama, tie_word_embeddings=True)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**llama, head_dim=8, sliding_window=16)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**llama, head_dim=8)),
        "qwen3-moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **llama,
                head_dim=8,  # type: ignore[call-arg]
                moe_intermediate_size=24,
                num_experts=4,
                num_experts_per_tok=2,
                mlp_only_layers=[1],
            )
        ),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **llama,
                head_dim=8,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "mamba": lambda: MambaForCausalLM(
            MambaConfig(
                vocab_size=384,
                hidden_size=32,
                state_size=4,
                num_hidden_layers=2,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=None,
            )
        ),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**llama, num_local_experts=4)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=384,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                word_embed_proj_dim=16,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=1,
            )
        ),
    }
    model = makers[kind]().eval()
    # Initial biases and gains are 0 and 1, where a mistake in them would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
            parameter.requires_grad_(False)
    return model


MODEL_KINDS = (
    "gpt2", "llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3-moe",
    "opt",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Threads only get into each other's way on models as small as these."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], nn.Module]:
    """Gives a fresh model of a kind."""
    made: dict[str, nn.Module] = {}

    def fresh(kind: str) -> nn.Module:
        if kind not in made:
            made[kind] = make_model(kind)
        return copy.deepcopy(made[kind])

    return fresh


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Path]:
    """Gives the folder of a saved model of a kind; not to be written to."""
    saved: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in saved:
            path = tmp_path_factory.mktemp(kind)
            model: Any = make_model(kind)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            saved[kind] = path
        return saved[kind]

    return folder
