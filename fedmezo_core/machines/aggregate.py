"""What the coordinator makes of projected gradients: the coefficients of a commit.

Computed once, by the coordinator, and journaled; nobody recomputes them. The arithmetic is written
down to the last rounding all the same, so that an auditor with the answers gets the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import NumericError
from fedmezo_core.machines.health import chance_of
from fedmezo_core.records import Scalars

CLIP_ROUNDS = 8
"""Newest rounds whose usual sizes count, beside a round's own answers, in what is usual."""
FAR_LARGER = 5.0
"""An answer that is clipped and this many times as large as usual is told to the operator."""
GAIN_LIMIT = 2.0
"""Gain of a step by its slope, over the loss, from which on more directions make it at most twice
as long. About a quarter of a squared projected gradient is the same on all batches, so that such a
step really promises half of the loss."""


def to_binary32(value: float) -> float:
    """Round `value` once to IEEE 754 binary32, to nearest, ties to even; held as a Python float.

    Raises `NumericError` if the result is NaN or infinite.
    """
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise NumericError(
            f"{value!r} is not a finite binary32 value; lower the learning rate or the clip."
        )
    return rounded


def all_to_binary32(values: Sequence[float]) -> tuple[float, ...]:
    """Each of `values` rounded as by `to_binary32`; `NumericError` names the first it fails for."""
    form = f"<{len(values)}f"
    try:
        rounded: tuple[float, ...] = struct.unpack(form, struct.pack(form, *values))
    except OverflowError:
        return tuple(to_binary32(value) for value in values)
    # Sums of so few finite binary32 values stay finite in binary64; infinities and NaN stay too.
    if not math.isfinite(sum(rounded)):
        return tuple(to_binary32(value) for value in values)
    return rounded


@lru_cache
def clip_of(projected_grad_abs_max: float) -> float:
    """Largest absolute value of a binary32 projected gradient that the clip allows.

    A worker that clamps to the clip and then rounds to binary32 may land just above the clip's
    binary64 value; that is still the clip.
    """
    try:
        return max(projected_grad_abs_max, to_binary32(projected_grad_abs_max))
    except NumericError:
        return projected_grad_abs_max


def bits_of(values: Sequence[float]) -> bytes:
    """The binary32 bit patterns of `values`, little-endian, 4 bytes each: -0.0 and 0.0 differ."""
    return struct.pack(f"<{len(values)}f", *values)


@dataclass(slots=True)
class Share:
    """One answer's part in a round's mean. Nobody changes it; a frozen one takes longer to make."""

    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]
    """One for each seed, step by step."""
    learning_rate: float
    weight: int = 1
    """Rows of the worker's data where answers are weighted by rows; otherwise 1."""
    mean_loss: float | None = None
    """What the answer says of it; None if it says nothing, as a single local step."""


def coefficients_of(shares: Sequence[Share], config: RunConfig) -> list[tuple[float, ...]]:
    """Coefficients of each answer's seeds in a round that commits `shares`.

    Each is binary32( -(learning_rate * grad * weight) / (sum of weights * probes) ), every
    operation rounded to binary64 from the left, the divisor an exact integer: the mean over workers
    and directions of MeZO's step (Malladi et al. 2023, algorithms 1 and 2). With `normalized_step`,
    `grad` is the projected gradient over the root mean square of those of its step. With
    `rate_directions`, each quotient is multiplied by the commit's `step_factor` before it is
    rounded to binary32. Raises `NumericError` if one is not finite.
    """
    quotients = _quotients_of(shares, config)
    if config.rate_directions:
        factor = _step_factor_of(shares, quotients, config)
        quotients = [[quotient * factor for quotient in each] for each in quotients]
    return [all_to_binary32(each) for each in quotients]


def commit_factor(shares: Sequence[Share], config: RunConfig) -> float:
    """The `step_factor` of a round that commits `shares`; 1 without `rate_directions`."""
    if not config.rate_directions:
        return 1.0
    return _step_factor_of(shares, _quotients_of(shares, config), config)


