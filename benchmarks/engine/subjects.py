"""What is measured: models of known shapes with random weights, journals, and batches.

Weights and texts do not matter to time and memory, so none are downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedmezo_core.config import TaskConfig
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.forward.graphs import Recorder
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.entries import Manifest
from fedmezo_core.zo.weights import Weights

COMMIT_PAIRS: Final = 40
"""What four workers with ten local steps make of a round."""
GPT2_SMALL: dict[str, Any] = {}
"""transformers' default shape: 124 M parameters, 50,257 words."""
GPT2_TINY: dict[str, Any] = {
    "vocab_size": 384, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
"""TinyLlama's shape: 1.1 B parameters."""
LLAMA_TINY: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with the task that gives its losses."""

    name: str
    model: nn.Module
    device: torch.device
    vocabulary: int = field(init=False)
    task: Task = field(init=False)
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        model: Any = self.model
        vocabulary = model.get_input_embeddings().num_embeddings
        config = TaskConfig(kind="instruction", template="{text}", response_column="text")
        fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructor without types
        words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
        tokenizer = fast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>")
        object.__setattr__(self, "vocabulary", vocabulary)
        object.__setattr__(self, "task", Task(config, tokenizer, vocabulary))
        object.__setattr__(self, "manifest", manifest_of(self.model))

    def batch(self, tokens: int) -> Batch:
        """One row of random tokens, of which all but the first are the response.

        So each token goes through all layers and gets logits of the whole vocabulary.
        """
        generator = np.random.default_rng(tokens)
        ids = [int(token) for token in generator.integers(0, self.vocabulary, tokens)]
        return self.task.collate(
            [EncodedExample((ids[0],), tuple(ids[1:]), -1)], "bench", self.device
        )

    def estimator(
        self,
        distribution: Distribution,
        *,
        one_sided: bool = False,
        recorder: Recorder | None = None,
    ) -> Estimator:
        return Estimator(
            self.model,
            self.manifest,
            self.task,
            distribution=distribution,
            rounding=Rounding.STOCHASTIC,
            one_sided=one_sided,
            threads=1,
            recorder=recorder,
        )

    def weights(self, distribution: Distribution, threads: int = 1) -> Weights:
        return Weights(
            self.model,
            self.manifest,
            distribution=distribution,
            rounding=Rounding.STOCHASTIC,
            threads=threads,
        )


def gpt2(
    shape: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Subject:
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**shape))
    return Subject("GPT-2", model.to(device, dtype), device)


def llama(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Subject:
    torch.manual_seed(0)
    with device:
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape))
    return Subject("Llama", model.to(dtype), device)


def commit_of(pairs: int, number: int = 0) -> Commit:
    """Pairs as a run of a small learning rate has them."""
    generator = np.random.default_rng([pairs, number])
    return Commit(
        generator.integers(0, 2**64, pairs, dtype=np.uint64),
        (generator.normal(size=pairs) * 1e-6).astype(np.float32),
        rounding_seed=number,
    )


def journal_of(pairs: int) -> list[Commit]:
    """Commits of a run, `pairs` pairs in all."""
    return [commit_of(COMMIT_PAIRS, number) for number in range(pairs // COMMIT_PAIRS)]
