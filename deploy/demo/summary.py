"""What the demo shows at its end: one table, one plot, one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from fedmezo_coordinator.programs.view import agreement, duration_text, size_text
from fedmezo_proto.v1 import coordinator_pb2 as wire


def figures(status: wire.GetStatusResponse, run_s: float) -> list[dict[str, Any]]:
    """The demo's figures as {name, value, unit, goal}."""
    first, last = status.evaluations[0], status.evaluations[-1]
    up = sum(worker.bytes_up for worker in status.workers)
    down = sum(worker.bytes_down for worker in status.workers)
    shipped = shipped_bytes(status)
    rows: list[tuple[str, Any, str, str]] = [
        ("held-out accuracy before", first.accuracy, "share", ""),
        ("held-out accuracy after", last.accuracy, "share", "clearly above before"),
        ("held-out loss before", first.loss, "nats", ""),
        ("held-out loss after", last.loss, "nats", "clearly below before"),
        ("bytes up, all workers", up, "B", ""),
        ("bytes down, all workers", down, "B", ""),
        ("bytes to ship the weights, each way", shipped, "B", ""),
        ("shipping the weights up / bytes up", shipped / max(up, 1), "ratio", "above 1000"),
        ("uplink a round and worker", up / status.round / len(status.workers), "B", "at most 150"),
        (
            "parties whose final digests are equal",
            _agreeing_parties(status),
            "parties",
            str(len(status.workers) + 1),
        ),
        ("run time", run_s, "s", "at most 480"),
    ]
    if first.HasField("auc") and last.HasField("auc"):
        rows[4:4] = [
            ("held-out AUC before", first.auc, "share", ""),
            ("held-out AUC after", last.auc, "share", ""),
        ]
    return [
        {"name": name, "value": value, "unit": unit, "goal": goal}
        for name, value, unit, goal in rows
    ]


def shipped_bytes(status: wire.GetStatusResponse) -> int:
    """Bytes one way if each worker shipped the trained weights once a round."""
    return int(status.trainable_bytes) * status.round * len(status.workers)


def _agreeing_parties(status: wire.GetStatusResponse) -> int:
    final = [d.weights_digest for d in status.digests if d.round == status.round]
    return max((final.count(digest) for digest in set(final)), default=0)


def print_table(status: wire.GetStatusResponse, run_s: float) -> None:
    """The one table at the end."""
    first, last = status.evaluations[0], status.evaluations[-1]
    learned = Table(box=None, padding=(0, 2), header_style="bold")
    learned.add_column(f"held-out, {last.rows} rows")
    for name in ("before", "after"):
        learned.add_column(name, justify="right")
    learned.add_row("accuracy", f"{100 * first.accuracy:.1f} %", f"{100 * last.accuracy:.1f} %")
    learned.add_row("loss", f"{first.loss:.4f}", f"{last.loss:.4f}")
    if first.HasField("auc") and last.HasField("auc"):
        learned.add_row("AUC", f"{first.auc:.3f}", f"{last.auc:.3f}")
    up = sum(worker.bytes_up for worker in status.workers)
    down = sum(worker.bytes_down for worker in status.workers)
    shipped = shipped_bytes(status)
    sent = Table(box=None, padding=(0, 2), header_style="bold")
    sent.add_column(f"{status.round} rounds, {len(status.workers)} workers")
    for name in ("sent", "shipping the weights", "times less"):
        sent.add_column(name, justify="right")
    for name, count in (("up", up), ("down", down)):
        sent.add_row(name, size_text(count), size_text(shipped), f"{shipped / max(count, 1):,.0f}")
    held = Table(box=None, padding=(0, 2), header_style="bold")
    held.add_column("party")
    held.add_column(f"weights digest after round {status.round}")
    for digest in status.digests:
        if digest.round == status.round:
            held.add_row(digest.party, digest.weights_digest.hex())
    equal, _ = agreement(status)
    Console().print(
        Group(
            "",
            learned,
            "",
            sent,
            "",
            held,
            "",
            f"{'All parties hold the same weights' if equal else '[bold red]The weights DIFFER[/]'}; "
            f"the run took {duration_text(run_s)}.",
        )
    )


def write_plot(status: wire.GetStatusResponse, path: Path) -> None:
    """Loss and accuracy over the rounds, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rounds = [e.round for e in status.evaluations]
    trained = [r for r in status.recent_rounds if r.HasField("mean_loss")]
    left.plot(
        [r.round for r in trained],
        [r.mean_loss for r in trained],
        color="#9db4c0",
        label="training (mean of the workers' batches)",
    )
    left.plot(rounds, [e.loss for e in status.evaluations], "o-", color="#0b3954", label="held-out")
    left.set(title="Loss", xlabel="round", ylabel="cross-entropy (nats)")
    right.plot(
        rounds, [e.accuracy for e in status.evaluations], "o-", color="#0b3954", label="accuracy"
    )
    if all(e.HasField("auc") for e in status.evaluations):
        right.plot(rounds, [e.auc for e in status.evaluations], "s--", color="#bf6900", label="AUC")
    right.set(title="Held-out accuracy", xlabel="round", ylim=(0.4, 1.0))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    up = sum(worker.bytes_up for worker in status.workers)
    figure.suptitle(
        f"{status.config.model}, {len(status.workers)} workers, {status.round} rounds: "
        f"{size_text(up)} sent up in all"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_json(values: list[dict[str, Any]], path: Path) -> None:
    """A list of {name, value, unit, goal}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
