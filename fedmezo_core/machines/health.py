"""Whether a run gets better, worse or no better, by its losses and projected gradients alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedmezo_core.config import RunConfig
from fedmezo_core.records import Evaluated

ZERO_ROUNDS = 3
"""Rounds in a row whose projected gradients are all 0, before the run pauses."""
ZERO_SCORES = 1000
"""Projected gradients in a row that must be 0 too if an objective scores the run, because scores
that count may well be equal at two points."""
BETTER_SHARE = 0.8
"""A loss below this share of chance is clearly better than chance."""
WORSE_EVALUATIONS = 3
"""Evaluations in a row that must have got worse, or be at chance, before the run pauses."""
WORSE_SHARE = 0.1
"""Least distance of a clearly worse loss from the best one, as a share of the latter's size."""


@dataclass(slots=True)
class Streak:
    """How long something has been so without a break."""

    since: int | None = None
    """Its first round; None: the newest round is not part of it."""
    count: int = 0
    """Times that it was seen since then."""

    def see(self, round_: int, is_so: bool, count: int = 1) -> None:
        """Take `count` sightings in `round_`, or its end."""
        if not is_so:
            self.since, self.count = None, 0
            return
        if self.since is None:
            self.since = round_
        self.count += count

    def lasts(self, round_: int, rounds: int, count: int = 1) -> bool:
        """Whether it has lasted `rounds` rounds at `round_`, and was seen `count` times."""
        return self.since is not None and round_ - self.since + 1 >= rounds and self.count >= count


@dataclass(slots=True)
class LossWatch:
    """Follows one kind of loss over the rounds."""

    first: float | None = None
    newest: float = 0.0
    newest_round: int = 0
    high_since: int | None = None
    """The round since which every loss was above the allowed multiple of the first one."""
    better: Streak = field(default_factory=Streak)
    """Losses clearly better than chance."""
    was_better: bool = False
    """Whether the loss has been clearly better than chance for long enough to be sure."""
    at_chance: Streak = field(default_factory=Streak)
    """Losses of a model that guesses, or worse ones."""

    def see(self, round_: int, loss: float, config: RunConfig, sure_after: int) -> None:
        """Take the loss of `round_`, which is high if it is above a multiple of the first one.

        If the first loss is 0 or below, as an objective's scores can be, no loss is high.
        `sure_after` losses clearly better than chance are not luck.
        """
        if self.first is None:
            self.first = loss
        self.newest, self.newest_round = loss, round_
        if self.first <= 0 or loss <= config.pause_loss_factor * self.first:
            self.high_since = None
        elif self.high_since is None:
            self.high_since = round_
        chance = chance_of(config)
        if chance is not None:
            self.better.see(round_, loss < BETTER_SHARE * chance)
            self.was_better |= self.better.count >= sure_after
            self.at_chance.see(round_, loss >= chance)

    def forgive(self) -> None:
        """Begin anew with whatever may lead to a pause."""
        self.high_since, self.was_better = None, False
        self.better, self.at_chance = Streak(), Streak()


