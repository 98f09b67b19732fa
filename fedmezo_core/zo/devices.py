"""`materialize` away from the CPU: Triton's kernels on a CUDA device, plain torch operations elsewhere.

Seeds and coefficients are uploaded once for a list of commits and a device, not once a tensor. A fan never
waits for the device: whether its results are finite is collected there, and asked for once, at the end of
a forward pass (`finite_results`).
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
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.errors import NumericError
from fedmezo_core.zo.noise import Distribution, portable
from fedmezo_core.zo.noise.portable import NO_ELEMENT

if TYPE_CHECKING:
    from fedmezo_core.zo.materialize import Commit

log = logging.getLogger("fedmezo.devices")

TABLES_MAX: Final = 32
"""Lists of commits that stay uploaded: a pass asks for the same ones at every layer, and for each of its
points alone where embeddings are looked up."""


def elsewhere(device: torch.device) -> bool:
    """Whether `device` is for this module: any but the CPU, whose kernels are in `noise.cpu`."""
    return device.type != "cpu"


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """The module with the kernels for `device`; None where plain torch operations must do, said once."""
    if device.type != "cuda" or torch.version.cuda is None:
        reason = "there are kernels for CUDA devices and the CPU only"
    else:
        try:
            from fedmezo_core.zo.noise import triton_kernels

            # Triton compiles when a kernel is first launched: only then is it known to work here.
            weight = torch.zeros(1, device=device)
            _launch_apply(
                triton_kernels, weight, weight, (), 0, 0, 1, Distribution.RADEMACHER, False
            )
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


def materialize(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    start: int,
    distribution: Distribution,
    stochastic: bool,
    columns: int,
) -> bool:
    """out = base + commits for checked operands that are not on the CPU; whether all results are finite.

    Waits for the device.
    """
    found = kernels(base.device)
    if found is None:
        bad = portable.materialize(
            out.detach().view(-1), base.detach().view(-1), [_plain(commit) for commit in commits],
            start, tensor_id=tensor_id, distribution=distribution, stochastic=stochastic,
            columns=columns,
        )  # fmt: skip
    else:
        bad = _launch_apply(
            found, out, base, commits, tensor_id, start, columns, distribution, stochastic
        )
    return int(bad) == NO_ELEMENT


def materialize_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    start: int,
    distribution: Distribution,
    stochastic: bool,
    columns: int,
    name: str | None,
    rows: torch.Tensor | None = None,
) -> None:
    """outs[g] = base + commits[g] for checked operands that are not on the CPU, without waiting for it.

    With `rows` (int64, on the device): only these rows of the base, a tensor of `columns` columns, one
    after the other. What is not finite, and a row that is not there, `finite_results` raises.
    """
    found = kernels(base.device)
    bad, place = _results.place(base.device, tensor_id, start, base.numel(), name)
    if found is None:
        elements: torch.Tensor | int = start
        source = base.detach().view(-1)
        if rows is not None:
            source, elements = _looked_up(source, rows, columns, bad[place])
        for out, commit in zip(outs, commits, strict=True):
            first = portable.materialize(
                out.view(-1), source, [_plain(commit)], elements, tensor_id=tensor_id,
                distribution=distribution, stochastic=stochastic, columns=columns,
            )  # fmt: skip
            bad[place] = torch.minimum(bad[place], first)
        return
    if any(commit.decay != 1.0 for commit in commits):
        assert rows is None, "no measurement looks up rows at a commit with a decay"
        for out, commit in zip(outs, commits, strict=True):
            _launch_apply(
                found, out, base, [commit], tensor_id, start, columns, distribution, stochastic,
                bad[place : place + 1],
            )  # fmt: skip
        return
    with _current(base.device):
        for begin, end, stride in _runs_of_equal_distance(outs):
            for table in _fan_tables(tuple(commits[begin:end]), base.device):
                found.materialize_fan(
                    outs[begin + table.first_output], stride, base, table.lines, table.pairs,
                    table.draws, table.shared_bits, bad, place, tensor_id=tensor_id, start=start,
                    columns=columns, distribution=distribution, stochastic=stochastic, rows=rows,
                )  # fmt: skip


def materialize_rows(
    outs: Sequence[torch.Tensor],
    table: torch.Tensor,
    rows: torch.Tensor,
    commits: Sequence[Commit],
    *,
    tensor_id: int,
    distribution: Distribution,
    stochastic: bool,
) -> None:
    """outs[g] = the rows `rows` of `table` + commits[g]: an embedding's lookup, without waiting.

    outs: contiguous [rows, columns] each, apart from each other. table: contiguous [any, columns], a whole
    tensor. rows: int64, 1-D, on the device of the table, which is not the CPU. No commit has a decay.
    """
    materialize_fan(
        outs, table, commits, tensor_id=tensor_id, start=0, distribution=distribution,
        stochastic=stochastic, columns=table.shape[1], name=None, rows=rows.contiguous(),
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
    """`low_rank.factors` on a device that is not the CPU, without waiting: [seeds, rank, length]."""
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
    device: torch.device, dtype: torch.dtype, distribution: Distribution, stochastic: bool
) -> None:
    """Compile what a run launches on a device that is not the CPU: seconds once, then Triton's cache."""
    from fedmezo_core.zo.materialize import Commit

    commits = [
        Commit(np.zeros(1, np.uint64), np.array([eps], np.float32), 0) for eps in (1e-3, -1e-3)
    ]
    weights = torch.zeros(2, 8, dtype=dtype, device=device)
    outs = list(torch.empty(2, 2, 8, dtype=dtype, device=device))
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    materialize(
        weights, weights, commits, tensor_id=0, start=0, distribution=distribution,
        stochastic=stochastic, columns=8,
    )  # fmt: skip
    with finite_results():
        for looked_up in (None, rows):
            materialize_fan(
                outs, weights, commits, tensor_id=0, start=0, distribution=distribution,
                stochastic=stochastic, columns=8, name=None, rows=looked_up,
            )  # fmt: skip
    if distribution.rank:
        for domain in (4, 5):
            factor_signs([0], 0, domain, 8, distribution.rank, dtype=dtype, device=device)


