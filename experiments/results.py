"""An experiment's results: figures as JSON, a table as Markdown, curves as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.figures import REPORTS, Figure, write
from experiments.catalogue import Axis, Experiment, Metric
from experiments.judging import Point
from experiments.peak_memory import OF_INFERENCE
from experiments.runs import Result

METRICS: Final[dict[Metric, str]] = {
    "accuracy": "held-out accuracy",
    "calibrated_accuracy": "calibrated accuracy (median threshold)",
    "auc": "AUC",
    "loss": "held-out loss (nats)",
    "exact_match": "exact match",
    "token_f1": "token F1",
}
COLUMNS: Final[dict[Metric, str]] = {
    "accuracy": "accuracy",
    "calibrated_accuracy": "calibrated",
    "auc": "AUC",
    "loss": "loss",
    "exact_match": "exact match",
    "token_f1": "token F1",
}
"""Headings of the table, in which a metric that no run has is left out."""
AXES: Final[dict[Axis, str]] = {
    "round": "round",
    "forwards": "forward passes of one batch, all workers",
    "rows": "rows through the model, all workers",
    "bytes": "bytes sent up and down, all workers",
}
PACE_ROUNDS: Final = 5
"""Number of successive rounds whose training losses are averaged before they are compared."""
# Okabe and Ito's colours can be told apart with all common forms of colour blindness; lines and
# markers differ as well, and tell arms of one colour apart.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
_LEGEND_CHARACTERS: Final = 130
"""Most characters in a line of the legend: all names, and six for each name's sample."""
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of one arm: for each seed, a list of points in the order of rounds."""

    arm: str
    rounds: list[list[int]]
    x_per_round: list[dict[Axis, float]]
    """For each seed, the cost of a round on each axis."""
    metrics: dict[Metric, list[list[float | None]]]

    def line(self, metric: Metric, axis: Axis) -> list[tuple[float, float, float, float]]:
        """Return (x, mean, least, most) over the seeds, at each round at which any was judged."""
        found: dict[int, list[tuple[float, float]]] = {}
        rows = zip(self.rounds, self.metrics[metric], self.x_per_round, strict=True)
        for rounds, values, cost in rows:
            for round_, value in zip(rounds, values, strict=True):
                if value is not None:
                    found.setdefault(round_, []).append((round_ * cost[axis], value))
        line = []
        for _, points in sorted(found.items()):
            values_here = [value for _, value in points]
            x = sum(x for x, _ in points) / len(points)
            mean = sum(values_here) / len(values_here)
            line.append((x, mean, min(values_here), max(values_here)))
        return line


def curve_of(arm: str, results: Sequence[Result]) -> Curve:
    """Make the curve of an arm from its runs."""
    costs: list[dict[Axis, float]] = [
        {
            "round": 1.0,
            "forwards": result.forwards / max(result.rounds, 1),
            "rows": result.forward_rows / max(result.rounds, 1),
            "bytes": (result.bytes_up + result.bytes_down) / max(result.rounds, 1),
        }
        for result in results
    ]
    return Curve(
        arm,
        [[point.round for point in result.curve] for result in results],
        costs,
        {
            metric: [[getattr(point, metric) for point in result.curve] for result in results]
            for metric in METRICS
        },
    )


# ---------------------------------------------------------------- figures


def figures(experiment: Experiment, results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    """Make all figures: the base's, each arm's outcome and costs, then arm against baseline."""
    found: list[Figure] = []
    for metric, name in METRICS.items():
        value = getattr(next(iter(results.values()))[0].whole[0], metric)
        if value is not None:
            found.append(Figure(f"before: {name}", value, "nats" if metric == "loss" else "share"))
    for arm, runs in results.items():
        found += _outcome(arm, runs)
        found += _costs(arm, runs)
    for arm, baseline in experiment.against.items():
        if arm in results and baseline in results:
            found += _against(arm, baseline, results)
    for arm, baselines in experiment.drops.items():
        for baseline in baselines:
            if arm in results and baseline in results:
                found += _drops(arm, baseline, results)
    if experiment.paced_by in results:
        found += _pace(experiment.paced_by, results)
        found += _held_out_pace(experiment.paced_by, results)
    return [with_goal(experiment, figure) for figure in found]


def with_goal(experiment: Experiment, figure: Figure) -> Figure:
    """Add the experiment's goal to a figure, if there is one for it."""
    return replace(figure, goal=experiment.goals.get(figure.name, figure.goal))


