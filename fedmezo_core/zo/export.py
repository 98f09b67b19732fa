"""Write a trained model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmezo_core.errors import ModelError
from fedmezo_core.folders import whole_folder
from fedmezo_core.zo.model.loading import quiet
from fedmezo_core.zo.model.offload import stored_parameters

_BASE_LAYER = ".base_layer."


def export_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write `model` and `tokenizer` to `folder` in Hugging Face's layout, safetensors only.

    A LoRA model is written with its adapter merged into it; the weights in memory stay as they are.
    The folder appears complete or not at all. Raises `ModelError` if it exists and is not empty, or
    cannot be written.
    """

    def write(target: Path) -> None:
        plain, state = _merged(model)
        plain.save_pretrained(target, state_dict=state)
        tokenizer.save_pretrained(target)

    _write_folder(Path(folder), write)


def export_adapter(model: nn.Module, folder: str | Path, base: str) -> None:
    """Write only the LoRA adapter of `model` to `folder`, in peft's layout, safetensors only.

    The files call the base model `base`, which should tell nothing about this machine. The folder
    appears complete or not at all. Raises `ModelError` if it exists and is not empty, or cannot be
    written, and for a model without an adapter.
    """
    if not hasattr(model, "peft_config"):
        raise ModelError("The model has no LoRA adapter to export; export the whole model.")
    wrapped = cast("Any", model)

    def write(target: Path) -> None:
        plain = wrapped.get_base_model()
        # Each of these is written somewhere, and is the path of a base that came from a folder.
        plain.name_or_path = plain.config.name_or_path = base
        for config in wrapped.peft_config.values():
            config.base_model_name_or_path = base
        # "auto" would ask the model hub whether the embeddings have changed; they never do.
        wrapped.save_pretrained(target, save_embedding_layers=False)

    _write_folder(Path(folder), write)


def _merged(model: nn.Module) -> tuple[PreTrainedModel, dict[str, torch.Tensor] | None]:
    """The transformers model and, for a LoRA model, the state dict to write instead of its own."""
    if not hasattr(model, "peft_config"):
        return cast("PreTrainedModel", model), None
    inner = cast("PreTrainedModel", cast("Any", model).get_base_model())
    stored = stored_parameters(inner)
    state = {
        # transformers reads offloaded weights itself, except under the names that peft changed.
        name.replace(_BASE_LAYER, "."): stored[name].read() if _BASE_LAYER in name else tensor
        for name, tensor in inner.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in inner.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            weight = state[f"{name}.weight"]
            # Added in float32, rounded to the weight's own type once.
            delta = module.get_delta_weight("default").float()
            state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return inner, state


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    try:
        with whole_folder(folder, ModelError) as partial, quiet():
            # safetensors makes its files readable for their owner alone, whatever the umask says.
            plain = partial / "plain"
            plain.touch()
            mode = stat.S_IMODE(plain.stat().st_mode)
            plain.unlink()
            write(partial)
            for path in partial.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # safetensors reports a full disk as its own exception, with the system's words in it.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split("\n", 1)[0].split())
        folder = folder.expanduser().absolute()
        raise ModelError(f"The model cannot be written to {folder} ({reason}).") from error
