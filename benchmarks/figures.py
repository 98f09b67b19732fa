"""Figures: measured values with their goals, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

REPORTS: Final = Path(__file__).parents[1] / "build" / "reports"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    name: str
    value: float
    unit: str
    goal: str = ""
    """`at least 10` or `at most 2.1`; empty where there is none."""

    @property
    def missed(self) -> bool:
        """Whether there is a goal that the value does not reach."""
        if not self.goal:
            return False
        bound = float(self.goal.split()[-1])
        return self.value < bound if self.goal.startswith("at least") else self.value > bound

    @property
    def shown(self) -> str:
        """The value with three significant digits, or all that are before the point."""
        if self.value == 0 or abs(self.value) >= 100:
            return f"{self.value:,.0f}"
        if abs(self.value) < 0.01:
            return f"{self.value:.1e}"
        return f"{self.value:.{2 if abs(self.value) < 10 else 1}f}"


Group = Callable[[], Iterator[Figure]]
"""Measures some figures, one after another."""


def collect(groups: Iterable[Group]) -> list[Figure]:
    """All figures of `groups`, with a line on standard error for each as it is ready."""
    console = Console(stderr=True, width=120)
    figures: list[Figure] = []
    for group in groups:
        for figure in group():
            console.print(f"[dim]{figure.name}: {figure.shown} {figure.unit}[/]", highlight=False)
            figures.append(figure)
    return figures


def write(figures: Sequence[Figure], path: Path) -> None:
    """The report: a list of {name, value, unit, goal}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(figure) for figure in figures], indent=1, ensure_ascii=False)
    path.write_text(text + "\n")


def publish(figures: Sequence[Figure], path: Path, title: str) -> None:
    """Print the table and write the report, which `--markdown` reads."""
    show(figures, title)
    write(figures, path)
    print(f"wrote {path}")


def arguments_of(
    parser: argparse.ArgumentParser, path: Path, groups: Iterable[str] = ()
) -> argparse.Namespace:
    """The arguments of a benchmark's command; `only` is which of `groups` to measure.

    With `--markdown` it prints the last report and ends.
    """
    if names := list(groups):
        parser.add_argument("--only", nargs="+", choices=names, default=names, help="measure these")
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing, print the last report"
    )
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(read(path)), end="")
        parser.exit()
    return arguments


def read(path: Path) -> list[Figure]:
    return [Figure(**item) for item in json.loads(path.read_text())]


def show(figures: Sequence[Figure], title: str, console: Console | None = None) -> None:
    """Print the table; a goal that is missed stands out, also without colours."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure", max_width=66)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    for figure in figures:
        goal = figure.goal
        if figure.missed:
            goal = f"[bold red]{goal}: missed[/]"
        elif goal:
            goal = f"[green]{goal}[/]"
        table.add_row(figure.name, figure.shown, figure.unit, goal)
    (console or Console(width=120)).print(table)


def markdown(figures: Sequence[Figure]) -> str:
    """The table as docs/benchmarks.md has it."""
    lines = ["| figure | value | unit | goal |", "|---|---|---|---|"]
    for figure in figures:
        goal = f"**missed**: {figure.goal}" if figure.missed else figure.goal
        lines.append(f"| {figure.name} | {figure.shown} | {figure.unit} | {goal} |")
    return "\n".join(lines) + "\n"
