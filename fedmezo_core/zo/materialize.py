"""`materialize`: weights = base + journal, the one primitive.

It perturbs, steps, applies, catches up and exports. The arithmetic standard says what it computes:
`arithmetic_spec` is that standard in slow NumPy, and `materialize` equals it bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from fedmezo_core.errors import MismatchError
from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit, fan_plan
from fedmezo_core.zo.noise import (
    ELEMENTS_MAX,
    TENSOR_ID_MAX,
    Distribution,
    Operands,
    Rounding,
    cpu,
    spec,
)
from fedmezo_core.zo.noise.tensors import (
    STORAGE_DTYPES,
    check_tensors,
    require_finite,
    values_of,
)
from fedmezo_core.zo.noise.threads import scratch, spread
from fedmezo_core.zo.plain.arrays import apply_commits

_STORAGE: Final = {
    torch.float32: cpu.FLOAT32,
    torch.bfloat16: cpu.BFLOAT16,
    torch.float16: cpu.FLOAT16,
}


def materialize(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    *,
    threads: int | None = None,
) -> None:
    """out = base + commits, element by element, in order.

    out, base: contiguous tensors on one device, of one dtype (float32, bfloat16 or float16) and one
    size, any shape; the same memory (in place) or apart. operands: which elements of which tensor
    they are, and the noise. threads: the most threads to use, torch's number by default; it changes
    no bit.

    Everything is checked before the first write, except the results: raises `NumericError` for the
    first one that is NaN or infinite (a bad weight or an overflow), after which `out` holds no
    usable values. Raises `MismatchError` where out and base do not fit each other.
    """
    size = check_tensors(operands, out, base)
    _refuse_from_base(commits)
    if size == 0:
        return
    columns = operands.columns_of(out)
    if devices.elsewhere(out.device):
        if not devices.apply_commits(out, base, commits, operands):
            require_finite(out, operands)
        return
    own_columns = operands._replace(columns=columns)
    bad = apply_commits(
        values_of(out), values_of(base), commits, own_columns, _STORAGE[out.dtype], _used(threads)
    )
    if bad is not None:
        raise operands.not_finite(operands.start + bad, float(out.detach().view(-1)[bad]))


def materialize_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    *,
    threads: int | None = None,
) -> None:
    """outs[g] = base + commits[g]: several perturbations of one base, which is read once.

    Gives exactly what a call of `materialize` for each output gives, with the same arguments and
    errors. outs: tensors apart from the base and from each other. Fast where all commits begin with
    the same pairs (a worker's local steps) and then have at most one more each. Neighbours whose
    last pairs are opposite (one seed, +eps and -eps) share their noise, and equal rounding seeds
    share their bits. A commit with a decay, which no measurement has, shares nothing.

    On a device other than the CPU nothing waits: `devices.finite_results` raises `NumericError` for
    a result that is NaN or infinite.
    """
    size, pointers, base_address = _check_fan(outs, base, commits, operands)
    _refuse_from_base(commits)
    if size == 0 or not outs:
        return
    columns = operands.columns_of(base)
    if devices.elsewhere(base.device):
        devices.apply_fan(outs, base, commits, operands)
        return
    plan = fan_plan(tuple(commits))
    if plan is None:
        own_columns = operands._replace(columns=columns)
        for out, commit in zip(outs, commits, strict=True):
            materialize(out, base, [commit], own_columns, threads=threads)
        return
    tensor_id, distribution, rounding, start, _, _ = operands
    gaussian, stochastic = distribution is Distribution.GAUSSIAN, rounding is Rounding.STOCHASTIC
    addresses = np.array(pointers, dtype=np.uint64)
    storage, rank = _STORAGE[base.dtype], distribution.rank
    ceiling = plan.ceilings[storage]
    in_doubt: list[int] = []

    def run(begin: int, end: int) -> None:
        own = scratch
        control = cpu.exchange_float_control(cpu.STRICT_CONTROL)
        try:
            if storage == cpu.FLOAT32 and rank == 0:
                finite = cpu.fan_float32(
                    addresses, base_address, begin, end, start, tensor_id, gaussian,
                    plan.seeds, plan.coefficients, plan.steps, plan.last_seeds,
                    plan.last_coefficients, ceiling,
                    own.words, own.tile_values, own.products,
                )  # fmt: skip
            else:
                finite = cpu.fan_tiles(
                    addresses, base_address, begin, end, start, tensor_id,
                    storage, stochastic, gaussian, rank, columns,
                    plan.seeds, plan.coefficients, plan.steps, plan.last_seeds,
                    plan.last_coefficients, plan.rounding_seeds, ceiling,
                    own.words, own.tile_values, own.row_patterns, own.patterns, own.used_patterns,
                    own.random_bits, own.products, own.sums,
                )  # fmt: skip
        finally:
            cpu.exchange_float_control(control)
        if not finite:
            in_doubt.append(begin)

    spread(run, start, size, len(plan.seeds) + len(outs), rank, columns, _used(threads))
    if in_doubt:
        for out in outs:
            require_finite(out, operands)


def warm_up(
    device: torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    distribution: Distribution = Distribution.RADEMACHER,
    rounding: Rounding = Rounding.STOCHASTIC,
) -> None:
    """Compile every CPU kernel, or load it from a cache: seconds once, milliseconds later.

    For a device other than the CPU, also compile the kernels of a run with this storage type,
    distribution and rounding.
    """
    if device is not None and devices.elsewhere(device):
        devices.warm_up(device, dtype, distribution, rounding)
    commit = Commit(np.zeros(1, np.uint64), np.zeros(1, np.float32), 0)
    operands = Operands(0, Distribution.RADEMACHER, Rounding.NEAREST)
    for dtype in STORAGE_DTYPES:
        weights = torch.zeros(1, dtype=dtype)
        materialize(weights, weights, [commit], operands, threads=1)
        materialize_fan([torch.empty_like(weights)], weights, [commit], operands, threads=1)
    signs = np.empty(1, dtype=np.float32)
    cpu.factor_signs(
        signs.ctypes.data, True, 0, commit.seeds, 0, spec.DOMAIN_ROW_SIGNS, 1, 1, scratch.words
    )


def _used(threads: int | None) -> int:
    """The most threads that a call uses."""
    return torch.get_num_threads() if threads is None else threads


def _refuse_from_base(commits: Sequence[Commit]) -> None:
    assert not any(commit.from_base for commit in commits), "Weights.apply knows the run's base"


def _check_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
) -> tuple[int, list[int], int]:
    """(elements of each output, the outputs' addresses, the base's), once all is known to be sound.

    A row block's arithmetic takes 50 us: in the sound case, this asks in few calls what
    `check_tensors` asks one by one.
    """
    if len(outs) != len(commits):
        raise MismatchError(
            f"Tensor {operands.tensor_id}: {len(outs)} outputs for {len(commits)} commits; "
            "give one output for each."
        )
    size, dtype = base.numel(), base.dtype
    sound = (
        dtype in STORAGE_DTYPES
        and 0 <= operands.tensor_id <= TENSOR_ID_MAX
        and 0 <= operands.start <= ELEMENTS_MAX - size
    )
    for tensor in (base, *outs):
        sound = sound and tensor.dtype is dtype and tensor.numel() == size
        sound = sound and tensor.device == base.device and tensor.is_contiguous()
    if not sound:
        for out in outs:
            check_tensors(operands, out, base)
    addresses, base_address = [out.data_ptr() for out in outs], base.data_ptr()
    size_bytes = size * base.element_size()
    begin = 0
    for after in sorted(addresses):
        if abs(after - base_address) < size_bytes or after < begin:
            raise MismatchError(
                f"Tensor {operands.tensor_id}: two outputs overlap, or one overlaps the base; "
                "give each output memory of its own."
            )
        begin = after + size_bytes
    return size, addresses, base_address
