"""What `materialize` calls for devices other than the CPU.

On a CUDA device these are Triton's kernels, elsewhere plain torch operations. Seeds and
coefficients are uploaded once for a list of commits and a device, not once for each tensor. A fan
never waits for the device: whether its results are finite is collected there, and asked for once,
at the end of a forward pass (`finite_results`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import NumericError
from fedmezo_core.zo.commits import Commit, common_pairs, join
from fedmezo_core.zo.noise import Distribution, Operands, Rounding, portable, spec
from fedmezo_core.zo.noise.portable import NO_ELEMENT

log = logging.getLogger("fedmezo.devices")

TABLES_MAX: Final = 32
"""Lists of commits that stay uploaded.

A pass asks for the same ones at every layer, and for each of its points alone where embeddings are
looked up.
"""


def elsewhere(device: torch.device) -> bool:
    """Whether `device` is not the CPU, whose kernels are in `noise.cpu`."""
    return device.type != "cpu"


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """The module with the kernels for `device`.

    None where plain torch operations must do, which the log says once.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        reason = "there are kernels for CUDA devices and the CPU only"
    else:
        try:
            from fedmezo_core.zo.noise import triton_kernels

            # Triton compiles when a kernel is first launched: only then is it known to work here.
            weight = torch.zeros(1, device=device)
            operands = Operands(0, Distribution.RADEMACHER, Rounding.NEAREST)
            _launch_apply(triton_kernels, weight, weight, (), operands)
            return triton_kernels
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"Triton does not work there ({type(error).__name__}: {error})"
    log.warning(
        "%s: weights are built by plain torch operations, which give the same bits slowly: %s; "
        "install PyTorch's CUDA build with Triton and a C compiler, or use device = cpu.",
        device,
        reason,
    )
    return None


def apply_commits(
    out: torch.Tensor, base: torch.Tensor, commits: Sequence[Commit], operands: Operands
) -> bool:
    """out = base + commits on a device that is not the CPU; whether all results are finite.

    Waits for the device. The operands are checked already.
    """
    found = kernels(base.device)
    if found is None:
        bad = portable.apply_commits(
            out.detach().view(-1), base.detach().view(-1), [_plain(commit) for commit in commits],
            operands.start, operands, operands.columns_of(out),
        )  # fmt: skip
    else:
        bad = _launch_apply(found, out, base, commits, operands)
    return int(bad) == NO_ELEMENT


def apply_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    rows: torch.Tensor | None = None,
) -> None:
    """outs[g] = base + commits[g] on a device that is not the CPU, without waiting for it.

    The operands are checked already. With `rows` (int64, 1-D, on the device), an embedding's
    lookup: `base` is a whole table, contiguous [any, columns], and each output, contiguous [rows,
    columns], gets only these rows of it; no commit may have a decay. `finite_results` raises
    `NumericError` for a result that is not finite and for a row that the table does not have.
    """
    found = kernels(base.device)
    columns = operands.columns_of(base)
    bad, place = _results.place(operands, base)
    if rows is not None:
        rows = rows.contiguous()
    if found is None:
        elements: torch.Tensor | int = operands.start
        source = base.detach().view(-1)
        if rows is not None:
            source, elements = _looked_up(source, rows, columns, bad[place])
        for out, commit in zip(outs, commits, strict=True):
            first = portable.apply_commits(
                out.view(-1), source, [_plain(commit)], elements, operands, columns
            )
            bad[place] = torch.minimum(bad[place], first)
        return
    if any(commit.decay != 1.0 for commit in commits):
        assert rows is None, "no measurement looks up rows at a commit with a decay"
        operands = operands._replace(columns=columns)
        for out, commit in zip(outs, commits, strict=True):
            _launch_apply(found, out, base, [commit], operands, bad[place : place + 1])
        return
    with _current(base.device):
        for begin, end, stride in _runs_of_equal_distance(outs):
            for table in _fan_tables(tuple(commits[begin:end]), base.device):
                found.launch_fan(
                    outs[begin + table.first_output], stride, base, table.lines, table.pairs,
                    table.draws, table.shared_bits, bad, place, operands, rows,
                )  # fmt: skip


