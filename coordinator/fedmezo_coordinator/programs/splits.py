"""Which rows go to which worker: equal shares, Dirichlet shares of each class, or whole categories.

These functions are pure: rows are numbers from 0, classes are text, and randomness comes from a
seed. The same arguments give the same split. The held-out rows are drawn independently of the
shares, so they do not depend on the splitter, `alpha` or the number of workers.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import ConfigError

ALPHA_MIN, ALPHA_MAX = 1e-6, 1e6
"""Range of alpha. Below it a draw gives all to one worker, above it equal shares."""
NAME_CHARS_MAX = 64

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Shares:
    """The rows of each worker, in ascending order."""

    rows: tuple[tuple[int, ...], ...]
    moved_count: int = 0
    """Rows that were moved from the largest shares to give every worker enough."""


# ---------------------------------------------------------------- what is held out


def held_out_count(amount: str, row_count: int) -> int:
    """Number of rows to hold out: `amount` is a share of all rows below 1, or a number of rows.

    Raises `ConfigError` for anything else, and if no row would be left.
    """
    try:
        number = float(amount)
    except ValueError:
        number = math.nan
    if not (0 <= number < 1 or (number >= 1 and number.is_integer())):
        raise ConfigError(
            f"--heldout = {amount!r} is not allowed: use a share below 1, such as 0.1, or a number "
            "of rows, such as 400."
        )
    count = int(number) if number >= 1 else max(round(number * row_count), int(number > 0))
    if count >= row_count:
        raise ConfigError(
            f"--heldout {amount} leaves none of the {row_count} rows to the workers; "
            "hold out fewer."
        )
    return count


def held_out(row_count: int, count: int, classes: Sequence[str] | None, seed: int) -> list[int]:
    """`count` random rows, in ascending order; with `classes`, in proportion to each class.

    At least one row of each class is left. Raises `ConfigError` if that is impossible.
    """
    chance = _chance(seed, "held out")
    quotas = {"": count}
    if classes is not None:
        quotas = _quotas(Counter(classes), count, chance)
    groups = _rows_of(classes or [""] * row_count, range(row_count))
    return sorted(
        row for name, rows in groups.items() for row in _shuffled(rows, chance)[: quotas[name]]
    )


def _quotas(sizes: Counter[str], count: int, chance: random.Random) -> dict[str, int]:
    """Divide `count` among the classes by largest remainder, leaving at least one row of each."""
    total = sizes.total()
    if count > total - len(sizes):
        raise ConfigError(
            f"{count} rows held out of {total} leave not one row to each of the {len(sizes)} "
            "classes; hold out fewer, or name another column with --by."
        )
    quotas = {name: count * sizes[name] // total for name in sorted(sizes)}
    # Equal remainders come in random order.
    by_remainder = sorted(
        _shuffled(list(quotas), chance), key=lambda name: -(count * sizes[name] % total)
    )
    missing = count - sum(quotas.values())
    while missing:
        for name in by_remainder:
            if missing and quotas[name] < sizes[name] - 1:
                quotas[name] += 1
                missing -= 1
    return quotas


# ---------------------------------------------------------------- shares


def split_iid(rows: Sequence[int], workers: int, seed: int) -> Shares:
    """Give the workers equal random shares; no two differ by more than one row."""
    _check_enough(len(rows), workers, 1)
    order = _shuffled(rows, _chance(seed, "iid"))
    return Shares(tuple(tuple(sorted(order[first::workers])) for first in range(workers)))


def split_dirichlet(
    rows: Sequence[int],
    classes: Sequence[str],
    workers: int,
    *,
    alpha: float,
    seed: int,
    rows_min: int = 1,
) -> Shares:
    """Divide each class among the workers in the proportions of one Dirichlet(`alpha`) draw.

    This is the method of Yurochkin et al. 2019 (arXiv 1905.12022). `classes` holds the class of
    every row, not only of `rows`. A small `alpha` gives nearly all of a class to one worker, a
    large one divides it equally. A worker with fewer than `rows_min` rows then gets more, from the
    largest class of the worker that has the most. Raises `ConfigError` for values out of range.
    """
    if not ALPHA_MIN <= alpha <= ALPHA_MAX:
        raise ConfigError(
            f"--alpha = {alpha:g} is not allowed: use a number above 0, from {ALPHA_MIN:g} (each "
            f"class to one worker) to {ALPHA_MAX:g} (equal shares)."
        )
    if rows_min < 1:
        raise ConfigError(f"--rows-min = {rows_min} is not allowed: use 1 or more.")
    _check_enough(len(rows), workers, rows_min)
    chance = _chance(seed, "dirichlet")
    shares: list[dict[str, list[int]]] = [{} for _ in range(workers)]
    for name, members in _rows_of(classes, rows).items():
        order = _shuffled(members, chance)
        proportions = _dirichlet(alpha, workers, chance)
        # Systematic sampling: every worker gets its proportion of the class to within a row, and on
        # average exactly that, however small the class is.
        offset = chance.random()
        ends = [
            min(math.floor(total * len(order) + offset), len(order))
            for total in accumulate(proportions)
        ]
        ends[-1] = len(order)
        for share, start, end in zip(shares, [0, *ends], ends, strict=False):
            if end > start:
                share[name] = order[start:end]
    moved_count = _level(shares, rows_min)
    return Shares(
        tuple(tuple(sorted(row for part in share.values() for row in part)) for share in shares),
        moved_count,
    )


def _level(shares: list[dict[str, list[int]]], rows_min: int) -> int:
    """Fill shares up to `rows_min` rows from the largest ones; returns the count of moved rows."""
    sizes = [sum(map(len, share.values())) for share in shares]
    moved_count = 0
    for poor, share in enumerate(shares):
        while sizes[poor] < rows_min:
            rich = max(range(len(shares)), key=lambda worker: (sizes[worker], -worker))
            name = max(sorted(shares[rich]), key=lambda name: len(shares[rich][name]))
            source = shares[rich][name]
            count = min(rows_min - sizes[poor], sizes[rich] - rows_min, len(source))
            share.setdefault(name, []).extend(source[-count:])
            del source[-count:]
            sizes[poor] += count
            sizes[rich] -= count
            moved_count += count
    return moved_count


def split_category(rows: Sequence[int], classes: Sequence[str], workers: int) -> Shares:
    """Give each worker whole categories, so that the workers get about as many rows each.

    Nothing is random: the largest category that is left goes to the worker with the fewest rows.
    `classes` holds the class of every row. If there are as many categories as workers, each worker
    gets one, in alphabetical order. Raises `ConfigError` for more workers than categories.
    """
    _check_enough(len(rows), workers, 1)
    groups = _rows_of(classes, rows)
    if workers > len(groups):
        raise ConfigError(
            f"{workers} workers are more than the {len(groups)} categories; use fewer workers, or "
            "another splitter."
        )
    shares: list[list[str]] = [[] for _ in range(workers)]
    sizes = [0] * workers
    for name in sorted(groups, key=lambda name: -len(groups[name])):
        smallest = min(range(workers), key=lambda worker: (sizes[worker], worker))
        shares[smallest].append(name)
        sizes[smallest] += len(groups[name])
    shares.sort(key=min)
    return Shares(tuple(tuple(sorted(row for n in share for row in groups[n])) for share in shares))


# ---------------------------------------------------------------- names


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for names that a run would refuse."""
    for name in names:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(
                f"--names: {name!r} is not allowed: use 1 to 64 of a-z, 0-9 and -, beginning with "
                "a letter or digit."
            )
        if names.count(name) > 1:
            raise ConfigError(f"--names: {name!r} is given twice; names are unique in a run.")


