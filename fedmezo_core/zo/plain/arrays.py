"""Commits applied in a CPU's memory by the kernels: whole tensors as arrays, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedmezo_core.errors import MismatchError
from fedmezo_core.zo.commits import Commit, join
from fedmezo_core.zo.noise import ELEMENTS_MAX, Distribution, Operands, cpu
from fedmezo_core.zo.noise.operands import Rounding
from fedmezo_core.zo.noise.threads import Scratch, scratch, spread

_VALUE_DTYPES: Final = {
    cpu.FLOAT32: np.dtype(np.float32),
    cpu.BFLOAT16: np.dtype(np.uint16),
    cpu.FLOAT16: np.dtype(np.uint16),
}
"""How an array holds each storage type, as the kernels number them."""


def materialize_array(
    out: npt.NDArray[np.float32],
    base: npt.NDArray[np.float32],
    commits: Sequence[Commit],
    operands: Operands,
    *,
    threads: int | None = None,
) -> None:
    """out = base + commits: a whole float32 tensor as `materialize` makes it, without torch.

    out, base: contiguous float32 arrays of one shape; the same array (in place) or two apart.
    threads: the most to use (default: one for each core that this process may use); it changes no
    bit. Raises `MismatchError` for arrays that do not fit each other, and `NumericError` for the
    first result that is NaN or infinite, after which `out` holds no usable values.
    """
    fits = out.shape == base.shape and out.size <= ELEMENTS_MAX
    if not fits or any(
        array.dtype != np.float32 or not array.flags.c_contiguous for array in (out, base)
    ):
        raise MismatchError(
            f"Tensor {operands.tensor_id}: cannot make a {out.dtype} array {list(out.shape)} out "
            f"of a {base.dtype} one {list(base.shape)}; give contiguous float32 arrays of one "
            "shape."
        )
    if out.size == 0:
        return
    threads = threads or len(os.sched_getaffinity(0))
    flat, columns = out.reshape(-1), operands.columns_of(out)
    operands = operands._replace(columns=columns)
    bad = apply_commits(flat, base.reshape(-1), commits, operands, cpu.FLOAT32, threads)
    if bad is not None:
        raise operands.not_finite(operands.start + bad, float(flat[bad]))


def apply_commits(
    out: npt.NDArray[Any],
    base: npt.NDArray[Any],
    commits: Sequence[Commit],
    operands: Operands,
    storage: int,
    threads: int,
) -> int | None:
    """out = base + commits; the index of the first result that is NaN or infinite, or None.

    out, base: contiguous 1-D arrays, not empty, the same or apart, of checked `operands` that name
    the columns. storage: `cpu.FLOAT32` (float32 arrays), or one of the others (their bits, uint16).
    """
    assert not any(commit.from_base for commit in commits), "Weights.apply knows the run's base"
    assert out.dtype == base.dtype == _VALUE_DTYPES[storage]
    seeds, coefficients, commit_ends, rounding_seeds, decays = join(
        commits, endless=storage == cpu.FLOAT32
    )
    tensor_id, distribution, rounding, start, columns, _ = operands
    assert columns is not None
    gaussian, stochastic = distribution is Distribution.GAUSSIAN, rounding is Rounding.STOCHASTIC
    rank = distribution.rank
    out_address, base_address = out.ctypes.data, base.ctypes.data
    bad: list[int] = []
    if storage == cpu.FLOAT32 and rank == 0:
        in_place = out_address == base_address
        first, tensor = np.uint64(start), np.uint64(tensor_id)

        def compute(begin: int, end: int, own: Scratch) -> Any:
            return cpu.apply_float32(
                out, base, not in_place, np.uint64(begin), np.uint64(end), first,
                tensor, gaussian, seeds, coefficients, commit_ends, decays,
                own.words, own.tile_values,
            )  # fmt: skip
    else:

        def compute(begin: int, end: int, own: Scratch) -> Any:
            return cpu.apply_tiles(
                out_address, base_address, begin, end, start, tensor_id,
                storage, stochastic, gaussian, rank, columns,
                seeds, coefficients, commit_ends, rounding_seeds, decays,
                own.words, own.tile_values, own.row_patterns, own.patterns, own.used_patterns,
                own.random_bits,
            )  # fmt: skip

    def run(begin: int, end: int) -> None:
        control = cpu.exchange_float_control(cpu.STRICT_CONTROL)
        try:
            found = compute(begin, end, scratch)
        finally:
            cpu.exchange_float_control(control)
        if found != cpu.FINITE:
            bad.append(found)

    spread(run, start, len(out), len(seeds) + 1, rank, columns, threads)
    return min(bad, default=None)
