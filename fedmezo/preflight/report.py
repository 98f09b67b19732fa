"""What the checks before a run found: one line each, the exit status, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedmezo_core.errors import FedMezoError


class Format(StrEnum):
    """How a command prints."""

    TEXT = "text"
    JSON = "json"


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

    @property
    def line(self) -> str:
        """The check for a person."""
        return f"{self.outcome:<8} {self.name:<12} {self.said}"


@dataclass
class Report:
    """The checks so far."""

    program: str
    checks: list[Check] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    """Rows as the model reads them, for the person at this terminal: they are private."""

    def ok(self, name: str, said: str, **values: Any) -> None:
        """Note a check that found nothing wrong."""
        self.checks.append(Check(name, Outcome.OK, said, values))

    def warning(self, name: str, said: str, **values: Any) -> None:
        """Note what lets the run go on but should be known; `said` ends with what to do."""
        self.checks.append(Check(name, Outcome.WARNING, said, values))

    def failure(self, name: str, said: str, **values: Any) -> None:
        """Note what would end or hinder the program; `said` ends with what to do."""
        self.checks.append(Check(name, Outcome.FAILURE, said, values))

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

    def text(self) -> str:
        """The report for a person: the checks, the examples and the sum."""
        lines = [check.line for check in self.checks]
        for number, example in enumerate(self.examples, start=1):
            lines += ["", f"row {number}, as the model reads it:", example]
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
                }
                for check in self.checks
            ],
        }
        if with_rows:
            values["examples"] = self.examples
        return json.dumps(_finite(values), allow_nan=False)


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
