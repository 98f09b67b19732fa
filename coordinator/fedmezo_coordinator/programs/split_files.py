"""`fedmezo split`: rows become one file for each worker and one of held-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmezo_coordinator.programs.splits import (
    Shares,
    check_names,
    held_out,
    held_out_count,
    names_of_categories,
    numbered_names,
    split_category,
    split_dirichlet,
    split_iid,
)
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.folders import whole_folder
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.rows import (
    RawExample,
    label_form,
    read_raw_examples,
    shown_columns,
    spelling_in,
)

ALPHA_DEFAULT = 0.5
HELD_OUT = "held-out"
CLASSES_NAMED_MAX = 4
"""Classes that a line names if the table has no room for a column for each class."""
CLASS_CHARS_MAX = 30
"""Characters of a class's name that such a line shows."""


class Splitter(StrEnum):
    """Ways to divide rows among workers."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    CATEGORY = "category"


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """The command's options; None: not given."""

    splitter: Splitter
    workers: int | None
    names: tuple[str, ...]
    by: str | None
    alpha: float | None
    rows_min: int | None
    heldout: str
    seed: int


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a split."""

    name: str
    """Name of the worker, or `HELD_OUT`."""
    rows: tuple[int, ...]

    @property
    def file_name(self) -> str:
        """Name of the file, as in the demo and docs/data.md."""
        return "heldout.jsonl" if self.name == HELD_OUT else f"{self.name}.train.jsonl"


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a split."""

    parts: tuple[Part, ...]
    classes: tuple[str, ...] | None
    """Each row's value in the column --by; None if no column was named."""
    moved_count: int
    """Rows that were moved to give every worker enough."""


def split_file(data: Path, out: Path, options: SplitOptions) -> Written:
    """Read `data`, a file or a folder of files, split it, and write the folder `out`.

    Raises `ConfigError` for options or data that cannot be used.
    """
    _check(options)
    try:
        rows = read_raw_examples(data)
        classes = None if options.by is None else _classes(rows, options.by)
        with long_step(f"writing {out}"):
            written = _split(len(rows), classes, options)
            _write(out, rows, written.parts)
    except DataError as error:
        raise ConfigError(str(error)) from error
    return written


def _check(options: SplitOptions) -> None:
    splitter = options.splitter
    if splitter is not Splitter.IID and options.by is None:
        raise ConfigError(f"--splitter {splitter.value} needs --by, the column to split by.")
    for flag, value in (("--alpha", options.alpha), ("--rows-min", options.rows_min)):
        if value is not None and splitter is not Splitter.DIRICHLET:
            raise ConfigError(f"{flag} is for --splitter dirichlet only; leave it out.")
    check_names(options.names)
    if options.names and options.workers not in (None, len(options.names)):
        raise ConfigError(
            f"--workers {options.workers} does not fit the {len(options.names)} names of --names; "
            "leave --workers out."
        )
    if not options.names and options.workers is None and splitter is not Splitter.CATEGORY:
        raise ConfigError("The number of workers is missing; give --workers or --names.")


def _classes(rows: Sequence[RawExample], by: str) -> tuple[str, ...]:
    columns = dict.fromkeys(name for row in rows for name in row.values)
    by = spelling_in(columns, by)
    if by not in columns:
        raise ConfigError(
            f"There is no column {shown_columns([by])} to split by; "
            f"the columns are {shown_columns(columns)}."
        )
    return tuple(label_form(row.text(by)) for row in rows)


def _split(row_count: int, classes: tuple[str, ...] | None, options: SplitOptions) -> Written:
    held = held_out(row_count, held_out_count(options.heldout, row_count), classes, options.seed)
    taken = frozenset(held)
    left = [row for row in range(row_count) if row not in taken]
    workers = len(options.names) or options.workers
    names: Sequence[str] | None = options.names or None
    match options.splitter:
        case Splitter.DIRICHLET:
            assert classes is not None
            assert workers is not None
            shares = split_dirichlet(
                left,
                classes,
                workers,
                alpha=ALPHA_DEFAULT if options.alpha is None else options.alpha,
                seed=options.seed,
                rows_min=1 if options.rows_min is None else options.rows_min,
            )
        case Splitter.CATEGORY:
            assert classes is not None
            shares = split_category(
                left, classes, len(set(classes)) if workers is None else workers
            )
            names = names or names_of_categories(shares, classes)
        case Splitter.IID:
            assert workers is not None
            shares = split_iid(left, workers, options.seed)
    parts = _parts(shares, names or numbered_names(len(shares.rows)))
    if held:
        parts.append(Part(HELD_OUT, tuple(held)))
    return Written(tuple(parts), classes, shares.moved_count)


def _parts(shares: Shares, names: Sequence[str]) -> list[Part]:
    return [Part(name, rows) for name, rows in zip(names, shares.rows, strict=True)]


def _write(out: Path, rows: Sequence[RawExample], parts: Sequence[Part]) -> None:
    try:
        with whole_folder(out, ConfigError) as folder:
            for part in parts:
                with (folder / part.file_name).open("wb") as file:
                    file.writelines(rows[row].json_line() for row in part.rows)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror or error}); choose another --out."
        ) from error


# ---------------------------------------------------------------- what is printed


def split_values(written: Written) -> list[dict[str, Any]]:
    """One entry for each file, for programs."""
    return [
        {
            "name": part.name,
            "file": part.file_name,
            "rows": len(part.rows),
            "classes": None
            if written.classes is None
            else dict(sorted(Counter(written.classes[row] for row in part.rows).items())),
        }
        for part in written.parts
    ]


def split_view(written: Written, width: int) -> RenderableType:
    """A table with one line for each file, and a column for each class if `width` allows it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("worker")
    table.add_column("rows", justify="right")
    names = [] if written.classes is None else sorted(set(written.classes))
    counts = [
        Counter(written.classes[row] for row in part.rows) if written.classes else Counter[str]()
        for part in written.parts
    ]
    first = max(len(part.name) for part in written.parts) + 2 + 9
    if first + sum(max(len(name), 7) + 2 for name in names) <= width:
        for name in names:
            table.add_column(Text(name), justify="right")
        for part, count in zip(written.parts, counts, strict=True):
            numbers = [f"{count[name]:,}" for name in names]
            table.add_row(Text(part.name), f"{len(part.rows):,}", *numbers)
    else:
        table.add_column("of each class, largest first", overflow="fold")
        for part, count in zip(written.parts, counts, strict=True):
            table.add_row(Text(part.name), f"{len(part.rows):,}", Text(_largest(count)))
    lines: list[RenderableType] = [table]
    if written.moved_count:
        lines.append(
            Text(
                f"{written.moved_count:,} rows were taken from the largest shares, so that every "
                "worker has enough."
            )
        )
    return Group(*lines)


def _largest(count: Counter[str]) -> str:
    # Equal counts are sorted by name, so that the order of the rows does not matter.
    ordered = sorted(count, key=lambda name: (-count[name], name))
    shown = [f"{_short(name)} {count[name]:,}" for name in ordered[:CLASSES_NAMED_MAX]]
    if len(ordered) > CLASSES_NAMED_MAX:
        shown.append(f"{len(ordered) - CLASSES_NAMED_MAX} more")
    return ", ".join(shown)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= CLASS_CHARS_MAX else f"{name[: CLASS_CHARS_MAX - 1]}…"
