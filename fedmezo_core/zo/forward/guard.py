"""A check that a model reads its trained parameters only where they can be perturbed."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fedmezo_core.errors import ModelError
from fedmezo_core.zo.model.manifest import tensor_ids, trained_tensors
from fedmezo_core.zo.model.offload import hooked_parameters, offload_hooks
from fedmezo_core.zo.plain.entries import Manifest


class DirectReadError(ModelError):
    """A trained parameter was read outside the module that owns it."""

    def __init__(self, name: str, func: Any) -> None:
        super().__init__(
            f"This architecture reads parameter {name} outside the module that owns it ({func}), "
            "where it can't be perturbed; train a LoRA adapter on other modules, or use another "
            "model."
        )
        self.name = name


class DirectReadGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types
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
        """From now on, offloaded parameters can be read on the device."""
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
        """While open, any read is allowed."""
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
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    self._check(value, func)
        return func(*args, **kwargs)

    def _check(self, tensor: torch.Tensor, func: Any) -> None:
        address = tensor.data_ptr()
        index = bisect_right(self._starts, address) - 1
        read = [self._spans[index][2]] if index >= 0 and address < self._spans[index][1] else []
        read += [name for name, (first, end) in self._visiting.items() if first <= address < end]
        if read:
            raise DirectReadError(read[0], func)
