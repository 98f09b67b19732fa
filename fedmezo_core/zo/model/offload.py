"""Where the values of a model's parameters are kept between forward passes.

`accelerate` lets a model be larger than its device: the parameters of an offloaded module are empty (on
the meta device) but while the module runs; their values are kept in a map from names to tensors that
its hook holds, in memory or in files. So whoever reads or writes weights asks here for a parameter's
home: the parameter itself, the tensor in memory that its hook copies from, or a file.

Files are only ever read: they may be the checkpoint itself. What a run trains is first copied into one
memory-mapped file of this process's own (`move_into_mapped_memory`), and is then written like any
other memory. The file has no name, so that whatever ends the process, nothing is left of it, and no
other process can take its contents for the base.
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
class Home:
    """Where the values of one parameter are kept."""

    parameter: nn.Parameter
    """The model's own: gives dtype and shape; empty (on the meta device) while it is offloaded."""
    tensor: torch.Tensor | None
    """The values themselves, to be read and written in place; None if they are in a file."""
    file: Path | None
    """The file that holds the values of an offloaded parameter; None if they are in memory."""
    place: Hashable
    """The same for all names of one tensor (tied weights), another for any other tensor."""
    offloaded: tuple[Mapping[str, torch.Tensor], str] | None
    """The map that an offloaded parameter is copied from whenever its module runs, and its name there."""

    def read(self) -> torch.Tensor:
        """The values: `tensor`, or a fresh copy of what is in the file."""
        if self.tensor is not None:
            return self.tensor
        assert self.offloaded is not None
        weights, key = self.offloaded
        return weights[key]


def homes_of(model: nn.Module) -> dict[str, Home]:
    """The home of every parameter, under each of its names, sorted by name."""
    offloaded = {
        name: (hook.weights_map, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for hook in offload_hooks(module)
        for name, key, _ in hooked_parameters(prefix, module, hook)
    }
    homes: dict[str, Home] = {}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name not in offloaded:
            homes[name] = Home(parameter, parameter.detach(), None, id(parameter), None)
            continue
        kept, key = _innermost(*offloaded[name])
        in_memory = getattr(kept, "state_dict", kept)
        if key in in_memory:
            tensor = in_memory[key].detach()
            address = tensor.data_ptr() or id(in_memory[key])
            place: Hashable = (tensor.device, address, tuple(tensor.shape))
            homes[name] = Home(parameter, tensor, None, place, offloaded[name])
        else:
            # accelerate's own files hold tied weights once for each name.
            entry: dict[str, Any] = kept.index[key]
            if "safetensors_file" in entry:
                file = Path(entry["safetensors_file"])
                place = (file, entry.get("weight_name", key))
            else:
                file = Path(kept.save_folder)
                place = (file, ties.get(key, key))
            homes[name] = Home(parameter, None, file, place, offloaded[name])
    return homes


def unique_homes(model: nn.Module) -> dict[str, Home]:
    """The home of every parameter once, under the first of its names, sorted by name."""
    seen: set[Hashable] = set()
    unique: dict[str, Home] = {}
    for name, home in homes_of(model).items():
        if home.place not in seen:
            seen.add(home.place)
            unique[name] = home
    return unique


def move_into_mapped_memory(
    model: nn.Module, folder: Path, *, only_from: Path | None = None
) -> None:
    """Copy the parameters whose homes are files (in `only_from`) into memory mapped from `folder`.

    Afterwards they have a `tensor`: it can be larger than the machine's memory, because the system
    writes it to the disk and drops it from memory as it needs to. The file is as large as the tensors
    together, has no name, and is gone with the process. Raises `ModelError` if the disk is full.
    """
    groups: dict[Hashable, list[Home]] = {}
    for home in homes_of(model).values():
        if home.file is not None and (only_from is None or only_from in home.file.parents):
            groups.setdefault(home.place, []).append(home)
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
        for home in group:
            assert home.offloaded is not None
            kept, key = _innermost(*home.offloaded)
            # What is here is taken before any file.
            kept.state_dict[key] = moved
        first += size


def execution_device(model: nn.Module) -> torch.device:
    """The device that a batch for `model` belongs on."""
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return next(model.parameters()).device


def put_back(model: nn.Module) -> None:
    """Empty the offloaded parameters that a forward pass left on the device when it raised.

    accelerate would take some of them for up to date in the next pass.
    """
    for module in model.modules():
        for hook in offload_hooks(module):
            if any(
                not parameter.is_meta for _, _, parameter in hooked_parameters("", module, hook)
            ):
                hook.post_forward(module, ())


def offload_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that fill the module's parameters before it runs and empty them after."""
    return (hook for hook in _hooks(module) if getattr(hook, "offload", False))


def hooked_parameters(
    prefix: str, module: nn.Module, hook: Any
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """What such a hook of the module called `prefix` offloads: (name in the model and in the module, it)."""
    recurse = hook.place_submodules
    for key, parameter in module.named_parameters(recurse=recurse, remove_duplicate=False):
        yield f"{prefix}.{key}" if prefix else key, key, parameter


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _innermost(weights: Any, key: str) -> tuple[Any, str]:
    """The map and name behind accelerate's views of a map under prefixes."""
    while hasattr(weights, "prefix"):
        weights, key = weights.dataset, weights.prefix + key
    return weights, key


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _ALIGNMENT_BYTES


def _mapped(folder: Path, size_bytes: int) -> torch.Tensor:
    """`size_bytes` of memory backed by a file without a name in `folder`: uint8."""
    try:
        memory = nameless_mapping(folder, size_bytes)
    except OSError as error:
        raise ModelError(
            f"The weights that fit into no memory need {size_bytes} bytes in {folder} "
            f"({error.strerror}); make room there, or name another offload_folder."
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8)
