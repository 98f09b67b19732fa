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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import MismatchError, NumericError
from fedmezo_core.zo.forward.low_rank import Side, factors, split
from fedmezo_core.zo.materialize import (
    Commit,
    Rounding,
    materialize,
    materialize_fan,
    materialize_reference,
    require_finite,
    warm_up,
)
from fedmezo_core.zo.noise import Distribution, cpu, spec
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
RADEMACHER: dict[str, Any] = {"distribution": Distribution.RADEMACHER, "rounding": Rounding.NEAREST}


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


places = st.integers(0, 5000) | st.sampled_from([2**32 - 700, 2**35 + 1, 2**48 - 6000])
sizes = st.integers(0, 700) | st.integers(3000, 6000)


@settings(deadline=None, max_examples=120)
@given(
    journals(),
    st.sampled_from(STORAGE),
    st.sampled_from(Distribution),
    columns_of,
    places,
    sizes,
    st.integers(0, 2**32 - 1),
)
def test_equals_the_reference(
    journal: tuple[list[Commit], np.random.Generator],
    storage: tuple[torch.dtype, Rounding],
    distribution: Distribution,
    columns: int,
    start: int,
    size: int,
    tensor_id: int,
) -> None:
    commits, generator = journal
    base = weights_of(generator, size, storage[0])
    kept = base.clone()
    how: dict[str, Any] = {
        "tensor_id": tensor_id,
        "start": start,
        "columns": columns,
        "distribution": distribution,
        "rounding": storage[1],
    }
    expected, out = torch.empty_like(base), torch.empty_like(base)
    materialize_reference(expected, base, commits, **how)
    materialize(out, base, commits, **how)
    assert_same_bits(out, expected)
    assert_same_bits(base, kept)
    materialize(base, base, commits, **how)
    assert_same_bits(base, expected)


def cut(draw: st.DataObject, whole: int) -> list[tuple[int, int]]:
    """0 .. whole in up to five consecutive pieces."""
    inner = draw.draw(st.lists(st.integers(0, whole), max_size=4))
    edges = [0, *sorted(inner), whole]
    return list(itertools.pairwise(edges))


@settings(deadline=None, max_examples=100)
@given(
    journals(),
    st.sampled_from(STORAGE),
    st.sampled_from(Distribution),
    columns_of,
    places,
    sizes,
    st.sampled_from([1, 2, 3]),
    st.data(),
)
def test_any_way_of_calling_gives_the_same_bits(
    journal: tuple[list[Commit], np.random.Generator],
    storage: tuple[torch.dtype, Rounding],
    distribution: Distribution,
    columns: int,
    start: int,
    size: int,
    threads: int,
    data: st.DataObject,
) -> None:
    commits, generator = journal
    base = weights_of(generator, size, storage[0])
    how: dict[str, Any] = {
        "tensor_id": 4,
        "columns": columns,
        "distribution": distribution,
        "rounding": storage[1],
    }
    at_once = torch.empty_like(base)
    materialize(at_once, base, commits, start=start, **how)

    # The journal in pieces, and within each the elements in other pieces, out of place then in place.
    pieces = base.clone()
    for first, last in cut(data, len(commits)):
        source = pieces.clone()
        for begin, end in cut(data, size):
            materialize(
                pieces[begin:end], source[begin:end], commits[first:last],
                start=start + begin, threads=threads, **how,
            )  # fmt: skip
    assert_same_bits(pieces, at_once)

    if storage[0] == torch.float32:
        # float32: a commit's end leaves no trace, so commits may be cut and joined as well, up to the
        # next decay.
        decayed = [k for k, commit in enumerate(commits) if commit.decay != 1.0]
        joined = base.clone()
        for begin, end in itertools.pairwise(sorted({0, *decayed, len(commits)})):
            together = commits[begin:end]
            seeds = np.concatenate([commit.seeds for commit in together])
            coefficients = np.concatenate([commit.coefficients for commit in together])
            decay = together[0].decay
            for first, last in cut(data, len(seeds)):
                part = Commit(seeds[first:last], coefficients[first:last], 0, decay=decay)
                materialize(joined, joined, [part], start=start, **how)
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
    how: dict[str, Any] = {
        "tensor_id": 4,
        "start": 77,
        "columns": 768,
        "distribution": distribution,
        "rounding": storage[1],
    }
    one, many = torch.empty_like(base), base.clone()
    materialize(one, base, commits, threads=1, **how)
    materialize(many, many, commits, threads=5, **how)
    assert_same_bits(many, one)


