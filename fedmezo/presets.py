"""Named recipes for a run's contract, each with what it is for and what came of it.

A contract that names a preset takes its values where it does not say otherwise. A new run's journal
holds the values themselves, so a preset may change later without changing a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Final

from fedmezo_core.config import (
    DEEP_UP,
    DEEP_VALUES,
    LAST_DOWN,
    LAST_UP,
    PLACES,
    RunConfig,
    asks_for_sums,
    parse_run,
)
from fedmezo_core.errors import ConfigError

KEY: Final = "preset"
"""The key of a contract's settings that names a preset."""

_OF_SINGLE_ANSWERS: Final = (
    "report_losses",
    "seed_policy",
    "aggregation",
    "clip_median_factor",
    "weighting",
    "personal_rate",
)
"""Keys of which secure aggregation leaves no choice."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe: values of a run's contract."""

    name: str
    purpose: str
    """What it is for, in a sentence."""
    result: str
    """What was measured with it, in a sentence."""
    values: Mapping[str, Any]
    """Values of `RunConfig`."""
    walk_length: float | None = None
    """How far the run moves each trained element, which gives the rate of a contract without one
    (`RunConfig.rate_of_walk`); None: as for any contract."""


def _adapter(rank: int, place: str) -> dict[str, Any]:
    """An adapter of which only B is trained (decision 0015)."""
    return {
        "rank": rank,
        "alpha": float(rank),
        "freeze_a": True,
        "target_modules": [place],
    }


_STEPS: Final = {
    "local_steps": 1,
    "estimator": "one_sided",
    "normalized_step": True,
    "batch_size": 16,
    "schedule": "linear",
    "eps": 1e-3,
    "distribution": "low_rank_1",
    "report_losses": True,
    "digest_every_rounds": 10,
}
"""What the recipes for adapters have in common."""

PRESETS: Final = (
    Preset(
        name="classification",
        purpose="Two to some ten classes by the words that the model answers with, on CPUs.",
        result="4 workers of 160 rows, an adapter fitted to 200 texts: accuracy 87.1 % after 50 "
        "rounds, from 52.6 % (1,200 held-out rows, two classes, SmolLM2-135M, decision 0004).",
        values={
            **_STEPS,
            "rounds": 50,
            "probes": 28,
            "lora": _adapter(32, LAST_UP),
            "task": {"kind": "classification", "tokens_max": 64},
        },
    ),
    Preset(
        name="classification-fast",
        purpose="The same with a tenth of the trained elements, for a first result in minutes.",
        result="4 workers of 400 rows, an adapter fitted to 400 texts: accuracy 80.8 % after 30 "
        "rounds, from 53.0 % (600 held-out rows, two classes, SmolLM2-135M, make "
        "experiment-estimators).",
        values={
            **_STEPS,
            "rounds": 30,
            "probes": 16,
            "lora": _adapter(8, LAST_DOWN),
            "task": {"kind": "classification", "tokens_max": 64},
        },
        walk_length=1.2,
    ),
    Preset(
        name="classification-deep",
        purpose="Classes on GPUs, where passes through a third of the model are cheap.",
        result="4 workers with all their rows on an H200, an adapter fitted to 400 texts: accuracy "
        "90.4 % after 250 rounds, from 52.6 % (1,200 held-out rows, two classes, SmolLM2-135M, "
        "make experiment-accuracy-gpu).",
        values={
            **_STEPS,
            "rounds": 300,
            "probes": 31,
            "lora": _adapter(32, DEEP_UP),
            "task": {"kind": "classification", "tokens_max": 64},
        },
    ),
    Preset(
        name="instruction",
        purpose="Responses of free text, on CPUs; it learns what the end of the last layer can.",
        result="3 workers of 64 rows: held-out loss 3.167 after 40 rounds, from 3.184; "
        "back-propagation through all layers comes to 2.997 (how-to texts, SmolLM2-135M, make "
        "experiment-instructions).",
        values={
            **_STEPS,
            "rounds": 40,
            "probes": 8,
            "batch_size": 4,
            "lora": _adapter(4, LAST_DOWN),
            "task": {"kind": "instruction", "tokens_max": 64},
        },
        walk_length=0.37,
    ),
    Preset(
        name="instruction-deep",
        purpose="Responses of free text, on GPUs and on CPUs with AMX; deep layers learn far more.",
        result="3 workers of 64 rows, an adapter fitted to 192 rows: held-out loss 3.087 after 100 "
        "rounds, from 3.185; back-propagation on the same adapter comes to 3.049 (how-to texts, "
        "SmolLM2-135M, make experiment-instructions).",
        values={
            **_STEPS,
            "rounds": 100,
            "probes": 63,
            "batch_size": 4,
            "learning_rate": 0.2,
            "rate_directions": 0,
            "distribution": "rademacher",
            "dtype": "bfloat16",
            "eps": 0.05,
            "lora": {**_adapter(64, DEEP_VALUES), "output_rank": 8},
            "task": {"kind": "instruction", "tokens_max": 64},
        },
    ),
    Preset(
        name="full",
        purpose="All parameters, without an adapter: each pass is one through the whole model.",
        result="4 workers: accuracy 78.5 % after 12 rounds, from 52.7 %, most "
        "of it the loss of a bias (400 held-out rows, two classes, SmolLM2-135M, decision 0004).",
        values={
            "rounds": 12,
            "local_steps": 3,
            "probes": 1,
            "estimator": "two_sided",
            "batch_size": 8,
            "learning_rate": 1e-4,
            "rate_directions": 0,
            "eps": 1e-3,
            "distribution": "rademacher",
            "report_losses": True,
            "task": {"tokens_max": 64},
        },
    ),
)
"""The presets, in the order in which they are shown."""


