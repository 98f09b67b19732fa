"""Write a trained model as a folder that `from_pretrained` loads.

An export is the base's own files with other weights. A version of transformers spells settings in
its own way, which older ones pass over in silence: the frequencies of rotary positions, for
example. What the base's files say, every version reads that reads the base.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from fedmezo_core.errors import ModelError
from fedmezo_core.folders import whole_folder
from fedmezo_core.zo.edge.adapter_file import AdapterFile, GgufShape
from fedmezo_core.zo.edge.edge_export import adapter_matrices
from fedmezo_core.zo.model.adapter_layout import CONFIG_FILE
from fedmezo_core.zo.model.adapters import read_weights, without_adapter_name
from fedmezo_core.zo.model.factored import plain_b
from fedmezo_core.zo.model.loading import TOKENIZER_FILES, LoadedModel, load_model, quiet
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.model_card import GGUF_ADAPTER_FILE, ExportKind, ModelCard
from fedmezo_core.zo.model.offload import stored_parameters
from fedmezo_core.zo.model.weight_digest import tokenizer_digest

_BASE_LAYER = ".base_layer."
_COPIED: Final = (
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "chat_template.*", "generation_config.json", "LICEN[CS]E*", "NOTICE*",
)  # fmt: skip
"""The base's files that an export of the whole model has as they are."""
_ANOTHERS: Final = ("_name_or_path", "auto_map")
"""Settings of a base that are not an export's: a path, and code that no party runs."""
_OF_STORING: Final = {
    *_ANOTHERS, "architectures", "dtype", "quantization_config", "text_config", "torch_dtype",
    "tie_word_embeddings", "transformers_version",
}  # fmt: skip
"""Settings that may be other than the base's, because the weights are stored in another way."""


def export_model(loaded: LoadedModel, folder: str | Path, card: ModelCard) -> None:
    """Write a model and its tokenizer to `folder` in Hugging Face's layout, safetensors only.

    A LoRA model is written with its adapter merged into it; the weights in memory stay as they are.
    A head that an adapter has made another than the embeddings is written as its own. The folder is
    loaded again and compared before it appears, complete or not at all. Raises `ModelError` if it
    exists and is not empty, cannot be written, or does not load to the same weights.
    """

    def write(target: Path) -> None:
        plain, state = _merged(loaded.model)
        settings = plain.config.to_dict()
        # Strict versions refuse to write the generation settings that some bases have.
        vars(plain)["can_generate"] = lambda: False
        try:
            plain.save_pretrained(target, state_dict=None if state is None else dict(state))
        finally:
            del vars(plain)["can_generate"]
        _copy_files(loaded, target)
        _write_settings(loaded.folder, target, is_untied=_is_untied(plain, state))
        _write_card(card, "model", loaded, target)
        _check_model(target, loaded, settings, _values(plain, state), plain.dtype)

    _write_folder(Path(folder), write)


def export_adapter(loaded: LoadedModel, folder: str | Path, card: ModelCard) -> None:
    """Write only the LoRA adapter of a model to `folder`, in peft's layout, safetensors only.

    A B that consists of factors is multiplied out, so that peft and others read the folder. The
    files call the base model `card.base`, which should tell nothing about this machine. The folder
    is read again and compared before it appears, complete or not at all. Raises `ModelError` if it
    exists and is not empty, or cannot be written, and for a model without an adapter.
    """
    with plain_b(loaded.model):
        write_adapter(loaded, folder, card)


def write_adapter(loaded: LoadedModel, folder: str | Path, card: ModelCard) -> None:
    """Write the adapter for a run to begin from: as `export_adapter`, but B stays in factors."""
    model = cast("Any", loaded.model)
    if not hasattr(model, "peft_config"):
        raise ModelError("The model has no LoRA adapter to export; export the whole model.")

    def write(target: Path) -> None:
        plain = model.get_base_model()
        # Each of these is written somewhere, and is the path of a base that came from a folder.
        plain.name_or_path = plain.config.name_or_path = card.base
        for config in model.peft_config.values():
            config.base_model_name_or_path = card.base
        # "auto" would ask the model hub whether the embeddings have changed; they never do.
        model.save_pretrained(target, save_embedding_layers=False)
        _write_card(card, "adapter", loaded, target)
        _check_adapter(target, loaded.model)

    _write_folder(Path(folder), write)