def usual_loss(config: RunConfig) -> float:
    """Loss that `step_factor` reckons with where none is known: a guess's, or else 1 nat."""
    return chance_of(config) or 1.0


def step_factor(config: RunConfig, directions: float, gain: float, loss: float) -> float:
    """What `rate_directions` multiplies a step along `directions` by (decision 0035).

    `gain` is what the step would gain by the slope that was measured along its directions if
    nothing multiplied it, 0 or more, and `loss` is the loss, above 0, in the same unit. The factor
    is

        directions * (gain + limit) / (directions * gain + rate_directions * limit)

    with limit = GAIN_LIMIT * loss, rounded to binary64 after each operation from the left. It is 1
    for `rate_directions` directions. It grows as they do while the gain is small, because then only
    their noise bounds a step, and is at most (gain + limit) / gain, because curvature bounds a step
    that would gain as much as there is to gain.
    """
    limit = GAIN_LIMIT * loss
    return directions * (gain + limit) / (directions * gain + config.rate_directions * limit)


def rate_of_step(
    config: RunConfig, directions: float, rate: float, gain: float, loss: float
) -> float:
    """The learning rate with which a step along `directions` is as long as `rate` alone would be.

    `gain` is what the step gains at that length, and `loss` the loss, as for `step_factor`.
    """
    if not config.rate_directions:
        return rate
    # With x = the learning rate / rate, a step of x * gain times its factor gains `gain`:
    # directions * gain * x^2 + directions * (limit - gain) * x = rate_directions * limit.
    limit = GAIN_LIMIT * loss
    half = directions * (limit - gain) / 2
    root = math.sqrt(half * half + directions * gain * config.rate_directions * limit)
    if half > 0:
        return rate * config.rate_directions * limit / (half + root)
    return rate * (root - half) / (directions * gain)


def size_of(projected_grads: Sequence[float]) -> float:
    """Their root mean square: sqrt( fsum(grad * grad) / count )."""
    squares = math.fsum(map(mul, projected_grads, projected_grads))
    return math.sqrt(squares / len(projected_grads))


def clipped(
    answers: Sequence[tuple[float, ...]], earlier: Iterable[float], config: RunConfig
) -> tuple[list[tuple[float, ...]], float]:
    """The projected gradients of a round's answers, none of them much larger than is usual.

    Usual is the lower median of the sizes (`size_of`) of these answers, of which all have n
    projected gradients, and of `earlier`, the lower medians of rounds before. Sizes of 0 do not
    count. An answer larger than limit = clip_median_factor * usual * (1 + clip_spread / n) is
    multiplied by limit / size, which keeps its direction. One that is also larger than
    clip_drop_factor * (clip_median_factor * usual) becomes zeros, if that factor is not 0. Every
    operation is rounded to binary64 from the left.
    The others stay as they are, the same objects. Also returns the lower median of these answers'
    sizes alone; 0 if all are 0.
    """
    sizes = [size_of(grads) for grads in answers]
    own = sorted(filter(None, sizes))
    usual = lower_median(sorted([*own, *filter(None, earlier)]))
    allowed = config.clip_median_factor * usual
    limit = allowed * (1 + config.clip_spread / len(answers[0]))
    most = max(limit, config.clip_drop_factor * allowed) if config.clip_drop_factor else math.inf
    taken = list(answers)
    if own and own[-1] > limit:
        for number, size in enumerate(sizes):
            if size > most:
                taken[number] = (0.0,) * len(answers[number])
            elif size > limit:
                shrink = limit / size
                taken[number] = tuple([grad * shrink for grad in answers[number]])
    return taken, lower_median(own)


def is_far_larger(before: Sequence[float], after: Sequence[float], config: RunConfig) -> bool:
    """Whether an answer that was clipped was so much larger than usual that something is wrong."""
    limit = size_of(after)
    allowed = config.clip_median_factor * (1 + config.clip_spread / len(before))
    return limit == 0 or size_of(before) * allowed > FAR_LARGER * limit


