"""Bars on a terminal that show how far a long step is; rich draws them."""

from __future__ import annotations

import sys
import threading
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedmezo_core.program import LongStep

BAR_AFTER_S: Final = 1.0
"""A step that ends sooner shows no bar."""
UPDATE_EVERY_S: Final = 0.2

_terminal = threading.Lock()


def show_bar(step: LongStep, over: threading.Event) -> None:
    """Draw a bar for `step` on standard error until `over` is set, if it takes long.

    The bar goes away at the end. There is one at a time: of steps inside another, the first is
    shown.
    """
    if over.wait(BAR_AFTER_S) or not _terminal.acquire(blocking=False):
        return
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counted]}", markup=False),
        TimeElapsedColumn(),
        *([] if step.total is None else [TimeRemainingColumn()]),
    ]
    bars = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        # What is printed on the same terminal appears above the bar. A file gets it as it is.
        redirect_stdout=sys.stdout.isatty(),
    )
    try:
        with bars:
            task = bars.add_task(step.what, total=step.total, counted=step.counted)
            while not over.wait(UPDATE_EVERY_S):
                bars.update(task, completed=step.done, counted=step.counted)
    finally:
        _terminal.release()