def factor_signs(
    seeds: Sequence[int],
    tensor_id: int,
    domain: int,
    length: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Signs of each seed's low-rank direction on a device that is not the CPU, without waiting.

    Returns `dtype` [seeds, rank, length], each 1 or -1. domain: the noise standard's for rows or
    for columns, of which there are `length`.
    """
    found = kernels(device)
    if found is None:
        indices = torch.arange(length, device=device)
        signs = [portable.factor_signs(indices, seed, tensor_id, domain)[:rank] for seed in seeds]
        return torch.stack([torch.stack(own) for own in signs]).to(dtype)
    out = torch.empty(len(seeds), rank, length, dtype=dtype, device=device)
    words = np.array(seeds, dtype=np.uint64).view(np.int64)
    with _current(device):
        found.factor_signs(out, _uploaded(words, device), tensor_id, domain, rank, length)
    return out


def warm_up(
    device: torch.device, dtype: torch.dtype, distribution: Distribution, rounding: Rounding
) -> None:
    """Compile what a run launches on a device that is not the CPU: seconds once, then a cache."""
    commits = [
        Commit(np.zeros(1, np.uint64), np.array([eps], np.float32), 0) for eps in (1e-3, -1e-3)
    ]
    operands = Operands(0, distribution, rounding)
    weights = torch.zeros(2, 8, dtype=dtype, device=device)
    outs = list(torch.empty(2, 2, 8, dtype=dtype, device=device))
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    apply_commits(weights, weights, commits, operands)
    with finite_results():
        for looked_up in (None, rows):
            apply_fan(outs, weights, commits, operands, looked_up)
    if distribution.rank:
        for domain in (spec.DOMAIN_ROW_SIGNS, spec.DOMAIN_COLUMN_SIGNS):
            factor_signs([0], 0, domain, 8, distribution.rank, dtype=dtype, device=device)


# --- whether results are finite -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """A tensor whose first bad element is in a device's list."""

    place: int
    operands: Operands
    end: int
    """The largest index of an element, plus one."""


class _Results(threading.local):
    """For each device, the first bad element of each tensor since `finite_results` began."""

    def __init__(self) -> None:
        self.bad: dict[torch.device, torch.Tensor] = {}
        self.asked: dict[torch.device, dict[int, _Asked]] = {}

    def place(self, operands: Operands, base: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(the list of the base's device, the tensor's index in it)."""
        device, tensor_id = base.device, operands.tensor_id
        asked = self.asked.setdefault(device, {})
        before = asked.get(tensor_id)
        place = len(asked) if before is None else before.place
        end = max(operands.start + base.numel(), 0 if before is None else before.end)
        asked[tensor_id] = _Asked(place, operands, end)
        bad = self.bad.get(device)
        if bad is None or place >= len(bad):
            with torch.inference_mode(False):  # a pass is in that mode, what follows it may not be
                longer = torch.full((max(256, 2 * place),), NO_ELEMENT, device=device)
            if bad is not None:
                longer[: len(bad)] = bad
            self.bad[device] = bad = longer
        return bad, place

    def forget(self) -> None:
        for device, asked in self.asked.items():
            if asked:
                self.bad[device].fill_(NO_ELEMENT)
                asked.clear()

    def require_finite(self) -> None:
        for device, asked in self.asked.items():
            if not asked:
                continue
            found = self.bad[device][: len(asked)].tolist()
            for tensor in asked.values():
                if found[tensor.place] != NO_ELEMENT:
                    raise _not_finite(tensor, found[tensor.place])


_results = _Results()


@contextmanager
def finite_results() -> Iterator[None]:
    """Collect, inside the block, whether the results of `apply_fan` are finite.

    At the end, waits for the device and raises `NumericError`, which names the tensor and its first
    element that is NaN or infinite.
    """
    _results.forget()
    try:
        yield
        _results.require_finite()
    finally:
        _results.forget()


def _not_finite(tensor: _Asked, element: int) -> NumericError:
    if element >= tensor.end:
        return NumericError(
            f"{tensor.operands.called}: a row was looked up that it doesn't have; "
            "check the token ids against the model's vocabulary."
        )
    return tensor.operands.not_finite(element, "NaN or infinite")


# --- tables -------------------------------------------------------------------------------------


def _plain(commit: Commit) -> portable.PlainCommit:
    pairs = zip(commit.seeds.tolist(), commit.coefficients.tolist(), strict=True)
    return list(pairs), commit.rounding_seed, commit.decay


def _uploaded(array: npt.NDArray[np.int64 | np.int32], device: torch.device) -> torch.Tensor:
    """A copy on the device, made in the stream's order; nothing waits for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _halves(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """[n, 2]: the low and the high half of each."""
    low, high = numbers & np.uint64(0xFFFFFFFF), numbers >> np.uint64(32)
    return np.stack([low, high], axis=1).astype(np.uint32)


def _pair_lines(
    seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint32]:
    """Lines of a table for these pairs: seed low, seed high, coefficient, 0."""
    lines = np.zeros((len(seeds), 4), dtype=np.uint32)
    lines[:, :2] = _halves(seeds)
    lines[:, 2] = coefficients.view(np.uint32)
    return lines


@functools.lru_cache(TABLES_MAX)
def _apply_table(
    commits: tuple[Commit, ...], endless: bool, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """(lines for the kernel `apply`, pairs, commits); `endless`: see `join`."""
    seeds, coefficients, commit_ends, rounding_seeds, decays = join(commits, endless=endless)
    ends = np.zeros((len(commit_ends), 4), dtype=np.uint32)
    ends[:, :2] = _halves(rounding_seeds)
    ends[:, 2] = commit_ends
    ends[:, 3] = decays.view(np.uint32)
    # One more line, so that no table is empty.
    nothing = np.zeros((1, 4), np.uint32)
    lines = np.concatenate([_pair_lines(seeds, coefficients), ends, nothing]).view(np.int32)
    return _uploaded(lines, device), len(seeds), len(ends)


@dataclass(frozen=True, slots=True)
class _FanTable:
    """Lines for the kernel `fan`, and what they describe."""

    lines: torch.Tensor
    pairs: int
    draws: int
    shared_bits: bool
    first_output: int


@functools.lru_cache(TABLES_MAX)
def _fan_tables(commits: tuple[Commit, ...], device: torch.device) -> list[_FanTable]:
    """One table if the commits differ in their last pair at most, else one for each."""
    shared = common_pairs(commits)
    if shared is None:
        return [
            _fan_table((commit,), max(0, len(commit.seeds) - 1), device, g)
            for g, commit in enumerate(commits)
        ]
    return [_fan_table(commits, shared, device, 0)]


def _fan_table(
    commits: tuple[Commit, ...], shared: int, device: torch.device, first_output: int
) -> _FanTable:
    outputs = np.zeros((len(commits), 4), dtype=np.uint32)
    rounding_seeds = np.array([commit.rounding_seed for commit in commits], np.uint64)
    outputs[:, :2] = _halves(rounding_seeds)
    draws: list[list[int]] = []  # seed, first output, end output
    for g, commit in enumerate(commits):
        moves = len(commit.seeds) > shared
        if moves:
            outputs[g, 2:] = commit.coefficients[shared].view(np.uint32), 1
        # An output without a pair of its own joins its neighbour's direction and does not use it.
        seed = int(commit.seeds[shared]) if moves else draws[-1][0] if draws else 0
        if draws and draws[-1][0] == seed:
            draws[-1][2] = g + 1
        else:
            draws.append([seed, g, g + 1])
    directions = np.zeros((len(draws), 4), dtype=np.uint32)
    directions[:, :2] = _halves(np.array([seed for seed, _, _ in draws], np.uint64))
    directions[:, 2:] = [draw[1:] for draw in draws]
    first = commits[0]
    pairs = _pair_lines(first.seeds[:shared], first.coefficients[:shared])
    lines = np.concatenate([pairs, directions, outputs])
    return _FanTable(
        _uploaded(lines.view(np.int32), device), shared, len(draws),
        bool((rounding_seeds == rounding_seeds[0]).all()), first_output,
    )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------


def _launch_apply(
    found: ModuleType,
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    bad: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first bad element, or `NO_ELEMENT`: int64 [1] on the device; `bad` if it is given."""
    table, pairs, count = _apply_table(tuple(commits), base.dtype == torch.float32, base.device)
    if bad is None:
        bad = torch.full((1,), NO_ELEMENT, device=base.device)
    with _current(base.device):
        found.launch_apply(out, base, table, pairs, count, bad, operands)
    return bad


def _current(device: torch.device) -> AbstractContextManager[object]:
    """While open, launches go to `device`. (The interpreter's tensors are on the CPU.)"""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _runs_of_equal_distance(outs: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, int]]:
    """Outputs that lie equally far apart, as one launch takes them: (first, end, elements apart).

    The outputs of a forward pass all do. Others are taken two at a time.
    """
    addresses = [out.data_ptr() for out in outs]
    together = len(outs) if len({b - a for a, b in pairwise(addresses)}) <= 1 else 2
    for first in range(0, len(outs), together):
        end = min(first + together, len(outs))
        apart = addresses[first + 1] - addresses[first] if end - first > 1 else 0
        yield first, end, apart // outs[0].element_size()


def _looked_up(
    source: torch.Tensor, rows: torch.Tensor, columns: int, bad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, element indices) of the rows of a flat table; in `bad`, that one is not there."""
    count = source.numel() // columns
    known = rows.clamp(0, count - 1)
    bad.copy_(torch.where(rows == known, NO_ELEMENT, source.numel()).min())
    places = torch.arange(columns, device=rows.device)
    elements = (known[:, None] * columns + places).view(-1)
    return source[elements], elements