def numbered_names(workers: int) -> list[str]:
    """The names worker-1, worker-2, ..., with leading zeros so that all have the same length."""
    digits = len(str(workers))
    return [f"worker-{number:0{digits}}" for number in range(1, workers + 1)]


def names_of_categories(shares: Shares, classes: Sequence[str]) -> list[str] | None:
    """Names for workers that hold one category each, made from those categories.

    None if a worker holds several categories, or if two names are equal or empty.
    """
    held = [{classes[row] for row in share} for share in shares.rows]
    if any(len(names) != 1 for names in held):
        return None
    slugs = [_slug(next(iter(names))) for names in held]
    return slugs if all(slugs) and len(set(slugs)) == len(slugs) else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:NAME_CHARS_MAX].rstrip("-")


# ---------------------------------------------------------------- small parts


def _check_enough(row_count: int, workers: int, rows_min: int) -> None:
    if workers < 1:
        raise ConfigError(f"--workers = {workers} is not allowed: use 1 or more.")
    if workers * rows_min > row_count:
        each = "" if rows_min == 1 else f" of {rows_min} rows each"
        raise ConfigError(
            f"{workers} workers{each} are too many for {row_count} rows; use fewer workers or give "
            "more rows."
        )


def _rows_of(classes: Sequence[str], rows: Sequence[int]) -> dict[str, list[int]]:
    """The rows of each class; the classes are in alphabetical order."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(classes[row], []).append(row)
    return {name: groups[name] for name in sorted(groups)}


def _chance(seed: int, purpose: str) -> random.Random:
    digest = hashlib.sha256(f"fedmezo split v1 {purpose} {seed}".encode()).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _shuffled(items: Sequence[Item], chance: random.Random) -> list[Item]:
    # `random` is the same in all versions of Python; `shuffle` is not guaranteed to be.
    return sorted(items, key=lambda _item: chance.random())


def _dirichlet(alpha: float, count: int, chance: random.Random) -> list[float]:
    """Draw `count` proportions whose sum is 1."""
    # A gamma variate of a small shape underflows; its logarithm does not. With G of shape alpha + 1
    # and U uniform, G x U^(1/alpha) has shape alpha.
    logarithms = [
        math.log(chance.gammavariate(alpha + 1, 1.0)) + math.log(1 - chance.random()) / alpha
        for _ in range(count)
    ]
    largest = max(logarithms)
    parts = [math.exp(value - largest) for value in logarithms]
    total = math.fsum(parts)
    return [part / total for part in parts]