def preset_named(name: object) -> Preset:
    """The preset of that name; raises `ConfigError`, which names those that there are."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    known = ", ".join(preset.name for preset in PRESETS)
    shown = repr(name) if isinstance(name, str) else "a value that is no text"
    raise ConfigError(f"There is no preset {shown[:200]}; the presets are {known}.")


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """A contract's values with those of the preset that `given` names, without its name.

    What is given wins, key by key also inside `lora` and `task`. Modules that `train` names take
    the place of the preset's adapter, and secure aggregation that of what needs single answers.
    Values that name no preset come back as they are. Raises `ConfigError` for a preset that there
    is not.
    """
    if KEY not in given:
        return dict(given)
    values = deepcopy(dict(preset_named(given[KEY]).values))
    if given.get("train"):
        values.pop("lora", None)
    if asks_for_sums(given):
        for key in _OF_SINGLE_ANSWERS:
            values.pop(key, None)
    return merged(values, given)


def parse_contract(
    given: Mapping[str, Any], where: str, *, rate_comes_later: bool = False
) -> RunConfig:
    """The contract of a new run in `given`, where `preset` may name a recipe.

    As `parse_run`, which says what else is filled in; raises as it and `with_preset` do.
    """
    walk_length = preset_named(given[KEY]).walk_length if KEY in given else None
    return parse_run(
        with_preset(given), where, rate_comes_later=rate_comes_later, walk_length=walk_length
    )


def with_measured(
    config: RunConfig, measured: Mapping[str, float], given: Mapping[str, Any]
) -> RunConfig:
    """A new run's contract with those measured values that its user, who wrote `given`, left open.

    Raises `ConfigError` for a value that a contract cannot have.
    """
    taken = {key: value for key, value in measured.items() if key not in given}
    return parse_run({**config.model_dump(), **taken}, "the measured values", config)


def measured_sentence(before: RunConfig, after: RunConfig) -> str:
    """What was measured, for the log: `before` with its default rate became `after`."""
    own, taken = before.learning_rate, after.learning_rate
    if taken < own:
        rate = f"learning_rate = {taken:g}; the default of {own:g} is too long for this model"
    elif taken > own:
        rate = f"learning_rate = {taken:g}; this model allows more than the default of {own:g}"
    else:
        rate = f"the default learning_rate = {own:g} is not too long for this model"
    return f"{rate}; eps = {after.eps:g}"


def unmeasured_rate(config: RunConfig, why: str) -> str:
    """The warning that a new run's rate, which its user did not set, knows nothing of the model."""
    return (
        f"the learning rate is {config.learning_rate:g}, which was not measured "
        f"({why.removesuffix('.')}); it may be far too long or too short for this model "
        "(docs/choosing.md)"
    )


def difference_from(
    begun: RunConfig, asked: Mapping[str, Any], where: str
) -> tuple[str, Any, Any] | None:
    """The first key in which `asked` means another contract than `begun`, with both values.

    None if it means the same. A preset, and defaults for what `asked` does not name, count only
    when a run begins. Raises `ConfigError`, which names `where`, for values of no contract.
    """
    written = begun.model_dump()
    wanted = merged(written, asked) if KEY in asked else {**written, **asked}
    lora = wanted.get("lora")
    if isinstance(lora, dict) and begun.lora is not None and _is_a_word(lora.get("target_modules")):
        # The contract has the names that the word meant in the run's model.
        wanted["lora"] = {**lora, "target_modules": begun.lora.target_modules}
    for key, value in parse_run(wanted, where, begun).model_dump().items():
        if value != written[key]:
            return key, written[key], value
    return None


def _is_a_word(targets: object) -> bool:
    """Whether target modules are one of the words for a place in any model."""
    return any(targets in (word, [word], (word,)) for word in PLACES)


def merged(below: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with what is `given` on top, key by key in tables that both have; no preset's name.

    Verbalizers belong together and are replaced as a whole.
    """
    values = {**below, **{key: value for key, value in given.items() if key != KEY}}
    for table in ("lora", "task"):
        ours, theirs = below.get(table), given.get(table)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            values[table] = {**ours, **theirs}
    return values


def preset_toml(preset: Preset) -> str:
    """The lines of a TOML file that the preset stands for, from `[run]` on."""
    lines = [f"# {preset.purpose}", *(f"# {line}" for line in wrap(preset.result, 96))]
    if "learning_rate" not in preset.values:
        walk = "" if preset.walk_length is None else f" and a walk length of {preset.walk_length:g}"
        lines.append(f"# The learning rate follows from the rounds, workers and probes{walk}.")
    lines.append("# The coordinator shortens the rate if its rows show that it is too long.")
    tables = {"run": preset.values}
    for key, value in preset.values.items():
        if isinstance(value, Mapping):
            tables[f"run.{key}"] = value
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        # JSON's strings, numbers, booleans and lists are TOML's, too.
        lines += [
            f"{key} = {json.dumps(value)}"
            for key, value in table.items()
            if not isinstance(value, Mapping)
        ]
    return "\n".join(lines)
