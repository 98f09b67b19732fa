"""An objective as a user writes one, which does what the column `conduct` of its rows says."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmezo_core.zo.objectives import ENTRY_POINTS, Predictions, error_rate

NAME = f"{__name__}:by_conduct"

hanging_ended = threading.Event()
"""Lets functions that hang go on."""
SECRET = "patient 17 is ill"


def by_conduct(predictions: Predictions) -> Any:
    """The error rate, or what a bad objective does instead."""
    match predictions.rows[0].get("conduct"):
        case "raise":
            raise LookupError(SECRET)
        case "none":
            return None
        case "nan":
            return math.nan
        case "hang":
            hanging_ended.wait()
        case _:
            pass
    return error_rate(predictions)


def write_package(folder: Path, name: str, entries: Mapping[str, str]) -> None:
    """What an installer leaves of a package that registers these objectives."""
    facts = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{key} = {value}" for key, value in entries.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
