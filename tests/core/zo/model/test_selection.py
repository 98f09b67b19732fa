"""The names of modules in a contract: what they mean, and that no name takes for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.model.selection import lora_targets, parameters_inside

SECONDS = 20.0
"""A bound that holds on a busy machine, where the wrong way would take longer than the universe."""


def tree(*names: str) -> nn.Module:
    """A model with a linear layer of each of these dotted names."""
    root = nn.Module()
    for name in names:
        module = root
        *outer, last = name.split(".")
        for part in outer:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, nn.Linear(1, 1, bias=False))
    return root


@contextmanager
def bounded() -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < SECONDS


LAYERS = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(12) for p in "qkv"]


@pytest.mark.parametrize(
    "expression",
    [
        r"layers\.(0|1)\..*\.(q|v)_proj",
        r"model\.layers\.(0|1)\..*\.(q|v)_proj",
        r".*\.self_attn\..*",
        r"^(?!.*\.1\.).*(?:q_proj|k_proj)$",
        r".*_proj(?<!k_proj)",
        r"(?i)MODEL\.layers\.\d+\.self_attn\.[qk]_proj",
        r"model\.layers\.([02468]|1[0-9])\.(\w+)\.q_proj|model\.layers\.1\..+\.v_proj",
    ],
)
def test_an_expression_means_what_python_says(expression: str) -> None:
    model = tree(*LAYERS)
    lora = LoraConfig(rank=1, alpha=1, target_modules=(expression,))
    found = [name for name in LAYERS if re.fullmatch(expression, name)]
    if found:
        assert list(lora_targets(model, lora)) == found
    else:
        with pytest.raises(ConfigError, match="no module whose whole name matches"):
            lora_targets(model, lora)


@pytest.mark.parametrize(
    "expression",
    [
        "(([a-z0-9_.])+)+[A-Z]",
        ".*" * 8 + "[A-Z]",
        "(?:[a-z._]{1,2}|[a-z0-9._])+[A-Z]",
    ],
)
def test_an_expression_that_takes_for_ever_is_refused(expression: str) -> None:
    lora = LoraConfig(rank=1, alpha=1, target_modules=(expression,))
    with bounded(), pytest.raises(ConfigError, match=r"takes more than 2 s over the .* names"):
        lora_targets(tree(*LAYERS), lora)


@pytest.mark.parametrize("expression", ["(" * 2000 + ")" * 2000, "a{99999999999}", "(?P<a"])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    lora = LoraConfig(rank=1, alpha=1, target_modules=(expression,))
    with pytest.raises(ConfigError, match="is no regular expression"):
        lora_targets(tree(*LAYERS), lora)


PARTS = st.text("ab", min_size=1, max_size=4)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.text("ab*.", min_size=1, max_size=6)


@given(NAMES, PATTERNS)
def test_a_star_stands_for_any_characters_but_dots(name: str, pattern: str) -> None:
    model: Any = tree(name)
    expected = re.compile(r"(?:.*\.)?" + "[^.]*".join(map(re.escape, pattern.split("*"))))
    matches = any(expected.fullmatch(module) for module, _ in model.named_modules() if module)
    if matches:
        assert parameters_inside(model, [pattern]) == {f"{name}.weight"}
    else:
        with pytest.raises(ConfigError, match="no module"):
            parameters_inside(model, [pattern])


@pytest.mark.parametrize("pattern", ["*" * 255 + "X", "*a" * 100 + "X", "*_*" * 80 + "X"])
def test_stars_never_take_for_ever(pattern: str) -> None:
    names = ["a" * 120, f"block.{'a_' * 60}"]
    with bounded(), pytest.raises(ConfigError, match="no module"):
        parameters_inside(tree(*names), [pattern])


def test_thousands_of_names_over_thousands_of_modules() -> None:
    model = tree(*[f"layers.{n}.mlp" for n in range(2000)])
    with bounded():
        assert len(parameters_inside(model, [f"*{'*p' * n}" for n in range(2)] * 2048)) == 2000
        targets = tuple(f"layers.{n % 2000}.mlp" for n in range(4096))
        assert len(lora_targets(model, LoraConfig(rank=1, alpha=1, target_modules=targets))) == 2000
