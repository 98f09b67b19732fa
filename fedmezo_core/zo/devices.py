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
from collections.abc import Callable, Iterator, Sequence
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
from fedmezo_core.zo.noise.tensors import check_tensors

log = logging.getLogger("fedmezo.devices")

Launch = Callable[[], object]
"""Does again what it was prepared for, and nothing else."""

TABLES_MAX: Final = 32
"""Lists of commits that stay uploaded.

The modules of a pass ask for the same ones, those of all points or of one alone.
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
            bad = torch.full((1,), NO_ELEMENT, device=device)
            _launch_apply(triton_kernels, weight, weight, (), operands, bad)
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
    bad = torch.full((1,), NO_ELEMENT, device=base.device)
    _apply(out, base, commits, operands, bad)
    return int(bad) == NO_ELEMENT


class Points:
    """The points of a pass on a device: what launches that are prepared once read each time."""

    def __init__(self, device: torch.device, commits: Sequence[Commit], lines_max: int = 0) -> None:
        """Points that have their last pair for themselves at most (see `common_pairs`).

        lines_max: lines that the table has room for; 0 for what `commits` need.
        """
        self.device = device
        self.commits: Sequence[Commit] = ()
        self.shared_bits = len({commit.rounding_seed for commit in commits}) < 2
        """Whether all are rounded with the same bits; this never changes."""
        self.count = len(commits)
        """Number of points; this never changes."""
        lines = _fan_lines(commits)
        # Twice as many as needed, so that one pair more does not mean another table.
        size = max(lines_max, 2 * len(lines)) if lines_max else len(lines)
        self.table = torch.zeros(size, 4, dtype=torch.int32, device=device)
        """int32 [lines, 4], as the kernel `fan` takes it."""
        self._write(commits, lines)

    def move(self, commits: Sequence[Commit]) -> bool:
        """Take other points into the same memory; False if they do not fit there."""
        shared_bits = len({commit.rounding_seed for commit in commits}) < 2
        lines = _fan_lines(commits)
        if (len(commits), shared_bits) != (self.count, self.shared_bits):
            return False
        if len(lines) > len(self.table):
            return False
        self._write(commits, lines)
        return True

    def _write(self, commits: Sequence[Commit], lines: npt.NDArray[np.int32]) -> None:
        self.commits = tuple(commits)
        self.table[: len(lines)].copy_(torch.from_numpy(lines), non_blocking=True)


@dataclass(frozen=True, slots=True)
class Fan:
    """One tensor's outputs at all points."""

    outs: Sequence[torch.Tensor]
    """One for each point, of the base's size."""
    base: torch.Tensor
    """The tensor, or the part of it that begins at element `operands.start`."""
    operands: Operands


def prepared_fan(fan: Fan, points: Points, results: Results) -> list[Launch]:
    """What makes `fan` as often as it is called, at what `points` are then.

    The memory stays where it is now. Nothing waits: `results` knows what is not finite. Raises as
    `check_tensors` does.
    """
    for out in fan.outs:
        check_tensors(fan.operands, out, fan.base)
    found = kernels(points.device)
    bad, place = results.place(fan.operands, fan.base)
    if found is None:
        return [functools.partial(_portable_fan, fan, points, bad, place)]
    launches: list[Launch] = []
    for begin, end, stride in _runs_of_equal_distance(fan.outs):
        assert (begin, end) == (0, points.count), "outputs at several distances"
        launches += found.fan_launches(
            fan.outs[0], stride, fan.base, points.table, points.shared_bits, bad, place,
            fan.operands,
        )  # fmt: skip
    return launches