def test_callers_in_many_threads() -> None:
    generator = np.random.default_rng(3)
    commits = [commit_of(generator, 8)]
    bases = [weights_of(generator, 300_000, torch.float32) for _ in range(6)]

    def build(tensor_id: int, threads: int) -> torch.Tensor:
        out = torch.empty_like(bases[tensor_id])
        materialize(
            out, bases[tensor_id], commits, tensor_id=tensor_id, threads=threads, **RADEMACHER
        )
        return out

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda tensor_id: build(tensor_id, 3), range(6)))
    for tensor_id, out in enumerate(together):
        assert_same_bits(out, build(tensor_id, 1))


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
    how: dict[str, Any] = {
        "tensor_id": 4,
        "start": start,
        "columns": columns,
        "distribution": distribution,
        "rounding": storage[1],
    }
    base = weights_of(generator, size, storage[0])
    expected, out = torch.empty_like(base), torch.empty_like(base)
    materialize_reference(expected, base, commits, **how)
    materialize(out, base, commits, **how)
    assert_same_bits(out, expected)
    materialize_fan([out], base, commits[:1], **how)
    materialize_reference(expected, base, commits[:1], **how)
    assert_same_bits(out, expected)
    # One direction alone, coefficient 1: the reference's zeros have the sign of the coefficient.
    zeros = torch.full_like(base[:5000], -0.0)
    for coefficient in (1.0, -1.0, -0.0):
        commit = Commit(np.array([3], np.uint64), np.array([coefficient], np.float32), 1)
        materialize(out[:5000], zeros, [commit], **how)
        materialize_reference(expected[:5000], zeros, [commit], **how)
        assert_same_bits(out[:5000], expected[:5000])


def test_the_first_element_that_is_not_finite_is_named_also_in_a_later_tile() -> None:
    """A wide matrix's tiles end in mid-row."""
    base = torch.zeros(20, 3000)
    base[5, 10] = base[2, 2900] = float("inf")
    with pytest.raises(NumericError, match=f"element {2 * 3000 + 2900} is inf"):
        materialize(
            base, base, [commit_of(np.random.default_rng(0), 3)], tensor_id=0,
            distribution=Distribution.LOW_RANK_4, rounding=Rounding.NEAREST,
        )  # fmt: skip


def test_a_zero_of_a_huge_coefficient_is_a_zero() -> None:
    """1.4142135 times the coefficient is infinite, 0 times it is not."""
    huge = Commit(np.array([3], np.uint64), np.array([3e38], np.float32), 0)
    z = spec.low_rank(np.arange(40), 3, 0, rank=2, columns=40)
    place = int(np.argmin(np.abs(z)))
    assert z[place] == 0
    out = torch.zeros(1)
    materialize(
        out, out, [huge], tensor_id=0, start=place, columns=40,
        distribution=Distribution.LOW_RANK_2, rounding=Rounding.NEAREST,
    )  # fmt: skip
    assert out.item() == 0.0


@st.composite
def fans(draw: st.DrawFn) -> tuple[list[Commit], np.random.Generator]:
    """Commits as measurements have them (the same local pairs, then one more), and some unlike that."""
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


