"""A user's own function that scores a batch in place of the loss: a number, lower is better.

Zeroth-order measurements need no gradient of it, so it may count mistakes, compare generated text or
ask another program for a reward. See `fedmezo_core.zo.objectives` for ready-made ones.
"""

from __future__ import annotations

import importlib
import logging
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import ConfigError, MeasurementError

log = logging.getLogger("fedmezo.objective")

SCORE_ABS_MAX: Final = float(np.finfo(np.float32).max)
"""Largest size of a score: measurements travel as binary32."""
_LOG_CHARS_MAX = 500
_NAME_CHARS_MAX = 100


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model makes of one batch, at one point of weight space. Row i of everything belongs together."""

    rows: list[dict[str, str]]
    """The rows as they stand in the data, every column that is text or a number, as text."""
    wanted: list[str]
    """Each row's right answer: its label (classification) or its response (instruction)."""
    classes: list[str]
    """Labels in the order of the verbalizers; none in instruction tuning."""
    logits: npt.NDArray[np.float32]
    """[rows, classes]: of the verbalizers' first tokens, behind the prompt."""
    predicted: list[str]
    """Each row's label with the largest logit; none in instruction tuning."""
    log_likelihoods: npt.NDArray[np.float64]
    """[rows], in nats: of the right class among the verbalizers, or of all the response's tokens."""
    texts: list[str]
    """What the model writes behind each prompt, greedily; none if `generated_tokens_max` is 0."""


class Objective:
    """A user's function, by its name `module:function`. It may do anything, so nothing is believed."""

    def __init__(self, name: str, function: Callable[[Predictions], Any]) -> None:
        self.name = name
        self._function = function

    def __call__(self, predictions: Predictions) -> float:
        """The function's score, a finite number.

        Raises `MeasurementError`, whose sentence holds nothing of the data (an exception's message
        may): what more there is to say goes into this machine's log.
        """
        try:
            score = _number(self._function(predictions))
        except BaseException as error:  # SystemExit too: it would end a thread without a word.
            kind = type(error).__name__[:_NAME_CHARS_MAX]
            log.warning("objective %s: %s%s", self.name, kind, _detail(error))
            raise MeasurementError(
                f"Objective {self.name} raised {kind}; this worker's log says where."
            ) from None
        if isinstance(score, str):
            raise MeasurementError(
                f"Objective {self.name} returned {score}; it must return one finite number."
            )
        return score


def load_objective(name: str) -> Objective:
    """Import `module:function`, from the Python path or else from the current directory.

    Runs that module's code. Raises `ConfigError` if it cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        # Last: a file that lies about must not hide an installed package.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"Objective {name}: the module {module_name} cannot be imported "
            f"({type(error).__name__}{_detail(error)}); install it, or start the worker in its folder."
        ) from None
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(
            f"Objective {name}: the module {module_name} ({getattr(module, '__file__', None)}) has no "
            f"{attribute}; check the name."
        )
    if not callable(function):
        raise ConfigError(
            f"Objective {name}: {attribute} is a {type(function).__name__}, not a function; name one "
            "that takes the predictions and returns a number."
        )
    return Objective(name, function)


def _number(value: Any) -> float | str:
    """The finite number that `value` is, or words for what it is instead."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        count = value.numel() if isinstance(value, torch.Tensor) else value.size
        if count != 1:
            return f"{count} numbers"
        value = value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    # A bool is a number to Python, but one comparison is no score of a batch.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__[:_NAME_CHARS_MAX]
        return "None" if value is None else f"a value of type {kind}"
    number = float(value)
    if not math.isfinite(number):
        return f"{number}"
    return number if abs(number) <= SCORE_ABS_MAX else "a number beyond binary32"


def _detail(error: BaseException) -> str:
    """Where it was raised and what it says, on one line; what it says may hold data."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    try:
        message = " ".join(str(error).split())[:_LOG_CHARS_MAX]
    except Exception:  # Its class is a user's too.
        message = "(its message cannot be had)"
    return f"{place}: {message}" if message else place
