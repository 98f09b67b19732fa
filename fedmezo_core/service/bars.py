"""Bars on a terminal that show how far a long step is, and lines of the log above them."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

BAR_AFTER_S: Final = 1.0
"""A step that ends sooner shows no bar."""
UPDATE_EVERY_S: Final = 0.2

_terminal = threading.Lock()
"""Held while a bar is shown: there is one at a time."""
_writing = threading.RLock()
"""Held while a bar appears or goes, and while a line is written."""
_shown: Progress | None = None


class Step(Protocol):
    """How far a long step is, as `fedmezo_core.program.LongStep` says it."""

    what: str
    total: int | None
    done: int

    @property
    def counted(self) -> str:
        """What is done, such as `1,200 of 3,000 records`."""


class _Console(Console):
    """Leaves the cursor alone: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False


class _AboveTheBar:
    """A stream whose lines appear above the bar, if there is one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write whole lines."""
        with _writing:
            if _shown is None:
                self._stream.write(text)
            else:
                _shown.console.print(Text(text), end="", soft_wrap=True)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def keep_log_above_bars() -> None:
    """Let the log's lines, which go to standard error, appear above the bars from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(_AboveTheBar(sys.stderr))


def show_bar(step: Step, over: threading.Event) -> None:
    """Draw a bar for `step` on standard error until `over` is set, if it takes long.

    The bar goes away at the end. There is one at a time: of steps inside another, the first is
    shown.
    """
    if over.wait(BAR_AFTER_S):
        return
    while not _terminal.acquire(timeout=UPDATE_EVERY_S):
        if over.is_set():
            return
    try:
        _draw(step, over)
    finally:
        _terminal.release()


def _draw(step: Step, over: threading.Event) -> None:
    global _shown
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[counted]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_Console(stderr=True),
        transient=True,
        # What is printed on the same terminal appears above the bar. A file gets it as it is.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
    task = bars.add_task(step.what, total=step.total, counted=step.counted)
    with _writing:
        bars.start()
        _shown = bars
    try:
        while not over.wait(UPDATE_EVERY_S):
            if bars.tasks[0].description != step.what:  # An update cannot take a total away.
                bars.remove_task(task)
                task = bars.add_task(step.what, total=step.total, counted=step.counted)
            bars.update(task, total=step.total, completed=step.done, counted=step.counted)
    finally:
        with _writing:
            _shown = None
            bars.stop()
