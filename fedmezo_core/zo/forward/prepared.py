"""What passes launch on a device, prepared once for a model and a number of points.

A small model's pass would otherwise wait for the host: checks, tables and Triton's own dispatcher
take longer than the kernels. So all that does not change from one measurement to the next is done
once: a launch has its kernel, its arguments and its memory. Seeds and coefficients lie on the
device, where `PreparedPass.begin` overwrites them.

- The weight of a linear layer is built in one block or a few, in memory that all layers share.
- What is small is built for many modules in one launch, when the first of them runs: biases, norms,
  the factors of low-rank directions.
- A module that is elementwise in its parameters (a norm) runs once for all points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.devices import Fan, Launch, Points, Results
from fedmezo_core.zo.forward.low_rank import THIN_RANKS_PER_FULL_RANK, Side, Split, split
from fedmezo_core.zo.model.modules import Owned, with_parameters
from fedmezo_core.zo.noise import Operands, spec

BLOCK_BYTES: Final = 32 << 20
"""Weights of a linear layer that are built at a time, for all points together; fits an L2 cache."""
GROUP_BYTES: Final = 32 << 20
"""Small tensors, for all points together, that are built in one launch."""
LINES_MIN: Final = 1024
"""Lines of a table of points, 16 bytes each: more than most measurements need."""

Item = TypeVar("Item")
OperandsOf = Callable[[int], Operands]
"""The noise of the tensor with this number."""


class Memory:
    """A device's memory for what is built: all modules use it, one after the other."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, use: str, size_bytes: int, device: torch.device) -> torch.Tensor:
        """Memory for `use`, the same as before if that is large enough: uint8 [size_bytes].

        Those who have the memory before keep it.
        """
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < size_bytes:
            buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            self._buffers[use] = buffer
        return buffer[:size_bytes]


