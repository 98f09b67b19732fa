"""The LoRA adapter that a run begins from, read from a folder in peft's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.folders import is_git_lfs_pointer
from fedmezo_core.zo.model.adapter_layout import CONFIG_FILE, WEIGHTS_FILE
from fedmezo_core.zo.plain.entries import Manifest

_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (PiSSA, OLoRA, LoftQ) take the adapter's start out of the base's weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""The values that an adapter's settings may have; peft's default is the first."""
_ABSENT: Final = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora",
)  # fmt: skip
"""Settings that would change the adapter's function or add other weights to it."""


def read_adapter(folder: Path, lora: LoraConfig, manifest: Manifest) -> list[torch.Tensor]:
    """The float32 weights of the adapter in `folder`, in the order of the run's `manifest`.

    Raises `ConfigError` for an adapter of another kind than the run's `lora`, `ModelError` for a
    folder without a readable adapter. Nothing is unpickled.
    """
    folder = folder.expanduser()
    settings = _configuration(folder)
    _require_same(folder, settings, lora)
    weights = read_weights(folder)
    names = {without_adapter_name(entry.name): entry for entry in manifest}
    lacking, strange = names.keys() - weights.keys(), weights.keys() - names.keys()
    for what, some in (("lacks", lacking), ("also has", strange)):
        if some:
            layers = sorted({_layer(name) for name in some})
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            raise ConfigError(
                f"adapter: {folder} {what} weights for {layers[0]}{more}, other than the run's "
                "lora.target_modules say; make them name the adapter's modules."
            )
    tensors = []
    for name, entry in names.items():
        tensor = weights[name]
        if tuple(tensor.shape) != entry.shape:
            raise ConfigError(
                f"adapter: {name} in {folder} has shape {list(tensor.shape)}, the run's is "
                f"{list(entry.shape)}; it was made for another model, or another rank."
            )
        tensor = tensor.float()
        if tensor.numel() and not all(map(math.isfinite, (tensor.min(), tensor.max()))):
            raise ModelError(
                f"The adapter in {folder} is damaged: {name} holds a NaN or an infinity; get it "
                "again."
            )
        tensors.append(tensor)
    return tensors


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"There is no adapter in {folder}: it has no {CONFIG_FILE}; name a folder that peft's "
            "save_pretrained or fedmezo export --as adapter has written."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{CONFIG_FILE} in {folder} cannot be read ({error}).") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{CONFIG_FILE} in {folder} is no JSON object; get the adapter again.")
    return settings


def _require_same(folder: Path, settings: dict[str, Any], lora: LoraConfig) -> None:
    for key, run_key, ours in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if settings.get(key) != ours:
            raise ConfigError(
                f"adapter: {folder} has {key} = {settings.get(key)!r}, the run has lora.{run_key} "
                f"= {ours:g}; give the run the adapter's value."
            )
    odd = [key for key, allowed in _PLAIN.items() if settings.get(key, allowed[0]) not in allowed]
    odd += [key for key in _ABSENT if settings.get(key)]
    if odd:
        raise ConfigError(
            f"adapter: {folder} has {odd[0]} = {settings[odd[0]]!r}, which a run's adapter has "
            "not; begin from a plain LoRA adapter."
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder`, by their names in a file; raises `ModelError`."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = (
            "has its weights as a pickle file, which can run code when it is loaded; save the "
            "adapter as safetensors"
            if pickled
            else f"has no {WEIGHTS_FILE}; check the path"
        )
        raise ModelError(f"The adapter in {folder} {why}.")
    require_fetched(path)
    try:
        # peft leaves its name for the adapter in the names of factors.
        return {without_adapter_name(name): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); get the adapter again.") from None


def without_adapter_name(name: str) -> str:
    """A parameter's name in a file, of its name in a model that peft wrapped."""
    return name.replace(".default.", ".")


def require_fetched(path: Path) -> None:
    """Raise `ModelError` for a file that is only a Git LFS pointer to the real one."""
    try:
        is_pointer = is_git_lfs_pointer(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from None
    if is_pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer: fetch the file, for example with git lfs pull."
        )


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]
