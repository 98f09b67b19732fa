"""The forward pass at several points of weight space at once, without writing to the weights.

A point is the base weights plus a commit, for example `W + local pairs + eps z`. A batch goes
through the model once, in as many copies as there are points. When a module with trained parameters
runs, copy k of its input meets the parameters of point k, which are built in scratch memory and
then forgotten. So every weight is read once for all points, an offloaded model is copied to the
device once, and if the pass raises, there is nothing to restore.

- Linear layers (`nn.Linear`, GPT-2's `Conv1D`) are built and multiplied one block of rows at a
  time. So scratch memory stays in the cache, and a vocabulary-sized matrix is never built whole.
- With low-rank directions, a linear layer builds no weights: all copies of the batch are multiplied
  by the base at once, and by the factors of the directions.
- Embeddings build only the rows that are looked up.
- Experts of a mixture run once for each point, and build only the experts that tokens go to.
- Any other module runs once for each point, on that point's copy, with all its own parameters.
- Frozen modules that run before anything trained compute one copy for all points (`FrozenPart`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmezo_core.zo import devices
from fedmezo_core.zo.commits import Commit, common_pairs
from fedmezo_core.zo.forward.copies import Copies, DistinctRows, InseparableError, tensors_in
from fedmezo_core.zo.forward.embeddings import EmbeddingLookups, consecutive
from fedmezo_core.zo.forward.experts import NotSlicedError, Slices, one_by_one
from fedmezo_core.zo.forward.frozen import FrozenPart
from fedmezo_core.zo.forward.guard import DirectReadError, DirectReadGuard
from fedmezo_core.zo.forward.low_rank import (
    THIN_RANKS_PER_FULL_RANK,
    Side,
    Split,
    Thin,
    split,
)
from fedmezo_core.zo.forward.prepared import Memory, PreparedPass, affine, is_elementwise
from fedmezo_core.zo.forward.scratch import Scratch, detached_from
from fedmezo_core.zo.materialize import materialize_fan
from fedmezo_core.zo.model.modules import (
    Owned,
    Replacement,
    emptied_after_errors,
    owners_of,
    replaced,
    with_parameters,
)
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.plain.entries import Manifest

log = logging.getLogger("fedmezo.forward")

LINEAR_BLOCK_BYTES = 2 << 20
"""Weights of an `nn.Linear` that are built at a time, for all points together; fits a cache."""
CONV1D_BLOCK_BYTES = 4 << 20
"""Weights of a `Conv1D` that are built at a time; larger, since each block adds to all outputs."""
PREPARED_MAX: Final = 16
"""Numbers of points (and of shared low-rank pairs) whose launches stay prepared."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the running pass computes: the points, and one copy of the batch for each."""

    points: tuple[Commit, ...]
    copies: Copies
    index: int = 0
    """The first point's index among those of the whole pass."""


