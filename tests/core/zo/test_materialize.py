"""`materialize` equals its specification, and no way of calling it changes a bit."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import MismatchError, NumericError
from fedmezo_core.zo.arithmetic_spec import materialize_reference
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.forward.low_rank import Side, factors, split
from fedmezo_core.zo.materialize import materialize, materialize_fan, warm_up
from fedmezo_core.zo.noise import Distribution, Operands, Rounding, cpu, spec
from fedmezo_core.zo.noise.tensors import require_finite
from tests.core.zo.noise.test_noise_spec import columns_of

GOLDEN = Path(__file__).parents[2] / "golden" / "noise" / "v1.json"

# (dtype, rounding): float32 has nothing to round.
STORAGE = [
    (torch.float32, Rounding.NEAREST),
    (torch.bfloat16, Rounding.NEAREST),
    (torch.bfloat16, Rounding.STOCHASTIC),
    (torch.float16, Rounding.NEAREST),
    (torch.float16, Rounding.STOCHASTIC),
]
RADEMACHER = Operands(0, Distribution.RADEMACHER, Rounding.NEAREST)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))


def commit_of(
    generator: np.random.Generator,
    pairs: int,
    scale: float = 1e-3,
    rounding_seed: int = 0,
    decay: float = 1.0,
) -> Commit:
    return Commit(
        generator.integers(0, 2**64, pairs, dtype=np.uint64),
        (generator.normal(size=pairs) * scale).astype(np.float32),
        rounding_seed,
        decay=float(np.float32(decay)),
    )


def weights_of(generator: np.random.Generator, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights of many sizes, with zeros of both signs and subnormals among them."""
    values = generator.normal(size=count) * 10.0 ** generator.integers(-6, 1, count)
    values[generator.random(count) < 0.1] = 0.0
    values[generator.random(count) < 0.1] = -0.0
    values[generator.random(count) < 0.1] = 1e-40
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


# A run's, the two nearest to 1 and 0, and one that makes subnormals of ordinary weights.
DECAYS = [1 - 1e-4, 0.5, 1 - 2.0**-24, 2.0**-149, 3e-38]