def export_gguf_adapter(
    loaded: LoadedModel, folder: str | Path, card: ModelCard, *, alpha: float
) -> None:
    """Write the LoRA adapter of a model to `folder` as one GGUF, which llama.cpp adds to a base.

    The matrices are float32; `alpha` is the run's, and their scale is `alpha` over the rank. Raises
    `ModelError` as `export_adapter` does, for an architecture or a module whose place in a GGUF is
    not known, and if the package gguf is not installed.
    """
    model = cast("Any", loaded.model)
    if not hasattr(model, "peft_config"):
        raise ModelError("The model has no LoRA adapter to export; export the whole model.")
    config: Any = model.get_base_model().config
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None)
    shape = GgufShape(str(config.model_type), heads, heads if keys is None else int(keys))
    matrices = {name: own.numpy() for name, own in adapter_matrices(loaded.model).items()}

    def write(target: Path) -> None:
        AdapterFile(target / GGUF_ADAPTER_FILE, matrices, shape, alpha=alpha)
        _write_card(card, "gguf", loaded, target)

    _write_folder(Path(folder), write)


def _write_card(card: ModelCard, what: ExportKind, loaded: LoadedModel, target: Path) -> None:
    """Write the card, and what a program reads of the run."""
    (target / "README.md").write_text(card.text(what, loaded.folder), encoding="utf-8")
    if card.run is not None:
        card.run.write(target)


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


def _values(
    plain: PreTrainedModel, state: dict[str, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a loaded export must hold: every name with its values, one at a time."""
    stored = stored_parameters(plain)
    for name, tensor in (plain.state_dict() if state is None else state).items():
        yield name, stored[name].read() if tensor.is_meta else tensor


def _is_untied(plain: PreTrainedModel, state: dict[str, torch.Tensor] | None) -> bool:
    """Whether head and embeddings, one tensor by the model's settings, are two in the export."""
    model: Any = plain
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {f"{name}.weight" for name, module in plain.named_modules() if module in pair}
    weights = [value.to("cpu") for name, value in _values(plain, state) if name in names]
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return is_tied and len(weights) == 2 and not torch.equal(*weights)


def _copy_files(loaded: LoadedModel, target: Path) -> None:
    """Copy what an export has from its base, the tokenizer's files among it."""
    for pattern in _COPIED:
        for path in loaded.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    digest = tokenizer_digest(loaded.tokenizer)
    try:
        copied: Any = AutoTokenizer.from_pretrained(target, local_files_only=True)
        is_same = tokenizer_digest(copied) == digest
    except Exception:
        is_same = False  # transformers raises almost any type here.
    if not is_same:
        # It also has files of other names, which only its own class knows.
        loaded.tokenizer.save_pretrained(target)


def _write_settings(base: Path, target: Path, *, is_untied: bool) -> None:
    """Write the base's config.json to `target`, with what is different about an export."""
    path = target / "config.json"
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") != written["model_type"]:
        settings = written  # Only the language model in the base was loaded.
    for name in (*_ANOTHERS, *({"quantization_config"} - written.keys())):
        settings.pop(name, None)
    dtype = written.get("dtype", written.get("torch_dtype"))
    spellings = [name for name in ("dtype", "torch_dtype") if name in settings] or ["dtype"]
    settings |= dict.fromkeys(spellings, dtype)
    settings["architectures"] = written["architectures"]
    if is_untied:
        for part in (settings, settings.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_model(
    folder: Path,
    loaded: LoadedModel,
    settings: dict[str, Any],
    values: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """Load the export as a party would, and compare it with what it was made from.

    The loaded tensors are views of the files, so this takes hardly any memory of its own.
    """
    try:
        back = load_model(str(folder), dtype=cast("Any", str(dtype).removeprefix("torch.")))
    except ModelError as error:
        raise _defect(f"it does not load: {error}") from error
    tensors = back.model.state_dict()
    for name, value in values:
        if name not in tensors or not torch.equal(tensors.pop(name), value.to("cpu")):
            raise _defect(f"{name} loads to other values")
    if tensors:
        raise _defect(f"it also loads {min(tensors)}")
    config: Any = back.model.config
    found = config.to_dict()
    for name in (settings.keys() | found.keys()) - _OF_STORING:
        if settings.get(name) != found.get(name):
            raise _defect(f"the setting {name} loads as {found.get(name)!r}")
    if tokenizer_digest(back.tokenizer) != tokenizer_digest(loaded.tokenizer):
        raise _defect("its tokenizer is another")


def _check_adapter(folder: Path, model: nn.Module) -> None:
    weights = read_weights(folder)
    manifest = manifest_of(model, adapters_only=True)
    for entry, value in zip(manifest, trained_tensors(model, manifest), strict=True):
        name = without_adapter_name(entry.name)
        if name not in weights or not torch.equal(weights.pop(name), value.to("cpu")):
            raise _defect(f"{name} loads to other values")
    if weights or not (folder / CONFIG_FILE).is_file():
        raise _defect("it is not the adapter alone")


def _defect(what: str) -> ModelError:
    return ModelError(
        f"The export is not what was trained, so it was not kept: {what}; export with another "
        "version of transformers, or only the adapter (--as adapter)."
    )


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
