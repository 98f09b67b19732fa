"""Two-point measurements of a loss, forward only, that never write to the model's weights.

SPSA (Spall 1992) as MeZO uses it (Malladi et al. 2023): for a direction z,

    projected_grad = (loss(W + eps z) - loss(W - eps z)) / (2 eps)

Existing systems add eps z to the weights in place, run, and subtract it again, which in low precision
doesn't lead back to the same weights. Here the perturbed values of a module's own parameters are built
in scratch memory when that module runs, and thrown away when it returns. What is built is
`W + local pairs ± eps z`, through the one primitive `materialize`, so a worker's uncommitted local
steps need no copy of the weights either. If the forward pass raises, there is nothing to restore.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedmezo_core.errors import MeasurementError, ModelError
from fedmezo_core.zo.manifest import Manifest, trained_tensors
from fedmezo_core.zo.materialize import Commit, Rounding, materialize
from fedmezo_core.zo.noise import Distribution
from fedmezo_core.zo.task import Batch, Task

BLOCK_BYTES = 1 << 22
"""Linear layers with more bytes of weights than this are built and multiplied in blocks of rows."""
_ALIGNMENT_BYTES = 64

Pair = tuple[int, float]
"""A seed (u64) and the float32 coefficient of its direction."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One two-point evaluation on one seed."""

    loss_plus: float
    """Mean loss at W + eps z, in nats (float64)."""
    loss_minus: float
    projected_grad: float
    """A float32 value: the difference over 2 eps, rounded once."""


@dataclass(frozen=True, slots=True)
class LocalSteps:
    """What a worker answers to one assignment."""

    projected_grads: npt.NDArray[np.float32]
    """[steps], clipped, in the order of the seeds."""
    loss: float
    """Mean of both losses over all steps, in nats."""


@dataclass(frozen=True, slots=True)
class _Owned:
    """A trained parameter as an attribute of the module that owns it."""

    attribute: str
    tensor_id: int
    tensor: torch.Tensor


