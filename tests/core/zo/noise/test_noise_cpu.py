"""The numba backend equals the specification bit for bit, wherever a range begins and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmezo_core
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.forward.low_rank import Side, factors
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.noise import Distribution, Operands, Rounding, cpu, noise, spec
from tests.core.zo.noise.test_noise_spec import (
    LOW_RANK,
    columns_of,
    golden_noise,
    seeds,
    starts,
    tensor_ids,
)

ROW, TILE = 128, cpu.TILE_ELEMENTS


def generated(
    seed: int,
    tensor_id: int,
    start: int,
    count: int,
    distribution: Distribution,
    columns: int = 1,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """`z` by the kernels: minus zero is the one float to which adding z gives z, zeros included."""
    out = torch.full((count,), -0.0)
    pair = Commit(np.array([seed], np.uint64), np.ones(1, np.float32), 0)
    operands = Operands(tensor_id, distribution, Rounding.NEAREST, start, columns)
    materialize(out, out, [pair], operands, threads=threads)
    return out.numpy()


def assert_same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("case", golden_noise(), ids=lambda case: f"{case['start']}")
def test_golden_vectors(case: dict[str, Any]) -> None:
    place = int(case["seed"], 16), case["tensor_id"], case["start"], len(case["rademacher"])
    signs = generated(*place, Distribution.RADEMACHER)
    assert "".join("+" if sign == 1 else "-" for sign in signs) == case["rademacher"]
    normals = generated(*place, Distribution.GAUSSIAN)
    assert " ".join(f"{bits:08x}" for bits in normals.view(np.uint32)) == case["gaussian"]


@pytest.mark.parametrize("case", golden_noise("noise_added"), ids=lambda case: f"{case['start']}")
@pytest.mark.parametrize("distribution", LOW_RANK)
def test_golden_vectors_of_low_rank(case: dict[str, Any], distribution: Distribution) -> None:
    expected = case[distribution].split()
    place = int(case["seed"], 16), case["tensor_id"], case["start"], len(expected)
    values = generated(*place, distribution, case["columns"])
    assert [f"{bits:08x}" for bits in values.view(np.uint32)] == expected


@settings(max_examples=150)
@given(
    seeds,
    tensor_ids,
    starts,
    st.integers(0, 900) | st.integers(0, 9000),
    st.sampled_from(Distribution),
    columns_of,
)
def test_any_range(
    seed: int, tensor_id: int, start: int, count: int, distribution: Distribution, columns: int
) -> None:
    start = min(start, 2**48 - count)
    elements = np.arange(start, start + count, dtype=np.int64)
    expected = noise(elements, seed, tensor_id, distribution, columns)
    assert_same_bits(generated(seed, tensor_id, start, count, distribution, columns), expected)


@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize(("origin", "columns"), [(0, 1), (2**35, 768), (2**39, 130)])
def test_every_alignment_and_length(distribution: Distribution, origin: int, columns: int) -> None:
    """All offsets around row and tile edges, with lengths around the same edges."""
    elements = np.arange(origin, origin + 3 * TILE, dtype=np.int64)
    expected = noise(elements, 12345, 6, distribution, columns)
    near = [0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 127]
    offsets = [*range(ROW + 1), *(TILE - step for step in near), TILE + 1]
    lengths = [*near[1:], ROW, ROW + 1, TILE - 1, TILE, TILE + 1]
    for i, offset in enumerate(offsets):
        for length in lengths[i % 3 :: 3]:
            got = generated(12345, 6, origin + offset, length, distribution, columns)
            assert_same_bits(got, expected[offset : offset + length])


@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize(("threads", "columns"), [(2, 768), (3, 2**40), (7, 5)])
def test_threads_change_nothing(distribution: Distribution, threads: int, columns: int) -> None:
    count, start = 1_200_003, 2**33 - 12_345
    whole = generated(9, 1, start, count, distribution, columns)
    assert_same_bits(generated(9, 1, start, count, distribution, columns, threads), whole)
    picked = np.random.default_rng(0).integers(0, count, 3000)
    assert_same_bits(whole[picked], noise(picked + start, 9, 1, distribution, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("side", list(Side))
def test_factors(dtype: torch.dtype, rank: int, side: Side) -> None:
    seeds = [0, 7, 2**63, 2**64 - 1]
    for length in (1, 127, 128, 130, 1023, 1024, 1025, 2500):
        for some in (seeds, seeds[2:3], []):
            got = factors(
                some, 2**32 - 1, side, length, rank, dtype=dtype, device=torch.device("cpu")
            )
            assert got.dtype == dtype
            assert got.shape == (len(some), rank, length)
            for signs, seed in zip(got, some, strict=True):
                expected = spec.factor_signs(np.arange(length), seed, 2**32 - 1, side.value)[:rank]
                assert torch.equal(signs, torch.from_numpy(expected).to(dtype))


def test_without_a_folder_to_write_to_kernels_are_compiled_again(tmp_path: Path) -> None:
    """As in a read-only installation under a user without a home; said once, not per kernel."""
    package = Path(fedmezo_core.__file__).parent
    installed = tmp_path / package.name
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("__pycache__"))
    # Root may write anywhere, but not into a folder that is a file.
    (installed / "zo" / "noise" / "__pycache__").write_bytes(b"")
    nowhere = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache"}
    paths = [str(tmp_path), *sys.path]
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    program = (
        "import numpy as np; from fedmezo_core.zo.noise import cpu; "
        "print(cpu.__file__, cpu.exchange_float_control(np.uint64(0)) != 0)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        env={**kept, **nowhere, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (
        0,
        f"{installed / 'zo' / 'noise' / 'cpu.py'} True\n",
    ), done.stderr
    assert done.stderr.count("set NUMBA_CACHE_DIR") == 1
