"""The forward pass at several points of weight space at once, without writing to the weights.

A point is the base weights plus a commit: `W + local pairs + eps z`, say. A batch goes through the
model once, in as many copies as there are points; when a module with trained parameters runs, copy k
of its input meets the parameters of point k, which are built in scratch memory and forgotten. So every
weight is read once for all points, a model whose layers travel to the device one by one (offload)
travels once, and if the pass raises, there is nothing to restore.

- Linear layers (`nn.Linear`, GPT-2's `Conv1D`) are built and multiplied one block of rows at a time:
  scratch stays in the cache, and a vocabulary-sized matrix is never built whole.
- Embeddings build only the rows that are looked up.
- Any other module runs once for each point, on that point's copy, with all its own parameters.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedmezo_core.errors import ModelError
from fedmezo_core.zo import devices
from fedmezo_core.zo.homes import hooked_parameters, offload_hooks, put_back
from fedmezo_core.zo.manifest import Manifest, tensor_ids, trained_tensors
from fedmezo_core.zo.materialize import Commit, Rounding, materialize_fan
from fedmezo_core.zo.noise import Distribution

LINEAR_BLOCK_BYTES = 2 << 20
"""Weights of an `nn.Linear` that are built at a time, all points together: a cache's worth."""
CONV1D_BLOCK_BYTES = 8 << 20
"""The same for a `Conv1D`, each of whose blocks adds to the whole output: fewer and larger ones."""
DEVICE_BLOCK_BYTES = 32 << 20
"""The same for both where a block is built and multiplied by launches: fits into a GPU's L2 cache."""
_ALIGNMENT_BYTES: Final = 64


class InseparableError(Exception):
    """At some module, the copies of the batch cannot be told apart; the message says where and why."""


