"""The CUDA kernels in Triton's interpreter and the portable path, against the specification.

Both work on CPU tensors here. `materialize` would take its CPU path, so the tests call `devices`.
The interpreter is slow (a program of a kernel takes 0.01 to 0.5 s): tensors are small.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo_core.errors import NumericError
from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.noise import Distribution, Operands, Rounding, portable, spec
from tests.core.zo.test_materialize import (
    STORAGE,
    Case,
    assert_same_bits,
    cases,
    commit_of,
    fans,
    golden_name,
    golden_operands,
    golden_place,
    golden_weights,
    hexadecimal,
    specified,
    weights_of,
)

# The interpreter is NumPy, which says when a float overflows or a NaN is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

Backend = ModuleType | None
CPU = torch.device("cpu")
TENSOR_ID = 2**32 - 1


def interpreted() -> ModuleType:
    """The kernels, which this process's Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: nothing to interpret")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1: these kernels would need a GPU")
    from fedmezo_core.zo.noise import triton_kernels

    return triton_kernels


@pytest.fixture(params=["interpreted", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU as a device whose kernels are the interpreted ones, or which has none."""
    use(monkeypatch, interpreted() if request.param == "interpreted" else None)
    return str(request.param)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)


def use(monkeypatch: pytest.MonkeyPatch, found: Backend) -> None:
    monkeypatch.setattr(devices, "kernels", lambda device: found)


def check(commits: Sequence[Commit], base: torch.Tensor, operands: Operands) -> None:
    """Out of place, and in place one commit at a time, the backend equals the specification."""
    expected = specified(base, commits, operands)
    out, kept = torch.empty_like(base), base.clone()
    assert devices.apply_commits(out, base, commits, operands)
    assert_same_bits(out, expected)
    assert_same_bits(base, kept)
    for commit in commits:
        assert devices.apply_commits(base, base, [commit], operands)
    assert_same_bits(base, expected)


# Tile edges, starts in mid-tile and mid-row, indices of 64 bits, blocks that need their high word.
WHERE = [
    (0, 300, 100),
    (4096 - 130, 264, 7 * 37),
    (2**33 + 4097, 140, 96),
    (2**34 - 5, 12, 2**40),
    (2**48 - 300, 300, 299),
]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_kernels_equal_the_specification(
    distribution: Distribution,
    storage: tuple[torch.dtype, Rounding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, interpreted())
    generator = np.random.default_rng(5)
    which = STORAGE.index(storage) + list(Distribution).index(distribution)
    start, size, columns = WHERE[which % len(WHERE)]
    commits = [
        commit_of(generator, 2, 1e-3, 5),
        commit_of(generator, 1, 1e-39, 2**64 - 1, decay=0.9),
    ]
    operands = Operands(TENSOR_ID, distribution, storage[1], start, columns)
    check(commits, weights_of(generator, size, storage[0]), operands)


def test_whole_tiles_take_the_unmasked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, interpreted())
    generator = np.random.default_rng(6)
    for distribution, start in ((Distribution.RADEMACHER, 2**32 - 8), (Distribution.LOW_RANK_2, 0)):
        operands = Operands(TENSOR_ID, distribution, Rounding.NEAREST, start, 1050)
        check([commit_of(generator, 1)], weights_of(generator, 4200, torch.float32), operands)


@pytest.mark.usefixtures("without_kernels")
@settings(max_examples=60)
@given(cases(sizes=st.integers(1, 700)))
def test_the_portable_path_equals_the_specification(case: Case) -> None:
    check(case.commits, case.base, case.operands)


def test_pieces_of_the_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    monkeypatch.setattr(portable, "PIECE_ELEMENTS", 100)
    generator = np.random.default_rng(7)
    operands = Operands(TENSOR_ID, Distribution.LOW_RANK_4, Rounding.STOCHASTIC, 50, 7)
    commits = [commit_of(generator, 2, rounding_seed=3)]
    check(commits, weights_of(generator, 450, torch.bfloat16), operands)


def golden_cases() -> list[Any]:
    """All for the portable path; for the slow interpreter, a few."""
    cases = golden_weights()
    names = [golden_name(case) for case in cases]
    few = [names.index(name) for name in (
        "gaussian-float32-nearest", "rademacher-bfloat16-stochastic",
        "low_rank_2-float16-stochastic", "low_rank_4-bfloat16-nearest",
        "rademacher-float32-nearest-decay", "gaussian-float16-stochastic-decay",
    )]  # fmt: skip
    return [
        pytest.param("portable", c, id=f"portable-{n}") for n, c in zip(names, cases, strict=True)
    ] + [pytest.param("interpreted", cases[k], id=f"interpreted-{names[k]}") for k in few]


@pytest.mark.parametrize(("backend", "case"), golden_cases(), indirect=["backend"])
def test_golden_weights(backend: str, case: dict[str, Any]) -> None:
    base, commits = golden_operands(case)
    out = torch.empty_like(base)
    assert devices.apply_commits(out, base, commits, golden_place(case))
    assert hexadecimal(out) == case["result"]


def assert_fan(base: torch.Tensor, commits: Sequence[Commit], operands: Operands) -> None:
    outs = list(torch.empty(len(commits), *base.shape, dtype=base.dtype))
    with devices.finite_results():
        devices.apply_fan(outs, base, commits, operands)
    for out, commit in zip(outs, commits, strict=True):
        assert_same_bits(out, specified(base, [commit], operands))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_fan_of_the_kernels(
    distribution: Distribution,
    storage: tuple[torch.dtype, Rounding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ends of one direction, the weights themselves, another direction; then other bits."""
    use(monkeypatch, interpreted())
    generator = np.random.default_rng(8)
    ends: list[list[tuple[int, float]]] = [[(7, 1e-3)], [(7, -1e-3)], [], [(9, -0.0)]]
    start, size, columns = 4096 - 130, 120, 7 * 37
    base = weights_of(generator, size, storage[0])
    local = [] if distribution.rank else [(1, 2e-3)]
    for rounding_seeds in ([5] * 4, [5, 6]):
        commits = [
            Commit(
                np.array([seed for seed, _ in [*local, *end]], np.uint64),
                np.array([c for _, c in [*local, *end]], np.float32),
                rounding_seed,
            )
            for end, rounding_seed in zip(ends, rounding_seeds, strict=False)
        ]
        assert_fan(base, commits, Operands(4, distribution, storage[1], start, columns))


@settings(max_examples=12)
@given(fans(), st.booleans())
def test_any_fan_equals_one_call_for_each_output(
    journal: tuple[list[Commit], np.random.Generator], by_kernels: bool
) -> None:
    """Also for commits that have nothing in common, and for outputs that lie anywhere."""
    commits, generator = journal
    base = weights_of(generator, 150, torch.bfloat16)
    outs = [torch.empty_like(base) for _ in commits]
    operands = Operands(4, Distribution.RADEMACHER, Rounding.STOCHASTIC, 77, 150)
    with pytest.MonkeyPatch.context() as patch, devices.finite_results():
        use(patch, interpreted() if by_kernels else None)
        devices.apply_fan(outs, base, commits, operands)
    for out, commit in zip(outs, commits, strict=True):
        assert_same_bits(out, specified(base, [commit], operands))


@pytest.mark.parametrize("storage", STORAGE[::2], ids=str)
def test_commits_with_and_without_decay(
    storage: tuple[torch.dtype, Rounding], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of commits that float32 takes as one, an empty one among them; tiny weights."""
    use(monkeypatch, interpreted())
    generator = np.random.default_rng(12)
    decays = [1.0, 1.0, 1 - 1e-4, 2.0**-149, 1.0, 0.5, 1.0]
    commits = [commit_of(generator, k % 2, 1e-39, k, decay) for k, decay in enumerate(decays)]
    for distribution in (Distribution.RADEMACHER, Distribution.LOW_RANK_2):
        operands = Operands(TENSOR_ID, distribution, storage[1], 4000, 37)
        check(commits, weights_of(generator, 100, storage[0]) * 1e-3, operands)


def test_a_fan_of_commits_with_a_decay(backend: str) -> None:
    generator = np.random.default_rng(13)
    base = weights_of(generator, 130, torch.bfloat16)
    pairs = np.array([7], np.uint64), np.array([1e-3], np.float32)
    commits = [Commit(*pairs, 5, decay=0.5), Commit(*pairs, 5), Commit(*pairs, 6, decay=0.25)]
    operands = Operands(7, Distribution.RADEMACHER, Rounding.STOCHASTIC, 77, 13, "wte")
    assert_fan(base, commits, operands)
    base[60] = float("inf")
    with (
        pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 137 is NaN or inf"),
        devices.finite_results(),
    ):
        assert_fan(base, commits, operands)


@pytest.mark.parametrize("distribution", [Distribution.GAUSSIAN, Distribution.LOW_RANK_1])
def test_rows_that_are_looked_up(backend: str, distribution: Distribution) -> None:
    generator = np.random.default_rng(9)
    table = weights_of(generator, 9 * 50, torch.float16).view(9, 50)
    rows = torch.tensor([[8, 0, 3, 3], [5, 5, 1, 8]])
    commits = [
        Commit(np.array([7], np.uint64), np.array([eps], np.float32), 5) for eps in (1e-3, -1e-3)
    ]
    outs = torch.empty(2, 4, 50, dtype=torch.float16)
    operands = Operands(3, distribution, Rounding.STOCHASTIC)
    points = devices.Points(CPU, commits)
    with devices.finite_results() as results:
        look_up = devices.prepared_look_up(outs, table, operands, rows, points, results)
        look_up()
    for out, own, commit in zip(outs, rows, commits, strict=True):
        assert_same_bits(out, specified(table, [commit], operands)[own])
    for unknown in (9, -1, 2**40):
        rows[0, 1] = unknown
        with (
            pytest.raises(NumericError, match="Tensor 3: a row was looked up"),
            devices.finite_results(results),
        ):
            look_up()


def test_as_many_rows_as_a_batch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA lets only the first axis of a launch be longer than 65,535."""
    kernels, rows = interpreted(), torch.zeros(16, 1 << 17, dtype=torch.int64)
    grids: list[tuple[int, int, int]] = []
    monkeypatch.setattr(kernels, "_prepared", lambda kernel, grid, *others: grids.append(grid))
    table = torch.zeros(3, 20_000)
    outs, bad = torch.empty(0), torch.zeros(1, dtype=torch.int64)
    for distribution in Distribution:
        operands = Operands(3, distribution, Rounding.STOCHASTIC)
        kernels.look_up_launch(outs, table, outs, bad, 0, operands, rows)
    assert all(max(grid[1:]) < 1 << 16 and grid[0] == 1 << 17 for grid in grids)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_what_is_not_finite_is_named(backend: str, storage: tuple[torch.dtype, Rounding]) -> None:
    operands = Operands(7, Distribution.RADEMACHER, storage[1], 2**33, 600, "wte")
    commits = [commit_of(np.random.default_rng(0), 1)] * 2
    for value in (float("nan"), float("-inf")):
        base = torch.zeros(600, dtype=storage[0])
        base[[410, 599]] = value
        assert not devices.apply_commits(torch.empty_like(base), base, commits, operands)
        outs = [torch.empty_like(base), torch.empty_like(base)]
        with (
            pytest.raises(
                NumericError, match=rf"Tensor 7 \(wte\): element {2**33 + 410} is NaN or inf"
            ),
            devices.finite_results(),
        ):
            devices.apply_fan(outs, base, commits, operands)
    huge = float(torch.finfo(storage[0]).max)
    overflow = Commit(np.array([5], np.uint64), np.array([0.9 * huge], np.float32), 1)
    base = torch.full((3,), huge).to(storage[0])
    assert not devices.apply_commits(torch.empty_like(base), base, [overflow], operands)
    with devices.finite_results():  # an error of one pass is not the next one's
        zeros = torch.zeros(3, dtype=storage[0])
        devices.apply_fan([outs[0][:3]], zeros, commits[:1], operands)


def test_an_overflow_outside_the_range_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile's other elements are computed too, and must not be reported."""
    use(monkeypatch, interpreted())
    seeds = np.arange(4, dtype=np.uint64)
    signs = [spec.rademacher(np.array([40]), int(seed), 0)[0] for seed in seeds]
    # Back and forth for element 40; where the signs are others, two steps in a row overflow.
    steps = np.array([1, -1, 1, -1]) * 3e38 * np.array(signs)
    commit = Commit(seeds, steps.astype(np.float32), 0)
    base = torch.full((1,), 1.0)
    operands = Operands(0, Distribution.RADEMACHER, Rounding.NEAREST, 40)
    assert devices.apply_commits(base, base, [commit], operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factor_signs(backend: str, dtype: torch.dtype) -> None:
    domain = spec.DOMAIN_COLUMN_SIGNS if dtype == torch.float16 else spec.DOMAIN_ROW_SIGNS
    seeds, length = [3, 2**64 - 1], 1500
    got = devices.factor_signs(seeds, 9, domain, length, 4, dtype=dtype, device=CPU)
    assert got.dtype == dtype
    indices = np.arange(length, dtype=np.int64)
    for signs, seed in zip(got, seeds, strict=True):
        expected = torch.from_numpy(spec.factor_signs(indices, seed, 9, domain))
        assert torch.equal(signs.to(torch.int32), expected)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    devices.kernels.cache_clear()
    yield
    devices.kernels.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_device_without_kernels_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert devices.kernels(torch.device("meta")) is None
        assert devices.kernels(torch.device("meta")) is None
    assert [
        record.message for record in caplog.records if "meta: weights are built" in record.message
    ]
    assert len(caplog.records) == 1


def test_tables_are_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, interpreted())
    uploads: list[str] = []

    def count(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            uploads.append(name)
            return plain(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(devices, "_uploaded")
    count(devices.Points, "_write")
    commits = [commit_of(np.random.default_rng(k), 1) for k in range(2)]
    with devices.finite_results():
        for tensor_id in range(3):
            base = torch.ones(8)
            operands = Operands(tensor_id, Distribution.RADEMACHER, Rounding.NEAREST)
            devices.apply_fan(list(torch.empty(2, 8)), base, commits, operands)
            assert devices.apply_commits(base, base, commits, operands)
    assert len(uploads) == 2


def test_warming_up_launches_everything(backend: str) -> None:
    devices.warm_up(CPU, torch.bfloat16, Distribution.LOW_RANK_1, Rounding.STOCHASTIC)
