"""Evaluations on a worker's own held-out rows: when they are made, and where results are written.

They go to this machine's log and file. Nothing of them is sent.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmezo_core.errors import ConfigError

log = logging.getLogger("fedmezo.worker")


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """How the weights do on the worker's held-out rows; its fields are the keys of its JSON."""

    round: int
    """The round whose commit the weights hold; 0 for the base."""
    loss: float
    accuracy: float
    auc: float | None
    rows: int

    def __str__(self) -> str:
        auc = "" if self.auc is None else f", AUC {self.auc:.3f}"
        return f"loss {self.loss:.4f}, accuracy {100 * self.accuracy:.1f} %{auc}"


class Evaluations:
    """The results so far, and which round is evaluated next.

    An evaluation is due every `every_rounds` rounds and is made in an idle moment; the next round
    may cut it short. Of two successive ones at least one is made, even if the next round waits.
    """

    def __init__(self, every_rounds: int, rounds: int, file: Path | None) -> None:
        """`every_rounds` is 0 if none are ever due; `rounds` is the run's number of rounds.

        The last round is never due: it is evaluated when nothing else is left to do. Raises
        `ConfigError` if `file` cannot be appended to.
        """
        self._every_rounds = every_rounds
        self._rounds = rounds
        self._file = file
        self._begun_round = 0
        self.first: HeldOutResult | None = None
        self.last: HeldOutResult | None = None
        if file is not None:
            try:
                with file.open("a"):
                    pass
            except OSError as error:
                raise ConfigError(
                    f"evaluations = {str(file)!r} cannot be written ({error.strerror or error}); "
                    "name another file."
                ) from error

    def is_due(self, round_: int) -> bool:
        """Whether the weights of `round_` are to be evaluated, if there is time."""
        if not self._begun_round < round_ < self._rounds:
            return False
        return self._every_rounds > 0 and round_ % self._every_rounds == 0

    def must_finish(self, round_: int) -> bool:
        """Whether the evaluation of `round_` must not be cut short, because the last one was."""
        last_round = 0 if self.last is None else self.last.round
        return round_ - last_round >= 2 * self._every_rounds

    def begin(self, round_: int) -> None:
        """Note that the evaluation of `round_` has begun: that round is not due again."""
        self._begun_round = round_

    def add(self, result: HeldOutResult) -> None:
        """Log a result, and append it to the file."""
        self.first = self.first or result
        self.last = result
        log.info("round %d: held-out %s, %d rows", result.round, result, result.rows)
        if self._file is None:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        except OSError as error:
            # A full disk is no reason to leave the run.
            log.warning("%s cannot be written (%s)", self._file, error.strerror or error)

    def log_summary(self) -> None:
        """Log the first and the last result in one line."""
        first, last = self.first, self.last
        if first is not None and last is not None and first is not last:
            rounds = f"round {first.round} {first} -> round {last.round} {last}"
            log.info("held-out, %d rows: %s", last.rows, rounds)
