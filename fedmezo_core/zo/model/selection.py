"""The modules that a run's `train` or a LoRA adapter's `target_modules` name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Final, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmezo_core.config import ALL_LINEAR, DEEP_UP, DEEP_VALUES, LAST_DOWN, PLACES, LoraConfig
from fedmezo_core.errors import ConfigError, ModelError

VALUE_LAYERS: Final = ("v_proj", "value", "v_lin", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""What families call the layer that makes the values, alone or with queries and keys."""
MATCHING_CPU_S_MAX: Final = 2
"""Longest CPU time that a run's regular expression may take over a model's names of modules."""

_MATCHER: Final = """
import json, re, resource, sys
seconds, expression, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
pattern = re.compile(expression)
json.dump([name for name in names if pattern.fullmatch(name)], sys.stdout)
"""
"""A program that writes which names an expression matches; it is killed when its time is over."""


def parameters_inside(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The names of the parameters of the modules `names`, and of all modules inside them.

    A name is a module's whole dotted name or the end of one (`mlp` for `model.layers.3.mlp`); a `*`
    in it stands for any characters but dots. Raises `ConfigError` for a name that no module has, or
    only modules without parameters.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    # Parameter -> the modules that it is inside of, from its own one outwards.
    owners = {
        parameter: list(_ancestors(parameter))
        for parameter, _ in model.named_parameters(remove_duplicate=False)
    }
    inside: set[str] = set()
    unknown = []
    for name in dict.fromkeys(names):
        pattern = _pattern_of(name)
        matched = {module for module in modules if pattern.fullmatch(module)}
        found = [p for p, outer in owners.items() if not matched.isdisjoint(outer)]
        if not matched:
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


def with_places_named(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """The same adapter with this model's names in the place of a word such as `LAST_UP`.

    A layer of an MLP is told by its shape, because every family of models has names of its own: a
    block's MLP goes up in its last linear layer with more outputs than inputs, and down in its last
    one with fewer. The layer of the values is told by its name (`VALUE_LAYERS`). Raises
    `ModelError` if the model has no such layer.
    """
    if len(lora.target_modules) > 1 or lora.target_modules[0] not in PLACES:
        return lora
    [word] = lora.target_modules

    def is_meant(name: str, inputs: int, outputs: int) -> bool:
        if word == DEEP_VALUES:
            return _last(name) in VALUE_LAYERS
        return outputs < inputs if word == LAST_DOWN else outputs > inputs

    # By the first number in its name, which is its block's; the last one of a block counts.
    of_blocks: dict[int, str] = {}
    for name, (inputs, outputs) in linear_shapes(model).items():
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if block is not None and is_meant(name, inputs, outputs):
            of_blocks[block] = name
    if not of_blocks:
        raise ModelError(
            f"lora.target_modules: the model has no layer that is meant by {word}; write the "
            "names of the linear layers to train."
        )
    places = [of_blocks[block] for block in sorted(of_blocks)]
    first = len(places) * 2 // 3
    deep = places[first : max(len(places) - 2, first + 1)]
    chosen = deep if word in (DEEP_UP, DEEP_VALUES) else places[-1:]
    return lora.model_copy(update={"target_modules": tuple(chosen)})


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the model's linear layers, by name in the model's order; no head."""
    everything = LoraConfig(rank=1, alpha=1, target_modules=(ALL_LINEAR,))
    shapes = {}
    for name, layer in lora_targets(model, everything).items():
        rows, columns = cast("nn.Linear", layer).weight.shape
        # A Conv1D, as in GPT-2, keeps its weight transposed.
        shapes[name] = (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)
    return shapes


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
    named: dict[str, list[str]] = {}
    if expression is not None:
        named[expression] = _matched(expression, list(modules), kinds)
    else:
        ends: dict[str, list[str]] = {}
        for name in modules:
            for end in _ends(name):
                ends.setdefault(end, []).append(name)
        named = {target: ends.get(target, []) for target in lora.target_modules}
    targets: dict[str, nn.Module] = {}
    unknown = []
    for target, found in named.items():
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


def _pattern_of(name: str) -> re.Pattern[str]:
    """What a name of `train` means; takes time that grows with the square of a module's name.

    Each `*` but the last keeps the first end that it finds, which leaves the most for the others:
    to try all ends would take time that grows with a power of the number of `*`.
    """
    first, *rest = [re.escape(part) for part in re.sub(r"\*+", "*", name).split("*")]
    stars = "".join(rf"(?>[^.]*?{part})" for part in rest[:-1])
    return re.compile(rf"(?:.*\.)?{first}{stars}" + "".join(f"[^.]*{p}" for p in rest[-1:]))


def _matched(expression: str, names: list[str], kinds: str) -> list[str]:
    """The names that a regular expression matches as a whole.

    An expression can take practically for ever, and Python does nothing else meanwhile. So another
    process does it first, with a limit on its time; peft then matches the same names.
    """
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"lora.target_modules: {expression} is no regular expression ({error}); write names of "
            f"modules, or one expression; the linear layers are {kinds}."
        ) from None
    done = subprocess.run(
        [sys.executable, "-ISc", _MATCHER],
        # peft asks for the model itself too, whose name is empty.
        input=json.dumps([MATCHING_CPU_S_MAX, expression, ["", *names]]),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"lora.target_modules: the regular expression {expression} takes more than "
            f"{MATCHING_CPU_S_MAX} s over the {len(names)} names of the model's modules; write it "
            "without repetitions inside repetitions, or name the modules."
        )
    return [name for name in json.loads(done.stdout) if name]


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _ends(name: str) -> Iterator[str]:
    yield name
    while name := name.partition(".")[2]:
        yield name


def _last(name: str) -> str:
    return name.rpartition(".")[2]
