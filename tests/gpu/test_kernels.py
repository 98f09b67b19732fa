"""The CUDA kernels on a real GPU: the specification's bits, at any size, and nothing waits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedmezo_core.errors import NumericError
from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.forward.low_rank import Side, factors
from fedmezo_core.zo.materialize import materialize, materialize_fan, warm_up
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from tests.core.zo.test_materialize import (
    STORAGE,
    assert_same_bits,
    commit_of,
    made,
    specified,
    weights_of,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device; run make test-gpu where there is one",
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="Triton interprets in this process; run make test-gpu",
    ),
]

GPU = torch.device("cuda", 0)


@pytest.fixture(params=["kernels", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing on the device."""
    if request.param == "portable":
        monkeypatch.setattr(devices, "kernels", lambda device: None)
    else:
        assert devices.kernels(GPU) is not None
    return str(request.param)


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    """An operation that waits for the device is an error; not yet at the fixture's own begin."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def places(distribution: Distribution) -> list[tuple[int, int, int]]:
    """(start, size, columns): tile edges, mid-tile, mid-row, far away, whole tiles."""
    found = [
        (0, 1, 1), (1, 4095, 7), (4096 - 130, 9000, 768), (2**33 + 4097, 5000, 96),
        (2**34 - 5, 8193, 4096), (2**48 - 20_000, 20_000, 128), (0, 65_536, 1024),
    ]  # fmt: skip
    return [*found, (2**40 + 5, 3000, 2**40)] if distribution.rank else found


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_equals_the_specification(
    backend: str, distribution: Distribution, storage: tuple[torch.dtype, Rounding]
) -> None:
    generator = np.random.default_rng(5)
    commits = [
        commit_of(generator, 5, 1e-3, 5),
        commit_of(generator, 0, 1.0, 7),
        commit_of(generator, 1, 1e-39, 2**64 - 1, decay=1 - 1e-4),
        commit_of(generator, 3, 1.0, 0),
        commit_of(generator, 0, 1.0, 8, decay=3e-38),
    ]
    for start, size, columns in places(distribution):
        operands = Operands(2**32 - 1, distribution, storage[1], start, columns)
        base = weights_of(generator, size, storage[0])
        expected = specified(base, commits, operands)
        on_device = base.to(GPU)
        assert_same_bits(made(on_device, commits, operands).cpu(), expected)
        for commit in commits:
            materialize(on_device, on_device, [commit], operands)
        assert_same_bits(on_device.cpu(), expected)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_fan_equals_one_call_for_each_output(
    backend: str, distribution: Distribution, storage: tuple[torch.dtype, Rounding]
) -> None:
    generator = np.random.default_rng(6)
    ends: list[list[tuple[int, float]]] = [[(7, 1e-3)], [(7, -1e-3)], [], [(9, -0.0)], [(9, 2.0)]]
    for rounding_seeds in ([5] * 5, [5, 6, 6, 5, 0]):
        commits = [
            Commit(
                np.array([1, 2] + [seed for seed, _ in end], np.uint64),
                np.array([1e-3, -2e-3] + [c for _, c in end], np.float32),
                rounding_seed,
            )
            for end, rounding_seed in zip(ends, rounding_seeds, strict=True)
        ]
        for start, size, columns in places(distribution):
            operands = Operands(4, distribution, storage[1], start, columns)
            base = weights_of(generator, size, storage[0])
            outs = list(torch.empty(len(commits), size, dtype=storage[0], device=GPU))
            with devices.finite_results():
                materialize_fan(outs, base.to(GPU), commits, operands)
            for out, commit in zip(outs, commits, strict=True):
                assert_same_bits(out.cpu(), made(base, [commit], operands))


@pytest.mark.parametrize("distribution", list(Distribution))
def test_rows_that_are_looked_up(backend: str, distribution: Distribution) -> None:
    generator = np.random.default_rng(7)
    table = weights_of(generator, 3000 * 96, torch.bfloat16).view(3000, 96)
    rows = torch.from_numpy(generator.integers(0, 3000, (2, 500)))
    commits = [
        Commit(np.array([7], np.uint64), np.array([eps], np.float32), 5) for eps in (1e-3, -1e-3)
    ]
    outs = torch.empty(2, 500, 96, dtype=torch.bfloat16, device=GPU)
    operands = Operands(3, distribution, Rounding.STOCHASTIC)
    points, on_device, read = devices.Points(GPU, commits), rows.to(GPU), table.to(GPU)
    with devices.finite_results() as results:
        look_up = devices.prepared_look_up(outs, read, operands, on_device, points, results)
        look_up()
    for out, own, commit in zip(outs, rows, commits, strict=True):
        assert_same_bits(out.cpu(), made(table, [commit], operands)[own])
    on_device.fill_(3000)
    with pytest.raises(NumericError, match="a row was looked up"), devices.finite_results(results):
        look_up()


@pytest.mark.parametrize("distribution", list(Distribution))
def test_more_elements_than_32_bits_count(distribution: Distribution) -> None:
    """2**31 + some in one call, in place; looked at in its first, last and middle tiles."""
    count, columns = 2**31 + 3 * 4096 + 5, 4096
    if torch.cuda.mem_get_info(GPU)[0] < 3 * count:
        pytest.skip("the device has less free memory than 6.5 GB")
    generator = np.random.default_rng(8)
    commits = [commit_of(generator, 3, 1e-2, 5)]
    operands = Operands(4, distribution, Rounding.STOCHASTIC, 0, columns)
    weights = torch.full((count,), 0.5, dtype=torch.bfloat16, device=GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    materialize(weights, weights, commits, operands)
    assert torch.cuda.max_memory_allocated(GPU) - before < 1 << 20  # nothing but tables
    for start in (0, 2**30 - 77, 2**31 - 5000, count - 9000):
        end = min(start + 9000, count)
        base = torch.full((end - start,), 0.5, dtype=torch.bfloat16)
        materialize(base, base, commits, operands._replace(start=start))
        assert_same_bits(weights[start:end].cpu(), base)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_what_is_not_finite_is_named(backend: str, storage: tuple[torch.dtype, Rounding]) -> None:
    operands = Operands(7, Distribution.GAUSSIAN, storage[1], 1_000_000, name="wte")
    commits = [commit_of(np.random.default_rng(0), 3)]
    for value in (float("nan"), float("-inf")):
        base = torch.zeros(9000, dtype=storage[0], device=GPU)
        base[[4100, 8999]] = value
        with pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 1004100 is (nan|-inf)"):
            made(base, commits, operands)
        with (
            pytest.raises(NumericError, match=r"Tensor 7 \(wte\): element 1004100 is NaN or inf"),
            devices.finite_results(),
        ):
            materialize_fan([torch.empty_like(base)], base, commits, operands)


@pytest.mark.parametrize("distribution", list(Distribution))
def test_fans_do_not_wait(nothing_waits: None, distribution: Distribution) -> None:
    """Not for the upload of the pairs, nor to see whether results are finite."""
    warm_up(GPU, dtype=torch.bfloat16, distribution=distribution, rounding=Rounding.STOCHASTIC)
    base = torch.ones(64, 128, dtype=torch.bfloat16, device=GPU)
    rows = torch.tensor([[3, 1, 3], [3, 1, 3]], device=GPU)
    outs = list(torch.empty(2, 64, 128, dtype=torch.bfloat16, device=GPU))
    few = torch.empty(2, 3, 128, dtype=torch.bfloat16, device=GPU)
    commits = [
        Commit(np.array([7], np.uint64), np.array([eps], np.float32), 5) for eps in (1e-3, -1e-3)
    ]
    with devices.finite_results() as results:
        points = devices.Points(GPU, commits)
        looked_up = Operands(9, distribution, Rounding.STOCHASTIC)
        torch.cuda.set_sync_debug_mode("error")
        for tensor_id in range(3):
            operands = Operands(tensor_id, distribution, Rounding.STOCHASTIC)
            materialize_fan(outs, base, commits, operands)
        points.move(commits)
        devices.prepared_look_up(few, base, looked_up, rows, points, results)()
        if distribution.rank:
            factors([3], 0, Side.ROWS, 64, distribution.rank, dtype=torch.bfloat16, device=GPU)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", list(Side))
def test_factors(backend: str, side: Side, dtype: torch.dtype) -> None:
    for length in (1, 31, 4097):
        on_device = factors([3, 2**64 - 1], 9, side, length, 4, dtype=dtype, device=GPU)
        on_cpu = factors(
            [3, 2**64 - 1], 9, side, length, 4, dtype=dtype, device=torch.device("cpu")
        )
        assert torch.equal(on_device.cpu(), on_cpu)