def _outcome(arm: str, runs: Sequence[Result]) -> list[Figure]:
    found = []
    ends = [run.whole[-1] for run in runs if not run.ended]
    for metric, name in METRICS.items():
        values = [value for end in ends if (value := getattr(end, metric)) is not None]
        if values:
            unit = "nats" if metric == "loss" else "share"
            found.append(Figure(f"{arm}: {name}", sum(values) / len(values), unit))
            found.append(
                Figure(f"{arm}: {name}, most − least of the seeds", max(values) - min(values), unit)
            )
    found.append(Figure(f"{arm}: seeds", len(runs), "runs"))
    found.append(Figure(f"{arm}: seeds that were lost", len(runs) - len(ends), "runs"))
    return found


def _costs(arm: str, runs: Sequence[Result]) -> list[Figure]:
    def mean(name: str) -> float:
        return float(sum(getattr(run, name) for run in runs)) / len(runs)

    minutes = (
        sum(run.workers_cpu_s + run.workers * run.apply_cpu_s for run in runs) / len(runs) / 60
    )
    return [
        Figure(f"{arm}: rounds", mean("rounds"), "rounds"),
        Figure(f"{arm}: forward passes of one batch, all workers", mean("forwards"), "passes"),
        Figure(f"{arm}: rows through the model, all workers", mean("forward_rows"), "rows"),
        Figure(f"{arm}: backward passes of one batch, all workers", mean("backwards"), "passes"),
        Figure(f"{arm}: bytes up, all workers", mean("bytes_up"), "B"),
        Figure(f"{arm}: bytes down, all workers", mean("bytes_down"), "B"),
        Figure(f"{arm}: trained parameters", mean("trained_elements"), "parameters"),
        Figure(f"{arm}: core-minutes, all workers", minutes, "min"),
        Figure(f"{arm}: hours, with evaluations", mean("wall_s") / 3600, "h"),
    ]


