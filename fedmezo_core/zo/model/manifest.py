"""The manifest: which tensors of a model are trained, in which order, under which tensor id.

Every party derives it from its own copy of the model, and all of them must derive the same one: the
tensor id goes into the noise, so two parties that numbered their tensors differently would silently
train different directions. Therefore

- entries are sorted by name, by Unicode code point. The order in which modules were registered, or
  in which a library walks them, can differ between releases; a sort of the names cannot;
- a tensor that has several names (tied weights) is one entry, under the first of its names in that
  same order;
- buffers are no part of it: they are not trained;
- in a LoRA run the entries are the adapter's A and B matrices and nothing else, or with `freeze_a`
  its B matrices. In any other run
  they are all parameters, or those of the modules that the run's `train` names; a tied tensor is one
  of them if any of its names is. `requires_grad` plays no part, so that no party can change the set
  by freezing something.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fedmezo_core.errors import MismatchError, ModelError
from fedmezo_core.zo.model.offload import homes_of, unique_homes
from fedmezo_core.zo.model.selection import parameters_inside

_ADAPTER_NAME = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One trained tensor."""

    tensor_id: int
    """Position in the manifest, from 0; the tensor id of the noise standard."""
    name: str
    """Dotted parameter name in the model."""
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16` or `float16`."""

    @property
    def columns(self) -> int:
        """Length of the last dimension, 1 for a scalar: what the low-rank families call columns."""
        return self.shape[-1] if self.shape else 1

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The ordered trained tensors of a run.

    Invariant: entries are sorted by name, and `entries[i].tensor_id == i`.
    """

    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def element_count(self) -> int:
        """Number of trained parameters."""
        return sum(entry.element_count for entry in self.entries)

    def canonical_bytes(self) -> bytes:
        r"""The bytes that the digest is taken over.

        ASCII text: the line `fedmezo manifest 1`, then a line for each entry, of four fields with a
        tab between them: tensor id in decimal, name as a JSON string (non-ASCII as \uXXXX), dtype,
        shape as decimal lengths joined by `x` (empty for a scalar). Every line ends in a newline.
        """
        lines = ["fedmezo manifest 1"]
        for entry in self.entries:
            shape = "x".join(str(length) for length in entry.shape)
            lines.append(f"{entry.tensor_id}\t{json.dumps(entry.name)}\t{entry.dtype}\t{shape}")
        return ("\n".join(lines) + "\n").encode("ascii")

    def digest(self) -> bytes:
        """SHA-256 of `canonical_bytes`, 32 bytes."""
        return hashlib.sha256(self.canonical_bytes()).digest()


def manifest_of(
    model: nn.Module,
    *,
    adapters_only: bool = False,
    freeze_a: bool = False,
    train: Sequence[str] = (),
) -> Manifest:
    """Derive the manifest of `model`.

    With `adapters_only`, the entries are the matrices of a LoRA adapter that peft has put into the
    model, with `freeze_a` of these the B alone; with `train`, the parameters of the modules that it names (see `parameters_inside`); otherwise
    all parameters. Raises `ConfigError` for a name that means nothing in the model, `ModelError` where
    there is nothing to train, or a tensor that is neither float32, bfloat16 nor float16, not contiguous,
    or shares only part of its memory with another.
    """
    every = homes_of(model)
    inside = parameters_inside(model, train) if train else every.keys()
    places = {every[name].place for name in inside}
    unique = unique_homes(model)
    chosen = {
        name: home
        for name, home in unique.items()
        if home.parameter.numel() > 0
        and home.place in places
        and (not adapters_only or _is_trained_side(name, freeze_a))
    }
    if not chosen:
        what = "LoRA adapter matrices" if adapters_only else "parameters"
        raise ModelError(f"The model has no {what} to train; check the model and lora settings.")
    entries: list[Entry] = []
    for tensor_id, (name, home) in enumerate(chosen.items()):
        parameter = home.parameter
        dtype = _DTYPES.get(parameter.dtype)
        if dtype is None:
            raise ModelError(
                f"Parameter {name} is {str(parameter.dtype).removeprefix('torch.')}, which cannot be "
                "trained; load the model unquantised as float32, bfloat16 or float16."
            )
        if home.tensor is not None and not home.tensor.is_contiguous():
            raise ModelError(
                f"Parameter {name} is not contiguous in memory; make it contiguous before training."
            )
        entries.append(Entry(tensor_id, name, tuple(parameter.shape), dtype))
    spans = sorted(
        (home.tensor.data_ptr(), home.tensor.data_ptr() + home.tensor.nbytes, name)
        for name, home in unique.items()
        if home.tensor is not None and not home.tensor.is_meta
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end and (one in chosen or other in chosen):
            raise ModelError(
                f"Parameters {min(one, other)} and {max(one, other)} share memory without being one "
                "tied parameter; tie them, or load a copy of the model in which they are separate."
            )
    return Manifest(tuple(entries))


def _is_trained_side(name: str, freeze_a: bool) -> bool:
    found = _ADAPTER_NAME.search(name)
    return found is not None and not (freeze_a and found[1] == "A")


def trained_tensors(model: nn.Module, manifest: Manifest) -> list[torch.Tensor]:
    """The model's own tensors (no copies) in manifest order, wherever they are kept.

    Raises `MismatchError` if one is missing, or of another shape or dtype than the manifest says;
    `ModelError` if one is kept in a file.
    """
    homes = homes_of(model)
    tensors: list[torch.Tensor] = []
    for entry in manifest:
        home = homes.get(entry.name)
        if home is None:
            raise MismatchError(
                f"The model has no parameter {entry.name}, which the manifest names; load the model "
                "that the run was started with."
            )
        parameter = home.parameter
        found = (tuple(parameter.shape), _DTYPES.get(parameter.dtype, str(parameter.dtype)))
        if found != (entry.shape, entry.dtype):
            raise MismatchError(
                f"Parameter {entry.name} is {found[1]} {list(found[0])}, but the manifest says "
                f"{entry.dtype} {list(entry.shape)}; load the model that the run was started with."
            )
        if home.tensor is None:
            raise ModelError(
                f"Parameter {entry.name} is kept in a file, which is only read; load the model with "
                "an offload_folder, into which trained weights are copied."
            )
        tensors.append(home.tensor)
    return tensors


def tensor_ids(model: nn.Module, manifest: Manifest) -> dict[str, int]:
    """The tensor id of every trained parameter of `model`, under each of its names."""
    homes = homes_of(model)
    by_place = {homes[entry.name].place: entry.tensor_id for entry in manifest}
    return {name: by_place[home.place] for name, home in homes.items() if home.place in by_place}
