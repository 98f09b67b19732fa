"""Tables that show the status of a run to a person; rich draws them."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmezo_core.records import digest64_hex
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1.journal_pb2 import Evaluated

_PHASES = {
    wire.PHASE_WAITING: "waiting for workers",
    wire.PHASE_OPEN: "open",
    wire.PHASE_FINISHED: "finished",
    wire.PHASE_PAUSED: "PAUSED",
}

PACE_ROUNDS = 8
"""Newest rounds by which the time that is left is estimated."""
PACE_AFTER_SHARE = 0.3
"""Share of a run's rounds before which nothing is estimated."""
PACE_DIFFERS = 1.5
"""Nothing is estimated while the two halves of the newest rounds differ by more than this."""

EVALUATION_DUE = "the last weights are being evaluated"


def size_text(byte_count: float) -> str:
    """A size in decimal units, such as 1,234 B, 12.1 kB or 1.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if byte_count < 1000 or unit == "GB":
            return f"{byte_count:,.0f} {unit}" if unit == "B" else f"{byte_count:,.1f} {unit}"
        byte_count /= 1000
    raise AssertionError("the last unit has no bound")


def counted(count: int, thing: str) -> str:
    """A count of things, such as 1 record or 1,200 records."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """A duration, such as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """Estimates how long a run still takes, once its newest rounds tell.

    The first rounds of a run are slower than the rest: models load, kernels compile, and what is
    computed once for each row is computed then.
    """

    def __init__(self) -> None:
        # Round -> when it was first seen, for the newest rounds.
        self._seen: deque[tuple[int, float]] = deque(maxlen=PACE_ROUNDS + 1)

    def seconds_left(self, status: wire.GetStatusResponse, now_s: float) -> float | None:
        """Take a status that came at `now_s`; returns the seconds to the last round.

        None until the run has done `PACE_AFTER_SHARE` of its rounds, and while the newest ones do
        not have one pace.
        """
        if not self._seen or status.round > self._seen[-1][0]:
            self._seen.append((status.round, now_s))
        rounds = status.config.rounds
        is_running = status.phase not in (wire.PHASE_FINISHED, wire.PHASE_PAUSED)
        if not is_running or status.round < PACE_AFTER_SHARE * rounds:
            return None
        if len(self._seen) <= PACE_ROUNDS:
            return None
        seen = [self._seen[place] for place in (0, PACE_ROUNDS // 2, PACE_ROUNDS)]
        early, late = (
            (after_s - before_s) / (after - before)
            for (before, before_s), (after, after_s) in pairwise(seen)
        )
        if max(early, late) > PACE_DIFFERS * min(early, late):
            return None
        (first, first_s), (last, last_s) = seen[0], seen[-1]
        whole_s = (last_s - first_s) / (last - first) * (rounds - last)
        return max(whole_s - (now_s - last_s), 0.0)


def agreement(status: wire.GetStatusResponse) -> tuple[bool, str]:
    """Whether all parties held the same weights in the newest round with digests; and a text."""
    if not status.digests:
        since = f" since start {status.epoch} of the run" if status.epoch > 1 else ""
        return True, f"no digests yet{since}"
    newest = max(digest.round for digest in status.digests)
    same = [digest for digest in status.digests if digest.round == newest]
    kinds = {digest.weights_digest for digest in same}
    names = ", ".join(digest.party for digest in same)
    if len(kinds) == 1:
        hold = "holds" if len(same) == 1 else "hold"
        return True, f"round {newest}: {names} {hold} {next(iter(kinds)).hex()[:16]}"
    return False, f"round {newest}: {names} DIFFER"


def best_of(status: wire.GetStatusResponse) -> Evaluated | None:
    """The evaluation with the smallest loss, the first of several; None if there is none."""
    return min(status.evaluations, key=lambda evaluation: evaluation.loss, default=None)


def run_line(status: wire.GetStatusResponse, seconds_left: float | None = None) -> str:
    """The status in one line, for output that is not a terminal."""
    parts = [f"round {status.round}/{status.config.rounds}"]
    losses = [r.mean_loss for r in status.recent_rounds if r.HasField("mean_loss")]
    if losses:
        parts.append(f"training loss {losses[-1]:.4f}")
    if status.evaluations:
        parts.append(f"held-out at {_evaluation(status.evaluations[-1])}")
    best = best_of(status)
    if best is not None and best.round < status.evaluations[-1].round:
        parts.append(f"best at {_evaluation(best)}")
    up = sum(worker.bytes_up for worker in status.workers)
    down = sum(worker.bytes_down for worker in status.workers)
    since = f" since start {status.epoch} of the run" if status.epoch > 1 else ""
    parts.append(f"up {size_text(up)}, down {size_text(down)}{since}")
    if status.phase == wire.PHASE_PAUSED:
        parts.append(f"PAUSED: {status.reason}")
    elif status.phase == wire.PHASE_FINISHED:
        parts.append("finished")
        if status.evaluation_due:
            parts.append(EVALUATION_DUE)
        if status.reason:
            parts.append(status.reason)
    elif seconds_left is not None:
        parts.append(f"about {duration_text(seconds_left)} left")
    return "; ".join(parts)


def run_view(
    status: wire.GetStatusResponse, *, seconds_left: float | None = None
) -> RenderableType:
    """The status as tables."""
    config = status.config
    head = Table.grid(padding=(0, 2))
    # Texts, not strings: rich would read what stands in brackets in a string as its markup.
    head.add_row("run", Text.assemble((config.run_id, "bold"), f" on {config.model}"))
    left = "" if seconds_left is None else f", about {duration_text(seconds_left)} left"
    progress = Table.grid(padding=(0, 2, 0, 0))
    progress.add_row(
        f"{status.round} of {config.rounds} ({_PHASES.get(status.phase, 'unknown')}{left})",
        ProgressBar(total=config.rounds, completed=status.round, width=20),
    )
    head.add_row("round", progress)
    if status.reason:
        paused = status.phase == wire.PHASE_PAUSED
        head.add_row("because", Text(status.reason, style="bold red" if paused else ""))
    if status.phase == wire.PHASE_PAUSED:
        head.add_row("", Text(f"to continue all the same: fedmezo run resume {config.run_id}"))
    losses = [r for r in status.recent_rounds if r.HasField("mean_loss")]
    if losses:
        head.add_row("training loss", f"{losses[-1].mean_loss:.4f}")
    if status.evaluations:
        first, last = status.evaluations[0], status.evaluations[-1]
        head.add_row("held-out", _evaluation(first))
        if last.round > first.round:
            head.add_row("", _evaluation(last))
    best = best_of(status)
    if best is not None and best.round < status.evaluations[-1].round:
        head.add_row("best", _evaluation(best))
    if status.evaluation_due:
        head.add_row("" if status.evaluations else "held-out", EVALUATION_DUE)
    equal, text = agreement(status)
    head.add_row("weights", Text(text, style="" if equal else "bold red"))
    head.add_row("journal", f"{counted(status.records, 'record')}, head {status.head.hex()[:16]}")
    parts: list[RenderableType] = [head, worker_table(status)]
    if status.workers:
        since = duration_text(status.uptime_ms / 1000)
        parts.append(
            Text(
                f"rounds, up and down count since start {status.epoch} of the run, {since} ago",
                style="dim",
            )
        )
    parts += [
        Text(f"{worker.worker}: {worker.complaint}", style="yellow")
        for worker in status.workers
        if worker.complaint
    ]
    parts += [
        Text(f"{worker.worker}: {worker.suspicion}", style="yellow")
        for worker in status.workers
        if worker.suspicion
    ]
    parts += [
        Text(f"{found.worker}: excluded after round {found.round}: {found.reason}", style="red")
        for found in status.excluded
    ]
    if status.replica_complaint:
        parts.append(Text(status.replica_complaint, style="yellow"))
    return Group(*parts, *_divergences(status))


def _divergences(status: wire.GetStatusResponse) -> list[Text]:
    """The newest divergence of each party; those that were mended are no alarm."""
    newest = {divergence.party: divergence for divergence in status.divergences}
    parties = set(status.diverged_parties)
    lines = [
        Text(
            f"{party} diverged after round {found.round}: digest "
            f"{digest64_hex(found.found_digest64)}, the run's "
            f"{digest64_hex(found.expected_digest64)}",
            style="bold red",
        )
        for party, found in newest.items()
        if party in parties
    ]
    mended = [
        f"{party} (round {found.round})" for party, found in newest.items() if party not in parties
    ]
    if mended:
        lines.append(
            Text(
                f"diverged earlier, with the run's weights again: {', '.join(mended)}", style="dim"
            )
        )
    return lines


def worker_table(status: wire.GetStatusResponse) -> Table:
    """A table with one line for each worker, at most 80 columns wide if names are short."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("worker", "state"):
        table.add_column(name)
    for name in ("rounds", "loss", "rate", "answer after", "up", "down"):
        table.add_column(name, justify="right")
    for worker in status.workers:
        table.add_row(
            Text(worker.worker),
            _state(worker, is_over=status.phase == wire.PHASE_FINISHED),
            str(worker.rounds_answered),
            f"{worker.mean_loss:.4f}" if worker.HasField("mean_loss") else "-",
            f"{worker.learning_rate:.3g}" if worker.HasField("learning_rate") else "-",
            f"{worker.answered_after_ms / 1000:.1f} s" if worker.answered_after_ms else "-",
            size_text(worker.bytes_up),
            size_text(worker.bytes_down),
        )
    return table


def _state(worker: wire.WorkerStatus, *, is_over: bool) -> str:
    if worker.diverged:
        return "[red]diverged[/]"
    if not worker.connected:
        return "done" if is_over else "[yellow]away[/]"
    return "measuring" if worker.measuring else "ready"


def _evaluation(evaluation: Evaluated) -> str:
    auc = f", AUC {evaluation.auc:.3f}" if evaluation.HasField("auc") else ""
    return (
        f"round {evaluation.round}: loss {evaluation.loss:.4f}, accuracy "
        f"{100 * evaluation.accuracy:.1f} %{auc}"
    )