@dataclass(frozen=True, eq=False)
class _Group:
    """What a few launches build, into memory that other groups use, too."""

    launches: list[Launch]


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a weight: what builds them at all points, and where, [points, rows, columns]."""

    first: int
    last: int
    launches: list[Launch]
    built: torch.Tensor


class PreparedPass:
    """The launches of one model's passes at a number of points, whatever their seeds."""

    def __init__(
        self,
        owners: Mapping[nn.Module, Sequence[Owned]],
        points: Sequence[Commit],
        operands_of: OperandsOf,
        results: Results,
        memory: Memory,
        device: torch.device,
    ) -> None:
        """Prepare for as many points as `points` are, which share all but their last pair.

        owners: the modules with trained parameters. results: where launches leave what is not
        finite.
        """
        self._operands_of = operands_of
        self._results = results
        self._memory = memory
        self._device = device
        self._points = Points(device, points, LINES_MIN)
        self._current: dict[str, _Group] = {}
        self._small: dict[tuple[nn.Module, str], tuple[_Group, torch.Tensor, int]] = {}
        self._group_small(owners)
        products = {
            module: item.tensor_id
            for module, owned in owners.items()
            for item in owned
            if item.holder is module and item.attribute == "weight" and is_product(module)
        }
        self._low_rank = None
        rank = operands_of(0).distribution.rank
        blocks = [
            _rows_max(module, count) * _row_bytes(module, count)
            for module in products
            for count in ([self.count, 1] if rank else [self.count])  # shared pairs make 1
        ]
        # Once, for the largest. A recording of this pass writes there as long as this object lives.
        self._product = memory.take("product", max(blocks, default=0), device)
        if rank and products:
            self._low_rank = _LowRank(products, points, rank, memory, device)

    @property
    def count(self) -> int:
        """Number of points."""
        return self._points.count

    def begin(self, points: Sequence[Commit]) -> bool:
        """Begin a pass at `points`; False if it must be prepared anew for them."""
        if not self._points.move(points):
            return False
        self.restart()
        return self._low_rank is None or self._low_rank.move(points)

    def restart(self) -> None:
        """Compute the pass once more from its beginning, at the same points."""
        self._current = {}

    # ------------------------------------------------------------------ small tensors

    def built(self, holder: nn.Module, attribute: str) -> torch.Tensor | None:
        """A small parameter at every point: [points, *its shape]; None if it must be built alone.

        The values last until a module of another group runs.
        """
        found = self._small.get((holder, attribute))
        if found is None:
            return None
        group, outs, address = found
        parameter: Any = holder._parameters[attribute]
        if parameter.data_ptr() != address:
            return None
        self._launch("small", group)
        return outs

    def _launch(self, use: str, group: _Group) -> None:
        if self._current.get(use) is not group:
            for launch in group.launches:
                launch()
            self._current[use] = group

    def _group_small(self, owners: Mapping[nn.Module, Sequence[Owned]]) -> None:
        """Group what is on the device already, and not needed while another owner runs."""
        of_modules = [
            [item for item in owned if self._is_small(module, item)]
            for module, owned in owners.items()
            if not isinstance(module, nn.Embedding)
            if not any(inner in owners for inner in module.modules() if inner is not module)
        ]
        sizes = [
            sum(self.count * _padded(item.parameter.nbytes) for item in items)
            for items in of_modules
        ]
        # A module's own parameters must not take each other's memory.
        parts = list(_parts(list(zip(of_modules, sizes, strict=True)), sizes))
        whole = [sum(size for _, size in part) for part in parts]
        memory = self._memory.take("small", max(whole, default=0), self._device)
        for part in parts:
            group, left = _Group([]), memory
            fans: dict[torch.dtype, list[Fan]] = {}
            for item in (item for items, _ in part for item in items):
                parameter = item.parameter
                outs, left = _taken(left, (self.count, *parameter.shape), parameter.dtype)
                fan = Fan(outs.unbind(), parameter, self._operands_of(item.tensor_id))
                fans.setdefault(parameter.dtype, []).append(fan)
                self._small[item.holder, item.attribute] = group, outs, parameter.data_ptr()
            for same in fans.values():
                group.launches.extend(devices.prepared_fans(same, self._points, self._results))

    def _is_small(self, module: nn.Module, item: Owned) -> bool:
        parameter = item.parameter
        return (
            not parameter.is_meta
            and parameter.device == self._device
            and not (item.attribute == "weight" and is_product(module))
            and self.count * parameter.nbytes <= GROUP_BYTES
        )

    # ------------------------------------------------------------------ modules

    def product(
        self, module: nn.Module, tensor_id: int, bias: Callable[[], torch.Tensor] | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward of a linear layer for all copies of a batch, each with its point's weight.

        It takes a tensor that `reshape` makes [points, any, inputs]. `bias` gives the layer's bias,
        [points or 1, 1, outputs]; None if it has none.
        """
        if self._low_rank is not None:
            return self._thin_product(self._low_rank, module, tensor_id, bias)
        parameters: Any = module._parameters
        weight = _Built(self, module, tensor_id, self._points)
        count, inputs, outputs = self.count, weight.inputs, weight.outputs

        def forward(x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(count, -1, inputs)
            added = None if bias is None else bias()
            address = parameters["weight"].data_ptr()
            if address != weight.address:
                weight.bind(address)
            if weight.whole is None:
                result = weight.multiplied(flat, added)
            else:
                for launch in weight.launches:
                    launch()
                if added is None:
                    result = torch.bmm(flat, weight.whole)
                else:
                    result = torch.baddbmm(added, flat, weight.whole)
            return result.view(*x.shape[:-1], outputs)

        return forward

    def _thin_product(
        self,
        low_rank: _LowRank,
        module: nn.Module,
        tensor_id: int,
        bias: Callable[[], torch.Tensor] | None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same with low-rank directions: the base's product, and thin ones with the factors.

        The small terms come first, and the base's product is added to them, so that in low
        precision they are rounded by their own size.
        """
        parameters: Any = module._parameters
        factors = low_rank.factors[module]
        conv1d = isinstance(module, Conv1D)
        own_in, own_out, shared_in, shared_out = factors.sides(reverse=conv1d)
        inputs, outputs = own_in.shape[-1], own_out.shape[-1]
        own_in, shared_in = own_in.transpose(1, 2), shared_in.t()
        count, pairs, rank, scale = self.count, low_rank.pairs, low_rank.rank, low_rank.scale
        dtype = parameters["weight"].dtype
        own_coefficients, shared_coefficients = low_rank.coefficients(dtype)
        local = None
        if pairs and not factors.shares:
            assert low_rank.shared is not None
            local = _Built(self, module, tensor_id, low_rank.shared)

        def forward(x: torch.Tensor) -> torch.Tensor:
            self._launch("factors", factors.group)
            flat = x.reshape(count, -1, inputs)
            thin = torch.bmm(flat, own_in).mul_(own_coefficients)
            if rank > 1:
                thin.mul_(scale)
            added = None if bias is None else bias()
            if added is None:
                result = torch.bmm(thin, own_out)
            else:
                result = torch.baddbmm(added, thin, own_out)
            flat, out = flat.reshape(-1, inputs), result.view(-1, outputs)
            if pairs and local is None:
                thin = torch.mm(flat, shared_in).view(-1, pairs, rank).mul_(shared_coefficients)
                if rank > 1:
                    thin.mul_(scale)
                out.addmm_(thin.flatten(1), shared_out)
            weight = parameters["weight"]
            if local is not None:
                local.add(flat, out)
            else:
                out.addmm_(flat, weight if conv1d else weight.t())
            return result.view(*x.shape[:-1], outputs)

        return forward

    def look_up(self, weight: torch.Tensor, tensor_id: int, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` of an embedding, each copy's at its point: [*ids.shape, columns]."""
        columns = weight.shape[1]
        rows = weight.new_empty(*ids.shape, columns)
        devices.prepared_look_up(
            rows.view(self.count, -1, columns), weight, self._operands_of(tensor_id),
            ids.reshape(self.count, -1).contiguous(), self._points, self._results,
        )()  # fmt: skip
        return rows


class _Built:
    """The weight of a linear layer at some points, built in blocks of rows."""

    def __init__(
        self, prepared: PreparedPass, module: nn.Module, tensor_id: int, points: Points
    ) -> None:
        self._prepared = prepared
        self._module = module
        self._tensor_id = tensor_id
        self._points = points
        weight: Any = module._parameters["weight"]
        self._conv1d = isinstance(module, Conv1D)
        self.inputs, self.outputs = weight.shape if self._conv1d else reversed(weight.shape)
        self.address = -1
        """Where the base's weight was when the launches were prepared."""
        self.launches: list[Launch] = []
        """What builds `whole`."""
        self.whole: torch.Tensor | None = None
        """[points, inputs, outputs]; None if there are several blocks."""
        self._blocks: list[_Block] = []

    def bind(self, address: int) -> None:
        """Prepare for the base's weight at `address`: an offloaded one moves from pass to pass."""
        weight: Any = self._module._parameters["weight"]
        prepared, count = self._prepared, self._points.count
        operands = prepared._operands_of(self._tensor_id)
        rows, columns = weight.shape
        rows_max = _rows_max(self._module, count)
        self._blocks = []
        for first in range(0, rows, rows_max):
            last = min(first + rows_max, rows)
            built, _ = _taken(prepared._product, (count, last - first, columns), weight.dtype)
            fan = Fan(built.unbind(), weight[first:last], operands._replace(start=first * columns))
            launches = devices.prepared_fan(fan, self._points, prepared._results)
            self._blocks.append(_Block(first, last, launches, built))
        self.whole, self.launches = None, []
        if len(self._blocks) == 1:
            [block] = self._blocks
            self.whole = block.built if self._conv1d else block.built.transpose(1, 2)
            self.launches = block.launches
        self.address = address

    def blocks(self) -> Iterator[_Block]:
        """The blocks, each built when it comes and valid until the next."""
        weight: Any = self._module._parameters["weight"]
        if weight.data_ptr() != self.address:
            self.bind(weight.data_ptr())
        for block in self._blocks:
            for launch in block.launches:
                launch()
            yield block

    def multiplied(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ (the weight at each point) + bias: [points, any, outputs]."""
        out = x.new_empty(*x.shape[:-1], self.outputs)
        biases = [None] * len(x) if bias is None else bias.expand(len(x), 1, -1)
        for block in self.blocks():
            for copy, result, added, moved in zip(x, out, biases, block.built, strict=True):
                first, last = block.first, block.last
                if not self._conv1d:
                    part = None if added is None else added[0, first:last]
                    affine(copy, moved.t(), part, result[:, first:last])
                elif first == 0:
                    affine(copy[:, :last], moved, None if added is None else added[0], result)
                else:
                    result.addmm_(copy[:, first:last], moved)
        return out

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out += x @ (the weight at the only point), [any, inputs] to [any, outputs]."""
        for block in self.blocks():
            if self._conv1d:
                out.addmm_(x[:, block.first : block.last], block.built[0])
            else:
                out[:, block.first : block.last].addmm_(x, block.built[0].t())


@dataclass(frozen=True)
class _Factors:
    """The factors of one matrix's directions, those of the points' own pairs before the shared."""

    group: _Group
    rows: torch.Tensor
    """[seeds, rank, rows of the matrix]."""
    columns: torch.Tensor
    """[seeds, rank, columns of the matrix]."""
    points: int
    shares: bool
    """Whether the shared pairs are thin products, too."""

    def sides(
        self, *, reverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Factors by what they are multiplied with: (own inputs', own outputs', shared ...).

        The own ones are [points, rank, length], the shared ones [pairs * rank, length]. `reverse`:
        the matrix is [inputs, outputs].
        """
        outputs, inputs = (self.columns, self.rows) if reverse else (self.rows, self.columns)
        return (
            inputs[: self.points], outputs[: self.points],
            inputs[self.points :].flatten(0, 1), outputs[self.points :].flatten(0, 1),
        )  # fmt: skip


class _LowRank:
    """Factors and coefficients of low-rank directions, for a number of points and shared pairs."""

    def __init__(
        self,
        products: Mapping[nn.Module, int],
        points: Sequence[Commit],
        rank: int,
        memory: Memory,
        device: torch.device,
    ) -> None:
        """`products` are the linear layers, with the numbers of their weights."""
        parts = _split(points)
        self.rank = rank
        self.pairs = len(parts.shared.seeds)
        self.scale = float(spec.LOW_RANK_SCALE[rank])
        self.shared = Points(device, [parts.shared], LINES_MIN) if self.pairs else None
        self._count = len(points)
        self._device = device
        self._seeds = torch.zeros(self._count + self.pairs, dtype=torch.int64, device=device)
        self._coefficients: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._parts = parts
        self.factors: dict[nn.Module, _Factors] = {}
        kinds: dict[tuple[torch.dtype, bool], list[nn.Module]] = {}
        for module in products:
            weight: Any = module._parameters["weight"]
            thin = self.pairs * rank * THIN_RANKS_PER_FULL_RANK <= min(weight.shape)
            kinds.setdefault((weight.dtype, thin), []).append(module)
        for (dtype, thin), modules in kinds.items():
            self._group(modules, products, memory, dtype, shares=thin)
        self.move(points)

    def coefficients(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The own and the shared coefficients, [points, 1, 1] and [pairs, 1]; `move` sets them."""
        if dtype not in self._coefficients:
            self._coefficients[dtype] = (
                torch.zeros(self._count, 1, 1, dtype=dtype, device=self._device),
                torch.zeros(self.pairs, 1, dtype=dtype, device=self._device),
            )
            self._write_coefficients()
        return self._coefficients[dtype]

    def move(self, points: Sequence[Commit]) -> bool:
        """Take the seeds and coefficients of `points`; False if they share another number."""
        parts = _split(points)
        if len(parts.shared.seeds) != self.pairs:
            return False
        self._parts = parts
        if self.shared is not None and not self.shared.move([parts.shared]):
            return False
        seeds = torch.from_numpy(parts.own_seeds.view("int64"))
        self._seeds[: self._count].copy_(seeds, non_blocking=True)
        seeds = torch.from_numpy(parts.shared.seeds.view("int64"))
        self._seeds[self._count :].copy_(seeds, non_blocking=True)
        self._write_coefficients()
        return True

    def _write_coefficients(self) -> None:
        for own, shared in self._coefficients.values():
            own.view(-1).copy_(torch.from_numpy(self._parts.own_coefficients), non_blocking=True)
            values = torch.from_numpy(self._parts.shared.coefficients)
            shared.view(-1).copy_(values, non_blocking=True)

    def _group(
        self,
        modules: Sequence[nn.Module],
        products: Mapping[nn.Module, int],
        memory: Memory,
        dtype: torch.dtype,
        *,
        shares: bool,
    ) -> None:
        seeds = self._seeds if shares else self._seeds[: self._count]
        signs = len(seeds) * self.rank
        shapes: list[Any] = [module._parameters["weight"].shape for module in modules]  # type: ignore[union-attr]
        sizes = [signs * sum(shape) * dtype.itemsize for shape in shapes]
        of_module = dict(zip(modules, shapes, strict=True))
        for part in _parts(modules, sizes):
            count = sum(sum(of_module[module]) for module in part)
            buffer = memory.take("factors", signs * count * dtype.itemsize, self._device)
            group = _Group([])
            made: list[list[torch.Tensor]] = []
            for axis, side in enumerate((Side.ROWS, Side.COLUMNS)):
                tensors = [(products[module], of_module[module][axis]) for module in part]
                lengths = [length for _, length in tensors]
                out, buffer = _taken(buffer, (signs * sum(lengths),), dtype, padded=False)
                group.launches.append(
                    devices.prepared_signs(out, seeds, tensors, side.value, self.rank)
                )
                pieces: Any = torch.split(out, [signs * length for length in lengths])
                made.append([piece.view(len(seeds), self.rank, -1) for piece in pieces])
            for module, rows, columns in zip(part, *made, strict=True):
                self.factors[module] = _Factors(group, rows, columns, self._count, shares)


def is_product(module: nn.Module) -> bool:
    """Whether `module` multiplies by its weight and does nothing else but add a bias."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def is_elementwise(original: Callable[..., Any], owned: Sequence[Owned], width: int) -> bool:
    """Whether a module can take the parameters of several points at once: [points, 1, width].

    It can if each place of its result depends on the parameters' values at that place alone, as in
    most norms, and on the input at no other token. This tries it on made-up values. The parameters
    are all [width].
    """
    parameter = owned[0].parameter
    options: Any = {"dtype": parameter.dtype, "device": parameter.device}
    values = torch.arange(6 * width, dtype=torch.float32, device=parameter.device)
    x = (0.7 * values).sin().to(parameter.dtype).view(2, 3, width)
    moved = [
        (1.3 * values[: 2 * width] + index).cos().to(**options).view(2, width)
        for index in range(len(owned))
    ]
    try:
        with with_parameters(owned, [tensor.unsqueeze(1) for tensor in moved]):
            together = original(x)
        alone = []
        for point in range(2):
            with with_parameters(owned, [tensor[point] for tensor in moved]):
                own = torch.split(x[point : point + 1], 1, dim=1)
                tokens = [original(token) for token in own]
            alone.append(torch.cat(tokens, dim=1))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    if not isinstance(together, torch.Tensor) or together.shape != x.shape:
        return False
    tolerance = 1e-5 if parameter.dtype == torch.float32 else 2e-2
    return torch.allclose(together, torch.cat(alone), rtol=tolerance, atol=tolerance)


def affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x @ weight + bias."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _split(points: Sequence[Commit]) -> Split:
    parts = split(tuple(points))
    assert parts is not None, "points share all but their last pair"
    return parts


def _row_bytes(module: nn.Module, points: int) -> int:
    weight: Any = module._parameters["weight"]
    return points * int(weight.shape[1]) * int(weight.element_size())


def _rows_max(module: nn.Module, points: int) -> int:
    """Most rows of the weight in a block."""
    weight: Any = module._parameters["weight"]
    return max(1, min(int(weight.shape[0]), BLOCK_BYTES // _row_bytes(module, points)))


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % 64


def _taken(
    memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, padded: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the beginning of `memory` as a tensor, what is left)."""
    size_bytes = dtype.itemsize
    for length in shape:
        size_bytes *= length
    end = size_bytes + -size_bytes % 64 if padded else size_bytes
    return memory[:size_bytes].view(dtype).view(shape), memory[end:]


def _parts(items: Sequence[Item], sizes: Sequence[int]) -> Iterator[list[Item]]:
    """Cut `items` into runs whose sizes in bytes add up to `GROUP_BYTES` at most."""
    part: list[Item] = []
    used = 0
    for item, size in zip(items, sizes, strict=True):
        if part and used + size > GROUP_BYTES:
            yield part
            part, used = [], 0
        part.append(item)
        used += size
    if part:
        yield part
