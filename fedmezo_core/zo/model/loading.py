"""Load a causal language model and its tokenizer with the same bits at every party."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import struct
import warnings
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from huggingface_hub import (
    HfApi,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fedmezo_core.config import LoraConfig, how_to_name_a_copy, is_folder_name
from fedmezo_core.errors import ModelError
from fedmezo_core.folders import is_there
from fedmezo_core.program import long_step
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.model.adapter_layout import CONFIG_FILE
from fedmezo_core.zo.model.adapters import read_adapter, require_fetched
from fedmezo_core.zo.model.factored import factor_b
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.offload import (
    execution_device,
    has_hooks,
    move_into_mapped_memory,
    unique_parameters,
)
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.selection import lora_targets, with_places_named
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.entries import Manifest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers leaves these without types, and the hub's library does not declare them.
_auto_model: Any = AutoModelForCausalLM
_logging: Any = transformers_logging
_hub: Any = hub_utils
ON_CPU = Placement()
"""All weights are in the machine's memory, and the CPU computes."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer.model*", "*.model", "*.tiktoken", "*.spm",
    "tekken.json", "vocab*",
)  # fmt: skip
"""Files that hold a vocabulary; a tokenizer has at least one of them."""
_DOWNLOADED = ("*.json", "model*.safetensors", *TOKENIZER_FILES)
"""Files that make a model on the hub; code and pickles are not among them."""
_BYTE_TOKENIZERS = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}
"""Tokenizers of bytes or characters, which have no vocabulary in a file."""
_HUB_TIMEOUT_S = 10.0
_NOISY = ("accelerate", "bitsandbytes", "huggingface_hub", "torch.onnx")
"""Loggers that transformers' own verbosity leaves as they are."""
_ADAPTER = "default"
"""Peft's own name for the only adapter of a model."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for forward passes, with its tokenizer and its trained tensors."""

    model: nn.Module
    """A transformers model, or its `PeftModel` in a LoRA run; in eval mode, without gradients."""
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    folder: Path
    """The folder that the model was loaded from; for a hub's model, the one in the local cache."""
    lora: LoraConfig | None = None
    """The run's adapter, with names of this model's layers (see `with_places_named`)."""
    base: Base | None = None
    """The base that `model` has in common with other models, which stays while one of them does."""


@dataclass(frozen=True, eq=False)
class Base:
    """What was read from a model's files: without an adapter, and never written to."""

    model: PreTrainedModel
    """In eval mode, without gradients."""
    tokenizer: PreTrainedTokenizerBase
    folder: Path


class SharedBases:
    """Bases that the adapters of several runs have in common, each for as long as a run has it.

    The models of these runs have modules of their own around the same frozen parameters. One thread
    at a time may use it.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        """Begin with none. keeps: each stays as long as this object does, for a program's steps."""
        self._bases: MutableMapping[Hashable, Base] = {} if keeps else WeakValueDictionary()

    def get(self, key: Hashable) -> Base | None:
        """The base that was read under `key`, if anybody still has it."""
        return self._bases.get(key)

    def add(self, key: Hashable, base: Base) -> None:
        """Let others have `base`."""
        self._bases[key] = base


def load_model(
    name_or_path: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    lora: LoraConfig | None = None,
    adapter: Path | None = None,
    train: Sequence[str] = (),
    run_seed: int = 0,
    placement: Placement = ON_CPU,
    local_files_only: bool = False,
    bases: SharedBases | None = None,
) -> LoadedModel:
    """Load a Hugging Face causal LM by hub name or from a folder.

    Only safetensors files are read, and no code that comes with a model is run. With `lora`, the
    model gets an adapter (see `add_adapter`) with the weights in the folder `adapter`, or with
    weights that depend on `run_seed`, a u64. With `train`, the manifest holds only the parameters
    of the modules that it names. `placement` says which device computes, and where the weights are
    that do not fit its memory. With `local_files_only`, a name is only looked up in the local
    cache. With `bases`, a model with an adapter has its frozen parameters and its tokenizer in
    common with others there that were loaded from the same files to the same place.

    Raises `ModelError` for a folder without a model, a name that cannot be reached, a checkpoint
    that lacks some of the model's tensors or holds a NaN or infinity, a missing tokenizer, or
    weights that the placement has no room for; `ConfigError` for modules to train that the model
    does not have, and a device or offload folder that cannot be used.
    """
    folder = Path(name_or_path).expanduser()
    is_folder = is_there(folder)
    if is_folder:
        _check_folder(folder, name_or_path)
    elif name_or_path.startswith((".", "/", "~")):
        raise ModelError(f"There is no model folder {name_or_path}; check the path.")
    local = folder if is_folder else _cached_folder(name_or_path, local_files_only)
    if local is not None and (local / CONFIG_FILE).exists():
        # transformers would load the base that this file names, from wherever that is.
        raise _is_adapter(name_or_path)
    if bases is None or lora is None:  # Whoever trains the base itself writes to it.
        own = _read_base(name_or_path, is_folder, local, dtype, placement, trains=lora is None)
        return _prepared(own, own.model, lora, adapter, train, run_seed)
    key = (_identity(name_or_path, local), dtype, placement)
    base = bases.get(key)
    if base is None:
        base = _read_base(name_or_path, is_folder, local, dtype, placement, trains=False)
        # Files that were replaced meanwhile are another model; hooks belong to one model.
        is_same = key == (_identity(name_or_path, local), dtype, placement)
        if not is_same or has_hooks(base.model):
            return _prepared(base, base.model, lora, adapter, train, run_seed)
        bases.add(key, base)
    # Buffers are small, and some models write to them.
    shared = {id(parameter): parameter for parameter in base.model.parameters()}
    model = copy.deepcopy(base.model, cast("dict[int, Any]", shared))
    return _prepared(base, model, lora, adapter, train, run_seed)


