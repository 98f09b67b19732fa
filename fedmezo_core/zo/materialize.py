"""`materialize`: weights = base + journal, the one primitive. The arithmetic standard v1.

An element's value is a fold over the journal. Within a commit it accumulates in float32, pair after
pair in order: `acc = fl(acc + fl(c * z))`, starting from the element's value, or from `fl(value * decay)`
where the commit has a weight decay. At the commit's end it is rounded to the storage type: float32 as it
is, bfloat16 and float16 stochastically (by the noise standard's bits under the commit's `rounding_seed`)
or to nearest even. Elements never meet, so tiles, threads, slices and fused commits cannot change a bit.
docs/arithmetic-standard-v1.md says the same in words.

`materialize_reference` is the specification, in slow NumPy; `materialize` equals it bit for bit.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import MismatchError, NumericError
from fedmezo_core.zo import devices
from fedmezo_core.zo.noise import ELEMENTS_MAX, SEED_MAX, TENSOR_ID_MAX, Distribution, cpu, spec

ARITHMETIC_VERSION: Final = 1
"""Version of the arithmetic standard: another version means that some result has other bits."""

STORAGE: Final = {
    torch.float32: cpu.FLOAT32,
    torch.bfloat16: cpu.BFLOAT16,
    torch.float16: cpu.FLOAT16,
}
STORAGE_DTYPES: Final = tuple(STORAGE)
"""What weights may be stored as."""
CHUNK_WORK_MIN: Final = 1 << 20
"""Least element-pairs (about 0.1 ms) worth handing to another thread."""
CHUNKS_PER_THREAD: Final = 32
"""Chunks are taken from a shared counter, so that a busy core holds up the rest by one chunk at most."""


Joined = tuple[
    npt.NDArray[np.uint64],
    npt.NDArray[np.float32],
    npt.NDArray[np.uint64],
    npt.NDArray[np.uint64],
    npt.NDArray[np.float32],
]
"""Commits as one: seeds, coefficients, number of pairs up to each end, rounding seeds, decays."""


class Rounding(StrEnum):
    """How bfloat16 and float16 weights are rounded at a commit's end; float32 weights need none."""

    STOCHASTIC = "stochastic"
    NEAREST = "nearest"


@dataclass(frozen=True, eq=False)
class Commit:
    """Pairs that are applied together: `w = decay * w + sum(coefficients[k] * z(seeds[k]))`, in this order.

    seeds: uint64 [pairs]. coefficients: float32 [pairs], finite. Both are copied. rounding_seed: below
    2**64, keys the bits of stochastic rounding. decay: a binary32 value in (0, 1]; 1 is none. Raises
    NumericError where they are anything else.

    from_base: in a journal, that this commit starts from the run's base weights instead of those of the
    round before. `Weights` sees to that; what `materialize` takes starts from what it is given.
    """

    seeds: npt.NDArray[np.uint64]
    coefficients: npt.NDArray[np.float32]
    rounding_seed: int
    decay: float = 1.0
    from_base: bool = False
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


