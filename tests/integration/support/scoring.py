"""An objective as a user writes one, which does what the column `conduct` of its rows says."""

from __future__ import annotations

import math
import threading
from typing import Any

from fedmezo_core.zo.objectives import Predictions, error_rate

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