def combined(shares: list[Share], config: RunConfig) -> list[Share]:
    """The shares of answers along the same seeds as one, by the contract's `aggregation`.

    Its projected gradient of a seed is made of the column of those of all answers, ascending. Of n
    answers,

    - trimmed_mean: the mean without the k smallest and the k largest, with k =
      floor(trimmed_share * n), at most (n - 1) / 2 rounded down;
    - median: the one in the middle, or the mean of the two in the middle;
    - sign_vote: the usual size times the sign of (count of those above 0) - (count of those below
      0), which is 0, 1 or -1. The usual size is the lower median of the answers' sizes that are not
      0 (0 if all are), so that plain steps have the scale of the projected gradients.

    A mean is (fsum(values) + 0.0) / count, so that a zero is never -0.0. The share's loss is the
    lower median of those that answers carry. With the `aggregation` mean, the shares stay as they
    are. The order of the answers never matters.
    """
    if config.aggregation == "mean":
        return shares
    answers = [share.projected_grads for share in shares]
    losses = sorted(share.mean_loss for share in shares if share.mean_loss is not None)
    loss = lower_median(losses) if losses else None
    first = shares[0]
    return [Share(first.seeds, _by_column(answers, config), first.learning_rate, mean_loss=loss)]


def _by_column(answers: Sequence[Sequence[float]], config: RunConfig) -> tuple[float, ...]:
    columns = [sorted(column) for column in zip(*answers, strict=True)]
    count = len(answers)
    if config.aggregation == "sign_vote":
        size = lower_median(sorted(filter(None, map(size_of, answers))))
        votes = [sum((grad > 0) - (grad < 0) for grad in column) for column in columns]
        return tuple(size * ((vote > 0) - (vote < 0)) for vote in votes)
    most = (count - 1) // 2
    trims = config.aggregation == "trimmed_mean"
    cut = min(int(config.trimmed_share * count), most) if trims else most
    kept = [column[cut : count - cut] for column in columns]
    return tuple((math.fsum(column) + 0.0) / len(column) for column in kept)