def materialize(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    start: int = 0,
    distribution: Distribution,
    rounding: Rounding,
    columns: int | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> None:
    """out = base + commits, element by element, in order.

    out, base: contiguous tensors on one device, of one dtype (float32, bfloat16 or float16) and one size,
    any shape; the same memory (in place) or apart. `start`: index, inside its tensor, of out's first
    element, so that a slice or row block can be made alone. `columns`: length of the whole tensor's
    last dimension, which only the low-rank families need; by default out's. `threads`: most threads to
    use, torch's number by default; it changes no bit. `name`: what an error calls the tensor.

    Everything is checked before the first write, except the results: NumericError for the first one
    that is NaN or infinite (a bad weight or an overflow), after which `out` holds no usable values.
    MismatchError where out and base do not fit each other.
    """
    size = _check(out, base, tensor_id, start)
    _refuse_from_base(commits)
    if size == 0:
        return
    columns = _columns(out, columns, tensor_id)
    if devices.elsewhere(out.device):
        if not devices.materialize(
            out, base, commits, tensor_id=tensor_id, start=start, distribution=distribution,
            stochastic=rounding is Rounding.STOCHASTIC, columns=columns,
        ):  # fmt: skip
            require_finite(out, tensor_id=tensor_id, start=start, name=name)
        return
    storage = STORAGE[out.dtype]
    seeds, coefficients, commit_ends, rounding_seeds, decays = join(
        commits, endless=storage == cpu.FLOAT32
    )
    gaussian = distribution is Distribution.GAUSSIAN
    stochastic = rounding is Rounding.STOCHASTIC
    rank = distribution.rank
    bad: list[int] = []
    if storage == cpu.FLOAT32 and rank == 0:
        out_values, base_values = _values(out), _values(base)
        in_place = out.data_ptr() == base.data_ptr()
        first, tensor = np.uint64(start), np.uint64(tensor_id)

        def compute(begin: int, end: int, scratch: _Scratch) -> Any:
            return cpu.materialize_float32(
                out_values, base_values, not in_place, np.uint64(begin), np.uint64(end), first,
                tensor, gaussian, seeds, coefficients, commit_ends, decays,
                scratch.words, scratch.tile_values,
            )  # fmt: skip
    else:
        out_address, base_address = out.data_ptr(), base.data_ptr()

        def compute(begin: int, end: int, scratch: _Scratch) -> Any:
            return cpu.materialize_tiles(
                out_address, base_address, begin, end, start, tensor_id,
                storage, stochastic, gaussian, rank, columns,
                seeds, coefficients, commit_ends, rounding_seeds, decays,
                scratch.words, scratch.tile_values, scratch.row_patterns, scratch.patterns, scratch.used_patterns,
                scratch.random_bits,
            )  # fmt: skip

    def run(begin: int, end: int) -> None:
        control = cpu.exchange_float_control(cpu.STRICT_CONTROL)
        try:
            found = compute(begin, end, _scratch)
        finally:
            cpu.exchange_float_control(control)
        if found != cpu.FINITE:
            bad.append(found)

    _spread(run, start, size, len(seeds) + 1, _grain(rank, columns, size), threads)
    if bad:
        raise _not_finite(out, min(bad), tensor_id, start, name)


def materialize_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    start: int = 0,
    distribution: Distribution,
    rounding: Rounding,
    columns: int | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> None:
    """outs[g] = base + commits[g] for each g: several perturbations of one base, from one reading of it.

    Exactly what a call of `materialize` for each output gives, with the same arguments and errors.
    outs: tensors apart from the base and from each other. Fast where the commits begin with the same
    pairs (a worker's local steps) and then have at most one more each; neighbours whose last pairs are
    opposite (one seed, +eps and -eps) share their noise, and equal rounding seeds share their bits. A
    commit with a decay, which no measurement has, shares nothing.

    Away from the CPU nothing waits for the device: what is not finite, `devices.finite_results` raises.
    """
    size, pointers, base_address = _check_fan(outs, base, commits, tensor_id, start)
    _refuse_from_base(commits)
    if size == 0 or not outs:
        return
    columns = _columns(base, columns, tensor_id)
    if devices.elsewhere(base.device):
        devices.materialize_fan(
            outs, base, commits, tensor_id=tensor_id, start=start, distribution=distribution,
            stochastic=rounding is Rounding.STOCHASTIC, columns=columns, name=name,
        )  # fmt: skip
        return
    plan = _plan_of(commits)
    if plan is None:
        for out, commit in zip(outs, commits, strict=True):
            materialize(
                out, base, [commit], tensor_id=tensor_id, start=start,
                distribution=distribution, rounding=rounding, columns=columns, threads=threads,
                name=name,
            )  # fmt: skip
        return
    gaussian = distribution is Distribution.GAUSSIAN
    stochastic = rounding is Rounding.STOCHASTIC
    addresses = np.array(pointers, dtype=np.uint64)
    storage, rank = STORAGE[base.dtype], distribution.rank
    ceiling = plan.ceilings[base.dtype]
    in_doubt: list[int] = []

    def run(begin: int, end: int) -> None:
        scratch = _scratch
        control = cpu.exchange_float_control(cpu.STRICT_CONTROL)
        try:
            if storage == cpu.FLOAT32 and rank == 0:
                finite = cpu.fan_float32(
                    addresses, base_address, begin, end, start, tensor_id, gaussian,
                    plan.seeds, plan.coefficients, plan.steps, plan.last_seeds,
                    plan.last_coefficients, ceiling,
                    scratch.words, scratch.tile_values, scratch.products,
                )  # fmt: skip
            else:
                finite = cpu.fan_tiles(
                    addresses, base_address, begin, end, start, tensor_id,
                    storage, stochastic, gaussian, rank, columns,
                    plan.seeds, plan.coefficients, plan.steps, plan.last_seeds,
                    plan.last_coefficients, plan.rounding_seeds, ceiling,
                    scratch.words, scratch.tile_values, scratch.row_patterns, scratch.patterns, scratch.used_patterns,
                    scratch.random_bits, scratch.products, scratch.sums,
                )  # fmt: skip
        finally:
            cpu.exchange_float_control(control)
        if not finite:
            in_doubt.append(begin)

    pairs = len(plan.seeds) + len(outs)
    _spread(run, start, size, pairs, _grain(rank, columns, size), threads)
    if in_doubt:
        for out in outs:
            require_finite(out, tensor_id=tensor_id, start=start, name=name)


def materialize_reference(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    start: int = 0,
    distribution: Distribution,
    rounding: Rounding,
    columns: int | None = None,
    name: str | None = None,
) -> None:
    """The specification of `materialize`: same arguments, same results, same errors; slow."""
    size = _check(out, base, tensor_id, start)
    _refuse_from_base(commits)
    if size == 0:
        return
    columns = _columns(out, columns, tensor_id)
    if not out.is_cpu:
        raise MismatchError(
            f"Tensor {tensor_id} is on {out.device}; the specification needs the CPU."
        )
    elements = np.arange(start, start + size, dtype=np.int64)
    acc = _float32(_values(base), out.dtype)
    for commit in commits:
        with np.errstate(over="ignore", invalid="ignore"):
            if commit.decay != 1.0:
                acc = acc * np.float32(commit.decay)
            for seed, coefficient in zip(commit.seeds, commit.coefficients, strict=True):
                z = spec.noise(elements, int(seed), tensor_id, distribution, columns)
                acc = acc + coefficient * z
        acc = _rounded(acc, out.dtype, rounding, elements, commit.rounding_seed, tensor_id)
    _values(out)[:] = _stored(acc, out.dtype)
    bad = ~np.isfinite(acc)
    if bad.any():
        raise _not_finite(out, int(np.argmax(bad)), tensor_id, start, name)


def require_finite(
    tensor: torch.Tensor, *, tensor_id: int, start: int = 0, name: str | None = None
) -> None:
    """Raise NumericError, naming the element, if any value of `tensor` (any device) is NaN or infinite.

    `start`: index, in the whole tensor, of the first value.
    """
    flat = tensor.detach().reshape(-1)
    piece = 1 << 22  # a mask of the whole could be gigabytes
    for begin in range(0, flat.numel(), piece):
        finite = torch.isfinite(flat[begin : begin + piece])
        if not finite.all():
            offset = begin + int(torch.argmin(finite.to(torch.uint8)))
            raise _not_finite(flat, offset, tensor_id, start, name)


def warm_up(
    device: torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    distribution: Distribution = Distribution.RADEMACHER,
    rounding: Rounding = Rounding.STOCHASTIC,
) -> None:
    """Compile every CPU kernel, or load it from a cache: seconds once, milliseconds later.

    For another device as well, those of one storage type, distribution and rounding: a run's.
    """
    if device is not None and devices.elsewhere(device):
        devices.warm_up(device, dtype, distribution, rounding is Rounding.STOCHASTIC)
    commit = Commit(np.zeros(1, np.uint64), np.zeros(1, np.float32), 0)
    for dtype in STORAGE_DTYPES:
        weights = torch.zeros(1, dtype=dtype)
        materialize(
            weights, weights, [commit], tensor_id=0,
            distribution=Distribution.RADEMACHER, rounding=Rounding.NEAREST, threads=1,
        )  # fmt: skip
        materialize_fan(
            [torch.empty_like(weights)], weights, [commit], tensor_id=0,
            distribution=Distribution.RADEMACHER, rounding=Rounding.NEAREST, threads=1,
        )  # fmt: skip
    signs = np.empty(1, dtype=np.float32)
    cpu.factor_signs(
        signs.ctypes.data, True, 0, commit.seeds, 0, spec.DOMAIN_ROW_SIGNS, 1, 1, _scratch.words
    )


# --- operands ----------------------------------------------------------------------------------------


def _check(out: torch.Tensor, base: torch.Tensor, tensor_id: int, start: int) -> int:
    """The number of elements, once all operands but the commits are known to be sound."""
    size = out.numel()
    if out.dtype != base.dtype or base.numel() != size:
        raise MismatchError(
            f"Tensor {tensor_id}: cannot make {size} {out.dtype} weights out of a base of "
            f"{base.numel()} {base.dtype} weights; give both one size and one dtype."
        )
    if out.dtype not in STORAGE_DTYPES:
        raise MismatchError(
            f"Tensor {tensor_id} is {out.dtype}; load the model in float32, bfloat16 or float16."
        )
    for tensor in (out, base):
        if tensor.device != out.device or tensor.is_meta or not tensor.is_contiguous():
            raise MismatchError(
                f"Tensor {tensor_id} is on {tensor.device} with strides {tensor.stride()}; "
                "give contiguous tensors on one device, the CPU or another."
            )
    distance_bytes = abs(out.data_ptr() - base.data_ptr())
    if 0 < distance_bytes < size * out.element_size():
        raise MismatchError(
            f"Tensor {tensor_id}: out and base overlap without being the same memory; "
            "give one tensor twice, or two that are apart."
        )
    if not 0 <= tensor_id <= TENSOR_ID_MAX:
        raise NumericError(
            f"The tensor id {tensor_id} is outside 0 .. 2**32 - 1; use the manifest's."
        )
    if not 0 <= start <= ELEMENTS_MAX - size:
        raise NumericError(
            f"Tensor {tensor_id}: elements {start} .. {start + size} are outside 0 .. 2**48; "
            "give the slice's place inside its tensor."
        )
    return size


def _refuse_from_base(commits: Sequence[Commit]) -> None:
    assert not any(commit.from_base for commit in commits), "Weights.apply knows the run's base"


def _check_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    tensor_id: int,
    start: int,
) -> tuple[int, list[int], int]:
    """(elements of each output, the outputs' addresses, the base's), once all is known to be sound.

    A row block's arithmetic takes 50 us: what `_check` says in words is asked here in few calls.
    """
    if len(outs) != len(commits):
        raise MismatchError(
            f"Tensor {tensor_id}: {len(outs)} outputs for {len(commits)} commits; "
            "give one output for each."
        )
    size, dtype = base.numel(), base.dtype
    sound = (
        dtype in STORAGE_DTYPES
        and 0 <= tensor_id <= TENSOR_ID_MAX
        and 0 <= start <= ELEMENTS_MAX - size
    )
    for tensor in (base, *outs):
        sound = sound and tensor.dtype is dtype and tensor.numel() == size
        sound = sound and tensor.device == base.device and tensor.is_contiguous()
    if not sound:
        for out in outs:
            _check(out, base, tensor_id, start)
    addresses, base_address = [out.data_ptr() for out in outs], base.data_ptr()
    size_bytes = size * base.element_size()
    begin = 0
    for after in sorted(addresses):
        if abs(after - base_address) < size_bytes or after < begin:
            raise MismatchError(
                f"Tensor {tensor_id}: two outputs overlap, or one overlaps the base; "
                "give each output memory of its own."
            )
        begin = after + size_bytes
    return size, addresses, base_address


