"""The log of a program: plain text for a person, or one JSON object a line for a machine."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

TEXT = "%(asctime)s %(levelname)-7s %(message)s"
"""Layout of a line for a person."""

FACTS = ("run", "round", "worker")
"""What a line says of where it is from, if that is known."""

_facts: ContextVar[dict[str, str | int] | None] = ContextVar("facts", default=None)


def log_with(**facts: str | int) -> None:
    """Let each later line of this task, and of tasks that it starts, say these facts.

    They are those in `FACTS`; a later value takes the place of an earlier one. A single line has
    others if its logger's `extra` names them. Plain text says them only if the message does.
    """
    _facts.set({**(_facts.get() or {}), **facts})


class _TextLines(logging.Formatter):
    """Makes a line for a person of a log record; says its run only where there are several."""

    names_runs = False

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """The line of `record`, without a traceback."""
        run = (_facts.get() or {}).get("run") if self.names_runs else None
        if run is not None:
            record.message = f"run {run}: {record.message}"
        return super().formatMessage(record)


def name_runs_in_text() -> None:
    """Let each line of plain text that is about one of several runs begin with its name."""
    _TextLines.names_runs = True


class JsonLines(logging.Formatter):
    """Makes one line of a log record: a JSON object.

    Its keys are `time` (UTC, ISO 8601), `level`, `logger`, `message`, those of `FACTS` that are
    known, and `error` with a traceback if the record has one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`, without its end."""
        values: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_facts.get() or {}),
            **{key: value for key, value in vars(record).items() if key in FACTS},
        }
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def start_log() -> None:
    """Begin the log of this process on standard error, as plain text, from `info` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TextLines(TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fedmezo").setLevel(logging.INFO)


def shape_log(form: LogFormat, level: LogLevel) -> None:
    """Give the lines of this process another form, and leave out those below `level`.

    What libraries log appears from `warning` on, whatever `level` is.
    """
    formatter = JsonLines() if form == "json" else _TextLines(TEXT)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    logging.getLogger("fedmezo").setLevel(level.upper())


def logs_json() -> bool:
    """Whether this process writes its log as JSON."""
    return any(isinstance(one.formatter, JsonLines) for one in logging.getLogger().handlers)