@dataclass(frozen=True, slots=True)
class _Owned:
    """A trained parameter as an attribute of the module that owns it."""

    attribute: str
    tensor_id: int


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
        self._owners = _owners(model, manifest)
        self._names = {module: name for name, module in model.named_modules()}
        self._guard: _DirectReadGuard | None = _DirectReadGuard(manifest, model)
        self._pass = _Pass((), 0, 0)

    @contextmanager
    def at(self, points: Sequence[Commit], rows: int, tokens: int) -> Iterator[None]:
        """While open, the model computes copy k of a batch at base + `points[k]`.

        `rows`, `tokens`: shape of one copy. A batch for one point is a single copy, and any model can
        compute it; with more points, a forward pass raises `InseparableError` where a module sees
        input whose copies cannot be told apart. Raises `ModelError` in the first pass if the
        architecture reads a parameter where it can't be perturbed.
        """
        with ExitStack() as stack:
            stack.enter_context(_emptied_after_errors(self._model))
            stack.enter_context(devices.finite_results())
            stack.enter_context(self._running(_Pass(tuple(points), rows, tokens)))
            for module, owned in self._owners.items():
                stack.enter_context(_computing(module, functools.partial(self._moved, owned)))
            stack.enter_context(self._guard or nullcontext())
            yield
        # The first pass has shown that no parameter is read behind its owner's back.
        self._guard = None

    @contextmanager
    def _running(self, new: _Pass) -> Iterator[None]:
        before, self._pass = self._pass, new
        try:
            yield
        finally:
            self._pass = before

    def _moved(
        self, owned: list[_Owned], module: nn.Module, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What `module` does instead of `original`, its forward."""
        names = [item.attribute for item in owned]
        plain = getattr(original, "__func__", None)
        run: Callable[..., Any]
        if isinstance(module, nn.Embedding) and names == ["weight"]:
            run = functools.partial(self._embedding, module, original, owned[0])
        elif "weight" in names and plain in (nn.Linear.forward, Conv1D.forward):
            run = functools.partial(self._product, module, owned)
        else:
            run = functools.partial(self._whole, module, original, owned)

        # wraps: callers look at the signature of a model's forward.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._scratch.frame():
                return run(*args, **kwargs)

        return forward

    # ------------------------------------------------------------------ kinds of modules

    def _product(self, module: nn.Module, owned: list[_Owned], x: torch.Tensor) -> torch.Tensor:
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
        if isinstance(module, Conv1D):
            blocks = self._blocks(weight, ids["weight"], CONV1D_BLOCK_BYTES)
            for first, last, moved in blocks:
                for (x_copy, out), bias, block in zip(copies, biases, moved, strict=True):
                    if first == 0:
                        _affine(x_copy[:, :last], block, bias, out)
                    else:
                        out.addmm_(x_copy[:, first:last], block)
        else:
            for first, last, moved in self._blocks(weight, ids["weight"], LINEAR_BLOCK_BYTES):
                for (x_copy, out), bias, block in zip(copies, biases, moved, strict=True):
                    part = None if bias is None else bias[first:last]
                    _affine(x_copy, block.t(), part, out[:, first:last])
        return result.view(*x.shape[:-1], outputs)

    def _embedding(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        item: _Owned,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """An embedding, or a subclass of it: only the rows that are looked up."""
        weight = _parameter(module, item.attribute)
        points = self._pass.points

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            with self._unguarded():
                if weight.is_cpu:
                    unique, places = torch.unique(ids, return_inverse=True)
                else:  # finding the distinct ones would wait for the device
                    unique, places = ids.reshape(-1), torch.arange(ids.numel(), device=ids.device)
                    places = places.view(ids.shape)
                count, width = len(unique), weight.shape[1]
                rows = self._scratch.take(len(points) * count * width, weight)
                rows = rows.view(len(points), count, width)
                if not weight.is_cpu:
                    devices.materialize_rows(
                        list(rows), weight, unique, points, tensor_id=item.tensor_id,
                        distribution=self._distribution,
                        stochastic=self._rounding is Rounding.STOCHASTIC,
                    )  # fmt: skip
                for place, length, first in _runs(unique.tolist()) if weight.is_cpu else ():
                    self._fan(
                        [table[place : place + length] for table in rows],
                        weight[first : first + length],
                        item.tensor_id,
                        first * width,
                    )
            if len(points) > 1:
                if ids.dim() > 1 and len(ids) == 1:
                    places = places.expand(len(points) * self._pass.rows, *places.shape[1:])
                elif self._pass.copy_length(len(ids)) is None:
                    raise self._inseparable(module, ids)
                tables = torch.arange(len(points), device=ids.device) * count
                tables = tables.repeat_interleave(len(places) // len(points))
                places = places + tables.view(-1, *[1] * (places.dim() - 1))
            return functional.embedding(places, rows.view(-1, width))

        with _EmbeddingLookups(weight, look_up):
            return original(*args, **kwargs)

    def _whole(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        owned: list[_Owned],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Any module: once for each point, with all its own parameters."""
        current = self._pass
        if len(current.points) == 1:
            moved = {
                item.attribute: self._built(_parameter(module, item.attribute), item.tensor_id)[0]
                for item in owned
            }
            with _parameters_as(module, moved):
                result = original(*args, **kwargs)
            return _detached_from(result, [tensor.untyped_storage() for tensor in moved.values()])
        seen = [tensor for tensor in _tensors((args, kwargs)) if tensor.dim()]
        shared = not any(current.copy_length(len(tensor)) for tensor in seen)
        results = []
        for index, point in enumerate(current.points):
            part = functools.partial(_part, current, index)
            with (
                self._running(_Pass((point,), current.rows, current.tokens)),
                self._scratch.frame(),
            ):
                results.append(self._whole(module, original, owned, *part(args), **part(kwargs)))
        try:
            return _joined(results, current, shared)
        except InseparableError:
            raise self._inseparable(module, seen[0] if seen else torch.empty(())) from None

    # ------------------------------------------------------------------ building weights

    def _blocks(
        self, weight: torch.Tensor, tensor_id: int, bytes_max: int
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Row ranges of `weight` and its rows at every point; each is overwritten by the next."""
        count, width = weight.shape
        points = len(self._pass.points)
        if not weight.is_cpu:
            bytes_max = DEVICE_BLOCK_BYTES
        rows_max = max(1, min(count, bytes_max // (points * width * weight.element_size())))
        scratch = [self._scratch.take(rows_max * width, weight) for _ in range(points)]
        for first in range(0, count, rows_max):
            last = min(first + rows_max, count)
            blocks = [buffer[: (last - first) * width].view(-1, width) for buffer in scratch]
            with self._unguarded():
                self._fan(blocks, weight[first:last], tensor_id, first * width)
            yield first, last, blocks

    def _built(self, parameter: torch.Tensor, tensor_id: int) -> list[torch.Tensor]:
        """A parameter at every point, in scratch."""
        outs = [
            self._scratch.take(parameter.numel(), parameter).view(parameter.shape)
            for _ in self._pass.points
        ]
        with self._unguarded():
            self._fan(outs, parameter, tensor_id, 0)
        return outs

    def _fan(
        self, outs: Sequence[torch.Tensor], base: torch.Tensor, tensor_id: int, start: int
    ) -> None:
        materialize_fan(
            outs,
            base,
            self._pass.points,
            tensor_id=tensor_id,
            start=start,
            distribution=self._distribution,
            rounding=self._rounding,
            threads=self._threads,
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


class _DirectReadGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types
    """Refuses an architecture that reads a trained parameter outside its owner's forward.

    Such a read would see the weights unperturbed, and the measurement would be silently wrong.
    """

    def __init__(self, manifest: Manifest, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paused = False
        self._model = model
        self._names = tensor_ids(model, manifest).keys()
        self._visiting: dict[str, tuple[int, int]] = {}
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, entry.name)
            for entry, tensor in zip(manifest, trained_tensors(model, manifest), strict=True)
        )
        self._starts = [span[0] for span in spans]
        self._spans = spans

    def __enter__(self) -> Self:
        for prefix, module in self._model.named_modules():
            for hook in offload_hooks(module):
                hook.pre_forward = functools.partial(self._arriving, prefix, hook.pre_forward, hook)
                hook.post_forward = functools.partial(
                    self._leaving, prefix, hook.post_forward, hook
                )
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for module in self._model.modules():
            for hook in offload_hooks(module):
                del hook.pre_forward, hook.post_forward
        self._visiting.clear()

    def _arriving(
        self,
        prefix: str,
        original: Callable[..., Any],
        hook: Any,
        module: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Offloaded parameters are copied to the device: now they can be read there."""
        with self.aside():
            result = original(module, *args, **kwargs)
        for name, _, parameter in hooked_parameters(prefix, module, hook):
            if name in self._names:
                first = parameter.data_ptr()
                self._visiting[name] = first, first + parameter.nbytes
        return result

    def _leaving(
        self, prefix: str, original: Callable[..., Any], hook: Any, module: nn.Module, output: Any
    ) -> Any:
        for name, _, _ in hooked_parameters(prefix, module, hook):
            self._visiting.pop(name, None)
        with self.aside():
            return original(module, output)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, reads are no concern of the guard's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._paused:
            for value in _tensors((args, tuple(kwargs.values()))):
                self._check(value, func)
        return func(*args, **kwargs)

    def _check(self, tensor: torch.Tensor, func: Any) -> None:
        address = tensor.data_ptr()
        index = bisect_right(self._starts, address) - 1
        read = [self._spans[index][2]] if index >= 0 and address < self._spans[index][1] else []
        read += [name for name, (first, end) in self._visiting.items() if first <= address < end]
        if read:
            raise ModelError(
                f"This architecture reads parameter {read[0]} outside the module that "
                f"owns it ({func}), where it can't be perturbed; train a LoRA adapter on other "
                "modules, or use another model."
            )


def _owners(model: nn.Module, manifest: Manifest) -> dict[nn.Module, list[_Owned]]:
    """Modules with trained parameters of their own, and which; attributes sorted by name."""
    trained_tensors(model, manifest)
    ids = tensor_ids(model, manifest)
    owners: dict[nn.Module, list[_Owned]] = {}
    for name, module in model.named_modules():
        owned = [
            _Owned(attribute, ids[path])
            for attribute in sorted(module._parameters)
            if (path := f"{name}.{attribute}" if name else attribute) in ids
        ]
        if not owned:
            continue
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ModelError(
                f"Embedding {name} renormalises its weights as it is used (max_norm), which breaks "
                "replay; use a model without max_norm."
            )
        owners[module] = owned
    return owners


@contextmanager
def _emptied_after_errors(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        put_back(model)
        raise


@contextmanager
def _computing(
    module: nn.Module, make: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While open, `module` runs `make(module, its forward)`, inside the hook that `accelerate` may
    have put around its forward: only there are offloaded weights at hand."""
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = make(module, getattr(module, name))
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def _parameters_as(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` see `tensors` in place of its own parameters, which stay untouched."""
    parameters: dict[str, Any] = module._parameters
    before = {name: parameters[name] for name in tensors}
    parameters.update(tensors)
    try:
        yield
    finally:
        parameters.update(before)


def _parameter(module: nn.Module, attribute: str) -> torch.Tensor:
    """The module's own parameter as it is now: offloaded weights are on the device only for a while."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def _affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x @ weight + bias."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


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
