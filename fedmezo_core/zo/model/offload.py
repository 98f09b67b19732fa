"""Where the values of a model's parameters are stored between forward passes.

`accelerate` lets a model be larger than its device. The parameters of an offloaded module are empty
(on the meta device) except while the module runs. Its hook holds a map from names to their values,
in memory or in files. So code that reads or writes weights asks this module where a parameter's
values are: in the parameter itself, in the tensor that the hook copies from, or in a file.

Files are only read, because they may be the checkpoint itself. Trained parameters are first copied
into a memory-mapped file of this process (`move_into_mapped_memory`), and are then written like any
other memory. That file has no name. So nothing is left of it however the process ends, and no other
process can mistake its contents for the base.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmezo_core.errors import ModelError
from fedmezo_core.folders import nameless_mapping

_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """Where the values of one parameter are stored."""

    parameter: nn.Parameter
    """The model's parameter, with its dtype and shape; empty (on the meta device) if offloaded."""
    tensor: torch.Tensor | None
    """The values, which may be read and written in place; None if they are in a file."""
    file: Path | None
    """The file that holds the values of an offloaded parameter; None if they are in memory."""
    storage_key: Hashable
    """Equal for all names of one tensor (tied weights), and different for any other tensor."""
    offloaded: tuple[Mapping[str, torch.Tensor], str] | None
    """The map that an offloaded parameter is copied from, and its name in it."""

    def read(self) -> torch.Tensor:
        """The parameter's values: `tensor`, or a new copy of the values in the file."""
        if self.tensor is not None:
            return self.tensor
        assert self.offloaded is not None
        weights, key = self.offloaded
        return weights[key]


def stored_parameters(model: nn.Module) -> dict[str, StoredParameter]:
    """Where every parameter of `model` is stored, by each of its names, sorted by name."""
    offloaded = {
        name: (hook.weights_map, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for hook in offload_hooks(module)
        for name, key, _ in hooked_parameters(prefix, module, hook)
    }
    by_name: dict[str, StoredParameter] = {}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name not in offloaded:
            by_name[name] = StoredParameter(
                parameter, parameter.detach(), None, id(parameter), None
            )
            continue
        values, inner_name = _innermost(*offloaded[name])
        in_memory = getattr(values, "state_dict", values)
        if inner_name in in_memory:
            tensor = in_memory[inner_name].detach()
            address = tensor.data_ptr() or id(in_memory[inner_name])
            key: Hashable = (tensor.device, address, tuple(tensor.shape))
            by_name[name] = StoredParameter(parameter, tensor, None, key, offloaded[name])
        else:
            # accelerate's own files hold tied weights once for each name.
            entry: dict[str, Any] = values.index[inner_name]
            if "safetensors_file" in entry:
                file = Path(entry["safetensors_file"])
                key = (file, entry.get("weight_name", inner_name))
            else:
                file = Path(values.save_folder)
                key = (file, ties.get(inner_name, inner_name))
            by_name[name] = StoredParameter(parameter, None, file, key, offloaded[name])
    return by_name


def unique_parameters(model: nn.Module) -> dict[str, StoredParameter]:
    """Where every parameter of `model` is stored, by the first of its names, sorted by name."""
    seen: set[Hashable] = set()
    unique: dict[str, StoredParameter] = {}
    for name, stored in stored_parameters(model).items():
        if stored.storage_key not in seen:
            seen.add(stored.storage_key)
            unique[name] = stored
    return unique


def move_into_mapped_memory(
    model: nn.Module, folder: Path, *, only_from: Path | None = None
) -> None:
    """Copy parameters that are stored in files into memory that is mapped from `folder`.

    With `only_from`, only files inside that folder count. Afterwards the parameters have a
    `tensor`. Together they can be larger than the machine's memory, because the system writes them
    to the disk and drops them from memory as it needs to. The mapped file is as large as the
    tensors, has no name, and disappears with the process. Raises `ModelError` if the disk is full.
    """
    groups: dict[Hashable, list[StoredParameter]] = {}
    for stored in stored_parameters(model).values():
        if stored.file is not None and (only_from is None or only_from in stored.file.parents):
            groups.setdefault(stored.storage_key, []).append(stored)
    if not groups:
        return
    sizes = [_padded(group[0].parameter.nbytes) for group in groups.values()]
    octets = _mapped(folder, sum(sizes))
    first = 0
    for group, size in zip(groups.values(), sizes, strict=True):
        parameter = group[0].parameter
        moved = octets[first : first + parameter.nbytes].view(parameter.dtype)
        moved = moved.view(parameter.shape)
        moved.copy_(group[0].read())
        for stored in group:
            assert stored.offloaded is not None
            values, name = _innermost(*stored.offloaded)
            # accelerate looks here before it opens a file.
            values.state_dict[name] = moved
        first += size


def execution_device(model: nn.Module) -> torch.device:
    """The device that a batch for `model` must be on."""
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return next(model.parameters()).device


def put_back(model: nn.Module) -> None:
    """Empty the offloaded parameters of `model` that a failed forward pass left on the device.

    Otherwise accelerate would take some of them for up to date in the next pass.
    """
    for module in model.modules():
        for hook in offload_hooks(module):
            if any(
                not parameter.is_meta for _, _, parameter in hooked_parameters("", module, hook)
            ):
                hook.post_forward(module, ())


def has_hooks(model: nn.Module) -> bool:
    """Whether accelerate moves values to the modules of `model` as they run."""
    return any(True for module in model.modules() for _ in _hooks(module))


def offload_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that fill the module's parameters before it runs and empty them after."""
    return (hook for hook in _hooks(module) if getattr(hook, "offload", False))


def hooked_parameters(
    prefix: str, module: nn.Module, hook: Any
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The parameters that `hook` offloads: (name in the model, name in the module, parameter).

    `module` has the hook and is called `prefix` in the model.
    """
    recurse = hook.place_submodules
    for key, parameter in module.named_parameters(recurse=recurse, remove_duplicate=False):
        yield f"{prefix}.{key}" if prefix else key, key, parameter


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _innermost(weights: Any, key: str) -> tuple[Any, str]:
    """The map and the name in it that accelerate's views of a map under prefixes lead to."""
    while hasattr(weights, "prefix"):
        weights, key = weights.dataset, weights.prefix + key
    return weights, key


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _ALIGNMENT_BYTES


def _mapped(folder: Path, size_bytes: int) -> torch.Tensor:
    """Memory that a nameless file in `folder` backs: uint8 [size_bytes]."""
    try:
        memory = nameless_mapping(folder, size_bytes)
    except OSError as error:
        raise ModelError(
            f"The weights that fit into no memory need {size_bytes} bytes in {folder} "
            f"({error.strerror}); make room there, or name another offload_folder."
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8)
