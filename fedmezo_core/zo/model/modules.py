"""A model's modules, by whether they hold anything trained, with another forward for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedmezo_core.errors import ModelError
from fedmezo_core.zo.model.manifest import tensor_ids, trained_tensors
from fedmezo_core.zo.model.offload import put_back
from fedmezo_core.zo.plain.entries import Manifest


@dataclass(frozen=True, slots=True)
class Owned:
    """A trained parameter, as an attribute of the module that holds it."""

    holder: nn.Module
    attribute: str
    tensor_id: int

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter now: an offloaded one is on the device only while its module runs."""
        parameter = self.holder._parameters[self.attribute]
        assert parameter is not None
        return parameter


def owners_of(model: nn.Module, manifest: Manifest) -> dict[nn.Module, list[Owned]]:
    """The modules that hold trained parameters, with these parameters, sorted by attribute.

    Raises as `trained_tensors` does, and `ModelError` for an embedding that renormalises its
    weights.
    """
    trained_tensors(model, manifest)
    ids = tensor_ids(model, manifest)
    owners: dict[nn.Module, list[Owned]] = {}
    for name, module in model.named_modules():
        owned = [
            Owned(module, attribute, ids[path])
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


def frozen_modules(model: nn.Module, owners: Mapping[nn.Module, object]) -> list[nn.Module]:
    """The outermost modules that have parameters, but none that is trained."""
    has_trained = {
        module for module in model.modules() if any(inner in owners for inner in module.modules())
    }
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        # A list of modules is never called, only the modules in it.
        if module not in has_trained and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            if next(module.parameters(), None) is not None:
                found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return list(dict.fromkeys(found))


def computing_elements(modules: Sequence[nn.Module]) -> int:
    """The number of elements of the modules' parameters, without those of embeddings."""
    return sum(
        parameter.numel()
        for module in modules
        for inner in module.modules()
        if not isinstance(inner, nn.Embedding)
        for parameter in inner.parameters(recurse=False)
    )


def loss_tolerance(model: nn.Module) -> float:
    """The relative difference that rounding may cause between two ways to compute a loss."""
    low_precision = any(value.dtype != torch.float32 for value in model.parameters())
    return 3e-2 if low_precision else 1e-3


@contextmanager
def emptied_after_errors(model: nn.Module) -> Iterator[None]:
    """While open, an error removes offloaded weights from the device (see `put_back`)."""
    try:
        yield
    except BaseException:
        put_back(model)
        raise


Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Replacement:
    """A forward that a module may run in place of its own, for a while."""

    attributes: dict[str, Any]
    """The module's own."""
    name: str
    before: Forward | None
    """What `attributes` had under `name`."""
    forward: Forward

    @classmethod
    def of(cls, module: nn.Module, make: Callable[[nn.Module, Forward], Forward]) -> Replacement:
        """`make(module, its forward)`.

        It runs inside the hook that `accelerate` may have put around the forward, because offloaded
        weights are on the device only there.
        """
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        attributes = module.__dict__
        return cls(attributes, name, attributes.get(name), make(module, getattr(module, name)))

    @property
    def fits(self) -> bool:
        """Whether the module still runs what it ran when this was made."""
        name = "_old_forward" if "_hf_hook" in self.attributes else "forward"
        return name == self.name and self.attributes.get(name) is self.before


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """While open, each module runs what replaces its forward."""
    for replacement in replacements:
        replacement.attributes[replacement.name] = replacement.forward
    try:
        yield
    finally:
        for replacement in reversed(replacements):
            if replacement.before is None:
                del replacement.attributes[replacement.name]
            else:
                replacement.attributes[replacement.name] = replacement.before


def computing(
    module: nn.Module, make: Callable[[nn.Module, Forward], Forward]
) -> AbstractContextManager[None]:
    """While open, `module` runs `make(module, its forward)` in place of its forward."""
    return replaced([Replacement.of(module, make)])


@contextmanager
def with_parameters(owned: Sequence[Owned], tensors: Sequence[Any]) -> Iterator[None]:
    """While open, modules see `tensors`, or objects that act as such, in place of `owned`.

    The parameters themselves stay as they are. `torch.func.functional_call` does the same, but it
    takes tensors alone, and calls the module, whose forward may be replaced (see `computing`).
    """
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