class Forward:
    """Lets a model compute at several points of weight space in one pass."""

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        *,
        distribution: Distribution,
        rounding: Rounding,
        threads: int | None = None,
    ) -> None:
        """Prepare `model`, whose trained tensors `manifest` lists.

        `threads` build the weights (default: as `materialize` chooses). Raises `MismatchError` if
        the manifest is of another model, `ModelError` for an embedding that renormalises its
        weights.
        """
        self._distribution = distribution
        self._rounding = rounding
        self._threads = threads
        self._scratch = Scratch()
        self._model = model
        self._owners = owners_of(model, manifest)
        self._parameter_names = [entry.name for entry in manifest]
        self._names = {module: name for name, module in model.named_modules()}
        self._guard: DirectReadGuard | None = DirectReadGuard(manifest, model)
        self._pass = _Pass((), Copies(0, 0, 0))
        self.frozen = FrozenPart(model, self._owners)
        """What passes compute for one copy of the batch, or not at all."""
        # "cuda" becomes "cuda:0", as the devices of tensors are called.
        self._device = torch.empty(0, device=execution_device(model)).device
        self._results = devices.Results(len(self._parameter_names))
        self._memory = Memory()
        self._prepared: dict[tuple[int, int], PreparedPass] = {}
        """By the numbers of points, and of low-rank pairs that they share; the last used last."""
        self._open: PreparedPass | None = None
        self._forwards: dict[PreparedPass | None, list[Replacement]] = {}
        self._unsliced: set[nn.Module] = set()
        self._warned: set[type[nn.Module]] = set()

    @contextmanager
    def at(
        self,
        points: Sequence[Commit],
        rows: int,
        tokens: int,
        distinct: DistinctRows | None = None,
    ) -> Iterator[None]:
        """While open, the model computes copy k of a batch at base + `points[k]`.

        A point has no decay, and does not start from the base. `rows` and `tokens` are the shape of
        one copy. `distinct` tells which rows are alike if the copies are not. With several points,
        a forward pass raises `InseparableError` where a module sees input whose copies cannot be
        told apart. A first pass raises `DirectReadError` if the architecture reads a parameter
        outside its owner (see `build_further_out`).
        """
        assert not any(point.decay != 1.0 or point.from_base for point in points)
        copies = Copies(len(points), rows, tokens)
        self._open = prepared = None
        with ExitStack() as stack:
            stack.enter_context(emptied_after_errors(self._model))
            if devices.elsewhere(self._device):
                stack.enter_context(devices.on(self._device))
                stack.enter_context(devices.finite_results(self._results))
                self._open = prepared = self._prepared_for(points)
            stack.enter_context(self._running(_Pass(tuple(points), copies)))
            stack.enter_context(replaced(self._replacements(prepared)))
            stack.enter_context(self.frozen.left_out(distinct or copies))
            stack.enter_context(self._guard or nullcontext())
            yield
        # The first pass has shown that no parameter is read outside its owner.
        self._guard = None

    @property
    def prepared(self) -> PreparedPass | None:
        """The launches of the pass that is open; None on a CPU."""
        return self._open

    def restart(self) -> None:
        """Let the pass that is open be computed once more from its beginning."""
        self.frozen.restart()
        if self._open is not None:
            self._open.restart()

    def build_further_out(self, error: DirectReadError) -> None:
        """Build the parameter that was read directly around the module that contains its owner.

        Raises `error` if there is no such module within the model, if the parameter has several
        owners, or if it is offloaded (and thus on the device only while its owner runs).
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
        self._prepared.clear()
        self._forwards.clear()
        self._warn(parent, f"it reads {error.name} directly")

    @contextmanager
    def _running(self, new: _Pass) -> Iterator[None]:
        before, self._pass = self._pass, new
        try:
            yield
        finally:
            self._pass = before

    def _prepared_for(self, points: Sequence[Commit]) -> PreparedPass:
        """The launches of passes such as one at `points`, and at those now."""
        pairs = common_pairs(points) if self._distribution.rank else 0
        key = len(points), pairs or 0
        prepared = self._prepared.pop(key, None)
        if prepared is None or not prepared.begin(points):
            self._forwards.pop(prepared, None)
            prepared = PreparedPass(
                self._owners, points, self._operands, self._results, self._memory, self._device
            )
            while len(self._prepared) >= PREPARED_MAX:
                self._forwards.pop(self._prepared.pop(next(iter(self._prepared))), None)
        self._prepared[key] = prepared
        return prepared

    def _replacements(self, prepared: PreparedPass | None) -> list[Replacement]:
        """What modules with trained parameters run in a pass, made once."""
        known = self._forwards.get(prepared)
        if known is None or not all(replacement.fits for replacement in known):
            known = self._forwards[prepared] = [
                Replacement.of(module, functools.partial(self._moved, prepared, owned))
                for module, owned in self._owners.items()
            ]
        return known

    def _moved(
        self,
        prepared: PreparedPass | None,
        owned: list[Owned],
        module: nn.Module,
        original: Callable[..., Any],
    ) -> Callable[..., Any]:
        """The forward that replaces `original`, the forward of `module`."""
        names = [item.attribute for item in owned if item.holder is module]
        plain = getattr(original, "__func__", None)
        run: Callable[..., Any]
        if len(names) < len(owned):
            run = functools.partial(self._whole, prepared, module, original, owned)
        elif isinstance(module, nn.Embedding) and names == ["weight"]:
            run = functools.partial(self._embedding, prepared, module, original, owned[0])
        elif "weight" in names and plain in (nn.Linear.forward, Conv1D.forward):
            run = functools.partial(self._product, module, owned)
            if prepared is not None:
                alone = self._framed(original, run)
                return self._prepared_product(prepared, module, owned, alone)
        elif (reference := one_by_one(module, original)) is not None:
            run = functools.partial(self._experts, prepared, module, original, reference, owned)
        else:
            self._warn_if_large(module, owned)
            run = functools.partial(self._whole, prepared, module, original, owned)
            if prepared is not None:
                alone = self._framed(original, run)
                return self._prepared_norm(prepared, module, original, owned, alone)
        return self._framed(original, run)

    def _framed(self, original: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` with scratch memory that is valid until it returns."""

        # wraps: callers look at the signature of a model's forward.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._scratch.frame():
                return run(*args, **kwargs)

        return forward

    def _prepared_product(
        self,
        prepared: PreparedPass,
        module: nn.Module,
        owned: list[Owned],
        alone: Callable[[torch.Tensor], torch.Tensor],
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A linear layer's forward by prepared launches; `alone` if it computes a single point."""
        parameters: Any = module._parameters
        ids = {item.attribute: item.tensor_id for item in owned}

        def bias() -> torch.Tensor:
            if "bias" not in ids:
                return parameters["bias"].view(1, 1, -1)  # type: ignore[no-any-return]
            built = prepared.built(module, "bias")
            if built is None:
                built = torch.stack(self._built(parameters["bias"], ids["bias"]))
            return built.unsqueeze(1)

        adds = None if parameters["bias"] is None else bias
        run, count = prepared.product(module, ids["weight"], adds), prepared.count

        def forward(x: torch.Tensor) -> torch.Tensor:
            copies = self._pass.copies
            if copies.count != count:
                return alone(x)
            # Most inputs have the first length; the question for all takes longer.
            whole = x.shape[0] == count * copies.rows
            if not whole and count > 1 and copies.length(x.shape[0]) is None:
                raise self._inseparable(module, x)
            if self._guard is None:
                return run(x)
            with self._guard.aside():
                return run(x)

        return forward

    def _prepared_norm(
        self,
        prepared: PreparedPass,
        module: nn.Module,
        original: Callable[..., Any],
        owned: list[Owned],
        alone: Callable[..., Any],
    ) -> Callable[..., Any]:
        """A module's forward for all points at once if that is possible, else `alone`."""
        parameters: Any = module._parameters
        names = [item.attribute for item in owned]
        shapes = {item.parameter.shape for item in owned}
        width = next(iter(shapes))[-1]
        elementwise: bool | None = None if len(shapes) == 1 == len(next(iter(shapes))) else False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal elementwise
            x = args[0] if len(args) == 1 and not kwargs else None
            copies = self._pass.copies
            fits = (
                elementwise is not False
                and isinstance(x, torch.Tensor)
                and x.shape[-1:] == (width,)
                and copies.count == prepared.count
                and copies.length(x.shape[0]) is not None
            )
            if not fits:
                return alone(*args, **kwargs)
            assert x is not None
            if elementwise is None:
                with self._unguarded():
                    elementwise = is_elementwise(original, owned, width)
            built = self._small(prepared, owned) if elementwise else None
            if built is None:
                return alone(*args, **kwargs)
            before = dict(parameters)
            for name, tensor in zip(names, built, strict=True):
                parameters[name] = tensor.unsqueeze(1)
            try:
                return original(x.reshape(copies.count, -1, width)).view(x.shape)
            finally:
                parameters.update(before)

        return forward

    # ------------------------------------------------------------------ kinds of modules

    def _product(self, module: nn.Module, owned: list[Owned], x: torch.Tensor) -> torch.Tensor:
        """A matrix product with the weight: [outputs, inputs], or the reverse for `Conv1D`."""
        parameters: dict[str, Any] = module._parameters
        ids = {item.attribute: item.tensor_id for item in owned}
        weight = parameters["weight"]
        inputs, outputs = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
        points = self._pass.points
        if len(points) > 1 and self._pass.copies.length(x.shape[0]) is None:
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
                        affine(x_copy[:, :last], block, bias, out)
                    else:
                        out.addmm_(x_copy[:, first:last], block)
        else:
            for first, last, moved in self._blocks(module, ids["weight"], points):
                for (x_copy, out), bias, block in zip(copies, biases, moved, strict=True):
                    part = None if bias is None else bias[first:last]
                    affine(x_copy, block.t(), part, out[:, first:last])
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

        The small terms come first, and the base's product is added to them, so that in low
        precision they are rounded by their own size.
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
        prepared: PreparedPass | None,
        module: nn.Module,
        original: Callable[..., Any],
        item: Owned,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """An embedding, or a subclass of it, which builds only the rows that are looked up."""
        weight = item.parameter
        points = self._pass.points

        def of_all_copies(ids: torch.Tensor) -> torch.Tensor:
            """`ids`, or values in their places, repeated if one row applies to all."""
            if len(points) > 1:
                if ids.dim() > 1 and len(ids) == 1:
                    return ids.expand(len(points) * self._pass.copies.rows, *ids.shape[1:])
                if self._pass.copies.length(len(ids)) is None:
                    raise self._inseparable(module, ids)
            return ids

        def look_up_on_device(ids: torch.Tensor) -> torch.Tensor:
            """Each copy's rows at its point; distinct ids would have to be waited for."""
            assert prepared is not None
            with self._unguarded():
                return prepared.look_up(weight, item.tensor_id, of_all_copies(ids))

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            with self._unguarded():
                unique, places = torch.unique(ids, return_inverse=True)
                count, width = len(unique), weight.shape[1]
                rows = self._scratch.take(len(points) * count * width, weight)
                rows = rows.view(len(points), count, width)
                for place, length, first in consecutive(unique.tolist()):
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

        is_prepared = prepared is not None and prepared.count == len(points)
        with EmbeddingLookups(weight, look_up_on_device if is_prepared else look_up):
            return original(*args, **kwargs)

    def _whole(
        self,
        prepared: PreparedPass | None,
        module: nn.Module,
        original: Callable[..., Any],
        owned: list[Owned],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Any module, which runs once for each point, with all its own parameters."""

        def run(*args: Any, **kwargs: Any) -> Any:
            moved = [self._built_here(prepared, item) for item in owned]
            with with_parameters(owned, moved):
                result = original(*args, **kwargs)
            return detached_from(result, [tensor.untyped_storage() for tensor in moved])

        return self._point_by_point(module, run, *args, **kwargs)

    def _experts(
        self,
        prepared: PreparedPass | None,
        module: nn.Module,
        original: Callable[..., Any],
        reference: Callable[..., Any],
        owned: list[Owned],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A mixture's experts, which run once for each point and are built one at a time."""

        def build(parameter: torch.Tensor, tensor_id: int, index: int) -> torch.Tensor:
            with self._unguarded():
                part = parameter[index]
                # Not in scratch memory, because the module may keep it for a while.
                built = torch.empty_like(part)
                self._fan([built], part, tensor_id, index * part.numel(), self._pass.points)
            return built

        def run(*args: Any, **kwargs: Any) -> Any:
            moved = [
                Slices(item.parameter, functools.partial(build, item.parameter, item.tensor_id))
                if item.parameter.dim() > 2
                else self._built_here(prepared, item)
                for item in owned
            ]
            with with_parameters(owned, moved):
                return reference(*args, **kwargs)

        if module not in self._unsliced:
            try:
                return self._point_by_point(module, run, *args, **kwargs)
            except NotSlicedError as error:
                self._unsliced.add(module)
                self._warn(module, f"it {error}")
        return self._whole(prepared, module, original, owned, *args, **kwargs)

    def _point_by_point(
        self, module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The results of `run` at each point alone, on its copy's part of the arguments, as one."""
        copies = self._pass.copies
        if copies.count == 1:
            return run(*args, **kwargs)
        seen = tensors_in((args, kwargs))
        constant = not any(copies.length(len(tensor)) for tensor in seen)
        results = []
        for index, point in enumerate(self._pass.points):
            own_args, own_kwargs = copies.part(index, (args, kwargs))
            one = _Pass((point,), Copies(1, copies.rows, copies.tokens), index)
            with self._running(one), self._scratch.frame():
                results.append(run(*own_args, **own_kwargs))
        try:
            return copies.joined(results, constant=constant)
        except InseparableError:
            raise self._inseparable(module, seen[0] if seen else torch.empty(())) from None

    # ------------------------------------------------------------------ building weights

    def _blocks(
        self, module: nn.Module, tensor_id: int, points: Sequence[Commit]
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Row ranges of the module's weight, and its rows at every point, until the next range."""
        weight: Any = module._parameters["weight"]
        count, width = weight.shape
        row_bytes = len(points) * width * weight.element_size()
        bytes_max = CONV1D_BLOCK_BYTES if isinstance(module, Conv1D) else LINEAR_BLOCK_BYTES
        rows_max = max(1, min(count, bytes_max // row_bytes))
        scratch = [self._scratch.take(rows_max * width, weight) for _ in points]
        for first in range(0, count, rows_max):
            last = min(first + rows_max, count)
            blocks = [buffer[: (last - first) * width].view(-1, width) for buffer in scratch]
            with self._unguarded():
                self._fan(blocks, weight[first:last], tensor_id, first * width, points)
            yield first, last, blocks

    def _built_here(self, prepared: PreparedPass | None, item: Owned) -> torch.Tensor:
        """The parameter at the first point of this pass."""
        built = None if prepared is None else self._small(prepared, [item])
        if built is not None:
            return built[0][self._pass.index]
        return self._built(item.parameter, item.tensor_id)[0]

    def _small(self, prepared: PreparedPass, owned: Sequence[Owned]) -> list[torch.Tensor] | None:
        """Small parameters at all points of a whole pass, or None if one must be built alone."""
        with self._unguarded():
            built = [prepared.built(item.holder, item.attribute) for item in owned]
        found = [tensor for tensor in built if tensor is not None]
        return found if len(found) == len(owned) else None

    def _built(self, parameter: torch.Tensor, tensor_id: int) -> list[torch.Tensor]:
        """The parameter at every point, in scratch memory."""
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

    def _warn_if_large(self, module: nn.Module, owned: Sequence[Owned]) -> None:
        for item in owned:
            size_bytes = item.parameter.nbytes
            if size_bytes > LINEAR_BLOCK_BYTES:
                self._warn(module, f"{item.attribute} has {size_bytes} bytes")
                return

    def _warn(self, module: nn.Module, why: str) -> None:
        """Warn, once for each kind of module, that it runs once for each point, built whole."""
        kind = type(module)
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(
                "%s (%s) is not perturbed block by block but whole, once for each point, which "
                "takes time and memory: %s.",
                self._names[module],
                kind.__name__,
                why,
            )

    def _unguarded(self) -> AbstractContextManager[None]:
        """While open, the guard does not look: this module reads the base weights itself."""
        return nullcontext() if self._guard is None else self._guard.aside()

    def _inseparable(self, module: nn.Module, seen: torch.Tensor) -> InseparableError:
        copies = self._pass.copies
        return InseparableError(
            f"{self._names[module]} ({type(module).__name__}) sees input of shape "
            f"{list(seen.shape)}, whose first dimension doesn't divide into {copies.count} copies "
            f"of {copies.rows} rows of {copies.tokens} tokens"
        )