def _identity(name: str, folder: Path | None) -> Hashable:
    """What changes if somebody changes a model: its files in `folder`, or its revision on the hub.

    Raises `ModelError` if the hub does not give it.
    """
    if folder is None:
        try:
            return cached_file(name, "config.json")  # Its folder is of one revision.
        except Exception as error:
            raise _model_error(name, False, "model", error) from error
    files = sorted(path for path in folder.resolve().iterdir() if path.is_file())
    return tuple(
        (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for path, stat in ((path, path.stat()) for path in files)
    )


def _read_base(
    shown: str,
    is_folder: bool,
    local: Path | None,
    dtype: str,
    placement: Placement,
    *,
    trains: bool,
) -> Base:
    """Read the model in `local`, or of the name `shown` on the hub; raises as `load_model`.

    `trains`: whether its own parameters are trained.
    """
    source = shown if local is None else str(local)
    common = {"local_files_only": local is not None, "trust_remote_code": False}
    with quiet(), placement.loading() as place:
        try:
            loaded, info = _auto_model.from_pretrained(
                source,
                dtype=_DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                **place,
                **common,
            )
        except Exception as error:
            # transformers raises almost any type here, up to ImportError for an unknown
            # architecture.
            raise _model_error(shown, is_folder, "model", error) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
        except Exception as error:
            raise _model_error(shown, is_folder, "tokenizer", error) from error
        _require_vocabulary(shown, tokenizer)
        placement.check(shown, loaded)
        _require_complete(shown, loaded, info)
        if placement.offload_folder is not None:
            # Trained weights may not stay in the checkpoint's files, nor any in temporary files.
            temporary = None if trains else Path(place["offload_folder"])
            move_into_mapped_memory(loaded, placement.offload_folder, only_from=temporary)
    loaded.eval()
    head = loaded.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)
    for name, stored in unique_parameters(loaded).items():
        if stored.offloaded is None:
            stored.parameter.data = stored.parameter.data.contiguous()
        _require_finite(shown, name, stored.read())
    loaded.requires_grad_(False)
    if local is None:
        # In the cache, where from_pretrained has put it.
        local = Path(cast("str", cached_file(source, "config.json", local_files_only=True))).parent
    return Base(loaded, tokenizer, local)


def _prepared(
    base: Base,
    model: PreTrainedModel,
    lora: LoraConfig | None,
    adapter: Path | None,
    train: Sequence[str],
    run_seed: int,
) -> LoadedModel:
    """Put the run's adapter, if it has one, into `model`: that of `base`, or a copy of it."""
    whole: nn.Module = model
    if lora is not None:
        lora = with_places_named(model, lora)
        whole = add_adapter(model, lora, run_seed, adapter)
        whole.requires_grad_(False)
    manifest = manifest_of(
        whole,
        adapters_only=lora is not None,
        freeze_a=lora is not None and lora.freeze_a,
        train=train,
    )
    kept = None if model is base.model else base
    return LoadedModel(whole, base.tokenizer, manifest, base.folder, lora, kept)


