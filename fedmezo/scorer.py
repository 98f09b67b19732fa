"""Calls the run's objective on its own thread, so that a function that hangs holds up nobody."""

from __future__ import annotations

import math
import threading
import time
from typing import Final

from fedmezo_core.errors import CutShortError, MeasurementError
from fedmezo_core.zo.objectives import Objective, Predictions

LOOK_EVERY_S: Final = 0.05
"""Seconds until a waiting engine sees that its measurement was cut short."""


class Scorer:
    """Scores by an objective until a deadline; a call that overruns is abandoned, but still runs.

    A function that never releases Python's interpreter lock still stops the whole worker.
    """

    def __init__(self, objective: Objective, cut_short: threading.Event) -> None:
        """`cut_short`, once set, ends a running call's wait."""
        self.deadline_s = math.inf
        """When a call must be done, by `time.monotonic`; it may change while a call runs."""
        self._objective = objective
        self._cut_short = cut_short
        self._thread: threading.Thread | None = None

    def check_free(self) -> None:
        """Raise `CutShortError` while an abandoned call still runs."""
        if self._thread is not None and self._thread.is_alive():
            raise CutShortError(
                f"Objective {self._objective.name} is still busy with an earlier round; raise "
                "deadline_ms, make it faster, or restart this worker if it hangs."
            )

    def __call__(self, predictions: Predictions) -> float:
        """Return the score; raises `MeasurementError` if the objective does.

        Raises `CutShortError` if it takes too long: that is no matter of this row alone.
        """
        self.check_free()
        outcome: list[float | MeasurementError] = []

        def call() -> None:
            try:
                outcome.append(self._objective(predictions))
            except MeasurementError as error:
                outcome.append(error)

        # A daemon thread: the program does not wait for it to end.
        thread = self._thread = threading.Thread(target=call, name="objective", daemon=True)
        thread.start()
        while True:
            thread.join(max(0.0, min(self.deadline_s - time.monotonic(), LOOK_EVERY_S)))
            if not thread.is_alive():
                break
            if self._cut_short.is_set():
                raise CutShortError(
                    f"the round closed while objective {self._objective.name} was still at work"
                )
            if time.monotonic() >= self.deadline_s:
                raise CutShortError(
                    f"Objective {self._objective.name} takes longer than the round's deadline; "
                    "raise deadline_ms or make it faster."
                )
        (result,) = outcome
        if isinstance(result, MeasurementError):
            raise result
        return result