@st.composite
def journals(draw: st.DrawFn) -> tuple[list[Commit], np.random.Generator]:
    """Without decays, with some, or all of them with one."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 11), max_size=5))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-6, 1e-39]))
    rounding_seeds = st.integers(0, 2**64 - 1)
    decays = st.sampled_from(draw(st.sampled_from([[1.0], [1.0, 1.0, *DECAYS], DECAYS])))
    return [
        commit_of(generator, n, scale, draw(rounding_seeds), draw(decays)) for n in lengths
    ], generator


@dataclass(frozen=True)
class Case:
    """Commits for base weights, which are some elements of a larger tensor."""

    commits: list[Commit]
    base: torch.Tensor
    operands: Operands


@st.composite
def cases(
    draw: st.DrawFn,
    journals: st.SearchStrategy[tuple[list[Commit], np.random.Generator]] = journals(),  # noqa: B008
    sizes: st.SearchStrategy[int] = st.integers(0, 700) | st.integers(3000, 6000),  # noqa: B008
) -> Case:
    commits, generator = draw(journals)
    dtype, rounding = draw(st.sampled_from(STORAGE))
    far = st.sampled_from([2**32 - 700, 2**35 + 1, 2**48 - 6000])
    operands = Operands(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(Distribution)),
        rounding,
        draw(st.integers(0, 5000) | far),
        draw(columns_of),
    )
    return Case(commits, weights_of(generator, draw(sizes), dtype), operands)


threads_used = st.sampled_from([1, 2, 3])


def made(
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    threads: int | None = None,
) -> torch.Tensor:
    out = torch.empty_like(base)
    materialize(out, base, commits, operands, threads=threads)
    return out


def specified(base: torch.Tensor, commits: Sequence[Commit], operands: Operands) -> torch.Tensor:
    out = torch.empty_like(base)
    materialize_reference(out, base, commits, operands)
    return out


@settings(max_examples=120)
@given(cases())
def test_equals_the_reference(case: Case) -> None:
    base, commits, operands = case.base, case.commits, case.operands
    kept = base.clone()
    expected = specified(base, commits, operands)
    assert_same_bits(made(base, commits, operands), expected)
    assert_same_bits(base, kept)
    materialize(base, base, commits, operands)
    assert_same_bits(base, expected)


def cut(draw: st.DataObject, whole: int) -> list[tuple[int, int]]:
    """0 .. whole in up to five consecutive pieces."""
    inner = draw.draw(st.lists(st.integers(0, whole), max_size=4))
    edges = [0, *sorted(inner), whole]
    return list(itertools.pairwise(edges))


@settings(max_examples=100)
@given(cases(), threads_used, st.data())
def test_any_way_of_calling_gives_the_same_bits(
    case: Case, threads: int, data: st.DataObject
) -> None:
    base, commits, operands = case.base, case.commits, case.operands
    at_once = made(base, commits, operands)

    # The journal in pieces, and within each the elements in other pieces; out of place, then in.
    pieces = base.clone()
    for first, last in cut(data, len(commits)):
        source = pieces.clone()
        for begin, end in cut(data, len(base)):
            part = operands._replace(start=operands.start + begin)
            materialize(
                pieces[begin:end], source[begin:end], commits[first:last], part, threads=threads
            )
    assert_same_bits(pieces, at_once)

    if base.dtype == torch.float32:
        # float32: a commit's end leaves no trace, so commits may be cut and joined as well, up to
        # the next decay.
        decayed = [k for k, commit in enumerate(commits) if commit.decay != 1.0]
        joined = base.clone()
        for begin, end in itertools.pairwise(sorted({0, *decayed, len(commits)})):
            together = commits[begin:end]
            seeds = np.concatenate([commit.seeds for commit in together])
            coefficients = np.concatenate([commit.coefficients for commit in together])
            decay = together[0].decay
            for first, last in cut(data, len(seeds)):
                some = Commit(seeds[first:last], coefficients[first:last], 0, decay=decay)
                materialize(joined, joined, [some], operands)
                decay = 1.0
        assert_same_bits(joined, at_once)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_threads_over_many_tiles(
    storage: tuple[torch.dtype, Rounding], distribution: Distribution
) -> None:
    generator = np.random.default_rng(3)
    commits = [commit_of(generator, n, rounding_seed=n, decay=n / 5) for n in (2, 5)]
    base = weights_of(generator, 700_001, storage[0])
    operands = Operands(4, distribution, storage[1], 77, 768)
    one, many = made(base, commits, operands, threads=1), base.clone()
    materialize(many, many, commits, operands, threads=5)
    assert_same_bits(many, one)


def test_callers_in_many_threads() -> None:
    generator = np.random.default_rng(3)
    commits = [commit_of(generator, 8)]
    bases = [weights_of(generator, 300_000, torch.float32) for _ in range(6)]

    def build(tensor_id: int, threads: int) -> torch.Tensor:
        operands = RADEMACHER._replace(tensor_id=tensor_id)
        return made(bases[tensor_id], commits, operands, threads)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda tensor_id: build(tensor_id, 3), range(6)))
    for tensor_id, out in enumerate(together):
        assert_same_bits(out, build(tensor_id, 1))


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE[::2], ids=str)
@pytest.mark.parametrize(
    ("distribution", "columns", "start", "size"),
    [
        # Tiles of whole rows, and of wide matrices' columns; rows' ends between them.
        (Distribution.LOW_RANK_1, 1, 2**34, 2100),
        (Distribution.LOW_RANK_1, 7001, 8000, 40_000),
        (Distribution.LOW_RANK_1, 769, 100, 90_000),
        (Distribution.LOW_RANK_2, 3, 3 * 900 + 1, 6000),
        (Distribution.LOW_RANK_2, 2300, 2**36 + 11, 25_000),
        (Distribution.LOW_RANK_4, 16, 5, 20_000),
        (Distribution.LOW_RANK_4, 577, 577 * 1020 + 300, 30_000),
    ],
)
def test_matrices_of_many_tiles(
    storage: tuple[torch.dtype, Rounding],
    distribution: Distribution,
    columns: int,
    start: int,
    size: int,
) -> None:
    generator = np.random.default_rng(columns)
    commits = [commit_of(generator, n, rounding_seed=n, decay=n / 9) for n in (9, 2, 3)]
    operands = Operands(4, distribution, storage[1], start, columns)
    base = weights_of(generator, size, storage[0])
    out = made(base, commits, operands)
    assert_same_bits(out, specified(base, commits, operands))
    materialize_fan([out], base, commits[:1], operands)
    assert_same_bits(out, specified(base, commits[:1], operands))
    # One direction alone, coefficient 1: the reference's zeros have the sign of the coefficient.
    zeros = torch.full_like(base[:5000], -0.0)
    for coefficient in (1.0, -1.0, -0.0):
        commit = Commit(np.array([3], np.uint64), np.array([coefficient], np.float32), 1)
        assert_same_bits(made(zeros, [commit], operands), specified(zeros, [commit], operands))


def test_the_first_element_that_is_not_finite_is_named_also_in_a_later_tile() -> None:
    """A wide matrix's tiles end in mid-row."""
    base = torch.zeros(20, 3000)
    base[5, 10] = base[2, 2900] = float("inf")
    operands = Operands(0, Distribution.LOW_RANK_4, Rounding.NEAREST)
    with pytest.raises(NumericError, match=f"element {2 * 3000 + 2900} is inf"):
        materialize(base, base, [commit_of(np.random.default_rng(0), 3)], operands)