def folder_of_hub_name(name: str, bytes_max: int | None = None) -> Path:
    """The folder in the local cache of a model that somebody else has named, downloaded if need be.

    The name is never taken for a folder of this machine. What is not in the cache comes from the
    hub: weights as safetensors, the tokenizer and JSON files, of at most `bytes_max` together.
    Raises `ModelError` if the hub does not give it, or if it is larger.
    """
    cached = _cached_folder(name, local_files_only=False)
    if cached is not None:
        return cached
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=_HUB_TIMEOUT_S)
    except Exception as error:
        # Every version of huggingface_hub has its own types for a network that fails.
        with suppress(ModelError):
            return cast("Path", _cached_folder(name, local_files_only=True))
        raise _model_error(name, False, "model", error) from error
    wanted = [
        file
        for file in info.siblings or ()
        if "/" not in file.rfilename and any(fnmatch(file.rfilename, p) for p in _DOWNLOADED)
    ]
    needed = sum(file.size or 0 for file in wanted)
    if bytes_max is not None and needed > bytes_max:
        raise ModelError(
            f"The model {name}, which the run names, has {needed} bytes on the hub, more than the "
            f"{bytes_max} that this worker allows; give it with --model, or raise policy.disk_max "
            "in its settings."
        )
    try:
        with quiet(), long_step(f"downloading {name}"):
            # The very files whose sizes were counted.
            folder = snapshot_download(
                name, revision=info.sha, allow_patterns=[escape(file.rfilename) for file in wanted]
            )
            # Until this asks for the newest revision, the cache finds nothing without a network.
            hf_hub_download(name, "config.json")
    except Exception as error:
        raise _model_error(name, False, "model", error) from error
    return Path(folder)


def _contiguous(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a head's input, a slice of few positions, contiguous.

    Otherwise torch multiplies each row of the batch by itself, in bfloat16 by its own copy of the
    weight.
    """
    return tuple(
        value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs
    )


def _require_complete(shown: str, loaded: Any, info: Mapping[str, Any]) -> None:
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would fill these at random, differently at every party.
        lacking = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise ModelError(
            f"The checkpoint of {shown} lacks {len(lacking)} of the model's tensors or has "
            f"them in another shape (first: {lacking[0]}); get a complete checkpoint of a causal "
            "language model."
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise _is_adapter(shown)


def _is_adapter(shown: str) -> ModelError:
    return ModelError(
        f"{shown} holds an adapter, not a whole model; merge it into its base model, save that, "
        "and use the folder."
    )


def add_adapter(
    model: PreTrainedModel, lora: LoraConfig, run_seed: int, folder: Path | None = None
) -> nn.Module:
    """Put a LoRA adapter (Hu et al. 2021) into `model` and return peft's wrapper, in eval mode.

    Scale is alpha / rank, dropout 0, and the adapter is float32 even on a bfloat16 model: peft's
    conventions. B is zero. A has the variance of peft's default (Kaiming uniform with a = sqrt 5,
    that is 1 / (3 fan_in)), but comes from the noise standard, so that every party starts at the
    same bits: `A = z * float32(1 / sqrt(3 fan_in))` with z gaussian, the seed of `adapter_seed`,
    and the tensor id that the manifest gives to A. If `lora` has an `output_rank`, B is P C, C is
    zero, and P comes from the noise standard as A does. With `folder`, all are read from there
    instead.

    Raises `ConfigError` for a target module that is not in the model or not a linear layer, or an
    adapter of another kind than `lora` (see `read_adapter`).
    """
    targets = lora_targets(model, lora)
    with quiet():
        # Only LoRA runs need peft, and importing it takes seconds.
        import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=cast("int", lora.alpha),  # peft scales by it; any float works
        target_modules=lora.target_expression or list(lora.target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
        task_type="CAUSAL_LM",
        init_lora_weights=True,
    )
    with quiet():
        wrapped: nn.Module = peft.get_peft_model(model, config, adapter_name=_ADAPTER)
    wrapped.eval()
    for layer in wrapped.modules():
        for side in ("lora_A", "lora_B"):
            matrices: Any = getattr(layer, side, {})
            # peft leaves an offloaded layer's adapter empty. It is small enough for the device.
            if _ADAPTER in matrices and matrices[_ADAPTER].weight.is_meta:
                matrices[_ADAPTER].to_empty(device=execution_device(layer))
    if lora.output_rank is not None:
        factor_b(wrapped, lora.output_rank, _ADAPTER)
    manifest = manifest_of(wrapped, adapters_only=True)
    if folder is not None:
        weights = read_adapter(folder, lora, manifest)
        for value, tensor in zip(weights, trained_tensors(wrapped, manifest), strict=True):
            tensor.copy_(value)
        return wrapped
    seeds = np.array([adapter_seed(run_seed)], dtype=np.uint64)
    for entry, tensor in zip(manifest, trained_tensors(wrapped, manifest), strict=True):
        zeros = torch.zeros(entry.shape, dtype=tensor.dtype)
        if ".lora_A." in entry.name or entry.name.endswith(".outputs.weight"):
            scale = np.array([1.0 / math.sqrt(3.0 * entry.shape[-1])], dtype=np.float32)
            operands = Operands(entry.tensor_id, Distribution.GAUSSIAN, Rounding.NEAREST)
            materialize(zeros, zeros, [Commit(seeds, scale, 0)], operands)
        tensor.copy_(zeros)
    return wrapped


def adapter_seed(run_seed: int) -> int:
    """The seed (u64) of a LoRA adapter's first A matrices.

    It is the first 8 bytes, little-endian, of SHA-256(`fedmezo lora v1`, a zero byte, run seed as 8
    little-endian bytes). No direction of the run uses it.
    """
    hashed = hashlib.sha256(b"fedmezo lora v1\0" + struct.pack("<Q", run_seed)).digest()
    return int.from_bytes(hashed[:8], "little")


def _check_folder(folder: Path, shown: str) -> None:
    if not folder.is_dir():
        raise ModelError(f"{shown} is a file; name the folder with config.json and the weights.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{shown} is no model folder: it has no config.json; check the path.")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ModelError(
                f"{shown} has its weights as pickle files, which can run code when they are "
                "loaded; save the model as safetensors (save_pretrained does) and use that folder."
            )
        raise ModelError(f"{shown} has no weights: no .safetensors file; check the path.")
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".json", ".model", ".txt"} and path.is_file():
            require_fetched(path)
    if not _has_tokenizer(folder):
        raise _no_tokenizer(shown)


def _has_tokenizer(folder: Path) -> bool:
    if any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.get("tokenizer_class") in _BYTE_TOKENIZERS


def _require_vocabulary(shown: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that transformers has made up, for lack of files."""
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise _no_tokenizer(shown)


