"""Commits, the pairs that move weights together, and the forms in which the kernels take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.errors import DivergedError, MismatchError, NumericError
from fedmezo_core.records import Committed
from fedmezo_core.zo.noise import SEED_MAX, cpu

Joined = tuple[
    npt.NDArray[np.uint64],
    npt.NDArray[np.float32],
    npt.NDArray[np.uint64],
    npt.NDArray[np.uint64],
    npt.NDArray[np.float32],
]
"""Commits as one: seeds, coefficients, number of pairs up to each end, rounding seeds, decays."""

_LARGEST: Final = {
    cpu.FLOAT32: float(np.finfo(np.float32).max),
    cpu.BFLOAT16: (2.0 - 2.0**-7) * 2.0**127,
    cpu.FLOAT16: float(np.finfo(np.float16).max),
}
"""The largest number of each storage type."""
_NOISE_ABS_MAX: Final = 7.0
"""|z| is below this for every distribution."""


@dataclass(frozen=True, eq=False)
class Commit:
    """Pairs applied together, in order: w = decay * w + sum(coefficients[k] * z(seeds[k])).

    Raises `NumericError` where a field is not what is said of it.
    """

    seeds: npt.NDArray[np.uint64]
    """[pairs]; copied."""
    coefficients: npt.NDArray[np.float32]
    """[pairs], all finite; copied."""
    rounding_seed: int
    """Key of the random bits of stochastic rounding, 0 .. 2**64 - 1."""
    decay: float = 1.0
    """What weights are multiplied by first: a float32 value above 0, at most 1."""
    from_base: bool = False
    """Whether, in a journal, this commit starts from the run's base and not from the round before.

    `Weights` sees to that. `materialize` starts from the tensor that it is given.
    """
    _joined: Joined = field(init=False, repr=False)
    """This commit alone as the kernels take it, made once rather than for each tensor."""

    def __post_init__(self) -> None:
        seeds, coefficients = self.seeds, self.coefficients
        if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
            raise NumericError(
                f"A commit has {seeds.dtype} seeds and {coefficients.dtype} coefficients; "
                "convert them to uint64 and float32 where they are made."
            )
        if seeds.ndim != 1 or seeds.shape != coefficients.shape:
            raise NumericError(
                f"A commit has seeds of shape {seeds.shape} and coefficients of shape "
                f"{coefficients.shape}; give one coefficient for each seed."
            )
        finite = np.isfinite(coefficients)
        if not finite.all():
            pair = int(np.argmin(finite))
            raise NumericError(
                f"Coefficient {pair} of a commit, for seed {seeds[pair]}, is {coefficients[pair]}; "
                "drop that pair or the whole commit."
            )
        if not 0 <= self.rounding_seed <= SEED_MAX:
            raise NumericError(
                f"The rounding seed {self.rounding_seed} is outside 0 .. 2**64 - 1; "
                "take it from the journal as it is."
            )
        if not 0.0 < self.decay <= 1.0 or float(np.float32(self.decay)) != self.decay:
            raise NumericError(
                f"The decay {self.decay} of a commit is no float32 above 0 and up to 1; "
                "take it from the journal as it is."
            )
        # Copies: a read-only or strided array (a message's bytes, say) would be another type to the
        # kernels, compiled anew, and the caller's own could change under us.
        object.__setattr__(self, "seeds", seeds.copy())
        object.__setattr__(self, "coefficients", coefficients.copy())
        ends = np.array([len(seeds)], dtype=np.uint64)
        rounding_seeds = np.array([self.rounding_seed], dtype=np.uint64)
        decays = np.array([self.decay], dtype=np.float32)
        joined = self.seeds, self.coefficients, ends, rounding_seeds, decays
        object.__setattr__(self, "_joined", joined)


def commits_of(records: Sequence[Committed]) -> list[Commit]:
    """The commits of a journal, in its order, as `materialize` takes them."""
    return [
        Commit(
            seeds=np.concatenate(
                [
                    np.uint64(seed_range.first_seed)
                    + np.arange(len(seed_range.coefficients), dtype=np.uint64)
                    for seed_range in record.seed_ranges
                ]
                or [np.empty(0, dtype=np.uint64)]
            ),
            coefficients=np.array(
                [c for seed_range in record.seed_ranges for c in seed_range.coefficients],
                dtype=np.float32,
            ),
            rounding_seed=record.rounding_seed,
            decay=record.decay,
            from_base=record.from_base,
        )
        for record in records
    ]


def commits_to_apply(
    round_: int, first_round: int, commits: Sequence[Commit], *, keeps_base: bool
) -> tuple[int, list[Commit], bool]:
    """What of the commits of `first_round` and later moves weights that are at `round_`.

    Gives the first round that counts, its commit and those after it without `from_base`, and
    whether the first one starts from the base: then it makes all commits before it superfluous.
    Raises `DivergedError` unless the first one is of the round after `round_`, or of any later
    round if it starts from the base; `MismatchError` if that was not kept.
    """
    starts = [k for k, commit in enumerate(commits) if commit.from_base]
    if starts:
        first_round += starts[-1]
        commits = [replace(commits[starts[-1]], from_base=False), *commits[starts[-1] + 1 :]]
        if not keeps_base:
            raise MismatchError(
                f"The commit of round {first_round} starts from the base weights, which were "
                "not kept here; load the model with the configuration of the run in the "
                "journal."
            )
    if first_round <= round_ or (not starts and first_round != round_ + 1):
        raise DivergedError(
            f"The commit of round {first_round} cannot be applied to weights at round "
            f"{round_}; replay the journal from round {round_ + 1}."
        )
    return first_round, list(commits), bool(starts)


def join(commits: Sequence[Commit], *, endless: bool) -> Joined:
    """All commits, one after the other, as the kernels take them.

    endless: whether a commit's end changes nothing (float32). Commits without a decay then continue
    the one before them, so that a journal without decays is a single commit.
    """
    if len(commits) == 1:
        return commits[0]._joined
    lengths = [len(commit.seeds) for commit in commits]
    ends = np.cumsum(lengths, dtype=np.uint64)
    rounding_seeds = np.array([commit.rounding_seed for commit in commits], dtype=np.uint64)
    decays = np.array([commit.decay for commit in commits], dtype=np.float32)
    if endless and commits:
        begins = decays != 1
        begins[0] = True
        # A commit is the last of its run if the next one begins another.
        lasts = np.append(begins[1:], True)
        ends, rounding_seeds, decays = ends[lasts], rounding_seeds[lasts], decays[begins]
    return (
        np.concatenate([np.empty(0, np.uint64), *(commit.seeds for commit in commits)]),
        np.concatenate([np.empty(0, np.float32), *(commit.coefficients for commit in commits)]),
        ends,
        rounding_seeds,
        decays,
    )


def common_pairs(commits: Sequence[Commit]) -> int | None:
    """The number of pairs, bit for bit the same, that all commits begin with.

    None unless every commit has at most one pair more, and no decay: a decay comes before any pair,
    so that what follows it starts from other numbers.
    """
    if any(commit.decay != 1.0 for commit in commits):
        return None
    shared = max(0, max(len(commit.seeds) for commit in commits) - 1)
    seeds, coefficients = commits[0].seeds[:shared], commits[0].coefficients[:shared]
    for commit in commits:
        if not np.array_equal(commit.seeds[:shared], seeds):
            return None
        begin = commit.coefficients[:shared]
        if not np.array_equal(begin.view(np.uint32), coefficients.view(np.uint32)):
            return None
    return shared


@dataclass(frozen=True, eq=False)
class FanPlan:
    """Commits of a fan as the CPU kernels take them: common pairs, and each output's last one."""

    seeds: npt.NDArray[np.uint64]
    """[common pairs]."""
    coefficients: npt.NDArray[np.float32]
    """[common pairs]."""
    steps: npt.NDArray[np.uint8]
    """[outputs]: what each does with its own pair, `cpu.SHARED_STEP` or one of the others there."""
    last_seeds: npt.NDArray[np.uint64]
    """[outputs]; 0 where an output has no pair of its own."""
    last_coefficients: npt.NDArray[np.float32]
    """[outputs]; 0 where an output has no pair of its own."""
    rounding_seeds: npt.NDArray[np.uint64]
    """[outputs]."""
    ceilings: dict[int, np.uint32]
    """By storage type, as the kernels number them: bits of the largest magnitude to which any last
    pair can be added without overflow."""


