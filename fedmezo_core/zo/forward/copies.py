"""The copies of a batch that one pass computes, in nested arguments and results of modules.

Where the copies are all of one batch, what is frozen is computed for one of them. Where each copy
has gone on with a text of its own, most rows are still alike, and it is computed once for each
distinct row (`DistinctRows`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

_PLAIN: Final = (torch.Tensor, int, float, str, torch.dtype, torch.device, type(None))
"""Values that cannot keep what they are given for later, as a cache can."""


class InseparableError(Exception):
    """The copies of a batch cannot be told apart at some module; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of a batch that lie one after the other in dimension 0 of a pass's tensors."""

    count: int
    """Number of copies."""
    rows: int
    """Rows of one copy."""
    tokens: int
    """Tokens of a row."""

    def length(self, whole: int) -> int | None:
        """The length of one copy's part of a dimension 0 of length `whole`.

        It is None if the dimension does not run over the rows, or the tokens, of all copies.
        """
        for one in (self.rows, self.rows * self.tokens):
            if whole == self.count * one:
                return one
        return None

    def separable(self, arguments: Any) -> bool:
        """Whether a module can compute one copy of its `arguments` alone, as far as they show."""
        if self.count == 1:
            return True
        if not all(isinstance(leaf, _PLAIN) for leaf in _leaves(arguments)):
            return False
        seen = tensors_in(arguments)
        mixed = (
            tensor.dim() > 2
            and tensor.is_floating_point()
            and len(tensor) > 1
            and self.length(len(tensor)) is None
            for tensor in seen
        )
        return any(self.length(len(tensor)) for tensor in seen) and not any(mixed)

    def single(self, arguments: Any) -> Any:
        """A module's `arguments` for one copy, which stands for all of them."""
        return self.part(0, arguments)

    def part(self, index: int, arguments: Any) -> Any:
        """A module's `arguments` for copy `index`; what is not of the batch stays as it is."""

        def part(leaf: Any) -> Any:
            whole = isinstance(leaf, torch.Tensor) and leaf.dim() > 0
            length = self.length(len(leaf)) if whole else None
            return leaf if length is None else leaf[index * length : (index + 1) * length]

        if self.count == 1:
            return arguments
        return pytree.tree_map(part, arguments, is_leaf=_is_leaf)

    def joined(self, results: Sequence[Any], *, constant: bool) -> Any:
        """A module's result for all copies, from its `results` for each.

        With `constant` the module saw nothing of the batch (positions, for example), so a result of
        length 1 applies to every row. Raises `InseparableError` for a result that does not divide.
        """

        def join(*parts: Any) -> Any:
            first = parts[0]
            if first is None:
                return None
            if isinstance(first, torch.Tensor) and first.dim():
                if constant and len(first) == 1:
                    return torch.cat([part.expand(self.rows, *first.shape[1:]) for part in parts])
                if not constant and self.length(len(first) * len(parts)) is not None:
                    return torch.cat(parts)
            raise InseparableError

        return pytree.tree_map(join, *results, is_leaf=_is_leaf)

    def repeated(self, result: Any) -> Any:
        """A module's result for all copies, from that for one.

        A tensor of length 1 applies to every row, and stays as it is. Raises `InseparableError` for
        a result that does not consist of rows or tokens.
        """

        def repeat(leaf: Any) -> Any:
            if leaf is None:
                return None
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                if len(leaf) in (self.rows, self.rows * self.tokens):
                    if not any(leaf.stride()):
                        # A single number in all places still takes no memory.
                        return leaf[:1].expand(self.count * len(leaf), *leaf.shape[1:])
                    return leaf.repeat(self.count, *[1] * (leaf.dim() - 1))
                if len(leaf) == 1:
                    return leaf
            raise InseparableError

        if self.count == 1:
            return result
        return pytree.tree_map(repeat, result, is_leaf=_is_leaf)


@dataclass(frozen=True, slots=True)
class DistinctRows:
    """The rows of several copies, many of them alike, of which each distinct one is needed once."""

    copies: Copies
    first: torch.Tensor
    """The first row of each kind, as an index into the rows of all copies: int64 [kinds]."""
    kind: torch.Tensor
    """The kind of each row of all copies: int64 [rows of all copies]."""

    @classmethod
    def of(cls, rows: Sequence[Hashable], copies: Copies, device: torch.device) -> DistinctRows:
        """Find the kinds among the `rows` of all copies; equal ones are alike."""
        first: dict[Hashable, int] = {}
        for number, row in enumerate(rows):
            first.setdefault(row, number)
        kinds = {row: kind for kind, row in enumerate(first)}
        return cls(
            copies,
            torch.tensor(list(first.values()), device=device),
            torch.tensor([kinds[row] for row in rows], device=device),
        )

    def of_tokens(self, tokens: int) -> DistinctRows:
        """The same rows where only `tokens` of each are left."""
        return replace(self, copies=replace(self.copies, tokens=tokens))

    @property
    def count(self) -> int:
        """Number of copies."""
        return self.copies.count

    def separable(self, arguments: Any) -> bool:
        """Whether a module can compute some rows of its `arguments` alone, as far as they show."""
        return self.copies.separable(arguments)

    def single(self, arguments: Any) -> Any:
        """A module's `arguments` for one row of each kind; others stay as they are."""

        def single(leaf: Any) -> Any:
            whole = isinstance(leaf, torch.Tensor) and leaf.dim() > 0
            if not whole or self.copies.length(len(leaf)) is None:
                return leaf
            return self._taken(leaf, self.first, len(self.kind))

        return pytree.tree_map(single, arguments, is_leaf=_is_leaf)

    def repeated(self, result: Any) -> Any:
        """A module's result for all copies, from that for one row of each kind.

        A tensor of length 1 applies to every row. Raises `InseparableError` for a result that does
        not consist of rows or tokens.
        """
        kinds = len(self.first)

        def repeat(leaf: Any) -> Any:
            if leaf is None:
                return None
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                if len(leaf) in (kinds, kinds * self.copies.tokens):
                    if not any(leaf.stride()):
                        # A single number in all places still takes no memory.
                        length = len(leaf) // kinds * len(self.kind)
                        return leaf[:1].expand(length, *leaf.shape[1:])
                    return self._taken(leaf, self.kind, kinds)
                if len(leaf) == 1:
                    return leaf
            raise InseparableError

        return pytree.tree_map(repeat, result, is_leaf=_is_leaf)

    @staticmethod
    def _taken(leaf: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
        """The given `rows` of a tensor whose dimension 0 runs over `count` rows or their tokens."""
        if len(leaf) == count:
            return leaf[rows]
        return leaf.reshape(count, -1, *leaf.shape[1:])[rows].flatten(0, 1)


def tensors_in(arguments: Any) -> list[torch.Tensor]:
    """The tensors with at least one dimension among a module's nested `arguments`."""
    return [leaf for leaf in _leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.dim()]


def _is_leaf(node: Any) -> bool:
    """Only containers without a behaviour of their own are taken apart: a cache never is."""
    return not isinstance(node, tuple | list | Mapping)


def _leaves(arguments: Any) -> list[Any]:
    return pytree.tree_leaves(arguments, is_leaf=_is_leaf)