@settings(deadline=None, max_examples=120)
@given(
    fans(),
    st.sampled_from(STORAGE),
    st.sampled_from(Distribution),
    columns_of,
    places,
    sizes,
    st.sampled_from([1, 2, 3]),
    st.data(),
)
def test_a_fan_equals_one_call_for_each_output(
    fan: tuple[list[Commit], np.random.Generator],
    storage: tuple[torch.dtype, Rounding],
    distribution: Distribution,
    columns: int,
    start: int,
    size: int,
    threads: int,
    data: st.DataObject,
) -> None:
    commits, generator = fan
    base = weights_of(generator, size, storage[0])
    kept = base.clone()
    how: dict[str, Any] = {
        "tensor_id": 4,
        "columns": columns,
        "distribution": distribution,
        "rounding": storage[1],
    }
    outs = [torch.empty_like(base) for _ in commits]
    for begin, end in cut(data, size):
        materialize_fan(
            [out[begin:end] for out in outs], base[begin:end], commits,
            start=start + begin, threads=threads, **how,
        )  # fmt: skip
    assert_same_bits(base, kept)
    for out, commit in zip(outs, commits, strict=True):
        expected = torch.empty_like(base)
        materialize_reference(expected, base, [commit], start=start, **how)
        assert_same_bits(out, expected)


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
    how: dict[str, Any] = {
        "tensor_id": 4,
        "start": 77,
        "columns": 768,
        "distribution": distribution,
        "rounding": storage[1],
    }
    outs = [torch.empty_like(base) for _ in commits]
    materialize_fan(outs, base, commits, threads=5, **how)
    for out, commit in zip(outs, commits, strict=True):
        expected = torch.empty_like(base)
        materialize(expected, base, [commit], threads=1, **how)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("local", [0, 2])
def test_a_fan_names_what_is_not_finite(storage: tuple[torch.dtype, Rounding], local: int) -> None:
    how: dict[str, Any] = {
        "tensor_id": 7,
        "start": 1_000_000,
        "name": "wte",
        "rounding": storage[1],
    }
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
        materialize_fan(outs, base, commits, distribution=distribution, **how)

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
    place: dict[str, Any] = {"tensor_id": 3, **RADEMACHER}
    apart = torch.zeros(8)
    for first, second, base in (
        (memory[:8], memory[4:12], apart),
        (memory[:8], memory[:8], apart),
        (apart, memory[:8], memory[:8]),
        (memory[:8], apart, memory[7:15]),
    ):
        with pytest.raises(MismatchError, match="overlap"):
            materialize_fan([first, second], base, commits, **place)
    with pytest.raises(MismatchError, match="1 outputs for 2 commits"):
        materialize_fan([apart], memory[:8], commits, **place)
    with pytest.raises(MismatchError, match="one size"):
        materialize_fan([apart, memory[:9]], memory[10:18], commits, **place)
    assert not memory.any()
    materialize_fan([memory[:8], memory[8:16]], apart, commits, **place)
    materialize_fan([], apart, [], **place)
    materialize_fan([memory[:0], memory[:0]], apart[:0], commits, **place)


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


@pytest.mark.parametrize("build", [materialize, materialize_reference])
@pytest.mark.parametrize("case", golden_weights(), ids=golden_name)
def test_golden_weights(build: Any, case: dict[str, Any]) -> None:
    base, commits = golden_operands(case)
    out = torch.empty_like(base)
    build(
        out, base, commits, tensor_id=case["tensor_id"], start=case["start"],
        distribution=Distribution(case["distribution"]), rounding=Rounding(case["rounding"]),
        columns=case.get("columns"),
    )  # fmt: skip
    digits = 8 if base.dtype == torch.float32 else 4
    got = bits(out).tolist()
    assert " ".join(f"{v & (16**digits - 1):0{digits}x}" for v in got) == case["result"]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_a_decay_comes_before_the_pairs_and_is_rounded_by_itself(
    storage: tuple[torch.dtype, Rounding],
) -> None:
    """Also that of a commit without pairs, and whatever the distribution."""
    generator = np.random.default_rng(11)
    base = weights_of(generator, 9000, storage[0])
    how: dict[str, Any] = {"tensor_id": 4, "rounding": storage[1]}
    decay = np.float32(0.9)
    shrunk = torch.from_numpy(base.float().numpy() * decay)
    for distribution in Distribution:
        pairs = commit_of(generator, 3)
        commit = Commit(pairs.seeds, pairs.coefficients, 5, decay=float(decay))
        out = torch.empty_like(base)
        materialize(out, base, [commit], distribution=distribution, **how)
        if storage[0] == torch.float32:
            exact = torch.empty_like(shrunk)
            materialize(exact, shrunk, [pairs], distribution=distribution, **how)
            assert_same_bits(out, exact)
        nothing = Commit(np.empty(0, np.uint64), np.empty(0, np.float32), 5, decay=float(decay))
        materialize(out, base, [nothing], distribution=distribution, **how)
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


