"""From measured losses to eps, learning rate, probes and rounds (decision 0028).

A step along random directions is a small part gradient and a large part random walk. Over a run the
walk moves each trained element by about

    walk length = rate * sqrt(sum of squared schedule factors / directions of a step)

if steps are normalised, and by the root mean square projected gradient times that if they are not.
The length depends on nothing else: neither on the task nor on the model. What it costs does: the
mean loss at W + length * z, less the loss at W. So the question for a rate becomes one for a
length, and a few forward passes answer it. The length that is proposed costs what the run can be
expected to gain by, and never more than a fixed part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Final

from fedmezo_core.config import STEPS_MAX, RunConfig
from fedmezo_core.errors import MeasurementError
from fedmezo_core.machines.aggregate import rate_of_step, usual_loss
from fedmezo_core.machines.rates import schedule_factor

COST_SHARE_MAX: Final = 0.075
"""Most that the walk of a whole run may cost, as a part of the loss before it."""
BLIND_COST_SHARE_MAX: Final = 0.015
"""The same where nobody knows what the run may gain: the least that good walks cost (0028)."""
COST_PER_GAIN: Final = 0.05
"""What the walk may cost over sqrt(gain * loss), where `gain` is what the gradient would gain if it
stayed as it is. Real gains over a run grow with about the root of that (decision 0028)."""
STEP_GAIN_MAX: Final = 0.4
"""Most that a single step may gain by its slope, as a part of the loss: longer ones overshoot."""
LONG_RUN_GAIN: Final = 8.0
"""Such a gain over the loss, from which on more rounds teach little."""
ROUNDS_FACTOR_MAX: Final = 100
"""Most by which the rounds of the contract are multiplied; beyond that, the task needs more."""
AGREEMENT: Final = 0.1
"""Relative difference up to which projected gradients at two neighbouring lengths agree."""
DISAGREEMENT_MAX: Final = 0.5
"""Such a difference beyond which nothing is proposed."""
BIAS_MAX: Final = 0.25
"""Largest bias of a one-sided projected gradient, as a part of its root mean square."""
PLAIN_FACTOR: Final = 1.4
"""How much larger a rate plain steps take: they shrink with the gradients as the run learns."""
USUAL_SIGNAL_SHARE: Final = 0.25
"""Part of a squared projected gradient that is the same on all batches, as on real tasks."""
USUAL_DIRECTIONS: Final = 4
"""How many measured directions this counts as much as: few directions measure the part badly."""
ONE_SIDED_PROBES_MIN: Final = 8
ONE_SIDED_PROBES: Final = 16
"""Probes that are proposed if a one-sided run has fewer than `ONE_SIDED_PROBES_MIN`. The pass at W,
which measures nothing alone, is then a seventeenth of all."""
_FACTORS_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Reading:
    """Losses of one batch at `length` along both signs of several directions.

    Direction k is the same in all readings. Losses may be NaN or infinite.
    """

    batch: int
    length: float
    plus: tuple[float, ...]
    """Loss at W + length * z, for each direction."""
    minus: tuple[float, ...]
    """Loss at W - length * z, for each direction."""

    @property
    def is_finite(self) -> bool:
        """Whether all losses are."""
        return all(map(math.isfinite, (*self.plus, *self.minus)))

    @property
    def middle(self) -> float:
        """Mean of all losses: that at W plus what the length costs."""
        return math.fsum((*self.plus, *self.minus)) / (2 * len(self.plus))

    @property
    def grads(self) -> tuple[float, ...]:
        """The two-sided projected gradient along each direction."""
        pairs = zip(self.plus, self.minus, strict=True)
        return tuple((plus - minus) / (2 * self.length) for plus, minus in pairs)


@dataclass(frozen=True, slots=True)
class LengthReport:
    """What all readings of one length say together."""

    length: float
    cost: float
    """Mean loss less that at W, in nats; NaN or infinite if a loss was."""
    grad: float
    """Root mean square of the projected gradients."""
    disagreement: float
    """Largest relative difference from the projected gradients at the lengths next to this one;
    infinite at the ends."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the readings say about a run, and the values that suit it."""

    loss: float
    """Mean loss before the run."""
    lengths: tuple[LengthReport, ...]
    grad: float
    """Root mean square projected gradient at `eps`."""
    signal_share: float
    """Part of a squared projected gradient that all batches have in common."""
    walk_length: float
    """How far the run's random walk moves each trained element, at the proposed rate."""
    walk_cost: float
    """What that costs, in nats."""
    eps: float
    plain_rate: float
    """Learning rate of plain steps, in this contract and with this number of workers."""
    normalized_rate: float
    """Learning rate of normalised steps, in the same way."""
    rounds_enough: int
    """Rounds after which more teach little; at most `ROUNDS_FACTOR_MAX` times the contract's."""

    def values(self, *, normalized: bool) -> dict[str, float]:
        """The contract's eps and learning rate for one kind of step, to two digits."""
        rate = self.normalized_rate if normalized else self.plain_rate
        return {"eps": float(f"{self.eps:.2g}"), "learning_rate": float(f"{rate:.2g}")}


