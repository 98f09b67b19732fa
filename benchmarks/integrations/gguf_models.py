"""GGUF files for tests and figures: a torch Llama as it is, or a shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

Q4_0_BLOCK_BYTES: Final = 18
"""Of 32 weights: a float16 scale and 4 bits for each."""
Q8_0_BLOCK_BYTES: Final = 34
_LLAMA_NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder that llama.cpp calls `llama` or `qwen2`."""

    architecture: str
    layers: int
    width: int
    inner_width: int
    heads: int
    key_heads: int
    vocabulary: int
    positions: int
    rope_base: float
    norm_epsilon: float = 1e-6

    @property
    def key_width(self) -> int:
        """Columns of keys and of values."""
        return self.width // self.heads * self.key_heads


QWEN_HALF_BILLION: Final = Shape("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768, 1e6)
"""The shape of Qwen2.5-0.5B: 494 million weights, the head tied to the embedding."""


def write_llama(model: Any, path: Path, *, type_name: str = "F32") -> None:
    """Write a transformers `LlamaForCausalLM` without its tokenizer.

    type_name: GGUF's name of the matrices' type, as `kind_of` takes it.
    """
    config = model.config
    shape = Shape(
        "llama",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
        config.rope_parameters["rope_theta"],
        config.rms_norm_eps,
    )
    writer = _writer(path, shape)
    heads = {"attn_q": shape.heads, "attn_k": shape.key_heads}

    def add(name: str, value: npt.NDArray[np.float32]) -> None:
        kind = kind_of(name, value.shape, type_name)
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)

    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if name == "model.embed_tokens.weight":
            add("token_embd.weight", value)
        elif name == "model.norm.weight":
            add("output_norm.weight", value)
        elif name == "lm_head.weight":
            if not config.tie_word_embeddings:
                add("output.weight", value)
        else:
            layer, _, module = name.removeprefix("model.layers.").partition(".")
            own = _LLAMA_NAMES[module.removesuffix(".weight")]
            if own in heads:
                rows, columns = value.shape
                halves = value.reshape(heads[own], 2, rows // heads[own] // 2, columns)
                value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
            add(f"blk.{layer}.{own}.weight", value)
    _finish(writer)


def kind_of(name: str, shape: tuple[int, ...], type_name: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in a file of the type `type_name`.

    The embedding has at least 8 bits, as small GGUF files have it. Vectors are F32, and so are
    matrices whose rows are no whole number of blocks.
    """
    kinds = gguf.GGMLQuantizationType
    kind = kinds[type_name]
    if name == "token_embd.weight" and type_name.startswith("Q4"):
        kind = kinds.Q8_0
    fits = len(shape) == 2 and shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else kinds.F32


def write_random(shape: Shape, path: Path) -> None:
    """Write random weights: Q4_0, the embedding Q8_0, as small GGUF files have it."""
    writer = _writer(path, shape)
    generator = np.random.default_rng(0)
    _add_quantised(
        writer, "token_embd.weight", shape.vocabulary, shape.width, Q8_0_BLOCK_BYTES, generator
    )
    ones = np.ones(shape.width, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", shape.width, shape.width),
            ("attn_k", shape.key_width, shape.width),
            ("attn_v", shape.key_width, shape.width),
            ("attn_output", shape.width, shape.width),
            ("ffn_gate", shape.inner_width, shape.width),
            ("ffn_up", shape.inner_width, shape.width),
            ("ffn_down", shape.width, shape.inner_width),
        ):
            place = f"blk.{layer}.{name}"
            _add_quantised(writer, f"{place}.weight", rows, columns, Q4_0_BLOCK_BYTES, generator)
            if name in {"attn_q", "attn_k", "attn_v"}:
                writer.add_tensor(f"{place}.bias", np.zeros(rows, dtype=np.float32))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    _finish(writer)


def _writer(path: Path, shape: Shape) -> Any:
    writer: Any = gguf.GGUFWriter(str(path), shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.vocabulary)
    # Workers turn text into tokens by the run's own tokenizer.
    writer.add_tokenizer_model("none")
    return writer


def _add_quantised(
    writer: Any,
    name: str,
    rows: int,
    columns: int,
    block_bytes: int,
    generator: np.random.Generator,
) -> None:
    blocks: npt.NDArray[np.uint8] = generator.integers(
        0, 256, (rows, columns // 32, block_bytes), dtype=np.uint8
    )
    largest = 8.0 if block_bytes == Q4_0_BLOCK_BYTES else 127.0
    scale = np.array([columns**-0.5 / largest], dtype=np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    kinds = gguf.GGMLQuantizationType
    kind = kinds.Q4_0 if block_bytes == Q4_0_BLOCK_BYTES else kinds.Q8_0
    writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
