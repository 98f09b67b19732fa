"""The trained tensors of a run as data: their numbers, names, types and shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Entry:
    """One trained tensor."""

    tensor_id: int
    """The noise standard's tensor id: the position in the manifest, from 0."""
    name: str
    """Dotted parameter name in the model."""
    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16` or `float16`."""

    @property
    def columns(self) -> int:
        """Columns of the tensor as a matrix: the length of its last dimension, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def element_count(self) -> int:
        """Number of elements of the tensor."""
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
        """Number of elements of all trained tensors together."""
        return sum(entry.element_count for entry in self.entries)

    def canonical_bytes(self) -> bytes:
        r"""The manifest as the bytes that its digest is taken over.

        They are ASCII text: the line `fedmezo manifest 1`, then one line for each entry, of four
        fields separated by tabs: tensor id in decimal, name as a JSON string (non-ASCII as \uXXXX),
        dtype, shape as decimal lengths joined by `x` (empty for a scalar). Every line ends in a
        newline.
        """
        lines = ["fedmezo manifest 1"]
        for entry in self.entries:
            shape = "x".join(str(length) for length in entry.shape)
            lines.append(f"{entry.tensor_id}\t{json.dumps(entry.name)}\t{entry.dtype}\t{shape}")
        return ("\n".join(lines) + "\n").encode("ascii")

    def digest(self) -> bytes:
        """SHA-256 of the manifest's `canonical_bytes`: 32 bytes."""
        return hashlib.sha256(self.canonical_bytes()).digest()
