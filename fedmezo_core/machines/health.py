"""Whether a run gets better, worse or no better, by its losses alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmezo_core.records import Evaluated


@dataclass(slots=True)
class LossWatch:
    """Follows one kind of loss over the rounds."""

    first: float | None = None
    newest: float = 0.0
    newest_round: int = 0
    high_since: int | None = None
    """The round since which every loss was above the allowed multiple of the first one."""

    def see(self, round_: int, loss: float, factor: float) -> None:
        """Take the loss of `round_`, which is high if it is above `factor` times the first one.

        If the first loss is 0 or below, as an objective's scores can be, no loss is high.
        """
        if self.first is None:
            self.first = loss
        self.newest, self.newest_round = loss, round_
        if self.first <= 0 or loss <= factor * self.first:
            self.high_since = None
        elif self.high_since is None:
            self.high_since = round_


@dataclass(slots=True)
class Health:
    """The run's losses, folded. Equal journals give equal health."""

    training: LossWatch = field(default_factory=LossWatch)
    """Mean losses of the committed answers, if the run reports them."""
    heldout: LossWatch = field(default_factory=LossWatch)
    """Losses on held-out rows."""
    best: Evaluated | None = None
    evaluations_since_best: int = 0

    def trained(self, round_: int, loss: float, factor: float) -> None:
        """A round was committed whose answers' mean loss is `loss`."""
        self.training.see(round_, loss, factor)

    def evaluated(self, record: Evaluated, factor: float) -> None:
        """Take an evaluation of the weights; one older than the newest changes nothing."""
        if self.heldout.first is not None and record.round <= self.heldout.newest_round:
            return
        self.heldout.see(record.round, record.loss, factor)
        if self.best is None or record.loss < self.best.loss:
            self.best, self.evaluations_since_best = record, 0
        else:
            self.evaluations_since_best += 1

    def resumed(self) -> None:
        """A person resumed the run: losses that were high so far no longer count."""
        self.training.high_since = self.heldout.high_since = None

    def gone_wrong(self, factor: float, rounds: int) -> str:
        """Why the run should pause: a loss was high for `rounds` rounds (0: never). Else empty."""
        for name, watch in (("training", self.training), ("held-out", self.heldout)):
            since = watch.high_since
            if rounds and since is not None and watch.newest_round - since + 1 >= rounds:
                return (
                    f"the {name} loss is {watch.newest:.4g} in round {watch.newest_round}, above "
                    f"{factor:g} times its first value {watch.first:.4g} since round {since}: the "
                    "learning rate is too large; resume with a smaller one, or begin again from an "
                    "earlier round"
                )
        return ""

    def no_better(self, evaluations: int) -> str:
        """Why the run should end: `evaluations` in a row were not better (0: never). Else empty."""
        if not evaluations or self.evaluations_since_best < evaluations or self.best is None:
            return ""
        return (
            f"no held-out loss of the last {self.evaluations_since_best} evaluations was below "
            f"{self.best.loss:.4g}, that of round {self.best.round}"
        )
