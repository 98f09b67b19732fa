"""Objectives: functions that score a batch in place of the loss with a number, lower is better.

Zeroth-order measurements need no gradient of it. So an objective may count mistakes, compare
generated text or ask another program for a reward. A run names one by the name under which an
installed package registers it, such as `error-rate` from here, or as `module:function`.
"""

from __future__ import annotations

import importlib
import logging
import math
import numbers
import string
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import ConfigError, MeasurementError

log = logging.getLogger("fedmezo.objective")

ENTRY_POINTS: Final = "fedmezo.objectives"
"""Group of the entry points by which packages register objectives."""
SCORE_ABS_MAX: Final = float(np.finfo(np.float32).max)
"""Largest size of a score: measurements travel as binary32."""
_LOG_CHARS_MAX = 500
_NAME_CHARS_MAX = 100


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model predicts for one batch at one point of weight space.

    Item i of every list and row i of every array belong to row i of the batch, except in `classes`.
    """

    rows: list[dict[str, str]]
    """The rows of the data: all columns that hold text or numbers, as text."""
    wanted: list[str]
    """The right answer to each row: its label (classification) or its response (instruction)."""
    classes: list[str]
    """The labels in the order of the verbalizers; empty in instruction tuning."""
    logits: npt.NDArray[np.float32]
    """Logits of the verbalizers' compared tokens after the prompt: float32 [rows, classes]."""
    predicted: list[str]
    """The label with the largest logit for each row; empty in instruction tuning."""
    log_likelihoods: npt.NDArray[np.float64]
    """Log-likelihoods of the right classes or the responses, in nats: float64 [rows]."""
    texts: list[str]
    """The text that the model generates greedily after each prompt; empty if
    `generated_tokens_max` is 0."""


class Objective:
    """A user's function, called by its name in the contract, whose results are checked."""

    def __init__(self, name: str, function: Callable[[Predictions], Any]) -> None:
        self.name = name
        self._function = function

    def __call__(self, predictions: Predictions) -> float:
        """The function's score of `predictions`: a finite number, at most `SCORE_ABS_MAX` in size.

        Raises `MeasurementError` for anything else that the function does. Its message tells
        nothing about the data, as an exception's own message may; the details go to this machine's
        log.
        """
        try:
            score = _number(self._function(predictions))
        except BaseException as error:  # SystemExit too: it would end a thread silently.
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
    """Import the objective that a contract calls `name`; this runs its module's code.

    `module:function` comes from the Python path or the current directory. Any other name is one
    that an installed package registers as an entry point of `ENTRY_POINTS`. Raises `ConfigError` if
    nobody or more than one package registers it, if it cannot be imported, or if there is no such
    function.
    """
    module_name, colon, attribute = name.partition(":")
    if colon:
        here = str(Path.cwd())
        if "" not in sys.path and here not in sys.path:
            # Last, so that a stray file does not hide an installed package.
            sys.path.append(here)
    else:
        entry = _registered(name)
        module_name, attribute = entry.module, entry.attr
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"Objective {name}: the module {module_name} cannot be imported "
            f"({type(error).__name__}{_detail(error)}); install it, or start the worker in its "
            "folder."
        ) from None
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(
            f"Objective {name}: the module {module_name} ({getattr(module, '__file__', None)}) has "
            f"no {attribute or 'function named'}; check the name."
        )
    if not callable(function):
        raise ConfigError(
            f"Objective {name}: {attribute} is a {type(function).__name__}, not a function; name "
            "one that takes the predictions and returns a number."
        )
    return Objective(name, function)


def _registered(name: str) -> EntryPoint:
    """The only entry point of that name."""
    registered = entry_points(group=ENTRY_POINTS)
    found = [entry for entry in registered if entry.name == name]
    if not found:
        names = ", ".join(sorted({entry.name for entry in registered})) or "none"
        raise ConfigError(
            f"Objective {name}: no installed package registers it, only these: {names}; install "
            "the package that does, or check the name."
        )
    if len(found) > 1:
        packages = ", ".join(sorted(entry.dist.name if entry.dist else "?" for entry in found))
        raise ConfigError(
            f"Objective {name}: {len(found)} packages register it ({packages}); uninstall all but "
            "one, or name the function as module:function in a new run."
        )
    return found[0]