@functools.lru_cache(maxsize=1)  # a measurement asks for the same plan at each of its layers
def fan_plan(commits: tuple[Commit, ...]) -> FanPlan | None:
    """How to make all outputs in one visit; None if the commits have too little in common."""
    shared = common_pairs(commits)
    if shared is None:
        return None
    seeds, coefficients = commits[0].seeds[:shared], commits[0].coefficients[:shared]
    steps = np.zeros(len(commits), dtype=np.uint8)
    last_seeds = np.zeros(len(commits), dtype=np.uint64)
    last_coefficients = np.zeros(len(commits), dtype=np.float32)
    last_bits = last_coefficients.view(np.uint32)
    for g, commit in enumerate(commits):
        if len(commit.seeds) == shared:
            continue
        last_seeds[g], last_coefficients[g] = commit.seeds[shared], commit.coefficients[shared]
        steps[g] = cpu.OWN_STEP
        if (
            g > 0
            and steps[g - 1] == cpu.OWN_STEP
            and last_seeds[g - 1] == last_seeds[g]
            and last_bits[g - 1] == last_bits[g] ^ np.uint32(0x80000000)
        ):
            steps[g - 1 : g + 1] = cpu.BOTH_STEP, cpu.DONE_STEP
    reach = _NOISE_ABS_MAX * float(np.abs(last_coefficients).max())
    # The hundredth covers the roundings, those of storage included.
    ceilings = {
        storage: np.float32(max(0.0, 0.99 * largest - reach)).view(np.uint32)
        for storage, largest in _LARGEST.items()
    }
    return FanPlan(
        seeds, coefficients, steps, last_seeds, last_coefficients,
        np.array([commit.rounding_seed for commit in commits], dtype=np.uint64), ceilings,
    )  # fmt: skip