class Estimator:
    """Measures projected gradients of one task on one model."""

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        task: Task,
        *,
        distribution: Distribution,
        rounding: Rounding,
        threads: int | None = None,
    ) -> None:
        """`threads` is how many build perturbed weights (default: as `materialize` chooses).

        Raises `MismatchError` if the model isn't the manifest's, `ModelError` for an embedding that
        renormalises its own weights.
        """
        self._model = model
        self._task = task
        self._distribution = distribution
        self._rounding = rounding
        self._threads = threads
        self._scratch = _Scratch()
        self._owners = _owners(model, manifest)
        self._guard: _DirectReadGuard | None = _DirectReadGuard(manifest, model)

    def measure(self, batch: Batch, local: Sequence[Pair], seed: int, eps: float) -> Measurement:
        """Measure along the direction of `seed` at the weights plus `local` pairs.

        In bfloat16 both perturbed weights are rounded with the same random bits, those of the
        rounding seed `seed`: rounding then moves both losses alike, and cancels out of their
        difference. Raises `MeasurementError` if a loss is NaN or infinite, `ModelError` if the
        architecture reads a parameter where it can't be perturbed. The weights are never written.
        """
        loss_plus, loss_minus = self._losses(batch, local, seed, eps)
        for sign, loss in (("+", loss_plus), ("-", loss_minus)):
            if not math.isfinite(loss):
                raise MeasurementError(
                    f"The loss at {sign}eps is {loss} on the batch of {batch.name}; use a smaller "
                    "eps or learning_rate, or check this worker's data."
                )
        projected_grad = np.float32((loss_plus - loss_minus) / (2.0 * eps))
        return Measurement(loss_plus, loss_minus, float(projected_grad))

    def _losses(
        self, batch: Batch, local: Sequence[Pair], seed: int, eps: float
    ) -> tuple[float, float]:
        """Both losses, by two forward passes one after the other."""
        seeds = np.array([*(pair[0] for pair in local), seed], dtype=np.uint64)
        losses: list[float] = []
        for step in (eps, -eps):
            coefficients = np.array([*(pair[1] for pair in local), step], dtype=np.float32)
            with self._moved(Commit(seeds, coefficients, seed)):
                losses.append(self._task.loss(self._model, batch))
        return losses[0], losses[1]

    # ------------------------------------------------------------------ moved weights

    @contextmanager
    def _moved(self, commit: Commit) -> Iterator[None]:
        """While open, every owner of trained parameters computes with base + `commit`."""
        with ExitStack() as stack:
            for module, owned in self._owners.items():
                stack.enter_context(_forward_as(module, self._moved_forward(module, owned, commit)))
            stack.enter_context(self._guard or nullcontext())
            yield
        # The first pass has shown that no parameter is read behind its owner's back.
        self._guard = None

    def _moved_forward(
        self, module: nn.Module, owned: list[_Owned], commit: Commit
    ) -> Callable[..., Any]:
        original: Callable[..., Any] = module.forward
        if isinstance(module, nn.Embedding) and [item.attribute for item in owned] == ["weight"]:
            run = functools.partial(self._run_embedding, original, owned[0], commit)
        elif (
            isinstance(module, nn.Linear)
            and type(module).forward is nn.Linear.forward
            and "forward" not in module.__dict__
            and owned[-1].attribute == "weight"
            and owned[-1].tensor.nbytes > BLOCK_BYTES
        ):
            run = functools.partial(self._run_linear, module, owned, commit)
        else:
            run = functools.partial(self._run_whole, original, module, owned, commit)

        # wraps: callers look at the signature of a model's forward.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._scratch.frame():
                return run(*args, **kwargs)

        return forward

    def _run_whole(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        owned: list[_Owned],
        commit: Commit,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Any module: all its own parameters at once."""
        moved = {item.attribute: self._build(item, commit) for item in owned}
        with _parameters_as(module, moved):
            result = original(*args, **kwargs)
        return _detached_from(result, [tensor.untyped_storage() for tensor in moved.values()])

    def _run_embedding(
        self, original: Callable[..., Any], item: _Owned, commit: Commit, *args: Any, **kwargs: Any
    ) -> Any:
        """An embedding, or a subclass of it: only the rows that are looked up."""

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            with self._unguarded():
                unique, places = torch.unique(ids, return_inverse=True)
                width = item.tensor.shape[1]
                rows = self._scratch.take(len(unique) * width, item.tensor).view(-1, width)
                for place, count, first in _runs(unique.tolist()):
                    self._materialize(
                        rows[place : place + count],
                        item.tensor[first : first + count],
                        item.tensor_id,
                        first * width,
                        commit,
                    )
            return functional.embedding(places, rows)

        with _EmbeddingLookups(item.tensor, look_up):
            return original(*args, **kwargs)

    def _run_linear(
        self, module: nn.Linear, owned: list[_Owned], commit: Commit, x: torch.Tensor
    ) -> torch.Tensor:
        """A large linear layer: blocks of rows of the weight, small enough for the cache."""
        weight = owned[-1]
        rows_max = max(1, BLOCK_BYTES // (weight.tensor.nbytes // module.out_features))
        scratch = self._scratch.take(rows_max * module.in_features, weight.tensor)
        inputs = x.reshape(-1, module.in_features)
        outputs = inputs.new_empty(len(inputs), module.out_features)
        for first in range(0, module.out_features, rows_max):
            last = min(first + rows_max, module.out_features)
            block = scratch[: (last - first) * module.in_features].view(-1, module.in_features)
            with self._unguarded():
                base = weight.tensor[first:last]
                self._materialize(block, base, weight.tensor_id, first * module.in_features, commit)
            torch.mm(inputs, block.t(), out=outputs[:, first:last])
        if owned[0].attribute == "bias":
            outputs += self._build(owned[0], commit)
        elif module.bias is not None:
            outputs += module.bias
        return outputs.view(*x.shape[:-1], module.out_features)

    def _build(self, item: _Owned, commit: Commit) -> torch.Tensor:
        """`item` plus `commit`, in scratch."""
        with self._unguarded():
            out = self._scratch.take(item.tensor.numel(), item.tensor).view(item.tensor.shape)
            self._materialize(out, item.tensor, item.tensor_id, 0, commit)
        return out

    def _materialize(
        self, out: torch.Tensor, base: torch.Tensor, tensor_id: int, start: int, commit: Commit
    ) -> None:
        materialize(
            out,
            base,
            [commit],
            tensor_id=tensor_id,
            start=start,
            distribution=self._distribution,
            rounding=self._rounding,
            threads=self._threads,
        )

    @contextmanager
    def _unguarded(self) -> Iterator[None]:
        """Reading the base weights is our own doing here."""
        guard = self._guard
        if guard is None:
            yield
            return
        guard.paused = True
        try:
            yield
        finally:
            guard.paused = False


def local_steps(
    estimator: Estimator,
    batch_of: Callable[[int], Batch],
    *,
    first_seed: int,
    count: int,
    eps: float,
    learning_rate: float,
    projected_grad_abs_max: float,
) -> LocalSteps:
    """Run one assignment: `count` MeZO steps from the current weights, none of them written.

    Step h measures along seed `first_seed + h` on `batch_of(h)`, at the weights plus the pairs of the
    steps before, and then appends its own pair (seed, float32(-learning_rate * g)), g being the
    projected gradient clipped to ± `projected_grad_abs_max`. A pure function of weights, batches and
    arguments. Raises as `Estimator.measure` does.
    """
    bound = np.float32(projected_grad_abs_max)
    if float(bound) > projected_grad_abs_max:
        # The nearest float32 may lie outside the run's clip, where the coordinator refuses it.
        bound = np.nextafter(bound, np.float32(0))
    projected_grads = np.empty(count, dtype=np.float32)
    local: list[Pair] = []
    losses: list[float] = []
    for step in range(count):
        seed = first_seed + step
        measurement = estimator.measure(batch_of(step), local, seed, eps)
        clipped = np.clip(np.float32(measurement.projected_grad), -bound, bound)
        projected_grads[step] = clipped
        local.append((seed, float(np.float32(-learning_rate * float(clipped)))))
        losses.append((measurement.loss_plus + measurement.loss_minus) / 2.0)
    return LocalSteps(projected_grads, math.fsum(losses) / count)


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
        self.paused = False
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, entry.name)
            for entry, tensor in zip(manifest, trained_tensors(model, manifest), strict=True)
        )
        self._starts = [span[0] for span in spans]
        self._spans = spans

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            for value in _tensors((args, tuple(kwargs.values()))):
                self._check(value, func)
        return func(*args, **kwargs)

    def _check(self, tensor: torch.Tensor, func: Any) -> None:
        address = tensor.data_ptr()
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._spans[index][1]:
            raise ModelError(
                f"This architecture reads parameter {self._spans[index][2]} outside the module that "
                f"owns it ({func}), where it can't be perturbed; train a LoRA adapter on other "
                "modules, or use another model."
            )


def _owners(model: nn.Module, manifest: Manifest) -> dict[nn.Module, list[_Owned]]:
    """Modules with trained parameters of their own, and which; attributes sorted by name."""
    tensors = trained_tensors(model, manifest)
    by_address = {
        tensor.data_ptr(): (entry.tensor_id, tensor)
        for entry, tensor in zip(manifest, tensors, strict=True)
    }
    owners: dict[nn.Module, list[_Owned]] = {}
    for name, module in model.named_modules():
        owned = [
            _Owned(attribute, *by_address[parameter.data_ptr()])
            for attribute, parameter in sorted(module.named_parameters(recurse=False))
            if parameter.data_ptr() in by_address
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
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace `module.forward`, which `accelerate` may have replaced before us."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


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