# --- whether results are finite -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a place in the list of bad elements stands for."""

    tensor_id: int
    end: int
    name: str | None


class _Results(threading.local):
    """For each device, and each tensor since the last question, the first element that is not finite."""

    def __init__(self) -> None:
        self.bad: dict[torch.device, torch.Tensor] = {}
        self.asked: dict[torch.device, dict[int, tuple[int, _Asked]]] = {}

    def place(
        self, device: torch.device, tensor_id: int, start: int, size: int, name: str | None
    ) -> tuple[torch.Tensor, int]:
        """(the device's list, the tensor's place in it)."""
        asked = self.asked.setdefault(device, {})
        if tensor_id in asked:
            place, before = asked[tensor_id]
            asked[tensor_id] = place, _Asked(tensor_id, max(before.end, start + size), name)
        else:
            place = len(asked)
            asked[tensor_id] = place, _Asked(tensor_id, start + size, name)
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
            for place, what in asked.values():
                if found[place] != NO_ELEMENT:
                    raise _not_finite(what, found[place])


_results = _Results()


@contextmanager
def finite_results() -> Iterator[None]:
    """Around fans on a device: at the end, wait for it, and raise NumericError if a result is not finite.

    The error names the tensor and its first such element.
    """
    _results.forget()
    try:
        yield
        _results.require_finite()
    finally:
        _results.forget()


def _not_finite(what: _Asked, element: int) -> NumericError:
    called = (
        f"Tensor {what.tensor_id}"
        if what.name is None
        else f"Tensor {what.tensor_id} ({what.name})"
    )
    if element >= what.end:
        return NumericError(
            f"{called}: a row was looked up that it doesn't have; "
            "check the token ids against the model's vocabulary."
        )
    return NumericError(
        f"{called}: element {element} is NaN or infinite; check the base weights, "
        "or lower the learning rate or eps."
    )


# --- tables ------------------------------------------------------------------------------------------


def _plain(commit: Commit) -> portable.PlainCommit:
    pairs = zip(commit.seeds.tolist(), commit.coefficients.tolist(), strict=True)
    return list(pairs), commit.rounding_seed, commit.decay


def _uploaded(array: npt.NDArray[np.int64 | np.int32], device: torch.device) -> torch.Tensor:
    """A copy on the device, made in the stream's order and not waited for."""
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


def _first_lines(commit: Commit, count: int) -> npt.NDArray[np.uint32]:
    """`_pair_lines` of a commit's first `count` pairs, or of all if it has fewer."""
    return _pair_lines(commit.seeds[:count], commit.coefficients[:count])


@functools.lru_cache(TABLES_MAX)
def _apply_table(
    commits: tuple[Commit, ...], endless: bool, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """(lines for the kernel `apply`, pairs, commits); `endless`: see `materialize.join`."""
    from fedmezo_core.zo.materialize import join

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
    """What makes the outputs of `commits`: one launch if they differ in their last pair at most, else
    one for each."""
    shared = max(0, max(len(commit.seeds) for commit in commits) - 1)
    first = _first_lines(commits[0], shared)
    alike = all(
        len(commit.seeds) >= shared and np.array_equal(_first_lines(commit, shared), first)
        for commit in commits
    )
    if not alike:
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
        # An output without a pair of its own goes with its neighbour's direction and does not use it.
        seed = int(commit.seeds[shared]) if moves else draws[-1][0] if draws else 0
        if draws and draws[-1][0] == seed:
            draws[-1][2] = g + 1
        else:
            draws.append([seed, g, g + 1])
    directions = np.zeros((len(draws), 4), dtype=np.uint32)
    directions[:, :2] = _halves(np.array([seed for seed, _, _ in draws], np.uint64))
    directions[:, 2:] = [draw[1:] for draw in draws]
    lines = np.concatenate([_first_lines(commits[0], shared), directions, outputs])
    return _FanTable(
        _uploaded(lines.view(np.int32), device), shared, len(draws),
        bool((rounding_seeds == rounding_seeds[0]).all()), first_output,
    )  # fmt: skip


# --- launches ----------------------------------------------------------------------------------------


def _launch_apply(
    found: ModuleType,
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    tensor_id: int,
    start: int,
    columns: int,
    distribution: Distribution,
    stochastic: bool,
    bad: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first bad element, or `NO_ELEMENT`, on the device; in `bad` (int64 [1]) if it is given."""
    table, pairs, count = _apply_table(tuple(commits), base.dtype == torch.float32, base.device)
    if bad is None:
        bad = torch.full((1,), NO_ELEMENT, device=base.device)
    with _current(base.device):
        found.materialize(
            out, base, table, pairs, count, bad, tensor_id=tensor_id, start=start, columns=columns,
            distribution=distribution, stochastic=stochastic,
        )  # fmt: skip
    return bad


def _current(device: torch.device) -> AbstractContextManager[object]:
    """While open, launches go to `device`. (The interpreter's tensors are on the CPU.)"""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _runs_of_equal_distance(outs: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, int]]:
    """Outputs that lie equally far apart, as one launch takes them: (first, end, elements apart).

    Those of a forward pass all do; of others two at a time, which always do.
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