@dataclass(frozen=True, slots=True)
class _Travel:
    """How far steps of rate 1 go over a run, before `rate_directions` makes them longer."""

    straight: float
    """Sum of the schedule's factors over all steps."""
    walk: float
    """Root of the sum of their squares over the number of directions of a step."""

    @classmethod
    def of(cls, config: RunConfig, workers: int) -> _Travel:
        stride = max(1, config.rounds // _FACTORS_MAX)
        factors = [schedule_factor(config, t) for t in range(1, config.rounds + 1, stride)]
        steps = config.rounds * config.local_steps / len(factors)
        squares = steps * math.fsum(factor * factor for factor in factors)
        walk = math.sqrt(squares / directions_of(config, workers))
        return cls(steps * math.fsum(factors), walk)


def directions_of(config: RunConfig, workers: int) -> int:
    """Directions of a step that `workers` workers make together."""
    return config.probes * (1 if config.seed_policy == "shared" else workers)


def forwards_of(config: RunConfig, workers: int) -> int:
    """Forward passes of one batch that all workers of a run do together."""
    a_step = config.probes + 1 if config.estimator == "one_sided" else 2 * config.probes
    return config.rounds * config.local_steps * a_step * workers


def with_enough_probes(config: RunConfig) -> RunConfig:
    """The contract, or one that spends its forward passes at W on more probes in fewer rounds."""
    few = config.estimator == "one_sided" and config.probes < ONE_SIDED_PROBES_MIN
    if not few or config.local_steps * ONE_SIDED_PROBES > STEPS_MAX:
        return config
    rounds = math.ceil(config.rounds * (config.probes + 1) / (ONE_SIDED_PROBES + 1))
    return config.model_copy(update={"probes": ONE_SIDED_PROBES, "rounds": rounds})


def reports_of(readings: Sequence[Reading]) -> tuple[float, list[LengthReport]]:
    """The mean loss at W, and what is known of each length, from the shortest.

    The loss of a batch at W is taken to be that at its shortest length. Raises `MeasurementError`
    if it is NaN or infinite.
    """
    lengths = sorted({reading.length for reading in readings})
    bases: dict[int, float] = {}
    for reading in sorted(readings, key=lambda reading: reading.length):
        if reading.batch not in bases and not reading.is_finite:
            raise MeasurementError(
                f"The loss is NaN or infinite {reading.length:g} away from the base weights; check "
                "the model and the data, or set dtype to float32."
            )
        bases.setdefault(reading.batch, reading.middle)
    reports: list[LengthReport] = []
    for number, length in enumerate(lengths):
        own = _at(readings, length)
        grads = [grad for reading in own for grad in reading.grads]
        ends = number in (0, len(lengths) - 1)
        near = [lengths[number - 1], lengths[number + 1]] if not ends else []
        reports.append(
            LengthReport(
                length,
                math.fsum(reading.middle - bases[reading.batch] for reading in own) / len(own),
                _root_mean_square(grads),
                max((difference_of(readings, length, other) for other in near), default=math.inf),
            )
        )
    return math.fsum(bases.values()) / len(bases), reports


def propose(readings: Sequence[Reading], config: RunConfig, workers: int) -> Proposal:
    """The values that suit a run of `workers` workers with this contract.

    Raises `MeasurementError`, which says what to change, if the losses do not allow a proposal.
    """
    loss, reports = reports_of(readings)
    try:
        eps = _eps(reports, config)
    except MeasurementError as error:
        if not config.normalized_step:
            raise
        rate = longest_rate(readings, config, workers)
        raise MeasurementError(
            f"{error} Or keep eps and take a learning_rate of at most {rate:.2g}: a random walk of "
            f"such steps raises the loss by {BLIND_COST_SHARE_MAX:.1%}, and no more can be told."
        ) from None
    grad = next(report.grad for report in reports if report.length == eps)
    share = _signal_share(readings, eps)
    signal = share * grad * grad
    travel = _Travel.of(config, workers)

    def gain(length: float) -> float:
        return travel.straight * length / travel.walk * signal / grad

    def is_short(length: float) -> bool:
        cost_max = min(
            COST_SHARE_MAX * loss, COST_PER_GAIN * math.sqrt(gain(length) * max(loss, 0.0))
        )
        one_step = length / travel.walk * signal / grad
        return cost_at(reports, length, loss) <= cost_max and one_step <= STEP_GAIN_MAX * loss

    length = _largest(is_short)
    normalized = length / travel.walk
    plain = PLAIN_FACTOR * normalized / grad
    # A walk of this length with s times the rounds gains sqrt(s) times as much.
    factor = min(ROUNDS_FACTOR_MAX, (LONG_RUN_GAIN * loss / gain(length)) ** 2)
    return Proposal(
        loss=loss,
        lengths=tuple(reports),
        grad=grad,
        signal_share=share,
        walk_length=length,
        walk_cost=cost_at(reports, length, loss),
        eps=eps,
        plain_rate=_rate_in(config, workers, plain, plain * grad * grad, loss),
        normalized_rate=_rate_in(config, workers, normalized, normalized * grad, loss),
        rounds_enough=max(1, math.ceil(config.rounds * factor)),
    )


def limited_values(
    readings: Sequence[Reading], config: RunConfig, workers: int
) -> dict[str, float]:
    """The contract's learning rate, or a shorter one that the readings propose, and their eps.

    If rounding drowns the projected gradients, nothing is proposed, and the rate of normalised
    steps is at most `longest_rate`. Then there is no eps. Raises as `propose` does, but for that.
    """
    try:
        values = propose(readings, config, workers).values(normalized=config.normalized_step)
    except MeasurementError:
        if not config.normalized_step:
            raise
        values = {"learning_rate": float(f"{longest_rate(readings, config, workers):.2g}")}
    return {**values, "learning_rate": min(config.learning_rate, values["learning_rate"])}


def longest_rate(readings: Sequence[Reading], config: RunConfig, workers: int) -> float:
    """The rate of normalised steps at which the run's walk costs as much as is safe.

    That is `BLIND_COST_SHARE_MAX` of the loss. It takes no projected gradients, so it stands where
    rounding drowns these. Raises `MeasurementError` if the loss at W is NaN or infinite, or no
    direction changes it.
    """
    loss, reports = reports_of(readings)
    _check_effect(reports)
    cost_max = BLIND_COST_SHARE_MAX * abs(loss)
    length = _largest(lambda length: cost_at(reports, length, loss) <= cost_max)
    return _rate_in(config, workers, length / _Travel.of(config, workers).walk, 0.0, loss)


def _rate_in(config: RunConfig, workers: int, rate: float, gain: float, loss: float) -> float:
    """The contract's learning rate for steps as long as `rate` alone makes them.

    `gain` is what such a step gains; it and `loss` are in nats.
    """
    seen_loss = loss if config.report_losses and loss > 0 else usual_loss(config)
    return rate_of_step(config, directions_of(config, workers), rate, gain, seen_loss)


def cost_at(reports: Sequence[LengthReport], length: float, loss: float) -> float:
    """What a walk of `length` costs, in nats, between and beyond the lengths that were measured.

    A cost grows with the square of a short length. So it is between two measured ones by their
    logarithms, and below the shortest one that stands out of the noise by its square. Infinite
    beyond the longest length at which all losses are finite.
    """
    finite = list(takewhile(lambda report: math.isfinite(report.cost), reports))
    noise = 1e-3 * abs(loss)
    known: list[tuple[float, float]] = []
    for report in finite:
        # Losses that fall along random directions too are as far from W as those that rise.
        if abs(report.cost) > noise or report is finite[-1]:
            before = known[-1][1] if known else noise
            known.append((report.length, max(abs(report.cost), before)))
    if length > known[-1][0]:
        return math.inf
    first, cost = known[0]
    if length <= first:
        return cost * (length / first) ** 2
    for (low, low_cost), (high, high_cost) in pairwise(known):
        if length <= high:
            share = math.log(length / low) / math.log(high / low)
            return math.exp(math.log(low_cost) * (1 - share) + math.log(high_cost) * share)
    raise AssertionError("the length is one of these")


def difference_of(readings: Sequence[Reading], length: float, other: float) -> float:
    """Relative root mean square difference of the projected gradients at two lengths.

    Infinite if no batch was measured at both.
    """
    others = {reading.batch: reading.grads for reading in _at(readings, other)}
    pairs = [
        pair
        for reading in _at(readings, length)
        if reading.batch in others
        for pair in zip(reading.grads, others[reading.batch], strict=False)
    ]
    if not pairs:
        return math.inf
    size = _root_mean_square([a for a, _ in pairs])
    difference = _root_mean_square([a - b for a, b in pairs])
    return difference / size if 0 < size < math.inf else math.inf


def _check_effect(reports: Sequence[LengthReport]) -> None:
    if all(report.grad == 0 for report in reports):
        raise MeasurementError(
            "No direction changes the loss: all losses are equal at every length. What the run "
            "trains has no effect, or dtype rounds it away; check train, lora and the adapter, or "
            "use float32."
        )


def _eps(reports: Sequence[LengthReport], config: RunConfig) -> float:
    """The sound length nearest to the contract's eps."""
    _check_effect(reports)
    best = min(report.disagreement for report in reports)
    if best > DISAGREEMENT_MAX:
        raise MeasurementError(
            f"Projected gradients differ by {100 * best:.0f} % or more between any two lengths: "
            "rounding drowns the differences of losses at short ones, curvature bends them at long "
            "ones. Use float32, larger batches, or train another part of the model."
        )
    agreeing = [report for report in reports if report.disagreement <= max(AGREEMENT, best)]
    sound = [
        report
        for report in agreeing
        if config.estimator == "two_sided"
        or abs(report.cost) / report.length <= BIAS_MAX * report.grad
    ]
    near = sound or agreeing[:1]
    return min(near, key=lambda report: abs(math.log(report.length / config.eps))).length


def _signal_share(readings: Sequence[Reading], length: float) -> float:
    """Part of a squared projected gradient that does not change with the batch: 0 to 1.

    The mean product of two batches' projected gradients along one direction is the squared length
    of the mean gradient, without the batches' noise.
    """
    batches = [reading.grads for reading in _at(readings, length)]
    products = [
        a * b
        for number, one in enumerate(batches)
        for other in batches[number + 1 :]
        for a, b in zip(one, other, strict=True)
    ]
    if not products:
        return USUAL_SIGNAL_SHARE
    size = _root_mean_square([grad for grads in batches for grad in grads])
    found = min(1.0, max(0.0, math.fsum(products) / len(products) / (size * size)))
    directions = len(batches[0])
    usual = USUAL_SIGNAL_SHARE * USUAL_DIRECTIONS
    return (found * directions + usual) / (directions + USUAL_DIRECTIONS)


def _largest(is_short: Callable[[float], bool]) -> float:
    """The longest length that is short enough, by bisection of its logarithm."""
    low, high = -60.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_short(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _root_mean_square(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.inf
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _at(readings: Sequence[Reading], length: float) -> list[Reading]:
    return [reading for reading in readings if reading.length == length]