@pytest.mark.parametrize("storage", STORAGE[::2], ids=str)
def test_a_thousand_commits_with_and_without_decay(storage: tuple[torch.dtype, Rounding]) -> None:
    generator = np.random.default_rng(12)
    commits = [
        commit_of(generator, k % 3, 1e-3, k, 0.999 if generator.random() < 0.3 else 1.0)
        for k in range(1000)
    ]
    base = weights_of(generator, 4600, storage[0])
    how: dict[str, Any] = {
        "tensor_id": 4, "start": 77, "distribution": Distribution.RADEMACHER, "rounding": storage[1],
    }  # fmt: skip
    fused, one_by_one, expected = torch.empty_like(base), base.clone(), torch.empty_like(base)
    materialize(fused, base, commits, **how)
    for commit in commits:
        materialize(one_by_one, one_by_one, [commit], **how)
    assert_same_bits(fused, one_by_one)
    materialize_reference(expected, base, commits, **how)
    assert_same_bits(fused, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_rounds_like_torch(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(5)
    base = weights_of(generator, 9000, dtype)
    commit = commit_of(generator, 1, scale=1e-2)
    rounded, exact = torch.empty_like(base), torch.empty(9000)
    for distribution in Distribution:
        materialize(
            rounded, base, [commit], tensor_id=0,
            distribution=distribution, rounding=Rounding.NEAREST,
        )  # fmt: skip
        materialize(
            exact, base.float(), [commit], tensor_id=0,
            distribution=distribution, rounding=Rounding.NEAREST,
        )  # fmt: skip
        assert_same_bits(rounded, exact.to(dtype))


def float16_of_all_patterns() -> torch.Tensor:
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    return patterns[torch.isfinite(patterns)]


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("build", [materialize, materialize_reference])
def test_what_float16_represents_is_unchanged(build: Any, rounding: Rounding) -> None:
    """Whatever the random bits; adding -0 keeps the sign of zeros too."""
    base = float16_of_all_patterns()
    sign = spec.rademacher(np.zeros(1, np.int64), 5, 0)[0]
    for rounding_seed in range(8):
        out = torch.empty_like(base)
        nothing = Commit(np.array([], np.uint64), np.array([], np.float32), rounding_seed)
        build(
            out, base, [nothing], tensor_id=0,
            distribution=Distribution.RADEMACHER, rounding=rounding,
        )  # fmt: skip
        assert_same_bits(out, base)
        zero = Commit(np.array([5], np.uint64), np.array([-0.0 * sign], np.float32), rounding_seed)
        build(
            out, base, [zero], tensor_id=0, distribution=Distribution.RADEMACHER, rounding=rounding
        )
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
    how: dict[str, Any] = {
        "tensor_id": 1,
        "start": 1000,
        "distribution": Distribution.RADEMACHER,
        "rounding": rounding,
    }
    expected, out = torch.empty_like(base), torch.empty_like(base)
    materialize_reference(expected, base, commits, **how)
    materialize(out, base, commits, **how)
    assert_same_bits(out, expected)


def test_float16_rounds_to_a_neighbour_and_right_on_average() -> None:
    """Also among subnormals, and to and from the smallest normal number."""
    count, tensor_id = 1 << 15, 0
    signs = spec.rademacher(np.arange(count, dtype=np.int64), 5, tensor_id)
    unit = 2.0**-24
    for value, step in ((1.0, 2.0**-10), (2.0**-14, unit), (1000 * unit, unit), (0.0, unit)):
        base = torch.full((count,), value, dtype=torch.float16)
        for share in (0.3, 1e-3):
            commit = Commit(np.array([5], np.uint64), np.array([share * step], np.float32), 123)
            out = torch.empty_like(base)
            materialize(
                out, base, [commit], tensor_id=tensor_id,
                distribution=Distribution.RADEMACHER, rounding=Rounding.STOCHASTIC,
            )  # fmt: skip
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
            build(out, base[i : i + 1], [commit], tensor_id=0, **RADEMACHER)
            assert out.item() == expected[i]


def test_stochastic_rounding_is_right_on_average() -> None:
    count = 1 << 16
    base = torch.full((count,), 1.0, dtype=torch.bfloat16)
    step = 2.0**-7  # between neighbours of 1 in bfloat16
    out = torch.empty_like(base)
    seeds = np.array([5], dtype=np.uint64)
    coefficient = np.array([0.3 * step], dtype=np.float32)
    materialize(
        out, base, [Commit(seeds, coefficient, 123)], tensor_id=0,
        distribution=Distribution.RADEMACHER, rounding=Rounding.STOCHASTIC,
    )  # fmt: skip
    up = spec.rademacher(np.arange(count, dtype=np.int64), 5, 0) > 0
    moved = out.float().numpy() - 1.0
    assert set(np.unique(moved[up])) == {0.0, step}
    assert set(np.unique(moved[~up])) == {-step / 2, 0.0}  # below 1 the neighbours are half as far
    assert abs(float((moved[up] > 0).mean()) - 0.3) < 0.01
    assert abs(float((moved[~up] < 0).mean()) - 0.6) < 0.01
    other = torch.empty_like(base)
    materialize(
        other, base, [Commit(seeds, coefficient, 124)], tensor_id=0,
        distribution=Distribution.RADEMACHER, rounding=Rounding.STOCHASTIC,
    )  # fmt: skip
    assert not torch.equal(out, other)


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
    how: dict[str, Any] = {
        "tensor_id": 0,
        "distribution": Distribution.GAUSSIAN,
        "rounding": storage[1],
    }
    expected, out = torch.empty_like(base), torch.empty_like(base)
    materialize_reference(expected[:5000], base[:5000], commits, **how)
    materialize(expected, base, commits, threads=1, **how)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as flushing:  # inherits the flushing mode
            flushing.submit(materialize, out, base, commits, threads=4, **how).result()
            flushed = torch.ones(1) * 1e-40
    finally:
        torch.set_flush_denormal(False)
    assert flushed.item() == 0.0  # the mode was on, and was restored in this thread
    assert_same_bits(out, expected)
    check = torch.empty_like(base[:5000])
    materialize_reference(check, base[:5000], commits, **how)
    assert_same_bits(check, out[:5000])
    assert len(set(bits(out[:100]).tolist())) > 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets MXCSR's rounding bits")
def test_the_rounding_mode_is_set_and_restored() -> None:
    """A kernel must not run in whatever floating-point mode the caller's thread happens to have."""
    before = cpu.exchange_float_control(cpu.STRICT_CONTROL)
    toward_zero = np.uint64(int(cpu.STRICT_CONTROL) | 0x6000)
    generator = np.random.default_rng(5)
    base, commits = weights_of(generator, 5000, torch.float32), [commit_of(generator, 9)]
    expected, out = torch.empty_like(base), torch.empty_like(base)
    materialize(expected, base, commits, tensor_id=0, **RADEMACHER)
    try:
        cpu.exchange_float_control(toward_zero)
        materialize(out, base, commits, tensor_id=0, **RADEMACHER)
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
    with pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 1004100 is (nan|-?inf)"):
        build(
            base.clone(), base, commits, tensor_id=7, start=1_000_000, name="wte",
            distribution=Distribution.GAUSSIAN, rounding=storage[1],
        )  # fmt: skip
    with pytest.raises(NumericError, match="Tensor 7: element 4100 is"):
        require_finite(base, tensor_id=7)
    require_finite(base[:4100], tensor_id=7)


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000])
def test_no_nan_is_rounded_into_a_number(pattern: int) -> None:
    base = torch.tensor([pattern >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for rounding in Rounding:
        with pytest.raises(NumericError, match="element 0 is"):
            materialize(
                base.clone(), base, [commit_of(np.random.default_rng(0), 1)], tensor_id=0,
                distribution=Distribution.RADEMACHER, rounding=rounding,
            )  # fmt: skip


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
        with pytest.raises(NumericError, match="Tensor 0: element 4999 is inf"):
            build(
                torch.empty_like(base), base, commits, tensor_id=0,
                distribution=Distribution.RADEMACHER, rounding=storage[1],
            )  # fmt: skip


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
    materialize(plain, plain, [Commit(seeds[::2], coefficients[::2], 0)], tensor_id=0, **RADEMACHER)
    compiled = len(cpu.materialize_float32.signatures)  # type: ignore[attr-defined]  # numba's
    commit = Commit(
        np.frombuffer(seeds[::2].tobytes(), np.uint64),
        np.frombuffer(coefficients[::2].tobytes(), np.float32),
        0,
    )
    materialize(read, read, [commit], tensor_id=0, **RADEMACHER)
    assert_same_bits(read, plain)
    assert len(cpu.materialize_float32.signatures) == compiled  # type: ignore[attr-defined]
    own = Commit(seeds, coefficients, 0)
    seeds[:], coefficients[:] = 0, np.nan
    assert own.seeds.tolist() == list(range(8))
    assert np.isfinite(own.coefficients).all()


def refused() -> Sequence[tuple[str, type[Exception], torch.Tensor, torch.Tensor, dict[str, int]]]:
    zeros, memory = torch.zeros(8), torch.zeros(12)
    return [
        ("one size", MismatchError, zeros, torch.zeros(9), {}),
        ("one dtype", MismatchError, zeros, zeros.bfloat16(), {}),
        ("one dtype", MismatchError, zeros.half(), zeros.bfloat16(), {}),
        ("float32, bfloat16 or float16", MismatchError, zeros.double(), zeros.double(), {}),
        ("contiguous", MismatchError, zeros, torch.zeros(8, 2)[:, 0], {}),
        ("CPU", MismatchError, zeros, zeros.to("meta"), {}),
        ("overlap", MismatchError, memory[4:], memory[:8], {}),
        ("tensor id", NumericError, zeros, zeros, {"tensor_id": 2**32}),
        ("tensor id", NumericError, zeros, zeros, {"tensor_id": -1}),
        ("elements", NumericError, zeros, zeros, {"start": -1}),
        ("elements", NumericError, zeros, zeros, {"start": 2**48 - 7}),
        ("columns", NumericError, zeros, zeros, {"columns": 0}),
        ("columns", NumericError, zeros, zeros, {"columns": 2**48 + 1}),
    ]


@pytest.mark.parametrize(("message", "error", "out", "base", "place"), refused())
@pytest.mark.parametrize("build", [materialize, materialize_reference])
def test_bad_operands_are_refused_untouched(
    build: Any,
    message: str,
    error: type[Exception],
    out: torch.Tensor,
    base: torch.Tensor,
    place: dict[str, int],
) -> None:
    before = out.clone()
    commit = commit_of(np.random.default_rng(0), 3)
    with pytest.raises(error, match=message):
        build(out, base, [commit], **{"tensor_id": 0, **place}, **RADEMACHER)
    assert torch.equal(out, before)


def test_shapes_parameters_and_empty_tensors() -> None:
    commit = commit_of(np.random.default_rng(0), 3)
    flat = torch.ones(6 * 50)
    materialize(flat, flat, [commit], tensor_id=0, **RADEMACHER)
    parameter = torch.nn.Parameter(torch.ones(6, 50))
    materialize(parameter, parameter, [commit], tensor_id=0, **RADEMACHER)
    assert_same_bits(parameter.detach().view(-1), flat)
    one = torch.ones(())
    materialize(one, one, [commit], tensor_id=0, **RADEMACHER)
    assert one == flat[0]
    row = torch.empty(2, 50)
    materialize(row, torch.ones(2, 50), [commit], tensor_id=0, start=100, **RADEMACHER)
    assert_same_bits(row, flat.view(6, 50)[2:4])
    materialize(torch.empty(0), torch.empty(0), [commit], tensor_id=0, **RADEMACHER)
    copied = torch.empty_like(flat)
    materialize(copied, flat, [], tensor_id=0, **RADEMACHER)
    assert_same_bits(copied, flat)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Compiling takes seconds: a kernel called with other types than before would take them in a round."""
    warm_up()
    kernels: list[Any] = [
        cpu.materialize_float32,
        cpu.materialize_tiles,
        cpu.fan_float32,
        cpu.fan_tiles,
        cpu.factor_signs,
    ]
    generator = np.random.default_rng(0)
    local = commit_of(generator, 3, rounding_seed=2**64 - 1)
    decayed = commit_of(generator, 3, decay=0.5)
    for (dtype, rounding), distribution in itertools.product(STORAGE, Distribution):
        how: dict[str, Any] = {
            "tensor_id": 2**32 - 1,
            "start": 2**48 - 6000,
            "distribution": distribution,
            "rounding": rounding,
        }
        weights = torch.nn.Parameter(torch.zeros(60, 100, dtype=dtype), requires_grad=False)
        outs = list(torch.empty(3, 60, 100, dtype=dtype))
        for commits in ([], [local], [local, local], [local, decayed, local], [decayed]):
            materialize(weights, weights, commits, **how)
            materialize(outs[0], weights, commits, **how)
        for fan in ([local], [local, local, local], [local, decayed]):
            materialize_fan(outs[: len(fan)], weights, fan, **how)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for side in Side:
            factors([2**64 - 1], 2**32 - 1, side, 9, 4, dtype=dtype, device=torch.device("cpu"))
    assert [len(kernel.signatures) for kernel in kernels] == [1] * len(kernels)


def test_the_last_dimension_is_the_columns() -> None:
    commit = commit_of(np.random.default_rng(0), 3)
    how: dict[str, Any] = {"distribution": Distribution.LOW_RANK_2, "rounding": Rounding.NEAREST}
    flat, matrix, deep = torch.ones(6 * 50), torch.ones(6, 50), torch.ones(3, 2, 50)
    materialize(flat, flat, [commit], tensor_id=0, columns=50, **how)
    materialize(matrix, matrix, [commit], tensor_id=0, **how)
    materialize(deep, deep, [commit], tensor_id=0, **how)
    assert_same_bits(matrix.view(-1), flat)
    assert_same_bits(deep.view(-1), flat)
    block = torch.empty(2, 50)
    materialize(block, torch.ones(2, 50), [commit], tensor_id=0, start=100, **how)
    assert_same_bits(block, matrix[2:4])
    one, row = torch.ones(()), torch.ones(1)
    materialize(one, one, [commit], tensor_id=0, **how)
    materialize(row, row, [commit], tensor_id=0, **how)
    assert one == row[0]
    with pytest.raises(AssertionError):
        assert_same_bits(flat, torch.ones(300))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads() -> None:
    warm_up()
    commits = [commit_of(np.random.default_rng(0), 8)]
    base = torch.ones(400_000)
    out = torch.empty_like(base)
    materialize(out, base, commits, tensor_id=0, threads=3, **RADEMACHER)
    child = os.fork()
    if child == 0:
        again = torch.empty_like(base)
        materialize(again, base, commits, tensor_id=0, threads=3, **RADEMACHER)
        os._exit(0 if again.numpy().tobytes() == out.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