def lower_median(ascending: Sequence[float]) -> float:
    """The median of values in ascending order, of two middle ones the lower; 0 of no values."""
    return ascending[(len(ascending) - 1) // 2] if ascending else 0.0


def site_answer(answers: Sequence[Scalars], config: RunConfig) -> Scalars:
    """What a relay answers for its workers, which all measured along the same seeds.

    It is their `site_mean`. With another `aggregation` than the mean, each projected gradient is
    binary32 of what `combined` makes of its column.
    """
    mean = site_mean(answers)
    if config.aggregation == "mean":
        return mean
    columns = _by_column([answer.projected_grads for answer in answers], config)
    return mean._replace(projected_grads=all_to_binary32(columns))


def site_mean(answers: Sequence[Scalars]) -> Scalars:
    """The mean of answers that were measured along the same seeds.

    Each projected gradient is binary32( fsum(grad * rows) / sum of rows ): products rounded to
    binary64, their sum exact and rounded once, so that the order of the answers does not matter,
    the divisor an exact integer. An answer without a count of rows has 1. The mean loss is the same
    mean over the answers that carry one, None if none does. `rows` is the sum, and there is no
    digest. Nobody computes the mean again: the coordinator above journals it as the site's answer.
    """

    def mean(values: Sequence[float], weights: Sequence[int]) -> float:
        terms = [value * weight for value, weight in zip(values, weights, strict=True)]
        return to_binary32(math.fsum(terms) / sum(weights))

    rows = [answer.rows or 1 for answer in answers]
    columns = zip(*(answer.projected_grads for answer in answers), strict=True)
    losses = [(a.mean_loss, a.rows or 1) for a in answers if a.mean_loss is not None]
    return Scalars(
        projected_grads=tuple(mean(column, rows) for column in columns),
        mean_loss=mean([loss for loss, _ in losses], [n for _, n in losses]) if losses else None,
        weights_digest64=None,
        rows=sum(rows),
    )


def normalized(projected_grads: Sequence[float]) -> list[float]:
    """Projected gradients over their root mean square; all 0 if that is 0.

    FZOO (Dang et al. 2025) divides by the standard deviation of the perturbed losses, which is eps
    times this up to the gradients' mean, which is nearly 0. With deviations from 0 instead of from
    the mean, no result is larger than the square root of their count, and one gradient is enough.
    """
    size = size_of(projected_grads)
    return [grad / size if size > 0 else 0.0 for grad in projected_grads]


def staleness_discount(config: RunConfig, rounds_old: int) -> float:
    """Factor for the learning rate of an answer measured `rounds_old` rounds before its commit.

    It is (1 + rounds_old) ^ -staleness_exponent, above 0 and at most 1: FedBuff's polynomial
    discount (Nguyen et al. 2022, section 5, after FedAsync, Xie et al. 2019). As there, the divisor
    of the mean stays: answers that are all old make a smaller step.
    """
    return float((1.0 + rounds_old) ** -config.staleness_exponent) if rounds_old else 1.0


def decay_of(config: RunConfig, factor: float) -> float:
    """What a commit multiplies the weights by: binary32( (1 - rate * weight_decay) ^ local_steps ).

    The decay is decoupled from the gradient, as in AdamW (Loshchilov & Hutter 2019). The round's
    learning rate is `factor` times the contract's. The power is a product, so that every machine
    rounds it alike.
    """
    once = 1.0 - config.learning_rate * factor * config.weight_decay
    power = 1.0
    for _ in range(config.local_steps if config.weight_decay else 0):
        power *= once
    return to_binary32(power)


def _quotients_of(shares: Sequence[Share], config: RunConfig) -> list[list[float]]:
    """What `coefficients_of` rounds, before `rate_directions` changes it."""
    grads: list[Sequence[float]] = [share.projected_grads for share in shares]
    if config.normalized_step:
        grads = _normalized_by_step(grads, config.probes)
    divisor = sum(share.weight for share in shares) * config.probes
    return [
        [-(rate * grad * weight) / divisor for grad in each]
        for share, each in zip(shares, grads, strict=True)
        for rate, weight in ((share.learning_rate, share.weight),)
    ]


def _step_factor_of(
    shares: Sequence[Share], quotients: Sequence[Sequence[float]], config: RunConfig
) -> float:
    """The `step_factor` of a commit, whose answers have several local steps or one.

    Directions count once however many workers measured along them: they are the distinct seeds
    over the local steps. The gain is that of a mean local step: fsum(-(quotient * projected
    gradient)) over all pairs, products rounded to binary64, over the local steps. The loss is the
    lower median of those that the answers carry. If none carries one, if that is not above 0, and
    for the scores of an objective, whose zero means nothing, it is `usual_loss`.
    """
    steps = len(shares[0].projected_grads) // config.probes
    pairs = len(shares) * len(shares[0].seeds)
    if config.seed_policy != "per_worker":
        pairs = len({seed for share in shares for seed in share.seeds})
    products = [
        -(quotient * grad)
        for share, each in zip(shares, quotients, strict=True)
        for quotient, grad in zip(each, share.projected_grads, strict=True)
    ]
    try:
        gain = math.fsum(products) / steps
    except OverflowError:
        gain = math.inf
    if not math.isfinite(gain):
        return 1.0  # It comes from coefficients that no binary32 holds; rounding them says so.
    losses = [share.mean_loss for share in shares if share.mean_loss is not None]
    loss = 0.0 if config.task.objective else lower_median(sorted(losses))
    return step_factor(config, pairs / steps, gain, loss if loss > 0 else usual_loss(config))


def _normalized_by_step(answers: Sequence[Sequence[float]], probes: int) -> list[Sequence[float]]:
    """Normalize the probes of each step over all workers: a federation is one pool of probes."""
    found: list[list[float]] = [[] for _ in answers]
    for first in range(0, len(answers[0]), probes):
        together = normalized([g for grads in answers for g in grads[first : first + probes]])
        for number, grads in enumerate(found):
            grads += together[number * probes : (number + 1) * probes]
    return list(found)