def prepared_fans(fans: Sequence[Fan], points: Points, results: Results) -> list[Launch]:
    """`prepared_fan` of several whole tensors of one dtype, whose outputs are each one tensor."""
    found = kernels(points.device)
    if found is None:
        return [launch for fan in fans for launch in prepared_fan(fan, points, results)]
    for fan in fans:
        check_tensors(fan.operands, fan.outs[0], fan.base)
    places = [results.place(fan.operands, fan.base) for fan in fans]
    tensors = [
        (fan.outs[0], fan.base, place, fan.operands)
        for fan, (_, place) in zip(fans, places, strict=True)
    ]
    return [found.fans_launch(tensors, points.table, points.shared_bits, places[0][0])]


def prepared_look_up(
    outs: torch.Tensor,
    base: torch.Tensor,
    operands: Operands,
    rows: torch.Tensor,
    points: Points,
    results: Results,
) -> Launch:
    """What looks up rows of an embedding, at each point those of its own.

    base: the whole table, contiguous [any, columns]. rows: contiguous int64 [points, rows]. outs:
    contiguous [points, rows, columns]. `results` also knows of a row that the table does not have.
    """
    check_tensors(operands, base, base)
    found = kernels(points.device)
    bad, place = results.place(operands, base)
    if found is None:
        return functools.partial(_portable_look_up, outs, base, operands, rows, points, bad, place)
    launch: Launch = found.look_up_launch(outs, base, points.table, bad, place, operands, rows)
    return launch


def prepared_signs(
    out: torch.Tensor,
    seeds: torch.Tensor,
    tensors: Sequence[tuple[int, int]],
    domain: int,
    rank: int,
) -> Launch:
    """What makes the signs of low-rank directions, each 1 or -1, of several tensors.

    tensors: for each its number and the length of its side that `domain` says. out: those of one
    tensor after the other, contiguous [seeds, rank, length]. seeds: int64, the bits of the seeds.
    """
    found = kernels(out.device)
    if found is None:
        return functools.partial(_portable_signs, out, seeds, tensors, domain, rank)
    launch: Launch = found.signs_launch(out, seeds, tensors, domain, rank)
    return launch


def apply_fan(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
) -> None:
    """outs[g] = base + commits[g] on a device that is not the CPU, without waiting for it.

    The operands are checked already. `finite_results` raises `NumericError` for a result that is
    not finite.
    """
    operands = operands._replace(columns=operands.columns_of(base))
    if any(commit.decay != 1.0 for commit in commits):
        bad, place = _current.results.place(operands, base)
        for out, commit in zip(outs, commits, strict=True):
            _apply(out, base, [commit], operands, bad[place : place + 1])
        return
    with on(base.device):
        for begin, end, _ in _runs_of_equal_distance(outs):
            for first, points in _points_of(tuple(commits[begin:end]), base.device):
                own = outs[begin + first : begin + first + points.count]
                for launch in prepared_fan(Fan(own, base, operands), points, _current.results):
                    launch()


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
    out = torch.empty(len(seeds), rank, length, dtype=dtype, device=device)
    with on(device):
        prepared_signs(out, uploaded_seeds(seeds, device), [(tensor_id, length)], domain, rank)()
    return out


def uploaded_seeds(
    seeds: Sequence[int] | npt.NDArray[np.uint64], device: torch.device
) -> torch.Tensor:
    """The bits of `seeds` as int64 on `device`."""
    return _uploaded(np.array(seeds, dtype=np.uint64).view(np.int64), device)


def warm_up(
    device: torch.device, dtype: torch.dtype, distribution: Distribution, rounding: Rounding
) -> None:
    """Compile what a run launches on a device that is not the CPU: seconds once, then a cache."""
    commits = [
        Commit(np.zeros(1, np.uint64), np.array([eps], np.float32), 0) for eps in (1e-3, -1e-3)
    ]
    operands = Operands(0, distribution, rounding)
    weights = torch.zeros(2, 8, dtype=dtype, device=device)
    outs = torch.empty(2, 2, 8, dtype=dtype, device=device)
    rows = torch.zeros(2, 2, dtype=torch.int64, device=device)
    apply_commits(weights, weights, commits, operands)
    with on(device), finite_results() as results:
        points = Points(device, commits)
        fan = Fan(list(outs), weights, operands)
        for launch in (
            *prepared_fan(fan, points, results),
            *prepared_fans([fan], points, results),
            prepared_look_up(outs, weights, operands, rows, points, results),
        ):
            launch()
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