def test_a_zero_of_a_huge_coefficient_is_a_zero() -> None:
    """1.4142135 times the coefficient is infinite, 0 times it is not."""
    huge = Commit(np.array([3], np.uint64), np.array([3e38], np.float32), 0)
    z = spec.low_rank(np.arange(40), 3, 0, rank=2, columns=40)
    place = int(np.argmin(np.abs(z)))
    assert z[place] == 0
    out = torch.zeros(1)
    operands = Operands(0, Distribution.LOW_RANK_2, Rounding.NEAREST, place, 40)
    materialize(out, out, [huge], operands)
    assert out.item() == 0.0


@st.composite
def fans(draw: st.DrawFn) -> tuple[list[Commit], np.random.Generator]:
    """Commits of measurements (the same local pairs, then one more each), and some unlike those."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    local = commit_of(generator, draw(st.sampled_from([0, 0, 1, 3, 5])))
    last = st.tuples(st.integers(0, 2), st.sampled_from([1e-3, -1e-3, 0.0, -0.0, 1e-39, 2.0]))
    rounding_seeds = st.sampled_from([5, 5, 2**64 - 1])
    commits = []
    for pair in draw(st.lists(st.none() | last, min_size=1, max_size=6)):
        own = [] if pair is None else [pair]
        seeds = [*local.seeds, *(np.uint64(seed) for seed, _ in own)]
        coefficients = [*local.coefficients, *(np.float32(c) for _, c in own)]
        commits.append(
            Commit(
                np.array(seeds, np.uint64),
                np.array(coefficients, np.float32),
                draw(rounding_seeds),
                decay=0.75 if draw(st.integers(0, 19)) == 0 else 1.0,
            )
        )
    if draw(st.integers(0, 9)) == 0:
        commits.append(commit_of(generator, draw(st.integers(0, 9))))
    return commits, generator


@settings(max_examples=120)
@given(cases(fans()), threads_used, st.data())
def test_a_fan_equals_one_call_for_each_output(
    case: Case, threads: int, data: st.DataObject
) -> None:
    base, commits, operands = case.base, case.commits, case.operands
    kept = base.clone()
    outs = [torch.empty_like(base) for _ in commits]
    for begin, end in cut(data, len(base)):
        materialize_fan(
            [out[begin:end] for out in outs], base[begin:end], commits,
            operands._replace(start=operands.start + begin), threads=threads,
        )  # fmt: skip
    assert_same_bits(base, kept)
    for out, commit in zip(outs, commits, strict=True):
        assert_same_bits(out, specified(base, [commit], operands))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_fan_in_threads_over_many_tiles(
    storage: tuple[torch.dtype, Rounding], distribution: Distribution
) -> None:
    generator = np.random.default_rng(3)
    base = weights_of(generator, 500_001, storage[0])
    commits = [
        Commit(np.array([7, 8], np.uint64), np.array([1e-5, eps], np.float32), 3)
        for eps in (1e-3, -1e-3, 2e-3)
    ]
    operands = Operands(4, distribution, storage[1], 77, 768)
    outs = [torch.empty_like(base) for _ in commits]
    materialize_fan(outs, base, commits, operands, threads=5)
    for out, commit in zip(outs, commits, strict=True):
        assert_same_bits(out, made(base, [commit], operands, threads=1))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("local", [0, 2])
def test_a_fan_names_what_is_not_finite(storage: tuple[torch.dtype, Rounding], local: int) -> None:
    pairs = [(k, 0.0) for k in range(local)]
    huge = float(torch.finfo(storage[0]).max)

    def fan(distribution: Distribution, base: torch.Tensor, eps: float) -> None:
        commits = [
            Commit(
                np.array([*(seed for seed, _ in pairs), 5], np.uint64),
                np.array([*(c for _, c in pairs), coefficient], np.float32),
                1,
            )
            for coefficient in (eps, -eps)
        ]
        outs = [torch.empty_like(base), torch.empty_like(base)]
        operands = Operands(7, distribution, storage[1], 1_000_000, name="wte")
        materialize_fan(outs, base, commits, operands)

    for distribution in Distribution:
        for value in (float("nan"), float("-inf")):
            base = torch.zeros(9000, dtype=storage[0])
            base[[4100, 8999]] = value
            with pytest.raises(
                NumericError, match=r"Tensor 7 \(wte\): element 1004100 is (nan|-inf)"
            ):
                fan(distribution, base, 1e-3)
        base = torch.zeros(9000, dtype=storage[0])
        base[5000] = huge
        fan(distribution, base, 1e-3)  # close to the limit, and yet finite
    with pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 1005000 is inf"):
        fan(Distribution.RADEMACHER, base, huge / 2)


def test_a_fan_whose_tensors_overlap_is_refused() -> None:
    memory = torch.zeros(40)
    commits = [commit_of(np.random.default_rng(0), 1)] * 2
    operands = RADEMACHER._replace(tensor_id=3)
    apart = torch.zeros(8)
    for first, second, base in (
        (memory[:8], memory[4:12], apart),
        (memory[:8], memory[:8], apart),
        (apart, memory[:8], memory[:8]),
        (memory[:8], apart, memory[7:15]),
    ):
        with pytest.raises(MismatchError, match="overlap"):
            materialize_fan([first, second], base, commits, operands)
    with pytest.raises(MismatchError, match="1 outputs for 2 commits"):
        materialize_fan([apart], memory[:8], commits, operands)
    with pytest.raises(MismatchError, match="one size"):
        materialize_fan([apart, memory[:9]], memory[10:18], commits, operands)
    assert not memory.any()
    materialize_fan([memory[:8], memory[8:16]], apart, commits, operands)
    materialize_fan([], apart, [], operands)
    materialize_fan([memory[:0], memory[:0]], apart[:0], commits, operands)


def golden_weights() -> list[dict[str, Any]]:
    golden = json.loads(GOLDEN.read_text())
    return [*golden["weights"], *golden["weights_decay"]]


def golden_name(case: dict[str, Any]) -> str:
    name = f"{case['distribution']}-{case['dtype']}-{case['rounding']}"
    return f"{name}-decay" if "base_bits" in case else name


def golden_operands(case: dict[str, Any]) -> tuple[torch.Tensor, list[Commit]]:
    """(base, commits)."""

    def floats(digits: Sequence[str]) -> Any:
        return np.array([int(value, 16) for value in digits], np.uint32).view(np.float32)

    dtype = getattr(torch, case["dtype"])
    base = ((torch.arange(48) - 24) / 512).to(dtype)
    if "base_bits" in case:
        stored = np.array([int(value, 16) for value in case["base_bits"].split()])
        base = torch.from_numpy(
            stored.astype(np.uint32 if dtype == torch.float32 else np.uint16)
        ).view(dtype)
    commits = [
        Commit(
            np.array([int(seed, 16) for seed in commit["seeds"]], dtype=np.uint64),
            floats(commit["coefficients"]),
            int(commit["rounding_seed"], 16),
            decay=float(floats([commit.get("decay", "3f800000")])[0]),
        )
        for commit in case["commits"]
    ]
    return base, commits


def golden_place(case: dict[str, Any]) -> Operands:
    return Operands(
        case["tensor_id"], Distribution(case["distribution"]), Rounding(case["rounding"]),
        case["start"], case.get("columns"),
    )  # fmt: skip


def hexadecimal(weights: torch.Tensor) -> str:
    digits = 8 if weights.dtype == torch.float32 else 4
    return " ".join(f"{v & (16**digits - 1):0{digits}x}" for v in bits(weights).tolist())


@pytest.mark.parametrize("build", [materialize, materialize_reference])
@pytest.mark.parametrize("case", golden_weights(), ids=golden_name)
def test_golden_weights(build: Any, case: dict[str, Any]) -> None:
    base, commits = golden_operands(case)
    out = torch.empty_like(base)
    build(out, base, commits, golden_place(case))
    assert hexadecimal(out) == case["result"]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_a_decay_comes_before_the_pairs_and_is_rounded_by_itself(
    storage: tuple[torch.dtype, Rounding],
) -> None:
    """Also that of a commit without pairs, and whatever the distribution."""
    generator = np.random.default_rng(11)
    base = weights_of(generator, 9000, storage[0])
    decay = np.float32(0.9)
    shrunk = torch.from_numpy(base.float().numpy() * decay)
    for distribution in Distribution:
        pairs = commit_of(generator, 3)
        commit = Commit(pairs.seeds, pairs.coefficients, 5, decay=float(decay))
        operands = Operands(4, distribution, storage[1])
        out = made(base, [commit], operands)
        if storage[0] == torch.float32:
            assert_same_bits(out, made(shrunk, [pairs], operands))
        nothing = Commit(np.empty(0, np.uint64), np.empty(0, np.float32), 5, decay=float(decay))
        out = made(base, [nothing], operands)
        if storage[0] == torch.float32:
            assert_same_bits(out, shrunk)
        elif storage[1] is Rounding.NEAREST:
            assert_same_bits(out, shrunk.to(storage[0]))
        else:
            spacing = torch.finfo(storage[0]).eps * shrunk.abs() + 2.0**-24
            assert ((out.float() - shrunk).abs() <= spacing).all()
    assert shrunk[base == 0].eq(0).all()


def test_commits_with_a_decay_have_no_pairs_in_common() -> None:
    """Thin products are of pairs alone: a decay needs the weights built."""
    commits = [commit_of(np.random.default_rng(0), 2, decay=decay) for decay in (1.0, 1.0, 0.5)]
    assert split(tuple(commits[:2])) is not None
    assert split(tuple(commits)) is None


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE[::2], ids=str)
def test_a_thousand_commits_with_and_without_decay(storage: tuple[torch.dtype, Rounding]) -> None:
    generator = np.random.default_rng(12)
    commits = [
        commit_of(generator, k % 3, 1e-3, k, 0.999 if generator.random() < 0.3 else 1.0)
        for k in range(1000)
    ]
    base = weights_of(generator, 4600, storage[0])
    operands = Operands(4, Distribution.RADEMACHER, storage[1], 77)
    fused, one_by_one = made(base, commits, operands), base.clone()
    for commit in commits:
        materialize(one_by_one, one_by_one, [commit], operands)
    assert_same_bits(fused, one_by_one)
    assert_same_bits(fused, specified(base, commits, operands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_rounds_like_torch(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(5)
    base = weights_of(generator, 9000, dtype)
    commit = commit_of(generator, 1, scale=1e-2)
    for distribution in Distribution:
        operands = Operands(0, distribution, Rounding.NEAREST)
        exact = made(base.float(), [commit], operands)
        assert_same_bits(made(base, [commit], operands), exact.to(dtype))


def float16_of_all_patterns() -> torch.Tensor:
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    return patterns[torch.isfinite(patterns)]


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("build", [materialize, materialize_reference])
def test_what_float16_represents_is_unchanged(build: Any, rounding: Rounding) -> None:
    """Whatever the random bits; adding -0 keeps the sign of zeros too."""
    base = float16_of_all_patterns()
    sign = spec.rademacher(np.zeros(1, np.int64), 5, 0)[0]
    operands = Operands(0, Distribution.RADEMACHER, rounding)
    for rounding_seed in range(8):
        out = torch.empty_like(base)
        nothing = Commit(np.array([], np.uint64), np.array([], np.float32), rounding_seed)
        build(out, base, [nothing], operands)
        assert_same_bits(out, base)
        zero = Commit(np.array([5], np.uint64), np.array([-0.0 * sign], np.float32), rounding_seed)
        build(out, base, [zero], operands)
        assert torch.equal(out, base)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("step", [3e-9, 2.0**-25, 1e-6, 3e-5, 0.01, 15.9])
def test_float16_of_any_size_equals_the_reference(rounding: Rounding, step: float) -> None:
    base = float16_of_all_patterns()
    base = base[base.abs() < 65_000]
    commits = [
        Commit(np.array([k], np.uint64), np.array([step], np.float32), 2**64 - 1 - k)
        for k in range(3)
    ]
    operands = Operands(1, Distribution.RADEMACHER, rounding, 1000)
    assert_same_bits(made(base, commits, operands), specified(base, commits, operands))


def test_float16_rounds_to_a_neighbour_and_right_on_average() -> None:
    """Also among subnormals, and to and from the smallest normal number."""
    count, tensor_id = 1 << 15, 0
    signs = spec.rademacher(np.arange(count, dtype=np.int64), 5, tensor_id)
    unit = 2.0**-24
    for value, step in ((1.0, 2.0**-10), (2.0**-14, unit), (1000 * unit, unit), (0.0, unit)):
        base = torch.full((count,), value, dtype=torch.float16)
        for share in (0.3, 1e-3):
            commit = Commit(np.array([5], np.uint64), np.array([share * step], np.float32), 123)
            operands = Operands(tensor_id, Distribution.RADEMACHER, Rounding.STOCHASTIC)
            out = made(base, [commit], operands)
            moved = (out.double().numpy() - value) * signs / step
            assert ((moved >= 0) & (moved <= 1)).all()
            error = np.abs(moved.mean() - share) / math.sqrt(share / count)
            assert error < 4.5


def test_float16_ties_and_the_limit() -> None:
    base = torch.tensor([2048.0, 2050.0, 65504.0, 3 * 2.0**-24, 4 * 2.0**-24], dtype=torch.float16)
    steps = [1.0, 1.0, 15.9, 2.0**-25, 2.0**-25]
    expected = [2048.0, 2052.0, 65504.0, 4 * 2.0**-24, 4 * 2.0**-24]
    for i, step in enumerate(steps):
        sign = spec.rademacher(np.zeros(1, np.int64), 5, 0)[0]
        commit = Commit(np.array([5], np.uint64), np.array([step * sign], np.float32), 0)
        for build in (materialize, materialize_reference):
            out = torch.empty(1, dtype=torch.float16)
            build(out, base[i : i + 1], [commit], RADEMACHER)
            assert out.item() == expected[i]


def test_stochastic_rounding_is_right_on_average() -> None:
    count = 1 << 16
    base = torch.full((count,), 1.0, dtype=torch.bfloat16)
    step = 2.0**-7  # between neighbours of 1 in bfloat16
    seeds = np.array([5], dtype=np.uint64)
    coefficient = np.array([0.3 * step], dtype=np.float32)
    operands = Operands(0, Distribution.RADEMACHER, Rounding.STOCHASTIC)
    out = made(base, [Commit(seeds, coefficient, 123)], operands)
    up = spec.rademacher(np.arange(count, dtype=np.int64), 5, 0) > 0
    moved = out.float().numpy() - 1.0
    assert set(np.unique(moved[up])) == {0.0, step}
    assert set(np.unique(moved[~up])) == {-step / 2, 0.0}  # below 1 the neighbours are half as far
    assert abs(float((moved[up] > 0).mean()) - 0.3) < 0.01
    assert abs(float((moved[~up] < 0).mean()) - 0.6) < 0.01
    assert not torch.equal(out, made(base, [Commit(seeds, coefficient, 124)], operands))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_subnormals_are_kept_even_where_torch_flushes_them(
    storage: tuple[torch.dtype, Rounding],
) -> None:
    count = 400_000  # enough for the pool's threads to take part
    scale = 1.0 if storage[0] != torch.float16 else 2.0**110  # float16's begin below 6.1e-5
    base = torch.full((count,), 3e-40 * scale).to(storage[0])
    steps = np.array([1e-41, 3e-42, 1e-45, -2e-41]) * scale
    pairs = np.arange(4, dtype=np.uint64), steps.astype(np.float32)
    commits = [Commit(*pairs, 9), Commit(*pairs, 10, decay=0.75)]
    operands = Operands(0, Distribution.GAUSSIAN, storage[1])
    expected, out = made(base, commits, operands, threads=1), torch.empty_like(base)
    assert_same_bits(expected[:5000], specified(base[:5000], commits, operands))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as flushing:  # inherits the flushing mode
            flushing.submit(materialize, out, base, commits, operands, threads=4).result()
            flushed = torch.ones(1) * 1e-40
    finally:
        torch.set_flush_denormal(False)
    assert flushed.item() == 0.0  # the mode was on, and was restored in this thread
    assert_same_bits(out, expected)
    assert len(set(bits(out[:100]).tolist())) > 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets MXCSR's rounding bits")
def test_the_rounding_mode_is_set_and_restored() -> None:
    """A kernel must not run in whatever floating-point mode the caller's thread happens to have."""
    before = cpu.exchange_float_control(cpu.STRICT_CONTROL)
    toward_zero = np.uint64(int(cpu.STRICT_CONTROL) | 0x6000)
    generator = np.random.default_rng(5)
    base, commits = weights_of(generator, 5000, torch.float32), [commit_of(generator, 9)]
    expected, out = made(base, commits, RADEMACHER), torch.empty_like(base)
    try:
        cpu.exchange_float_control(toward_zero)
        materialize(out, base, commits, RADEMACHER)
        restored = int(cpu.exchange_float_control(before)) & 0x6000
    finally:
        cpu.exchange_float_control(before)
    assert_same_bits(out, expected)
    assert restored == int(toward_zero) & 0x6000


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("build", [materialize, materialize_reference])
def test_a_bad_weight_is_named(
    storage: tuple[torch.dtype, Rounding], value: float, build: Any
) -> None:
    base = torch.zeros(9000, dtype=storage[0])
    base[[4100, 8999]] = value
    commits = [commit_of(np.random.default_rng(0), 3, decay=decay) for decay in (1.0, 1e-40)]
    operands = Operands(7, Distribution.GAUSSIAN, storage[1], 1_000_000, name="wte")
    with pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 1004100 is (nan|-?inf)"):
        build(base.clone(), base, commits, operands)
    operands = RADEMACHER._replace(tensor_id=7)
    with pytest.raises(NumericError, match="Tensor 7: element 4100 is"):
        require_finite(base, operands)
    require_finite(base[:4100], operands)


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000])
def test_no_nan_is_rounded_into_a_number(pattern: int) -> None:
    base = torch.tensor([pattern >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for rounding in Rounding:
        operands = Operands(0, Distribution.RADEMACHER, rounding)
        with pytest.raises(NumericError, match="element 0 is"):
            made(base, [commit_of(np.random.default_rng(0), 1)], operands)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_an_overflow_is_named(storage: tuple[torch.dtype, Rounding]) -> None:
    """Also one that a later commit would have undone."""
    base = torch.zeros(5000, dtype=storage[0])
    base[4999] = torch.finfo(storage[0]).max
    sign = spec.rademacher(np.array([4999], dtype=np.int64), 5, 0)[0]
    huge = np.array([0.9 * torch.finfo(storage[0]).max], dtype=np.float32)
    seeds = np.array([5], dtype=np.uint64)
    commits = [Commit(seeds, sign * huge, 1), Commit(seeds, -sign * huge, 2)]
    for build in (materialize, materialize_reference):
        operands = Operands(0, Distribution.RADEMACHER, storage[1])
        with pytest.raises(NumericError, match="Tensor 0: element 4999 is inf"):
            build(torch.empty_like(base), base, commits, operands)


def test_bad_commits_are_refused() -> None:
    seeds = np.arange(3, dtype=np.uint64)
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(
            NumericError, match=r"Coefficient 1 of a commit, for seed 1, is (nan|-?inf)"
        ):
            Commit(seeds, np.array([0, value, 0], dtype=np.float32), 0)
    with pytest.raises(NumericError, match="one coefficient for each seed"):
        Commit(seeds, np.zeros(2, np.float32), 0)
    with pytest.raises(NumericError, match="uint64 and float32"):
        Commit(seeds, np.zeros(3), 0)  # type: ignore[arg-type]  # float64, as a caller might
    for rounding_seed in (-1, 2**64):
        with pytest.raises(NumericError, match="rounding seed"):
            Commit(seeds, np.zeros(3, np.float32), rounding_seed)
    for decay in (0.0, -0.5, 1.5, 0.1, 1e-300, 1e300, math.nan, math.inf):
        with pytest.raises(NumericError, match=f"The decay {re.escape(str(decay))} of a commit"):
            Commit(seeds, np.zeros(3, np.float32), 0, decay=decay)


def test_a_commit_takes_any_array_and_keeps_its_own() -> None:
    seeds = np.arange(8, dtype=np.uint64)
    coefficients = np.linspace(-1, 1, 8, dtype=np.float32)
    plain, read = torch.zeros(500), torch.zeros(500)
    materialize(plain, plain, [Commit(seeds[::2], coefficients[::2], 0)], RADEMACHER)
    compiled = len(cpu.apply_float32.signatures)  # type: ignore[attr-defined]  # numba's
    commit = Commit(
        np.frombuffer(seeds[::2].tobytes(), np.uint64),
        np.frombuffer(coefficients[::2].tobytes(), np.float32),
        0,
    )
    materialize(read, read, [commit], RADEMACHER)
    assert_same_bits(read, plain)
    assert len(cpu.apply_float32.signatures) == compiled  # type: ignore[attr-defined]
    own = Commit(seeds, coefficients, 0)
    seeds[:], coefficients[:] = 0, np.nan
    assert own.seeds.tolist() == list(range(8))
    assert np.isfinite(own.coefficients).all()


def refused() -> Sequence[tuple[str, type[Exception], torch.Tensor, torch.Tensor, Operands]]:
    zeros, memory, plain = torch.zeros(8), torch.zeros(12), RADEMACHER
    return [
        ("one size", MismatchError, zeros, torch.zeros(9), plain),
        ("one dtype", MismatchError, zeros, zeros.bfloat16(), plain),
        ("one dtype", MismatchError, zeros.half(), zeros.bfloat16(), plain),
        ("float32, bfloat16 or float16", MismatchError, zeros.double(), zeros.double(), plain),
        ("contiguous", MismatchError, zeros, torch.zeros(8, 2)[:, 0], plain),
        ("CPU", MismatchError, zeros, zeros.to("meta"), plain),
        ("overlap", MismatchError, memory[4:], memory[:8], plain),
        ("tensor id", NumericError, zeros, zeros, plain._replace(tensor_id=2**32)),
        ("tensor id", NumericError, zeros, zeros, plain._replace(tensor_id=-1)),
        ("elements", NumericError, zeros, zeros, plain._replace(start=-1)),
        ("elements", NumericError, zeros, zeros, plain._replace(start=2**48 - 7)),
        ("columns", NumericError, zeros, zeros, plain._replace(columns=0)),
        ("columns", NumericError, zeros, zeros, plain._replace(columns=2**48 + 1)),
    ]


@pytest.mark.parametrize(("message", "error", "out", "base", "operands"), refused())
@pytest.mark.parametrize("build", [materialize, materialize_reference])
def test_bad_operands_are_refused_untouched(
    build: Any,
    message: str,
    error: type[Exception],
    out: torch.Tensor,
    base: torch.Tensor,
    operands: Operands,
) -> None:
    before = out.clone()
    commit = commit_of(np.random.default_rng(0), 3)
    with pytest.raises(error, match=message):
        build(out, base, [commit], operands)
    assert torch.equal(out, before)


def test_shapes_parameters_and_empty_tensors() -> None:
    commit = commit_of(np.random.default_rng(0), 3)
    flat = torch.ones(6 * 50)
    materialize(flat, flat, [commit], RADEMACHER)
    parameter = torch.nn.Parameter(torch.ones(6, 50))
    materialize(parameter, parameter, [commit], RADEMACHER)
    assert_same_bits(parameter.detach().view(-1), flat)
    one = torch.ones(())
    materialize(one, one, [commit], RADEMACHER)
    assert one == flat[0]
    row = torch.empty(2, 50)
    materialize(row, torch.ones(2, 50), [commit], RADEMACHER._replace(start=100))
    assert_same_bits(row, flat.view(6, 50)[2:4])
    materialize(torch.empty(0), torch.empty(0), [commit], RADEMACHER)
    assert_same_bits(made(flat, [], RADEMACHER), flat)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Compiling takes seconds, which a kernel called with new types would cost in a round."""
    warm_up()
    kernels: list[Any] = [
        cpu.apply_float32,
        cpu.apply_tiles,
        cpu.fan_float32,
        cpu.fan_tiles,
        cpu.factor_signs,
    ]
    generator = np.random.default_rng(0)
    local = commit_of(generator, 3, rounding_seed=2**64 - 1)
    decayed = commit_of(generator, 3, decay=0.5)
    for (dtype, rounding), distribution in itertools.product(STORAGE, Distribution):
        operands = Operands(2**32 - 1, distribution, rounding, 2**48 - 6000)
        weights = torch.nn.Parameter(torch.zeros(60, 100, dtype=dtype), requires_grad=False)
        outs = list(torch.empty(3, 60, 100, dtype=dtype))
        for commits in ([], [local], [local, local], [local, decayed, local], [decayed]):
            materialize(weights, weights, commits, operands)
            materialize(outs[0], weights, commits, operands)
        for fan in ([local], [local, local, local], [local, decayed]):
            materialize_fan(outs[: len(fan)], weights, fan, operands)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for side in Side:
            factors([2**64 - 1], 2**32 - 1, side, 9, 4, dtype=dtype, device=torch.device("cpu"))
    assert [len(kernel.signatures) for kernel in kernels] == [1] * len(kernels)


def test_the_last_dimension_is_the_columns() -> None:
    commit = commit_of(np.random.default_rng(0), 3)
    operands = Operands(0, Distribution.LOW_RANK_2, Rounding.NEAREST)
    flat, matrix, deep = torch.ones(6 * 50), torch.ones(6, 50), torch.ones(3, 2, 50)
    materialize(flat, flat, [commit], operands._replace(columns=50))
    materialize(matrix, matrix, [commit], operands)
    materialize(deep, deep, [commit], operands)
    assert_same_bits(matrix.view(-1), flat)
    assert_same_bits(deep.view(-1), flat)
    block = torch.empty(2, 50)
    materialize(block, torch.ones(2, 50), [commit], operands._replace(start=100))
    assert_same_bits(block, matrix[2:4])
    one, row = torch.ones(()), torch.ones(1)
    materialize(one, one, [commit], operands)
    materialize(row, row, [commit], operands)
    assert one == row[0]
    with pytest.raises(AssertionError):
        assert_same_bits(flat, torch.ones(300))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads() -> None:
    warm_up()
    commits = [commit_of(np.random.default_rng(0), 8)]
    base = torch.ones(400_000)
    out = made(base, commits, RADEMACHER, threads=3)
    child = os.fork()
    if child == 0:
        again = made(base, commits, RADEMACHER, threads=3)
        os._exit(0 if again.numpy().tobytes() == out.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
