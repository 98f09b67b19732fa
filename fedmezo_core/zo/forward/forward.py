"""The forward pass at several points of weight space at once, without writing to the weights.

A point is the base weights plus a commit: `W + local pairs + eps z`, say. A batch goes through the
model once, in as many copies as there are points; when a module with trained parameters runs, copy k
of its input meets the parameters of point k, which are built in scratch memory and forgotten. So every
weight is read once for all points, a model whose layers travel to the device one by one (offload)
travels once, and if the pass raises, there is nothing to restore.

- Linear layers (`nn.Linear`, GPT-2's `Conv1D`) are built and multiplied one block of rows at a time:
  scratch stays in the cache, and a vocabulary-sized matrix is never built whole.
- With low-rank directions, a linear layer builds no weights: all copies of the batch are multiplied by
  the base at once, and by the directions' factors.
- Embeddings build only the rows that are looked up.
- Experts of a mixture run once for each point, and build only the experts that tokens go to.
- Any other module runs once for each point, on that point's copy, with all its own parameters.

Until the first module with trained parameters runs, all copies are alike: whatever is frozen and runs
before it (an embedding, a decoder layer) computes the first copy alone, and its result is repeated.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.forward.experts import NotSlicedError, Slices, one_by_one
from fedmezo_core.zo.forward.guard import DirectReadError, DirectReadGuard, tensors_in
from fedmezo_core.zo.forward.low_rank import Side, Split, Thin, split
from fedmezo_core.zo.materialize import materialize_fan
from fedmezo_core.zo.model.manifest import Manifest
from fedmezo_core.zo.model.modules import (
    Owned,
    computing,
    computing_elements,
    emptied_after_errors,
    frozen_modules,
    owners_of,
)
from fedmezo_core.zo.noise import Distribution, Operands, Rounding

log = logging.getLogger("fedmezo.forward")

LINEAR_BLOCK_BYTES = 2 << 20
"""Weights of an `nn.Linear` that are built at a time, all points together: a cache's worth."""
CONV1D_BLOCK_BYTES = 4 << 20
"""The same for a `Conv1D`, each of whose blocks adds to the whole output: fewer and larger ones."""
DEVICE_BLOCK_BYTES = 32 << 20
"""The same for both where a block is built and multiplied by launches: fits into a GPU's L2 cache."""
THIN_RANKS_PER_FULL_RANK: Final = 8
"""Low-rank local pairs are thin products until their ranks add up to this part of the matrix's."""
_ALIGNMENT_BYTES: Final = 64


class InseparableError(Exception):
    """At some module, the copies of the batch cannot be told apart; the message says where and why."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the running pass computes: the points, and the shape of one copy of the batch."""

    points: tuple[Commit, ...]
    rows: int
    tokens: int

    def copy_length(self, length: int) -> int | None:
        """Length along dimension 0 of one copy's part, None where the dimension isn't the batch's."""
        copies = len(self.points)
        if length == copies * self.rows:
            return self.rows
        if length == copies * self.rows * self.tokens:
            return self.rows * self.tokens
        return None


