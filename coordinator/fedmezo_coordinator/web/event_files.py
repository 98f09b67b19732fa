"""A journal's curves as an event file, which TensorBoard shows."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmezo_coordinator.web.run_series import Curve, RunSeries
from fedmezo_core.errors import ConfigError
from fedmezo_core.journal.journal import Journal

EVERY_ROUND = 1 << 31
"""Room for every round: a file need not fit a screen."""


def write_event_file(journal: Journal, folder: Path) -> int:
    """Write the curves of a verified journal to a new event file in `folder`.

    A step is a round; a journal keeps no times, so all values bear the time of writing. Returns the
    count of values. Raises `ConfigError` without tensorboardX, or if the folder cannot be written.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            f"Event files need tensorboardX; run: {sys.executable} -m pip install "
            "'fedmezo[tensorboard]'"
        ) from None
    series = RunSeries(points_max=EVERY_ROUND)
    for entry in journal.load():
        series.take(entry.row.body)
    curves: dict[str, Curve] = {
        "loss/train": series.losses,
        "loss/heldout": series.heldout_losses,
        "accuracy/heldout": series.heldout_accuracies,
        "answers": series.answers,
    }
    try:
        writer = SummaryWriter(str(folder))
        for tag, curve in curves.items():
            for point in curve.points:
                writer.add_scalar(tag, point.mean, point.last_round)
        writer.close()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror or error}); name another folder."
        ) from None
    return sum(len(curve.points) for curve in curves.values())