@dataclass(slots=True)
class Health:
    """The run's losses and zeros, folded. Equal journals give equal health."""

    training: LossWatch = field(default_factory=LossWatch)
    """Mean losses of the committed answers, if the run reports them."""
    heldout: LossWatch = field(default_factory=LossWatch)
    """Losses on held-out rows."""
    best: Evaluated | None = None
    """The evaluation with the smallest loss."""
    evaluations_since_best: int = 0
    worsening: Streak = field(default_factory=Streak)
    """Evaluations that are worse than the one before, and clearly worse than the best."""
    zeros: Streak = field(default_factory=Streak)
    """Projected gradients in rounds that have no other value than 0."""

    def committed(
        self, round_: int, loss: float | None, zeros: int | None, config: RunConfig
    ) -> None:
        """A round was committed.

        `loss` is the mean loss of its answers, None if they carry none, and `zeros` the number of
        its projected gradients if all of them are 0, otherwise None.
        """
        self.zeros.see(round_, zeros is not None, zeros or 0)
        if loss is not None:
            # A round's loss is that of few rows: one low value may be chance.
            self.training.see(round_, loss, config, sure_after=2 * config.pause_rounds)

    def evaluated(self, record: Evaluated, config: RunConfig) -> None:
        """Take an evaluation of the weights; one older than the newest can only be the best."""
        watch, best = self.heldout, self.best
        is_best = best is None or record.loss < best.loss
        if watch.first is None or record.round > watch.newest_round:
            is_worse = (
                watch.first is not None
                and best is not None
                and record.loss > max(watch.newest, _clearly_worse(best.loss, watch.first))
            )
            self.worsening.see(record.round, is_worse)
            watch.see(record.round, record.loss, config, sure_after=1)
            self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best = record

    def resumed(self) -> None:
        """A person resumed the run: what went wrong so far no longer counts."""
        self.training.forgive()
        self.heldout.forgive()
        self.worsening, self.zeros = Streak(), Streak()

    def gone_wrong(self, config: RunConfig, round_: int) -> str:
        """Why the run should pause after `round_`, in one sentence; empty if it should not.

        It never should if the contract's `pause_rounds` is 0.
        """
        if not config.pause_rounds:
            return ""
        found = self._zeros(config, round_) or self._losses(config) or self._evaluations(config)
        if found and self.best is not None and self.best.round:
            found += (
                f"; the best evaluation is that of round {self.best.round}, with loss "
                f"{self.best.loss:.4g}: fedmezo export --best writes its model"
            )
        return found

    def no_better(self, evaluations: int) -> str:
        """Why the run should end: `evaluations` in a row were not better (0: never). Else empty."""
        if not evaluations or self.evaluations_since_best < evaluations or self.best is None:
            return ""
        return (
            f"no held-out loss of the last {self.evaluations_since_best} evaluations was below "
            f"{self.best.loss:.4g}, that of round {self.best.round}"
        )

    def _zeros(self, config: RunConfig, round_: int) -> str:
        count = ZERO_SCORES if config.task.objective else 1
        if not self.zeros.lasts(round_, ZERO_ROUNDS, count):
            return ""
        if config.task.objective:
            return (
                f"no probe since round {self.zeros.since} has changed the objective's score, so "
                "nothing is learned: the score may have too few steps (an exact match of a model "
                "that gets nothing right is the same at every point), eps may be too small to "
                "change it, or a learning rate that is too large has ruined the weights; begin "
                "again with a score of finer steps, a larger eps or a smaller learning_rate"
            )
        return (
            f"every projected gradient since round {self.zeros.since} is exactly 0, so nothing is "
            "learned any more: a learning rate that is too large has ruined the weights, or eps is "
            f"too small to change a loss in {config.dtype}, or no loss depends on what is trained; "
            "begin again with a smaller learning_rate, or with a larger eps"
        )

    def _losses(self, config: RunConfig) -> str:
        for name, watch, count in (
            ("training", self.training, 1),
            ("held-out", self.heldout, WORSE_EVALUATIONS),
        ):
            since = watch.high_since
            if since is not None and watch.newest_round - since + 1 >= config.pause_rounds:
                return (
                    f"the {name} loss is {watch.newest:.4g} in round {watch.newest_round}, above "
                    f"{config.pause_loss_factor:g} times its first value {watch.first:.4g} since "
                    f"round {since}: the learning rate is too large; resume with a smaller one, or "
                    "begin again from an earlier round"
                )
            if watch.was_better and watch.at_chance.lasts(
                watch.newest_round, 2 * config.pause_rounds, count
            ):
                return (
                    f"the {name} loss is {watch.newest:.4g} in round {watch.newest_round}, no "
                    f"better than a guess among {len(config.task.verbalizers)} classes "
                    f"({chance_of(config):.4g}) since round {watch.at_chance.since}, after it was "
                    "better: a learning rate that is too large has ruined the weights; begin again "
                    "with a smaller one"
                )
        return ""

    def _evaluations(self, config: RunConfig) -> str:
        watch, worsening = self.heldout, self.worsening
        rounds = 2 * config.pause_rounds
        if not worsening.lasts(watch.newest_round, rounds, WORSE_EVALUATIONS):
            return ""
        return (
            f"the last {worsening.count} evaluations got worse one after the other, up to the "
            f"held-out loss {watch.newest:.4g} of round {watch.newest_round}: the learning rate is "
            "too large, or the workers' rows are learned by heart; resume with a smaller rate, or "
            "end the run here"
        )


def chance_of(config: RunConfig) -> float | None:
    """Loss in nats of a model that guesses; None where it is not known."""
    if config.task.kind != "classification" or config.task.objective:
        return None
    return math.log(len(config.task.verbalizers))


def _clearly_worse(best: float, first: float) -> float:
    """The loss from which on a run has lost half of what it had gained, and more than noise."""
    return best + max(WORSE_SHARE * abs(best), (first - best) / 2)
