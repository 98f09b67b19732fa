"""`fedmezo presets`: the recipes that a run's contract can name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedmezo.presets import PRESETS, Preset, preset_named, preset_toml
from fedmezo_coordinator.programs.plain_values import Format, json_line
from fedmezo_core.layered_settings import OutputFormat


def presets(
    show: Annotated[
        str, typer.Option(metavar="NAME", help="print the settings that this preset stands for")
    ] = "",
    format_: Format = OutputFormat.TEXT,
) -> None:
    """List the recipes that a run can name as its preset, and what was measured with each."""
    chosen = [preset_named(show)] if show else list(PRESETS)
    if format_ is OutputFormat.JSON:
        print(json_line({"presets": [_values(preset) for preset in chosen]}))
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