class Forward:
    """Lets a model compute at points near its weights."""

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        *,
        distribution: Distribution,
        rounding: Rounding,
        threads: int | None = None,
    ) -> None:
        """`threads` is how many build weights (default: as `materialize` chooses).

        Raises `MismatchError` if the model isn't the manifest's, `ModelError` for an embedding that
        renormalises its own weights.
        """
        self._distribution = distribution
        self._rounding = rounding
        self._threads = threads
        self._scratch = _Scratch()
        self._model = model
        self._owners = owners_of(model, manifest)
        self._parameter_names = [entry.name for entry in manifest]
        self._names = {module: name for name, module in model.named_modules()}
        self._guard: DirectReadGuard | None = DirectReadGuard(manifest, model)
        self._pass = _Pass((), 0, 0)
        self._alike = False
        """Whether all copies in the running pass are the same still."""
        self._frozen = frozen_modules(model, self._owners)
        self._computed_once: dict[nn.Module, None] = {}
        """Those of `_frozen` that ran while all copies were alike, in the first pass that had several."""
        self._prefix_share: float | None = None
        self._remembered: list[tuple[nn.Module, Any]] | None = None
        """What frozen modules gave for one copy, in the order of their calls in a pass; None: not kept."""
        self._calls = 0
        self._unsliced: set[nn.Module] = set()
        self._told: set[type[nn.Module]] = set()

    @contextmanager
    def at(self, points: Sequence[Commit], rows: int, tokens: int) -> Iterator[None]:
        """While open, the model computes copy k of a batch at base + `points[k]`.

        A point is the weights plus pairs: none has a decay, or starts from the base. `rows`,
        `tokens`: shape of one copy. A batch for one point is a single copy, and any model can compute
        it; with more points, a forward pass raises `InseparableError` where a module sees input whose
        copies cannot be told apart. Raises `DirectReadError` in a first pass if the architecture
        reads a parameter outside its owner (see `build_further_out`).
        """
        assert not any(point.decay != 1.0 or point.from_base for point in points)
        with ExitStack() as stack:
            stack.enter_context(emptied_after_errors(self._model))
            stack.enter_context(devices.finite_results())
            stack.enter_context(self._running(_Pass(tuple(points), rows, tokens)))
            for module, owned in self._owners.items():
                stack.enter_context(computing(module, functools.partial(self._moved, owned)))
            self._alike, self._calls = len(points) > 1, 0
            for module in self._frozen if self._alike else ():
                stack.enter_context(computing(module, self._once))
            stack.enter_context(self._guard or nullcontext())
            yield
        if len(points) > 1 and self._prefix_share is None:
            # No others are looked at again: which run first is the same in every pass.
            self._frozen = list(self._computed_once)
            whole, prefix = computing_elements([self._model]), computing_elements(self._frozen)
            self._prefix_share = prefix / max(1, whole)
        # The first pass has shown that no parameter is read behind its owner's back.
        self._guard = None

    @property
    def prefix_share(self) -> float:
        """The part of the model that computes one copy for all; 0 before the first pass with several.

        Measured in parameters, without those that are looked up.
        """
        return self._prefix_share or 0.0

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While open, all passes are of one batch: what comes before the trained part is computed once.

        It is kept for one copy, so that passes can be small and still not repeat that work.
        """
        self._remembered = []
        try:
            yield
        finally:
            self._remembered = None

    def compute_every_copy(self) -> bool:
        """Let frozen modules compute all copies from now on; False if they did already."""
        did, self._frozen, self._prefix_share = bool(self._frozen), [], 0.0
        return did

    def build_further_out(self, error: DirectReadError) -> None:
        """Let the next pass build what was read directly where the module around its owner runs.

        Raises `error` if there is no such module within the model, the parameter has several owners, or
        it is offloaded (and thus on the device only while its owner runs).
        """
        owning = [
            (module, owned)
            for module, owned in self._owners.items()
            if any(self._parameter_names[item.tensor_id] == error.name for item in owned)
        ]
        path = self._names[owning[0][0]] if len(owning) == 1 else ""
        parent: nn.Module = nn.ModuleList()
        while path and isinstance(parent, nn.ModuleList | nn.ModuleDict):
            path = path.rpartition(".")[0]
            parent = self._model.get_submodule(path)
        if not path or any(item.parameter.is_meta for item in owning[0][1]):
            raise error
        self._owners.setdefault(parent, []).extend(self._owners.pop(owning[0][0]))
        self._tell(parent, f"it reads {error.name} directly")

    @contextmanager
    def _running(self, new: _Pass) -> Iterator[None]:
        before, self._pass = self._pass, new
        try:
            yield
        finally:
            self._pass = before

    def _moved(
        self, owned: list[Owned], module: nn.Module, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What `module` does instead of `original`, its forward."""
        names = [item.attribute for item in owned if item.holder is module]
        plain = getattr(original, "__func__", None)
        run: Callable[..., Any]
        if len(names) < len(owned):
            run = functools.partial(self._whole, module, original, owned)
        elif isinstance(module, nn.Embedding) and names == ["weight"]:
            run = functools.partial(self._embedding, module, original, owned[0])
        elif "weight" in names and plain in (nn.Linear.forward, Conv1D.forward):
            run = functools.partial(self._product, module, owned)
        elif (reference := one_by_one(module, original)) is not None:
            run = functools.partial(self._experts, module, original, reference, owned)
        else:
            self._tell_if_large(module, owned)
            run = functools.partial(self._whole, module, original, owned)

        # wraps: callers look at the signature of a model's forward.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._alike = False
            with self._scratch.frame():
                return run(*args, **kwargs)

        return forward

    def _once(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """What a frozen `module` does: while all copies are alike, it computes the first one."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            current = self._pass
            divides = (
                self._alike and _is_plain((args, kwargs)) and _divides(current, (args, kwargs))
            )
            if not divides:
                return original(*args, **kwargs)
            part = functools.partial(_part, current, 0)
            try:
                known = self._remembered or []
                if self._calls < len(known) and known[self._calls][0] is module:
                    single = known[self._calls][1]
                else:
                    single = original(*part(args), **part(kwargs))
                    if self._remembered is not None:
                        del self._remembered[self._calls :]
                        self._remembered.append((module, single))
                self._calls += 1
                result = _repeated(single, current)
            except InseparableError:
                self._frozen = [other for other in self._frozen if other is not module]
                return original(*args, **kwargs)
            self._computed_once[module] = None
            return result

        return forward

    # ------------------------------------------------------------------ kinds of modules

    def _product(self, module: nn.Module, owned: list[Owned], x: torch.Tensor) -> torch.Tensor:
        """A matrix product with the weight, which is [outputs, inputs], or for `Conv1D` the reverse."""
        parameters: dict[str, Any] = module._parameters
        ids = {item.attribute: item.tensor_id for item in owned}
        weight = parameters["weight"]
        inputs, outputs = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
        points = self._pass.points
        if len(points) > 1 and self._pass.copy_length(x.shape[0]) is None:
            raise self._inseparable(module, x)
        flat = x.reshape(-1, inputs)
        result = flat.new_empty(len(flat), outputs)
        copies = list(zip(flat.chunk(len(points)), result.chunk(len(points)), strict=True))
        biases: list[Any] = [parameters["bias"]] * len(points)
        if "bias" in ids:
            biases = self._built(parameters["bias"], ids["bias"])
        parts = split(points) if self._distribution.rank else None
        if parts is not None:
            self._low_rank_product(module, ids["weight"], parts, flat, biases, result)
        elif isinstance(module, Conv1D):
            for first, last, moved in self._blocks(module, ids["weight"], points):
                for (x_copy, out), bias, block in zip(copies, biases, moved, strict=True):
                    if first == 0:
                        _affine(x_copy[:, :last], block, bias, out)
                    else:
                        out.addmm_(x_copy[:, first:last], block)
        else:
            for first, last, moved in self._blocks(module, ids["weight"], points):
                for (x_copy, out), bias, block in zip(copies, biases, moved, strict=True):
                    part = None if bias is None else bias[first:last]
                    _affine(x_copy, block.t(), part, out[:, first:last])
        return result.view(*x.shape[:-1], outputs)

    def _low_rank_product(
        self,
        module: nn.Module,
        tensor_id: int,
        parts: Split,
        x: torch.Tensor,
        biases: Sequence[torch.Tensor | None],
        out: torch.Tensor,
    ) -> None:
        """out = x @ (the weight at each point) + biases, without building weights.

        The small terms come first and the base's product is added to them, so that in low precision
        they are rounded for what they are.
        """
        weight: Any = module._parameters["weight"]
        sides = [(Side.ROWS, weight.shape[0]), (Side.COLUMNS, weight.shape[1])]
        outputs, inputs = reversed(sides) if isinstance(module, Conv1D) else sides
        thin = Thin(tensor_id, self._distribution.rank, inputs, outputs)
        copies = len(parts.own_seeds)
        given = [bias for bias in biases if bias is not None]
        stacked = torch.stack(given).unsqueeze(1) if given else None
        thin.set_own(
            parts, x.view(copies, -1, x.shape[1]), stacked, out.view(copies, -1, out.shape[1])
        )
        pairs = len(parts.shared.seeds)
        if pairs * thin.rank * THIN_RANKS_PER_FULL_RANK > min(weight.shape):
            blocks = self._blocks(module, tensor_id, [parts.shared])
        else:
            if pairs:
                thin.add_shared(parts, x, out)
            blocks = iter([(0, len(weight), [weight])])
        with self._unguarded():
            for first, last, (block,) in blocks:
                if isinstance(module, Conv1D):
                    out.addmm_(x[:, first:last], block)
                else:
                    out[:, first:last].addmm_(x, block.t())

    def _embedding(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        item: Owned,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """An embedding, or a subclass of it: only the rows that are looked up."""
        weight = item.parameter
        points = self._pass.points

        def of_all_copies(ids: torch.Tensor) -> torch.Tensor:
            """`ids` (or what stands in their places), repeated where one row is meant for all."""
            if len(points) > 1:
                if ids.dim() > 1 and len(ids) == 1:
                    return ids.expand(len(points) * self._pass.rows, *ids.shape[1:])
                if self._pass.copy_length(len(ids)) is None:
                    raise self._inseparable(module, ids)
            return ids

        def look_up_on_device(ids: torch.Tensor) -> torch.Tensor:
            """Each copy's rows at its own point: finding the distinct ones would wait for the device."""
            ids = of_all_copies(ids)
            with self._unguarded():
                rows = weight.new_empty(*ids.shape, weight.shape[1])
                parts = zip(rows.chunk(len(points)), ids.chunk(len(points)), points, strict=True)
                for out, part, point in parts:
                    operands = self._operands(item.tensor_id)
                    devices.apply_fan([out], weight, [point], operands, part.reshape(-1))
            return rows

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            with self._unguarded():
                unique, places = torch.unique(ids, return_inverse=True)
                count, width = len(unique), weight.shape[1]
                rows = self._scratch.take(len(points) * count * width, weight)
                rows = rows.view(len(points), count, width)
                for place, length, first in _runs(unique.tolist()):
                    self._fan(
                        [table[place : place + length] for table in rows],
                        weight[first : first + length],
                        item.tensor_id,
                        first * width,
                        points,
                    )
            if len(points) > 1:
                places = of_all_copies(places)
                tables = torch.arange(len(points), device=ids.device) * count
                tables = tables.repeat_interleave(len(places) // len(points))
                places = places + tables.view(-1, *[1] * (places.dim() - 1))
            return functional.embedding(places, rows.view(-1, width))

        away = devices.elsewhere(weight.device)
        with _EmbeddingLookups(weight, look_up_on_device if away else look_up):
            return original(*args, **kwargs)

    def _whole(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        owned: list[Owned],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Any module: once for each point, with all its own parameters."""

        def run(*args: Any, **kwargs: Any) -> Any:
            moved = [self._built(item.parameter, item.tensor_id)[0] for item in owned]
            with _parameters_as(owned, moved):
                result = original(*args, **kwargs)
            return _detached_from(result, [tensor.untyped_storage() for tensor in moved])

        return self._point_by_point(module, run, *args, **kwargs)

    def _experts(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        reference: Callable[..., Any],
        owned: list[Owned],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A mixture's experts: once for each point, with those that tokens go to, one at a time."""

        def build(parameter: torch.Tensor, tensor_id: int, index: int) -> torch.Tensor:
            with self._unguarded():
                part = parameter[index]
                # Memory of its own, not scratch: who knows how long a module keeps it.
                built = torch.empty_like(part)
                self._fan([built], part, tensor_id, index * part.numel(), self._pass.points)
            return built

        def run(*args: Any, **kwargs: Any) -> Any:
            moved = [
                Slices(item.parameter, functools.partial(build, item.parameter, item.tensor_id))
                if item.parameter.dim() > 2
                else self._built(item.parameter, item.tensor_id)[0]
                for item in owned
            ]
            with _parameters_as(owned, moved):
                return reference(*args, **kwargs)

        if module not in self._unsliced:
            try:
                return self._point_by_point(module, run, *args, **kwargs)
            except NotSlicedError as error:
                self._unsliced.add(module)
                self._tell(module, f"it {error}")
        return self._whole(module, original, owned, *args, **kwargs)

    def _point_by_point(
        self, module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The results of `run` at each point alone, on its copy's part of the arguments, as one."""
        current = self._pass
        if len(current.points) == 1:
            return run(*args, **kwargs)
        seen = [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim()]
        shared = not any(current.copy_length(len(tensor)) for tensor in seen)
        results = []
        for index, point in enumerate(current.points):
            part = functools.partial(_part, current, index)
            with (
                self._running(_Pass((point,), current.rows, current.tokens)),
                self._scratch.frame(),
            ):
                results.append(run(*part(args), **part(kwargs)))
        try:
            return _joined(results, current, shared)
        except InseparableError:
            raise self._inseparable(module, seen[0] if seen else torch.empty(())) from None

    # ------------------------------------------------------------------ building weights

    def _blocks(
        self, module: nn.Module, tensor_id: int, points: Sequence[Commit]
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Row ranges of `module`'s weight and its rows at every point; each is overwritten by the next."""
        weight: Any = module._parameters["weight"]
        count, width = weight.shape
        row_bytes = len(points) * width * weight.element_size()
        bytes_max = CONV1D_BLOCK_BYTES if isinstance(module, Conv1D) else LINEAR_BLOCK_BYTES
        if devices.elsewhere(weight.device):
            bytes_max = DEVICE_BLOCK_BYTES
        rows_max = max(1, min(count, bytes_max // row_bytes))
        scratch = [self._scratch.take(rows_max * width, weight) for _ in points]
        for first in range(0, count, rows_max):
            last = min(first + rows_max, count)
            blocks = [buffer[: (last - first) * width].view(-1, width) for buffer in scratch]
            with self._unguarded():
                self._fan(blocks, weight[first:last], tensor_id, first * width, points)
            yield first, last, blocks

    def _built(self, parameter: torch.Tensor, tensor_id: int) -> list[torch.Tensor]:
        """A parameter at every point, in scratch."""
        outs = [
            self._scratch.take(parameter.numel(), parameter).view(parameter.shape)
            for _ in self._pass.points
        ]
        with self._unguarded():
            self._fan(outs, parameter, tensor_id, 0, self._pass.points)
        return outs

    def _fan(
        self,
        outs: Sequence[torch.Tensor],
        base: torch.Tensor,
        tensor_id: int,
        start: int,
        points: Sequence[Commit],
    ) -> None:
        operands = self._operands(tensor_id, start)
        materialize_fan(outs, base, points, operands, threads=self._threads)

    def _operands(self, tensor_id: int, start: int = 0) -> Operands:
        name = self._parameter_names[tensor_id]
        return Operands(tensor_id, self._distribution, self._rounding, start, None, name)

    def _tell_if_large(self, module: nn.Module, owned: Sequence[Owned]) -> None:
        for item in owned:
            size_bytes = item.parameter.nbytes
            if size_bytes > LINEAR_BLOCK_BYTES:
                self._tell(module, f"{item.attribute} has {size_bytes} bytes")
                return

    def _tell(self, module: nn.Module, why: str) -> None:
        """Warn, once for each kind of module, that it is perturbed in the portable way."""
        kind = type(module)
        if kind not in self._told:
            self._told.add(kind)
            log.warning(
                "%s (%s) is not perturbed block by block but whole, once for each point, which takes "
                "time and memory: %s.",
                self._names[module],
                kind.__name__,
                why,
            )

    def _unguarded(self) -> AbstractContextManager[None]:
        """Reading the base weights is our own doing here."""
        return nullcontext() if self._guard is None else self._guard.aside()

    def _inseparable(self, module: nn.Module, seen: torch.Tensor) -> InseparableError:
        current = self._pass
        return InseparableError(
            f"{self._names[module]} ({type(module).__name__}) sees input of shape {list(seen.shape)}, whose first "
            f"dimension doesn't divide into {len(current.points)} copies of {current.rows} rows of "
            f"{current.tokens} tokens"
        )


# ---------------------------------------------------------------------- parts


class _Scratch:
    """Reusable memory, handed out as a stack: a module may own parameters and contain others."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._used_bytes: dict[torch.device, int] = {}

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What is taken inside is given back at the end."""
        used = dict(self._used_bytes)
        try:
            yield
        finally:
            self._used_bytes = used

    def take(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """`count` aligned elements with the dtype and device of `like`: [count], not initialised."""
        first = self._used_bytes.get(like.device, 0)
        size = count * like.element_size()
        last = first + size + -size % _ALIGNMENT_BYTES
        buffer = self._buffers.get(like.device)
        if buffer is None or len(buffer) < last:
            # Tensors of outer frames keep the smaller buffer alive until they are done with it.
            buffer = torch.empty(last, dtype=torch.uint8, device=like.device)
            self._buffers[like.device] = buffer
        self._used_bytes[like.device] = last
        return buffer[first : first + size].view(like.dtype)


class _EmbeddingLookups(TorchFunctionMode):
    """Answers `functional.embedding` on one weight; all else runs as it is.

    Subclasses of `nn.Embedding` shift positions or scale the result around that call, so this works
    for them too.
    """

    def __init__(
        self, weight: torch.Tensor, look_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._weight = weight
        self._look_up = look_up

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            ids = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.data_ptr() == self._weight.data_ptr():
                return self._look_up(ids)
        return func(*args, **kwargs)


@contextmanager
def _parameters_as(owned: Sequence[Owned], tensors: Sequence[Any]) -> Iterator[None]:
    """Let modules see `tensors` (or what stands for them) in place of parameters, which stay untouched."""
    before = [item.parameter for item in owned]

    def put(values: Sequence[Any]) -> None:
        for item, value in zip(owned, values, strict=True):
            parameters: dict[str, Any] = item.holder._parameters
            parameters[item.attribute] = value

    put(tensors)
    try:
        yield
    finally:
        put(before)


def _affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x @ weight + bias."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _part(current: _Pass, index: int, value: Any) -> Any:
    """What copy `index` of the batch has of a module's arguments; the rest is common to all copies."""
    if isinstance(value, torch.Tensor):
        length = current.copy_length(len(value)) if value.dim() else None
        return value if length is None else value[index * length : (index + 1) * length]
    if isinstance(value, Mapping):
        return {key: _part(current, index, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_part(current, index, item) for item in value)
    return value


def _joined(results: Sequence[Any], current: _Pass, shared: bool) -> Any:
    """One result for the whole batch out of those of its copies.

    `shared`: the module saw nothing of the batch (positions, say), so that a result of length 1 is
    meant for every row.
    """
    first = results[0]
    if isinstance(first, torch.Tensor) and first.dim():
        whole = current.copy_length(len(first) * len(results))
        if shared and len(first) == 1:
            return torch.cat([result.expand(current.rows, *first.shape[1:]) for result in results])
        if whole is not None and not shared:
            return torch.cat(list(results))
    elif isinstance(first, Mapping):
        joined = {key: _joined([r[key] for r in results], current, shared) for key in first}
        return type(first)(**joined)  # a ModelOutput or a dict
    elif isinstance(first, (list, tuple)) and not hasattr(first, "_fields"):
        return type(first)(_joined(part, current, shared) for part in zip(*results, strict=True))
    elif first is None:
        return None
    raise InseparableError


def _is_plain(arguments: Any) -> bool:
    """Whether nothing in a module's arguments can keep what it computes for later, as a cache does."""
    if isinstance(arguments, Mapping):
        return all(map(_is_plain, arguments.values()))
    if isinstance(arguments, (list, tuple)):
        return all(map(_is_plain, arguments))
    return arguments is None or isinstance(
        arguments, torch.Tensor | int | float | str | torch.dtype | torch.device
    )


def _divides(current: _Pass, arguments: Any) -> bool:
    """Whether copies can be told apart in a module's arguments, as far as one can see."""
    seen = [tensor for tensor in tensors_in(arguments) if tensor.dim()]
    whole = (
        tensor.dim() > 2
        and tensor.is_floating_point()
        and len(tensor) > 1
        and current.copy_length(len(tensor)) is None
        for tensor in seen
    )
    return any(current.copy_length(len(tensor)) for tensor in seen) and not any(whole)


def _repeated(result: Any, current: _Pass) -> Any:
    """A module's result on one copy, for all copies; what is of length 1 is meant for every row."""
    if isinstance(result, torch.Tensor) and result.dim():
        if len(result) in (current.rows, current.rows * current.tokens):
            if not any(result.stride()):
                # One number everywhere, as `RowStates` gives it, stays one number.
                return result[:1].expand(len(current.points) * len(result), *result.shape[1:])
            return result.repeat(len(current.points), *[1] * (result.dim() - 1))
        if len(result) == 1:
            return result
    elif isinstance(result, Mapping):
        return type(result)(**{key: _repeated(item, current) for key, item in result.items()})
    elif isinstance(result, (list, tuple)) and not hasattr(result, "_fields"):
        return type(result)(_repeated(item, current) for item in result)
    elif result is None:
        return None
    raise InseparableError


def _detached_from(result: Any, storages: Sequence[torch.UntypedStorage]) -> Any:
    """Copy what a module returns of its own parameters: the scratch under it is used again."""
    if isinstance(result, torch.Tensor):
        address = result.untyped_storage().data_ptr()
        shared = any(storage.data_ptr() == address for storage in storages)
        return result.clone() if shared else result
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return tuple(_detached_from(item, storages) for item in result)
    if isinstance(result, list):
        return [_detached_from(item, storages) for item in result]
    return result


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut ascending `numbers` into runs of consecutive ones: (place, length, first number)."""
    place = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield place, index - place, numbers[place]
            place = index
