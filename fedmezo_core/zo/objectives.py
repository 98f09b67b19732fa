"""Ready-made objectives: name them as `fedmezo_core.zo.objectives:error_rate`. Lower is better."""

from __future__ import annotations

from fedmezo_core.zo.objective import Predictions


def error_rate(predictions: Predictions) -> float:
    """1 - accuracy (classification): the share of rows whose largest logit is a wrong class's."""
    pairs = zip(_predicted(predictions), predictions.wanted, strict=True)
    return sum(predicted != wanted for predicted, wanted in pairs) / len(predictions.rows)


def one_minus_macro_f1(predictions: Predictions) -> float:
    """1 - macro F1 (classification): a rare class counts as much as a frequent one.

    F1 is averaged over the classes that the batch holds or that the model predicts for it.
    """
    wanted, predicted = predictions.wanted, _predicted(predictions)
    scores = []
    for name in sorted({*wanted, *predicted}):
        right = sum(a == b == name for a, b in zip(wanted, predicted, strict=True))
        scores.append(2.0 * right / (wanted.count(name) + predicted.count(name)))
    return 1.0 - sum(scores) / len(scores)


def one_minus_exact_match(predictions: Predictions) -> float:
    """The share of rows whose generated text is not the right answer; needs `generated_tokens_max`.

    White space around either is left out of the comparison, upper and lower case is not.
    """
    if not predictions.texts:
        raise ValueError("no text was generated: set generated_tokens_max above 0")
    pairs = zip(predictions.texts, predictions.wanted, strict=True)
    return sum(text.strip() != wanted.strip() for text, wanted in pairs) / len(predictions.rows)


def _predicted(predictions: Predictions) -> list[str]:
    if not predictions.predicted:
        raise ValueError("there are no classes: this objective is for kind = classification")
    return predictions.predicted