@dataclass(frozen=True, eq=False)
class _Plan:
    """Commits of a fan as the kernels take them: the pairs that all begin with, and each one's last."""

    seeds: npt.NDArray[np.uint64]
    coefficients: npt.NDArray[np.float32]
    steps: npt.NDArray[np.uint8]
    """What each output does with its own pair: see `cpu.SHARED_STEP` and the others."""
    last_seeds: npt.NDArray[np.uint64]
    last_coefficients: npt.NDArray[np.float32]
    rounding_seeds: npt.NDArray[np.uint64]
    ceilings: dict[torch.dtype, np.uint32]
    """Bits of the largest magnitude to which any of the last pairs can be added without overflow."""


_latest: tuple[tuple[Commit, ...], _Plan | None] = (), None
"""The last plan made: a measurement asks for the same one at each of its layers."""


def _plan_of(commits: Sequence[Commit]) -> _Plan | None:
    """How to make all outputs in one visit; None if the commits have too little in common."""
    global _latest
    asked = tuple(commits)
    planned, plan = _latest
    if planned != asked:  # commits are equal only if they are the same object
        plan = _make_plan(asked)
        _latest = asked, plan
    return plan


def common_pairs(commits: Sequence[Commit]) -> int | None:
    """With how many pairs, the same bits, all begin that have at most one more; None if with too few.

    None as well if one has a decay: before any pair, it has made another number of the base.
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


def _make_plan(commits: tuple[Commit, ...]) -> _Plan | None:
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
    # |z| < 7 for every distribution; the hundredth covers the roundings, those of storage included.
    reach = 7.0 * float(np.abs(last_coefficients).max())
    ceilings = {
        dtype: np.float32(max(0.0, 0.99 * torch.finfo(dtype).max - reach)).view(np.uint32)
        for dtype in STORAGE_DTYPES
    }
    return _Plan(
        seeds, coefficients, steps, last_seeds, last_coefficients,
        np.array([commit.rounding_seed for commit in commits], dtype=np.uint64), ceilings,
    )  # fmt: skip


def join(commits: Sequence[Commit], *, endless: bool) -> Joined:
    """All commits as the kernels take them.

    `endless`: a commit's end changes nothing (float32), so that those without a decay continue the one
    before them, and a journal without decays is a single commit.
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