def _no_tokenizer(shown: str) -> ModelError:
    return ModelError(
        f"There is no tokenizer in {shown}; add the files of the model's own one, such as "
        "tokenizer.json."
    )


def _cached_folder(name: str, local_files_only: bool) -> Path | None:
    """The folder of the local cache that holds a model, unless the hub can give it.

    The hub is asked at most once: transformers would ask for each file several times, for a minute
    or more, and for some even when it is told not to. Raises `ModelError` if neither the hub nor
    the cache has the model.
    """
    cached = None
    try:
        config = try_to_load_from_cache(name, "config.json")
        if isinstance(config, str):
            cached = Path(config).parent
        if local_files_only:
            if cached is None:
                raise FileNotFoundError("the local cache does not have it")
            return cached
        # Some versions of the library's own functions ask again for half a minute.
        address = hf_hub_url(name, "config.json")
        headers = _hub.build_hf_headers()
        answer = get_session().head(address, headers=headers, timeout=_HUB_TIMEOUT_S)
        _hub.hf_raise_for_status(answer)
    except RepositoryNotFoundError as error:
        if cached is None:
            raise _model_error(
                name, False, "model", "it has none of this name, or none without a login"
            ) from error
    except HfHubHTTPError:
        return None  # It answers. transformers tries again, or finds the weights without this.
    except Exception as error:
        # Every version of huggingface_hub has its own types for a network that fails.
        if cached is None:
            raise _model_error(name, False, "model", error) from error
    else:
        return None
    return cached


def _model_error(shown: str, is_folder: bool, what: str, error: Exception | str) -> ModelError:
    reason = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
    if len(reason) > 300:
        reason = reason[:300] + "…"
    if is_folder:
        return ModelError(
            f"The {what} in {shown} cannot be loaded ({reason.rstrip('.')}); the folder must hold "
            "a causal language model and its tokenizer, as save_pretrained writes them."
        )
    advice = (
        "check the name and the network, or give the model's folder with --model"
        if not is_folder_name(shown)
        else "if it is a folder at the coordinator, name your own copy: "
        + how_to_name_a_copy(shown)
    )
    return ModelError(
        f"The {what} {shown} cannot be loaded: it is no folder here, and the model hub did not "
        f"give it ({reason.rstrip('.')}); {advice}."
    )


def _require_finite(shown: str, name: str, values: torch.Tensor) -> None:
    if not values.is_floating_point() or values.numel() == 0:
        return
    # The extremes show NaN and infinities, and need no temporary of the tensor's size.
    low, high = torch.aminmax(values.detach())
    if not (math.isfinite(float(low)) and math.isfinite(float(high))):
        raise ModelError(
            f"The weights of {shown} are damaged: {name} holds a NaN or an infinity; get the "
            "checkpoint again, or load it as float32 if it was saved so."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """While open, suppress log lines, bars and warnings of transformers and what it uses."""
    verbosity = _logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = _logging.is_progress_bar_enabled()
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        _logging.set_verbosity(verbosity)
        if bars:
            _logging.enable_progress_bar()
