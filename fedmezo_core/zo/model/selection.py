"""The modules that a run's `train` or a LoRA adapter's `target_modules` name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmezo_core.config import ALL_LINEAR, LoraConfig
from fedmezo_core.errors import ConfigError


def parameters_inside(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The names of the parameters of the modules `names`, and of all modules inside them.

    A name is a module's whole dotted name or the end of one (`mlp` for `model.layers.3.mlp`); a `*`
    in it stands for any characters but dots. Raises `ConfigError` for a name that no module has, or
    only modules without parameters.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    inside: set[str] = set()
    unknown = []
    for name in names:
        any_but_dots = "[^.]*".join(re.escape(part) for part in name.split("*"))
        pattern = re.compile(rf"(?:.*\.)?{any_but_dots}")
        prefixes = tuple(f"{module}." for module in modules if pattern.fullmatch(module))
        found = [parameter for parameter in parameters if parameter.startswith(prefixes)]
        if not prefixes:
            unknown.append(name)
        elif not found:
            raise ConfigError(
                f"train: {name} has no parameters of its own or inside it; remove it."
            )
        inside.update(found)
    if unknown:
        kinds = sorted({last for module in modules if not (last := _last(module)).isdecimal()})
        raise ConfigError(
            f"train: the model has no module {', '.join(unknown)}; its modules are called "
            f"{', '.join(kinds)}, the whole name of one is {max(modules, key=len)}."
        )
    return inside


def lora_targets(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Module]:
    """The linear layers, by name, that `lora.target_modules` names by peft's rules.

    Raises `ConfigError` for a name that no module has, or one of a module that is not linear.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = {name: m for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
    kinds = ", ".join(sorted({_last(name) for name in linear}))
    expression = lora.target_expression
    if expression == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {name: module for name, module in linear.items() if module is not head}
    try:
        pattern = None if expression is None else re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules: {expression} is no regular expression ({error}); write names of "
            f"modules, or one expression; the linear layers are {kinds}."
        ) from None
    targets: dict[str, nn.Module] = {}
    unknown = []
    for target in lora.target_modules:
        found = [
            name
            for name in modules
            if (
                pattern.fullmatch(name)
                if pattern
                else name == target or name.endswith(f".{target}")
            )
        ]
        if not found:
            unknown.append(target)
        for name in found:
            if name not in linear:
                raise ConfigError(
                    f"lora.target_modules: {target} is no linear layer"
                    f"{'' if _last(name) == target else f' ({name})'}; the linear layers are "
                    f"{kinds}."
                )
            targets[name] = modules[name]
    if unknown:
        how = "" if expression is None else " whose whole name matches the regular expression"
        raise ConfigError(
            f"lora.target_modules: the model has no module{how} {', '.join(unknown)}; its linear "
            f"layers are {kinds}."
        )
    return targets


def _last(name: str) -> str:
    return name.rpartition(".")[2]