def error_rate(predictions: Predictions) -> float:
    """1 - accuracy (classification): the share of rows whose predicted class is wrong."""
    pairs = zip(_predicted(predictions), predictions.wanted, strict=True)
    return sum(predicted != wanted for predicted, wanted in pairs) / len(predictions.rows)


def one_minus_macro_f1(predictions: Predictions) -> float:
    """1 - macro F1 (classification), in which a rare class counts as much as a frequent one.

    F1 is averaged over the classes that occur in the batch or that the model predicts for it.
    """
    wanted, predicted = predictions.wanted, _predicted(predictions)
    scores = []
    for name in sorted({*wanted, *predicted}):
        right = sum(a == b == name for a, b in zip(wanted, predicted, strict=True))
        scores.append(2.0 * right / (wanted.count(name) + predicted.count(name)))
    return 1.0 - sum(scores) / len(scores)


def one_minus_exact_match(predictions: Predictions) -> float:
    """1 - exact match: the share of rows whose generated text differs from the right answer.

    The comparison ignores white space around the texts, but not case. Raises `ValueError` if no
    text was generated, because `generated_tokens_max` is 0.
    """
    if not predictions.texts:
        raise ValueError("no text was generated: set generated_tokens_max above 0")
    pairs = zip(predictions.texts, predictions.wanted, strict=True)
    return sum(text.strip() != wanted.strip() for text, wanted in pairs) / len(predictions.rows)


def one_minus_token_f1(predictions: Predictions) -> float:
    """1 - token F1: how many words the generated texts share with the right answers, on average.

    The words of a text are what white space separates, in lower case and without punctuation around
    them. A row's F1 is twice the number of shared words over the number of words in both texts. It
    is SQuAD's (Rajpurkar et al. 2016), but the words a, an and the count here. Raises `ValueError`
    if no text was generated, because `generated_tokens_max` is 0.
    """
    if not predictions.texts:
        raise ValueError("no text was generated: set generated_tokens_max above 0")
    pairs = zip(predictions.texts, predictions.wanted, strict=True)
    return 1.0 - sum(token_f1(text, wanted) for text, wanted in pairs) / len(predictions.rows)


def token_f1(text: str, wanted: str) -> float:
    """Twice the number of words that two texts share, over the number of words in both: 0 to 1."""
    ours, theirs = Counter(_words(text)), Counter(_words(wanted))
    count = ours.total() + theirs.total()
    return 2.0 * (ours & theirs).total() / count if count else 1.0


def _words(text: str) -> list[str]:
    bare = (word.strip(string.punctuation) for word in text.lower().split())
    return [word for word in bare if word]


def _number(value: Any) -> float | str:
    """The finite number that `value` is, or a description of what it is instead."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        count = value.numel() if isinstance(value, torch.Tensor) else value.size
        if count != 1:
            return f"{count} numbers"
        value = value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    # Python counts a bool as a number, but a single comparison cannot score a batch.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__[:_NAME_CHARS_MAX]
        return "None" if value is None else f"a value of type {kind}"
    number = float(value)
    if not math.isfinite(number):
        return f"{number}"
    return number if abs(number) <= SCORE_ABS_MAX else "a number beyond binary32"


def _detail(error: BaseException) -> str:
    """Where `error` was raised and its message, on one line; the message may hold data."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    try:
        message = " ".join(str(error).split())[:_LOG_CHARS_MAX]
    except Exception:  # The exception's class may be the user's, too.
        message = "(its message cannot be read)"
    return f"{where}: {message}" if message else where


def _predicted(predictions: Predictions) -> list[str]:
    if not predictions.predicted:
        raise ValueError("there are no classes: this objective is for kind = classification")
    return predictions.predicted
