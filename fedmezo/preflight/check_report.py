"""A command that checks and reports: a line for each check, an exit status, and JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings

from fedmezo_core.errors import FedMezoError
from fedmezo_core.layered_settings import OutputFormat, load_settings
from fedmezo_core.program import run_program, show_steps_on_terminal


class ReportSettings(BaseSettings):
    """The flags of a command that reports."""

    format: OutputFormat = Field(
        default=OutputFormat.TEXT, description="text, or json: one object when all checks are made"
    )
    show_rows: bool = Field(
        default=False,
        description="show three rows as the model reads them also where the output is no terminal",
    )
    strict: bool = Field(default=False, description="end with status 1 also after a warning")


class Outcome(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    name: str
    """What was checked, in a word or two: the same words in every release."""
    outcome: Outcome
    said: str
    """What was found; of a warning or a failure, also what to do."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What was found, for programs; numbers have their units in their names."""
    section: str = ""
    """What the check is about, where there are several of its kind; such as `run reviews`."""

    @property
    def line(self) -> str:
        """The check for a person."""
        return f"{self.outcome:<8} {self.name:<12} {self.said}"


@dataclass
class Report:
    """The checks so far."""

    program: str
    told: Callable[[str], None] = lambda _line: None
    """Called with the line of each check as soon as it is made."""
    checks: list[Check] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    """Rows as the model reads them, for the person at this terminal: they are private."""
    _section: str = ""

    def begin_section(self, about: str) -> None:
        """Begin a section: the checks that follow are `about` one of several things."""
        self._section = about
        self.told(f"\n{about}:")

    def ok(self, name: str, said: str, **values: Any) -> None:
        """Note a check that found nothing wrong."""
        self._note(Check(name, Outcome.OK, said, values, self._section))

    def warning(self, name: str, said: str, **values: Any) -> None:
        """Note what lets the run go on but should be known; `said` ends with what to do."""
        self._note(Check(name, Outcome.WARNING, said, values, self._section))

    def failure(self, name: str, said: str, **values: Any) -> None:
        """Note what would end or hinder the program; `said` ends with what to do."""
        self._note(Check(name, Outcome.FAILURE, said, values, self._section))

    def _note(self, check: Check) -> None:
        self.checks.append(check)
        self.told(check.line)

    @contextmanager
    def failing(self, name: str) -> Iterator[None]:
        """Turn an error of ours in this block into a failure of the check `name`."""
        try:
            yield
        except FedMezoError as error:
            self.failure(name, str(error), error=type(error).__name__)

    @property
    def failures(self) -> int:
        """How many checks failed."""
        return sum(check.outcome is Outcome.FAILURE for check in self.checks)

    @property
    def warnings(self) -> int:
        """How many checks warn."""
        return sum(check.outcome is Outcome.WARNING for check in self.checks)

    def exit_status(self, *, strict: bool) -> int:
        """1 if a check failed, or, if `strict`, warns; else 0."""
        return int(bool(self.failures or (strict and self.warnings)))

    def ending(self, *, with_rows: bool) -> str:
        """What follows the lines of the checks, for a person: perhaps the examples, and the sum."""
        lines: list[str] = []
        for example in self.examples if with_rows else ():
            lines += ["", "a row as the model reads it:", example]
        failures, warnings = counted(self.failures, "failure"), counted(self.warnings, "warning")
        lines += ["", f"{counted(len(self.checks), 'check')}: {failures}, {warnings}"]
        return "\n".join(lines)

    def json_line(self, *, with_rows: bool) -> str:
        """The report as one line of JSON; `with_rows`: with the examples, which are private."""
        values: dict[str, Any] = {
            "program": self.program,
            "failures": self.failures,
            "warnings": self.warnings,
            "checks": [
                {
                    "check": check.name,
                    "outcome": str(check.outcome),
                    "said": check.said,
                    "values": dict(check.values),
                    **({"section": check.section} if check.section else {}),
                }
                for check in self.checks
            ],
        }
        if with_rows:
            values["examples"] = self.examples
        return json.dumps(_finite(values), allow_nan=False)


Asked = TypeVar("Asked", bound=ReportSettings)


def report_program(
    program: str,
    kind: type[Asked],
    make: Callable[[Asked, Report], Coroutine[Any, Any, None]],
    arguments: Sequence[str],
) -> int:
    """Read the settings of a command that reports, let `make` check, and print the report.

    Returns the exit status: 0 if no check failed, 1 if one did (with `strict`: or warns), and else
    as `run_program`, so 2 for settings that cannot be read.
    """
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    show_steps_on_terminal()
    status = 0

    def work() -> None:
        nonlocal status
        settings = load_settings(kind, arguments, program=program)
        is_text = settings.format is OutputFormat.TEXT
        report = Report(program, partial(print, flush=True) if is_text else lambda _line: None)
        asyncio.run(make(settings, report))
        if is_text:
            # Private rows are for the person who sits here.
            print(report.ending(with_rows=settings.show_rows or sys.stdout.isatty()))
        else:
            print(report.json_line(with_rows=settings.show_rows))
        status = report.exit_status(strict=settings.strict)

    return run_program(program, work) or status


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for a person: `0.35 s`, `12 s`, `3 min`, `2.5 h`, `4 days`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.0f} days"


def size(count: float) -> str:
    """Bytes for a person, in powers of 1,024: `12 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
