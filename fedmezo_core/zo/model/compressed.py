"""Frozen layers of a LoRA run in 8 or 4 bits, by bitsandbytes.

A party may choose this for itself. Its adapter, commits and digests keep their bits. Its
measurements are those of the compressed base, which are close to the others' (LLM.int8, Dettmers et
al. 2022; NF4, Dettmers et al. 2023).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.model.manifest import tensor_ids
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.plain.entries import Manifest

OUTLIER_THRESHOLD: Final = 6.0
"""Columns of an input with larger values are multiplied uncompressed (LLM.int8's default)."""
INPUTS_PER_BLOCK: Final = 64
OUTPUTS_PER_BLOCK: Final = 32
"""Weights that bitsandbytes' 4-bit kernel for CPUs takes at a time."""


def check_compressible(*, has_adapter: bool, placement: Placement) -> None:
    """Raise `ConfigError` if a base can't be compressed here, before anything is loaded."""
    if not has_adapter:
        raise ConfigError(
            "frozen_base_bits: this run trains no adapter, and only the base under one is "
            "compressed; leave it out, or join a run with lora."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "frozen_base_bits: the library that compresses is not installed; pip install "
            "bitsandbytes."
        )
    if placement.device_memory_max_bytes is not None or placement.offload_folder is not None:
        raise ConfigError(
            "frozen_base_bits: a compressed base is not offloaded; leave out device_memory_max and "
            "offload_folder, or frozen_base_bits."
        )


def compress_frozen(model: Any, manifest: Manifest, bits: int, device: torch.device) -> None:
    """Compress the frozen linear layers of `model` to `bits` (8 or 4), and move it to `device`.

    It works in place, layer by layer. The head that gives the logits, embeddings, norms and a
    mixture's experts stay as they are, and in 4 bits so do layers that do not fill whole blocks.
    """
    # Otherwise each product warns that it rounds float32 inputs to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    trained = tensor_ids(model, manifest)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        frozen = not any(path.startswith(f"{name}.") for path in trained)
        whole = type(module) in (nn.Linear, Conv1D) and (bits == 8 or _fills_blocks(module))
        # An adapter's matrices are small, and never compressed.
        if whole and frozen and module is not head and ".lora_" not in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _compressed(module, bits, device))
    model.to(device)


def _fills_blocks(module: Any) -> bool:
    sides: torch.Size = module.weight.shape
    outputs, inputs = reversed(sides) if isinstance(module, Conv1D) else sides
    return outputs % OUTPUTS_PER_BLOCK == 0 and inputs % INPUTS_PER_BLOCK == 0


def _compressed(module: Any, bits: int, device: torch.device) -> nn.Module:
    import bitsandbytes.nn  # only here: it need not be installed

    layers: Any = bitsandbytes.nn  # without types
    weight = module.weight.detach()
    if isinstance(module, Conv1D):
        weight = weight.t().contiguous()
    outputs, inputs = weight.shape
    has_bias = module.bias is not None
    layer: nn.Module
    if bits == 8:
        layer = layers.Linear8bitLt(
            inputs, outputs, has_bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
        )
        parameter = layers.Int8Params
        layer.weight = parameter(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(
            inputs, outputs, has_bias, compute_dtype=weight.dtype, quant_type="nf4"
        )
        layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = module.bias
    return layer.to(device).eval().requires_grad_(False)
