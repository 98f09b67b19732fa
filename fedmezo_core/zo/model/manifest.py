"""The manifest: which tensors of a model are trained, in which order, under which tensor id.

Every party derives it from its own copy of the model, and all of them must derive the same one: the
tensor id goes into the noise, so two parties that numbered their tensors differently would silently
train different directions. Therefore

- entries are sorted by name, by Unicode code point. The order in which modules are registered, or
  in which a library walks them, can differ between releases; a sort of the names cannot;
- a tensor that has several names (tied weights) is one entry, under the first of its names in that
  order;
- buffers have no entry, because they are not trained;
- in a LoRA run the entries are the adapter's A and B matrices, or only its B matrices with
  `freeze_a`. In any other run they are all parameters, or those of the modules that the run's
  `train` names. A tied tensor has an entry if any of its names is among these. `requires_grad` has
  no effect, so that no party can change the set by freezing something.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import torch
from torch import nn

from fedmezo_core.errors import MismatchError, ModelError
from fedmezo_core.zo.model.offload import stored_parameters, unique_parameters
from fedmezo_core.zo.model.selection import parameters_inside
from fedmezo_core.zo.plain.entries import Entry, Manifest

_ADAPTER_NAME = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def manifest_of(
    model: nn.Module,
    *,
    adapters_only: bool = False,
    freeze_a: bool = False,
    train: Sequence[str] = (),
) -> Manifest:
    """Derive the manifest of `model`.

    With `adapters_only`, the entries are the matrices of the LoRA adapter that peft put into the
    model, or only its B matrices if `freeze_a` is set. With `train`, they are the parameters of the
    modules that it names (see `parameters_inside`). Otherwise they are all parameters.

    Raises `ConfigError` for a name that no module has. Raises `ModelError` if there is nothing to
    train, or if a tensor is neither float32, bfloat16 nor float16, is not contiguous, or shares
    only part of its memory with another.
    """
    every = stored_parameters(model)
    inside = parameters_inside(model, train) if train else every.keys()
    keys = {every[name].storage_key for name in inside}
    unique = unique_parameters(model)
    chosen = {
        name: stored
        for name, stored in unique.items()
        if stored.parameter.numel() > 0
        and stored.storage_key in keys
        and (not adapters_only or _is_trained_side(name, freeze_a))
    }
    if not chosen:
        what = "LoRA adapter matrices" if adapters_only else "parameters"
        raise ModelError(f"The model has no {what} to train; check the model and lora settings.")
    entries: list[Entry] = []
    for tensor_id, (name, stored) in enumerate(chosen.items()):
        parameter = stored.parameter
        dtype = _DTYPES.get(parameter.dtype)
        if dtype is None:
            raise ModelError(
                f"Parameter {name} is {str(parameter.dtype).removeprefix('torch.')}, which cannot "
                "be trained; load the model unquantised as float32, bfloat16 or float16."
            )
        if stored.tensor is not None and not stored.tensor.is_contiguous():
            raise ModelError(
                f"Parameter {name} is not contiguous in memory; make it contiguous before training."
            )
        entries.append(Entry(tensor_id, name, tuple(parameter.shape), dtype))
    spans = sorted(
        (stored.tensor.data_ptr(), stored.tensor.data_ptr() + stored.tensor.nbytes, name)
        for name, stored in unique.items()
        if stored.tensor is not None and not stored.tensor.is_meta
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end and (one in chosen or other in chosen):
            raise ModelError(
                f"Parameters {min(one, other)} and {max(one, other)} share memory without being "
                "one tied parameter; tie them, or load a copy of the model in which they are "
                "separate."
            )
    return Manifest(tuple(entries))


def _is_trained_side(name: str, freeze_a: bool) -> bool:
    found = _ADAPTER_NAME.search(name)
    return found is not None and not (freeze_a and found[1] == "A")


def trained_tensors(model: nn.Module, manifest: Manifest) -> list[torch.Tensor]:
    """The trained tensors of `model` themselves, not copies, in manifest order.

    They are the values in memory, also of offloaded parameters. Raises `MismatchError` if one is
    missing or has another shape or dtype than in the manifest, `ModelError` if one is in a file.
    """
    parameters = stored_parameters(model)
    tensors: list[torch.Tensor] = []
    for entry in manifest:
        stored = parameters.get(entry.name)
        if stored is None:
            raise MismatchError(
                f"The model has no parameter {entry.name}, which the manifest names; load the "
                "model that the run was started with."
            )
        parameter = stored.parameter
        found = (tuple(parameter.shape), _DTYPES.get(parameter.dtype, str(parameter.dtype)))
        if found != (entry.shape, entry.dtype):
            raise MismatchError(
                f"Parameter {entry.name} is {found[1]} {list(found[0])}, but the manifest says "
                f"{entry.dtype} {list(entry.shape)}; load the model that the run was started with."
            )
        if stored.tensor is None:
            raise ModelError(
                f"Parameter {entry.name} is kept in a file, which is only read; load the model "
                "with an offload_folder, into which trained weights are copied."
            )
        tensors.append(stored.tensor)
    return tensors


def tensor_ids(model: nn.Module, manifest: Manifest) -> dict[str, int]:
    """The tensor id of every trained parameter of `model`, by each of its names."""
    parameters = stored_parameters(model)
    ids = {parameters[entry.name].storage_key: entry.tensor_id for entry in manifest}
    return {
        name: ids[stored.storage_key]
        for name, stored in parameters.items()
        if stored.storage_key in ids
    }
