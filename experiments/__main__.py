"""Run experiments and report on them.

    python -m experiments TARGET... [--seeds N] [--quick] [--fresh] [--jobs N] [--redraw]
        [--set KEY=VALUE] [--plan]

A target is one of the catalogue's, or `all`. Finished runs are kept under build/experiments, so
that a second call goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from benchmarks.figures import REPORTS, Figure
from experiments import peak_memory
from experiments.catalogue import EXPERIMENTS, Changes, Experiment, run_of
from experiments.results import redraw, write_all
from experiments.runs import KEPT, Processes, Result, Run, kept, key_of
from experiments.starting_point import CACHE, Settings
from fedmezo_core.errors import ConfigError
from fedmezo_core.program import run_program

ALL = "all"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    targets: Sequence[str]
    seeds: int | None = None
    jobs: int = 2
    fresh: bool = False
    changes: Changes = field(default_factory=Changes)
    kept: Path = KEPT
    reports: Path = REPORTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=[*EXPERIMENTS, ALL], metavar="TARGET")
    parser.add_argument(
        "--seeds", type=int, help="seeds of each arm; default: the experiment's own number"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="ignore kept results")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--redraw", action="store_true", help="run nothing, draw the kept curves")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the run or of the settings, for all arms without their own; VALUE is JSON "
        "or text",
    )
    parser.add_argument("--plan", action="store_true", help="run nothing, say how much there is")
    given = parser.parse_args(arguments)
    targets = targets_of(given.targets)
    if given.redraw:
        for target in targets:
            print(redraw(target, EXPERIMENTS[target]))
        return 0

    # As Ctrl-C does: the processes must not outlive this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def run() -> None:
        changes = changes_of(given.set, quick=given.quick)
        order = Order(targets, given.seeds, given.jobs, given.fresh, changes)
        if given.plan:
            plan(order)
        else:
            experiment(order)

    return run_program("experiments", run)


def targets_of(given: Sequence[str]) -> list[str]:
    """Targets without repetition; `all` leaves out those for which this machine is too slow."""
    if ALL not in given:
        return list(dict.fromkeys(given))
    left_out = [
        name
        for name, described in EXPERIMENTS.items()
        if described.is_for_gpu and name not in given and not torch.cuda.is_available()
    ]
    for name in left_out:
        print(
            f"{name} is left out: it needs a CUDA device, and PyTorch sees none.", file=sys.stderr
        )
    return [name for name in EXPERIMENTS if name not in left_out]


def changes_of(given: Sequence[str], *, quick: bool = False) -> Changes:
    """Sort `KEY=VALUE` into values of the run and of the settings."""
    run: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write it as KEY=VALUE.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        # A run's `model` is only a name in its journal; the settings say what is loaded.
        (settings if key in Settings.model_fields else run)[key] = value
    return Changes(run, settings, quick)


def experiment(order: Order) -> None:
    """Do all runs of all targets, then report on each target."""
    runs = {target: _runs(EXPERIMENTS[target], order) for target in order.targets}
    _prepare(runs)
    # Arms of several targets may be the same run, such as the one that differs in nothing.
    everything = {
        key_of(run): run for arms in runs.values() for of_arm in arms.values() for run in of_arm
    }
    results = _results(everything, order)
    for target, arms in runs.items():
        described = EXPERIMENTS[target]
        found = {arm: [results[key_of(run)] for run in of_arm] for arm, of_arm in arms.items()}
        peaks: list[Figure] = []
        if described.has_memory:
            first = {arm: of_arm[0] for arm, of_arm in arms.items()}
            peaks = peak_memory.figures(first, order.kept, fresh=order.fresh)
        paths = write_all(target, described, found, peaks, order.reports)
        Console(width=160).print(Markdown(paths[1].read_text()))
        print("\n".join(f"wrote {path}" for path in paths))


def plan(order: Order) -> None:
    """Print how many runs and passes the targets take; runs that targets share count once."""
    table = Table(title="one pass: one batch forward; a first-order step counts as three")
    for column in ("target", "runs", "kept", "passes to do", "in passes of 16 rows"):
        table.add_column(column, justify="left" if column == "target" else "right")
    seen: set[str] = set()
    total = [0, 0, 0, 0.0]
    for target in order.targets:
        arms = _runs(EXPERIMENTS[target], order)
        runs = {key_of(run): run for of_arm in arms.values() for run in of_arm}
        new = {key: run for key, run in runs.items() if key not in seen}
        seen |= set(new)
        missing = [run for run in new.values() if order.fresh or kept(run, order.kept) is None]
        passes = [passes_of(run) for run in missing]
        alike = sum(n * run.config.batch_size / 16 for n, run in zip(passes, missing, strict=True))
        row = [len(new), len(new) - len(missing), sum(passes), alike]
        total = [before + more for before, more in zip(total, row, strict=True)]
        table.add_row(target, *(f"{value:,.0f}" for value in row))
    table.add_row("all", *(f"{value:,.0f}" for value in total))
    Console(width=120).print(table)


def passes_of(run: Run) -> int:
    """Count a run's forward passes of one batch; a backward pass counts as two."""
    config = run.config
    workers = min(run.settings.clients, config.cohort_size_max)
    if run.first_order is not None:
        each = 3
    else:
        each = 2 * config.probes if config.estimator == "two_sided" else config.probes + 1
    return config.rounds * workers * config.local_steps * each


def _runs(described: Experiment, order: Order) -> dict[str, list[Run]]:
    seeds = order.seeds or (1 if order.changes.quick else described.seeds)
    return {
        arm.name: [run_of(described, arm, seed, order.changes) for seed in range(1, seeds + 1)]
        for arm in described.arms
    }


def _prepare(runs: dict[str, dict[str, list[Run]]]) -> None:
    """Fetch what of models and data in the cache a run uses."""
    folders = {
        Path(folder)
        for arms in runs.values()
        for of_arm in arms.values()
        for run in of_arm
        for folder in (run.settings.model, run.settings.data)
    }
    if any(folder.is_relative_to(CACHE) for folder in folders):
        from deploy.demo.prepare import prepare
        from experiments.public_data import prepare_folders

        prepare(CACHE)
        prepare_folders(CACHE, folders)


def _results(runs: Mapping[str, Run], order: Order) -> dict[str, Result]:
    """Every run's result by the run's key: kept, or done now, several processes at a time."""
    console = Console(stderr=True, width=120)
    results: dict[str, Result] = {}
    for key, run in {} if order.fresh else runs.items():
        if (result := kept(run, order.kept)) is not None:
            results[key] = result
    missing = {key: run for key, run in runs.items() if key not in results}
    console.print(f"{len(runs)} runs, {len(results)} of them kept from before")
    processes = Processes(order.kept)
    with ThreadPoolExecutor(order.jobs) as pool:
        futures = {pool.submit(processes.result, run): key for key, run in missing.items()}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                key, result = futures[future], future.result()
                results[key] = result
                console.print(f"{number}/{len(missing)} {_line(result)}", highlight=False)
        except BaseException:
            processes.end()
            raise
    return results


def _line(result: Result) -> str:
    run = result.run
    method = "FedMeZO" if run.first_order is None else "BP-FedAvg"
    end = result.whole[-1]
    what = result.ended or f"accuracy {end.accuracy:.3f}, loss {end.loss:.3f}"
    return f"{method}, seed {run.config.seed}, {result.wall_s:.0f} s: {what}"


if __name__ == "__main__":
    sys.exit(main())