class Results:
    """For each device, the first bad element of each tensor since `forget` was called.

    A tensor keeps its place in a device's list, and the list its memory, as long as no more tensors
    come than are expected.
    """

    def __init__(self, tensors: int = 256) -> None:
        """Expect this many `tensors`."""
        self._tensors = tensors
        self._bad: dict[torch.device, torch.Tensor] = {}
        self._asked: dict[torch.device, dict[int, _Asked]] = {}

    def place(self, operands: Operands, base: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(the list of the base's device, the tensor's index in it)."""
        device, tensor_id = base.device, operands.tensor_id
        asked = self._asked.setdefault(device, {})
        before = asked.get(tensor_id)
        place = len(asked) if before is None else before.place
        end = max(operands.start + base.numel(), 0 if before is None else before.end)
        asked[tensor_id] = _Asked(place, operands, end)
        bad = self._bad.get(device)
        if bad is None or place >= len(bad):
            with torch.inference_mode(False):  # a pass is in that mode, what follows it may not be
                longer = torch.full((max(self._tensors, 2 * place),), NO_ELEMENT, device=device)
            if bad is not None:
                longer[: len(bad)] = bad
            self._bad[device] = bad = longer
        return bad, place

    def forget(self) -> None:
        """Begin again, without waiting for the devices."""
        for bad in self._bad.values():
            bad.fill_(NO_ELEMENT)

    def require_finite(self) -> None:
        """Wait for the devices; raise `NumericError` for the first bad element of a tensor."""
        for device, asked in self._asked.items():
            found = self._bad[device][: len(asked)].tolist()
            if min(found, default=NO_ELEMENT) == NO_ELEMENT:
                continue
            for tensor in asked.values():
                if found[tensor.place] != NO_ELEMENT:
                    raise _not_finite(tensor, found[tensor.place])


class _Current(threading.local):
    """Where `apply_fan` leaves what is not finite."""

    def __init__(self) -> None:
        self.results = Results()


_current = _Current()


@contextmanager
def finite_results(results: Results | None = None) -> Iterator[Results]:
    """Collect, inside the block, whether the results of `apply_fan` are finite.

    At the end, waits for the device and raises `NumericError`, which names the tensor and its first
    element that is NaN or infinite. `results`: where launches that are prepared leave it, too.
    """
    before, _current.results = _current.results, results or Results()
    try:
        _current.results.forget()
        yield _current.results
        _current.results.require_finite()
    finally:
        _current.results = before


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


@functools.lru_cache(TABLES_MAX)
def _points_of(commits: tuple[Commit, ...], device: torch.device) -> list[tuple[int, Points]]:
    """[(the first commit's index, points)]: one for all if they can share a table, else for each.

    They are kept, because a pass asks for the same ones at every layer.
    """
    if common_pairs(commits) is None:
        return [(g, Points(device, [commit])) for g, commit in enumerate(commits)]
    return [(0, Points(device, commits))]


def _fan_lines(commits: Sequence[Commit]) -> npt.NDArray[np.int32]:
    """The table of the kernel `fan` for `commits`, which differ in their last pair at most."""
    shared = common_pairs(commits)
    assert shared is not None, "points that share a table differ in their last pair at most"
    outputs = np.zeros((len(commits), 4), dtype=np.uint32)
    rounding_seeds = np.array([commit.rounding_seed for commit in commits], np.uint64)
    outputs[:, :2] = _halves(rounding_seeds)
    draws: list[list[int]] = []  # seed, first output, end output
    for g, commit in enumerate(commits):
        moves = len(commit.seeds) > shared
        # An output without a pair of its own joins its neighbour's direction and does not use it.
        seed = int(commit.seeds[shared]) if moves else draws[-1][0] if draws else 0
        if draws and draws[-1][0] == seed:
            draws[-1][2] = g + 1
        else:
            draws.append([seed, g, g + 1])
        if moves:
            outputs[g, 2:] = commit.coefficients[shared].view(np.uint32), len(draws)
    directions = np.zeros((len(draws), 4), dtype=np.uint32)
    directions[:, :2] = _halves(np.array([seed for seed, _, _ in draws], np.uint64))
    directions[:, 2:] = [draw[1:] for draw in draws]
    first = commits[0]
    pairs = _pair_lines(first.seeds[:shared], first.coefficients[:shared])
    counts = np.array([[shared, len(draws), 0, 0]], dtype=np.uint32)
    return np.concatenate([counts, pairs, directions, outputs]).view(np.int32)


# --- launches -----------------------------------------------------------------------------------


def on(device: torch.device) -> AbstractContextManager[object]:
    """While open, launches go to `device`. (The interpreter's tensors are on the CPU.)"""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launch_apply(
    found: ModuleType,
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    bad: torch.Tensor,
) -> None:
    table, pairs, count = _apply_table(tuple(commits), base.dtype == torch.float32, base.device)
    with on(base.device):
        for launch in found.apply_launches(out, base, table, pairs, count, bad, operands):
            launch()


def _apply(
    out: torch.Tensor,
    base: torch.Tensor,
    commits: Sequence[Commit],
    operands: Operands,
    bad: torch.Tensor,
) -> None:
    """out = base + commits; `bad`, int64 [1], gets the index of an element that is not finite."""
    found = kernels(base.device)
    if found is not None:
        _launch_apply(found, out, base, commits, operands, bad)
        return
    first = portable.apply_commits(
        out.detach().view(-1), base.detach().view(-1), [_plain(commit) for commit in commits],
        operands.start, operands, operands.columns_of(out),
    )  # fmt: skip
    bad.copy_(torch.minimum(bad, first))


def _portable_fan(fan: Fan, points: Points, bad: torch.Tensor, place: int) -> None:
    columns = fan.operands.columns_of(fan.base)
    source = fan.base.detach().view(-1)
    for out, commit in zip(fan.outs, points.commits, strict=True):
        first = portable.apply_commits(
            out.view(-1), source, [_plain(commit)], fan.operands.start, fan.operands, columns
        )
        bad[place] = torch.minimum(bad[place], first)


def _portable_look_up(
    outs: torch.Tensor,
    base: torch.Tensor,
    operands: Operands,
    rows: torch.Tensor,
    points: Points,
    bad: torch.Tensor,
    place: int,
) -> None:
    columns = operands.columns_of(base)
    for out, own, commit in zip(outs, rows, points.commits, strict=True):
        source, elements = _looked_up(base.detach().view(-1), own, columns, bad[place])
        first = portable.apply_commits(
            out.view(-1), source, [_plain(commit)], elements, operands, columns
        )
        bad[place] = torch.minimum(bad[place], first)


def _portable_signs(
    out: torch.Tensor,
    seeds: torch.Tensor,
    tensors: Sequence[tuple[int, int]],
    domain: int,
    rank: int,
) -> None:
    numbers = [seed % 2**64 for seed in seeds.tolist()]
    offset = 0
    for tensor_id, length in tensors:
        indices = torch.arange(length, device=out.device)
        signs = [portable.factor_signs(indices, seed, tensor_id, domain)[:rank] for seed in numbers]
        made = torch.stack([torch.stack(own) for own in signs])
        out.view(-1)[offset : offset + made.numel()] = made.flatten().to(out.dtype)
        offset += made.numel()


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
    bad.copy_(torch.minimum(bad, torch.where(rows == known, NO_ELEMENT, source.numel()).min()))
    places = torch.arange(columns, device=rows.device)
    elements = (known[:, None] * columns + places).view(-1)
    return source[elements], elements