def _columns(out: torch.Tensor, columns: int | None, tensor_id: int) -> int:
    """Length of the last dimension of the tensor that `out`, which has elements, is all or a part of."""
    if columns is None:
        return out.shape[-1] if out.ndim > 0 else 1
    if not 0 < columns <= ELEMENTS_MAX:
        raise NumericError(
            f"Tensor {tensor_id}: {columns} columns are outside 1 .. 2**48; "
            "give the length of the tensor's last dimension."
        )
    return columns


def _values(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory as a 1-D array: float32, or uint16 for bfloat16 and float16."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    wide = plain.dtype == torch.float32
    array: npt.NDArray[Any] = (plain if wide else plain.view(torch.uint16)).numpy()
    return array.reshape(-1)


def _float32(stored: npt.NDArray[Any], dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """What `_values` of a tensor of `dtype` mean, exactly."""
    if dtype == torch.float32:
        return stored.copy()
    if dtype == torch.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32)


def _stored(values: npt.NDArray[np.float32], dtype: torch.dtype) -> npt.NDArray[Any]:
    """The inverse of `_float32`, for values that `dtype` represents."""
    if dtype == torch.float32:
        return values
    if dtype == torch.bfloat16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def _rounded(
    acc: npt.NDArray[np.float32],
    dtype: torch.dtype,
    rounding: Rounding,
    elements: npt.NDArray[np.int64],
    rounding_seed: int,
    tensor_id: int,
) -> npt.NDArray[np.float32]:
    """A commit's results as `dtype` represents them."""
    if dtype == torch.float32:
        return acc
    bits = acc.view(np.uint32)
    if dtype == torch.bfloat16:
        addend: Any = np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
        if rounding is Rounding.STOCHASTIC:
            addend = spec.rounding_bits(elements, rounding_seed, tensor_id)
        # NaN and infinities keep their upper half.
        rounded = np.where(np.isfinite(acc), bits + addend, bits)
        return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    if rounding is Rounding.NEAREST:
        with np.errstate(over="ignore"):
            return acc.astype(np.float16).astype(np.float32)
    words = spec.rounding_words_float16(elements, rounding_seed, tensor_id)
    return _float16_stochastic(acc, words)


def _float16_stochastic(
    acc: npt.NDArray[np.float32], words: npt.NDArray[np.uint32]
) -> npt.NDArray[np.float32]:
    """`acc` rounded to float16 by a random word for each, as float32."""
    bits = acc.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # From 2**-14 on: 13 bits of the significand go, and the exponent's bias falls from 127 to 15.
    normal = ((magnitude + (words >> 19)) >> 13) - np.uint32(112 << 10)
    # Below, float16 is fixed-point, in units of 2**-24.
    with np.errstate(over="ignore", invalid="ignore"):
        units = magnitude.view(np.float32) * np.float32(2.0**24)
        whole = np.floor(units)
        uniform = (words >> 8).astype(np.float32) * np.float32(2.0**-24)
        up = uniform < units - whole
    small = np.where(magnitude < 0x38800000, whole, np.float32(0)).astype(np.uint32) + up
    half = np.where(magnitude < 0x38800000, small, np.minimum(normal, np.uint32(0x7C00)))
    half = np.where(magnitude > 0x7F800000, np.uint32(0x7E00), half)
    signed = (half | bits >> 16 & np.uint32(0x8000)).astype(np.uint16)
    return _float32(signed, torch.float16)


def _not_finite(
    tensor: torch.Tensor, offset: int, tensor_id: int, start: int, name: str | None
) -> NumericError:
    value = float(tensor.detach().view(-1)[offset])
    called = f"Tensor {tensor_id}" if name is None else f"Tensor {tensor_id} ({name})"
    return NumericError(
        f"{called}: element {start + offset} is {value}; check the base weights, "
        "or lower the learning rate or eps."
    )


# --- threads -----------------------------------------------------------------------------------------


def _aligned(count: int, dtype: Any) -> npt.NDArray[Any]:
    """Zeros from a cache line's beginning on: a vector across two lines is read twice."""
    line_bytes = 64
    memory = np.zeros(count * 4 + line_bytes, dtype=np.uint8)
    begin = -memory.ctypes.data % line_bytes
    return memory[begin : begin + count * 4].view(dtype)


class _Scratch(threading.local):
    """What one thread's kernels need besides their operands; made once for each thread."""

    def __init__(self) -> None:
        self.words = _aligned(cpu.SCRATCH_WORDS, np.uint32)
        self.tile_values = _aligned(cpu.MATRIX_ELEMENTS + cpu.VECTOR_LANES, np.float32)
        self.row_patterns = _aligned(cpu.FUSED_PATTERNS * cpu.MATRIX_ROWS_MAX, np.uint32)
        self.patterns = _aligned(cpu.PATTERN_VALUES, np.float32)
        self.used_patterns = np.zeros(cpu.FUSED_PATTERNS, dtype=np.uint64)
        self.random_bits = _aligned(cpu.FAN_ELEMENTS, np.uint32)
        self.products = _aligned(cpu.FAN_ELEMENTS + cpu.VECTOR_LANES, np.float32)
        self.sums = _aligned(cpu.TILE_ELEMENTS, np.float32)


_scratch = _Scratch()
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _shared_pool() -> ThreadPoolExecutor:
    """Threads of our own, started when first needed: torch's OpenMP pool and numba's are not shared,
    because neither allows two Python threads to enter it at once on every platform."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=256, thread_name_prefix="materialize")
            os.register_at_fork(after_in_child=_forget_pool)
        return _pool


def _forget_pool() -> None:
    """After a fork, the child has the pool's object but none of its threads."""
    global _pool
    _pool = None


def _grain(rank: int, columns: int, size: int) -> int:
    """Elements that a chunk for a thread should be multiples of."""
    if rank == 0:
        return cpu.TILE_ELEMENTS
    # Whole rows of a matrix share patterns; a chunk of one long row has none to share.
    rows = max(1, cpu.MATRIX_ELEMENTS // columns)
    return rows * columns if columns <= cpu.MATRIX_ELEMENTS else cpu.MATRIX_ELEMENTS


def _spread(
    run: Callable[[int, int], None],
    start: int,
    size: int,
    pairs: int,
    grain: int,
    threads: int | None,
) -> None:
    """Call run(begin, end) over 0 .. size in chunks that begin at a grain, on up to `threads` threads."""
    used = min(size * pairs // CHUNK_WORK_MIN, size // grain)
    if used > 1:
        used = min(used, torch.get_num_threads() if threads is None else threads)
    if used <= 1:
        run(0, size)
        return
    grains = -(-(start % grain + size) // grain)
    work = size * pairs // CHUNK_WORK_MIN
    chunks = min(used * CHUNKS_PER_THREAD, max(used, work), grains)
    edges = [max(0, grains * i // chunks * grain - start % grain) for i in range(chunks)] + [size]
    counter = itertools.count()

    def drain() -> None:
        while (chunk := next(counter)) < chunks:
            run(edges[chunk], edges[chunk + 1])

    pool = _shared_pool()
    others = [pool.submit(drain) for _ in range(used - 1)]
    try:
        drain()
    finally:
        for other in others:
            other.result()
