"""How a worker's answers compare with those of others: for the operator's eyes, not for a rule.

The scores see what a commit sees and change nothing in it. They begin anew with each start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from fedmezo_core.machines.aggregate import lower_median, size_of

ROUNDS_MIN = 10
"""Answers of a worker before its agreement is judged."""
TYPICAL_MIN = 4.0
"""The median agreement from which on a worker far below it is told."""
TYPICAL_SHARE = 0.25
"""A worker is told if its agreement is below this share of the median one."""
OPPOSITE = -3.0
"""An agreement below this is no chance: the worker's answers have the opposite sign."""
EMPTY_ROUNDS = 8
"""Answers in a row that are next to zero, or repeat others, before that is told."""
TINY = 0.05
"""An answer whose size is below this share of the usual one is next to zero."""
REPEAT_COUNT_MIN = 8
"""Fewest projected gradients that never repeat by chance, even if an objective only counts."""


@dataclass(slots=True)
class Score:
    """One worker's answers in the commits since the start."""

    size: float | None = None
    """Size of its newest answer over the lower median of its round's; None if that is 0."""
    empty_rounds: int = 0
    """Newest answers in a row that were next to zero where usual ones were not."""
    repeated_rounds: int = 0
    """Newest answers in a row that repeat its own one before, or another's of the round."""
    told: str = ""
    """What is wrong with its answers, as the operator was told it; empty: nothing."""
    _rounds: int = 0
    _sum: float = 0.0
    _variance: float = 0.0
    _newest: tuple[float, ...] = ()

    @property
    def agreement(self) -> float | None:
        """How well its answers agree with others' along the same directions; None: nobody knows.

        In standard deviations of what chance gives: random answers have about 0, honest ones more
        and more, those of the opposite sign less and less.
        """
        return self._sum / math.sqrt(self._variance) if self._variance else None

    def _see(self, grads: tuple[float, ...], size: float, usual: float, *, repeats: bool) -> None:
        self.size = size / usual if usual else None
        self.empty_rounds = self.empty_rounds + 1 if size < TINY * usual else 0
        is_news = len(grads) < REPEAT_COUNT_MIN or not size
        repeats = not is_news and (repeats or grads == self._newest)
        self.repeated_rounds = self.repeated_rounds + 1 if repeats else 0
        self._newest = grads

    def _agree(self, cosine: float, weight: float) -> None:
        self._rounds += 1
        self._sum += weight * cosine
        self._variance += weight * weight

    def _wrong(self, typical: float | None) -> str:
        if self.empty_rounds >= EMPTY_ROUNDS:
            return f"sent answers next to zero, {EMPTY_ROUNDS} rounds in a row"
        if self.repeated_rounds >= EMPTY_ROUNDS:
            return f"repeated answers, its own or another's, {EMPTY_ROUNDS} rounds in a row"
        agreement = self.agreement
        if agreement is None or typical is None or self._rounds < ROUNDS_MIN:
            return ""
        is_low = typical > TYPICAL_MIN and agreement < TYPICAL_SHARE * typical
        if not (is_low or agreement < OPPOSITE):
            return ""
        return (
            "does not agree with the others along the same directions: by "
            f"{agreement:.1f} standard deviations, where {typical:.1f} are usual; its data differ, "
            "or its answers are not measured"
        )


def see_commit(
    scores: Sequence[Score], answers: Sequence[tuple[float, ...]], *, is_shared: bool
) -> list[tuple[int, str]]:
    """Let the scores see a commit's answers, each its own worker's, before the clip.

    is_shared: whether all were measured along the same directions. Returns the positions of workers
    of which something is wrong that was not told before, each with the end of a sentence.
    """
    sizes = [size_of(grads) for grads in answers]
    usual = lower_median(sorted(filter(None, sizes)))
    counts = Counter(answers) if is_shared else Counter[tuple[float, ...]]()
    for score, grads, size in zip(scores, answers, sizes, strict=True):
        score._see(grads, size, usual, repeats=counts[grads] > 1)
    typical = None
    if is_shared and len(answers) > 2:
        cosines = _cosines(answers, sizes)
        # Rounds in which workers agree say more; where they don't, nobody's agreement means much.
        weight = max(lower_median(sorted(cosines)), 0.0)
        for score, cosine in zip(scores, cosines, strict=True):
            score._agree(cosine, weight)
        typical = lower_median(sorted(score.agreement or 0.0 for score in scores))
    found = []
    for position, score in enumerate(scores):
        wrong = score._wrong(typical)
        if wrong and not score.told:
            found.append((position, wrong))
        score.told = wrong
    return found


def _cosines(answers: Sequence[Sequence[float]], sizes: Sequence[float]) -> list[float]:
    """Of each answer and the mean direction of the others, times the root of their count."""
    units = [
        [grad / size if size else 0.0 for grad in grads]
        for grads, size in zip(answers, sizes, strict=True)
    ]
    total = [math.fsum(column) for column in zip(*units, strict=True)]
    cosines = []
    for unit in units:
        others = [whole - own for whole, own in zip(total, unit, strict=True)]
        length = size_of(others)
        product = math.fsum(map(mul, unit, others))
        # Unit vectors have a length of the root of their count here.
        cosines.append(product / length / math.sqrt(len(unit)) if length else 0.0)
    return cosines
