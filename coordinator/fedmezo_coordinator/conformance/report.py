"""What a battery found: one line for each check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.text import Text

from fedmezo_core.errors import FedMezoError

Outcome = Literal["passed", "failed", "skipped"]

UNKNOWN_FIELD = b"\xc2\x3e\x05later"
"""Field 1000 of any message, which no message of this version has."""

_COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


class CheckFailedError(FedMezoError):
    """Something did not come, or is not what the protocol says; ends the check that it is in."""


class CheckSkippedError(FedMezoError):
    """A check cannot be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the protocol promises, and what was seen of it."""

    name: str
    section: int
    """The section of docs/protocol.md that says it."""
    outcome: Outcome
    detail: str = ""
    """What was seen instead, or why the check was skipped. Empty where it passed."""

    def line(self) -> Text:
        """The check for a terminal: outcome, section, name and detail."""
        detail = f": {self.detail}" if self.detail else ""
        return Text.assemble(
            (f"{self.outcome:7}", _COLOURS[self.outcome]),
            f"  section {self.section:2}  {self.name}{detail}",
        )


class Report:
    """The checks of one battery, in their order."""

    def __init__(self, subject: str, show: Callable[[Check], None] = lambda _: None) -> None:
        """`subject` is what was checked: `coordinator` or `worker`.

        `show` is called with each check as it ends.
        """
        self.subject = subject
        self._show = show
        self.checks: list[Check] = []
        self.figures: dict[str, float] = {}
        """What was measured beside the checks, by name."""

    @property
    def passed(self) -> bool:
        """Whether some check passed and none failed."""
        outcomes = {check.outcome for check in self.checks}
        return "passed" in outcomes and "failed" not in outcomes

    def expect(self, name: str, section: int, holds: bool, detail: str = "") -> bool:
        """Note a check that passes if `holds`; `detail` says what was seen otherwise."""
        outcome: Outcome = "passed" if holds else "failed"
        self._add(Check(name, section, outcome, "" if holds else detail))
        return holds

    def skip(self, name: str, section: int, why: str) -> None:
        """Note a check that could not be made."""
        self._add(Check(name, section, "skipped", why))

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        self._show(check)

    @contextmanager
    def check(self, name: str, section: int) -> Iterator[None]:
        """Note a check that passes if the block ends without one of the errors above."""
        try:
            yield
        except CheckSkippedError as error:
            self.skip(name, section, str(error))
        except CheckFailedError as error:
            self.expect(name, section, False, str(error))
        else:
            self.expect(name, section, True)

    def values(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "subject": self.subject,
            "conforms": self.passed,
            "figures": self.figures,
            "checks": [asdict(check) for check in self.checks],
        }

    def summary(self) -> str:
        """How many checks passed, failed and were skipped, and the figures, one on each line."""
        counts = [
            f"{sum(check.outcome == outcome for check in self.checks)} {outcome}"
            for outcome in ("passed", "failed", "skipped")
        ]
        verdict = "conforms" if self.passed else "does not conform"
        lines = [f"The {self.subject} {verdict}: {', '.join(counts)}."]
        lines += [f"{name}: {value:.6g}" for name, value in self.figures.items()]
        return "\n".join(lines)


def require(holds: bool, seen: str) -> None:
    """Raise `CheckFailedError`, which says what was seen, unless `holds`."""
    if not holds:
        raise CheckFailedError(seen)