def _drops(arm: str, baseline: str, results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    """Tell what share of the baseline's drop in held-out loss an arm has, seed by seed.

    At equal rounds: at the last round of the shorter curve, between points along a straight line.
    At convergence: the lowest point of either curve. Seeds for which the baseline's loss does not
    drop do not count.
    """
    shares: dict[str, list[float]] = {"at equal rounds": [], "at convergence": []}
    for ours, theirs in zip(results[arm], results[baseline], strict=False):
        curves = [{point.round: point.loss for point in run.curve} for run in (ours, theirs)]
        last = min(max(curve) for curve in curves)
        ends = {
            "at equal rounds": [
                float(np.interp(last, list(curve), list(curve.values()))) for curve in curves
            ],
            "at convergence": [min(curve.values()) for curve in curves],
        }
        for when, losses in ends.items():
            own, drop = (curve[0] - loss for curve, loss in zip(curves, losses, strict=True))
            if drop > 0:
                shares[when].append(own / drop)
    found = []
    for when, values in shares.items():
        if values:
            name = f"{arm}: share of the drop of {baseline}, {when}"
            spread = max(values) - min(values)
            found.append(Figure(name, sum(values) / len(values), "share"))
            found.append(Figure(f"{name}, most − least of the seeds", spread, "share"))
    return found


def _pace(baseline: str, results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    """Count the rounds until an arm reaches the baseline's last training loss, seed by seed.

    Losses are means of PACE_ROUNDS rounds. A run that does not reach it counts with all its rounds.
    A seed for which either run was lost does not count.
    """
    found = []
    for arm, runs in results.items():
        rounds, changes = [], []
        for run, paced in zip(runs, results[baseline], strict=False):
            if run.ended or paced.ended:
                continue
            aim, ours = _smooth(paced.train_losses)[-1], _smooth(run.train_losses)
            reached = [index for index, loss in enumerate(ours) if loss <= aim]
            # The last mean is known after all rounds.
            rounds.append(run.rounds - len(ours) + 1 + reached[0] if reached else run.rounds)
            changes.append(ours[-1] - aim)
        if not rounds:
            continue
        name = f"{arm}: rounds to the last training loss of {baseline}"
        found += [
            Figure(name, sum(rounds) / len(rounds), "rounds"),
            Figure(f"{name}, most − least of the seeds", max(rounds) - min(rounds), "rounds"),
            Figure(
                f"{arm}: last training loss, less {baseline}'s, same seeds",
                sum(changes) / len(changes),
                "nats",
            ),
            Figure(
                f"{arm}: last training loss, less {baseline}'s, most − least of the seeds",
                max(changes) - min(changes),
                "nats",
            ),
        ]
    return found


def _held_out_pace(baseline: str, results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    """Count the rounds until an arm reaches the last held-out loss of the baseline's mean seed.

    Only the rounds of the curve count. A run that does not reach the loss, or was lost before,
    counts with all its rounds.
    """
    ends = [run.curve[-1].loss for run in results[baseline] if not run.ended]
    found = []
    for arm, runs in results.items() if ends else ():
        aim = sum(ends) / len(ends)
        rounds = [
            next((p.round for p in run.curve if p.loss <= aim), run.run.config.rounds)
            for run in runs
        ]
        name = f"{arm}: rounds to the last held-out loss of {baseline}"
        found += [
            Figure(name, sum(rounds) / len(rounds), "rounds"),
            Figure(f"{name}, most − least of the seeds", max(rounds) - min(rounds), "rounds"),
        ]
    return found


def _smooth(losses: Sequence[float]) -> list[float]:
    """Average each PACE_ROUNDS successive losses, or all of them if there are fewer."""
    width = min(PACE_ROUNDS, len(losses))
    return [sum(losses[first : first + width]) / width for first in range(len(losses) - width + 1)]


def _against(arm: str, baseline: str, results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    ours, theirs = results[arm], results[baseline]
    found = []
    for metric, name in METRICS.items():
        values = [
            [
                value
                for run in runs
                if not run.ended and (value := getattr(run.whole[-1], metric)) is not None
            ]
            for runs in (ours, theirs)
        ]
        if metric != "loss" and all(values):
            gap = sum(values[1]) / len(values[1]) - sum(values[0]) / len(values[0])
            found.append(Figure(f"{arm}: {name}, behind {baseline}", gap, "share"))
    for way in ("up", "down"):
        shipped, sent = (
            sum(getattr(run, f"bytes_{way}") for run in runs) / len(runs) for runs in (theirs, ours)
        )
        if sent:
            found.append(Figure(f"{baseline} ÷ {arm}: bytes {way}", shipped / sent, "ratio"))
    for name, what in (("forwards", "forward passes"), ("forward_rows", "rows through the model")):
        spent, less = (
            sum(getattr(run, name) for run in runs) / len(runs) for runs in (theirs, ours)
        )
        if less:
            found.append(Figure(f"{baseline} ÷ {arm}: {what}", spent / less, "ratio"))
    return found


# ---------------------------------------------------------------- Markdown


def markdown(
    experiment: Experiment, results: Mapping[str, Sequence[Result]], memory: Sequence[Figure]
) -> str:
    """Make a table with a row for each arm: means over the seeds, ± half of most minus least."""
    peaks = {figure.name.split(":")[0]: figure.value for figure in memory if figure.unit == "MB"}
    first = next(iter(results.values()))[0]
    shown = [metric for metric in COLUMNS if getattr(first.whole[0], metric) is not None]
    header = ["arm", *(COLUMNS[metric] for metric in shown), "rounds", "forwards", "rows"]
    header += ["bytes up", "bytes down", "core-minutes", *(["peak MB"] if memory else [])]
    rows: list[list[str]] = []
    before = [_spread([first.whole[0]], metric) for metric in shown]
    rows.append(["before", *before, *[""] * (len(header) - 1 - len(before))])
    for arm, runs in results.items():
        ends = [run.whole[-1] for run in runs if not run.ended]
        costs = _costs(arm, runs)
        by_name = {figure.name.removeprefix(f"{arm}: "): figure for figure in costs}
        row = [arm, *(_spread(ends, metric) for metric in shown)]
        row += [f"{by_name['rounds'].value:.4g}"]
        passes = f"{by_name['forward passes of one batch, all workers'].value:,.0f}"
        row += [passes + " + as many back" if runs[0].backwards else passes]
        row += [f"{by_name['rows through the model, all workers'].value:,.0f}"]
        row += [by_name[f"bytes {way}, all workers"].shown for way in ("up", "down")]
        row += [by_name["core-minutes, all workers"].shown]
        if memory:
            row += [f"{peaks[arm]:,.0f}" if arm in peaks else ""]
        lost = len(runs) - len(ends)
        row[0] += f" ({lost} of {len(runs)} seeds lost)" if lost else ""
        rows.append(row)
    for figure in memory:
        if figure.name.startswith(OF_INFERENCE):
            name = "inference" + figure.name.removeprefix(OF_INFERENCE)
            rows.append([name, *[""] * (len(header) - 2), f"{figure.value:,.0f}"])
    lines = [f"## {experiment.title}", "", _conditions(results), ""]
    lines += ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        f"\n{arm}, seed {run.run.config.seed}: {run.ended}"
        for arm, runs in results.items()
        for run in runs
        if run.ended
    ]
    return "\n".join(lines) + "\n"


def _spread(points: Sequence[Point], metric: Metric) -> str:
    values = [value for point in points if (value := getattr(point, metric)) is not None]
    if not values:
        return "–"
    scale, digits = (1.0, 3) if metric in ("loss", "auc") else (100.0, 1)
    text = f"{scale * sum(values) / len(values):.{digits}f}"
    half = scale * (max(values) - min(values)) / 2
    return f"{text} ± {half:.{digits}f}" if len(values) > 1 else text


def _conditions(results: Mapping[str, Sequence[Result]]) -> str:
    """Say in a sentence what all runs have in common."""
    runs = [run for of_arm in results.values() for run in of_arm]
    first = runs[0]
    seeds = len({run.run.config.seed for run in runs})
    spread = "; means, ± half of most minus least" if seeds > 1 else ""
    return (
        f"{Path(first.run.settings.model).name}, {first.run.settings.data}; "
        f"{first.whole[0].rows:,} held-out rows, curves on {first.curve[0].rows:,} of them; "
        f"{seeds} seed{'s' if seeds > 1 else ''}{spread}. Accuracies in per cent. {first.machine}."
    )


# ---------------------------------------------------------------- the plot


def plot(experiment: Experiment, curves: Sequence[Curve], path: Path) -> None:
    """Draw each panel: for each arm its mean over the seeds, and a band from least to most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels = [
        (metric, axis)
        for metric, axis in experiment.panels
        if any(curve.line(metric, axis) for curve in curves)
    ]
    rows = (len(panels) + 1) // 2
    figure, axes_of = pyplot.subplots(
        rows, 2, figsize=(11, 3.6 * rows + 1.0), layout="constrained", squeeze=False
    )
    flat: list[Any] = list(axes_of.flat)
    for spare in flat[len(panels) :]:
        spare.set_axis_off()
    handles: dict[str, Any] = {}
    for (metric, axis), axes in zip(panels, flat, strict=False):
        for number, curve in enumerate(curves):
            line = curve.line(metric, axis)
            if axis == "bytes":
                line = [point for point in line if point[0] > 0]
            if not line:
                continue
            x, mean, least, most = zip(*line, strict=True)
            kind = number % len(COLOURS)
            shape = (number + number // len(COLOURS)) % len(LINES)
            [handle] = axes.plot(
                x,
                mean,
                color=COLOURS[kind],
                linestyle=LINES[shape],
                marker=MARKERS[shape],
                markersize=5,
                label=curve.arm,
            )
            axes.fill_between(x, least, most, color=COLOURS[kind], alpha=0.15, linewidth=0)
            handles.setdefault(curve.arm, handle)
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel(METRICS[metric])
        axes.grid(alpha=0.3)
        if metric not in ("auc", "loss"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axis == "bytes":
            axes.set_xscale("log")
        elif axis == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds = max(len(curve.rounds) for curve in curves)
    band = f"; mean of {seeds} seeds, band from least to most" if seeds > 1 else ""
    figure.suptitle(f"{experiment.title}{band}")
    columns = _LEGEND_CHARACTERS // max(len(name) + 6 for name in handles)
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=max(1, min(len(handles), 5, columns)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------- files


def write_all(
    target: str,
    experiment: Experiment,
    results: Mapping[str, Sequence[Result]],
    memory: Sequence[Figure] = (),
    folder: Path = REPORTS,
) -> list[Path]:
    """Write an experiment's four files; returns their paths."""
    curves = [curve_of(arm, runs) for arm, runs in results.items()]
    paths = [folder / f"{target}{end}" for end in (".json", ".md", ".png", ".curves.json")]
    goaled = [with_goal(experiment, figure) for figure in memory]
    write([*figures(experiment, results), *goaled], paths[0])
    paths[1].write_text(markdown(experiment, results, memory))
    write_curves(curves, paths[3])
    plot(experiment, curves, paths[2])
    return paths


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write curves as JSON, from which the plot can be drawn again."""
    rows = [
        {
            "arm": curve.arm,
            "rounds": curve.rounds,
            "x_per_round": curve.x_per_round,
            "metrics": curve.metrics,
        }
        for curve in curves
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def redraw(target: str, experiment: Experiment, folder: Path = REPORTS) -> Path:
    """Draw the plot again from the curves that were kept."""
    rows = json.loads((folder / f"{target}.curves.json").read_text())
    path = folder / f"{target}.png"
    plot(experiment, [Curve(**row) for row in rows], path)
    return path
