"""`fedmezo presets`: the recipes that a run's contract can name."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fedmezo.preflight.check_report import Format
from fedmezo.presets import PRESETS, Preset, preset_named, preset_toml


def presets(
    show: Annotated[
        str, typer.Option(metavar="NAME", help="print the settings that this preset stands for")
    ] = "",
    format_: Annotated[
        Format, typer.Option("--format", help="text, or JSON for programs")
    ] = Format.TEXT,
) -> None:
    """List the recipes that preset = "NAME" in [run] can name, and what was measured with each."""
    chosen = [preset_named(show)] if show else list(PRESETS)
    if format_ is Format.JSON:
        print(json.dumps({"presets": [_values(preset) for preset in chosen]}))
    elif show:
        print(preset_toml(chosen[0]))
    else:
        for preset in chosen:
            print(f"{preset.name}\n  {preset.purpose}\n  {preset.result}")


def _values(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "purpose": preset.purpose,
        "result": preset.result,
        "run": dict(preset.values),
    }
