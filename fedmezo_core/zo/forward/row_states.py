"""The results of the frozen part for each row of the data, kept for a run (decision 0024).

A row goes through the frozen part once, by itself, and the result is kept. Whatever batch the row
comes in later, the pass begins there. The last module that a pass can do without, the *cut*, is
found by trial: a pass that begins after it, with NaN for the results of the modules before it, must
end in the very same loss.

If nothing trained mixes a row's positions (the attention of an adapter's last layer is frozen, for
example), the loss depends only on the last positions of what the frozen part gives. Then only those
are kept, and a pass is over those alone: one position of a row instead of all of its tokens, if the
task is classification. This, too, is found by trial, with NaN at all earlier positions.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fedmezo_core.zo.data.encoding import EncodedExample
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.forward.copies import Copies
from fedmezo_core.zo.forward.frozen import FROZEN_SHARE_MIN, FrozenPart, FrozenResult
from fedmezo_core.zo.model.modules import (
    computing,
    computing_elements,
    emptied_after_errors,
    loss_tolerance,
    owners_of,
)
from fedmezo_core.zo.plain.entries import Manifest

log = logging.getLogger("fedmezo.row_states")

_TRIED_TOKENS: Final = tuple(range(16))
"""Token ids that every vocabulary has."""


class RowStore(Protocol):
    """Keeps the states of rows under keys of 32 bytes; it may drop any of them."""

    def get(self, key: bytes) -> bytes | None:
        """The body that was put under `key`; None if there is none, or it was dropped."""

    def put(self, key: bytes, body: bytes) -> None:
        """Keep `body` under `key` if there is room."""


class SpooledRows:
    """A `RowStore` in a temporary file, which takes no memory and disappears with the process."""

    def __init__(self, bytes_max: int) -> None:
        """Keep at most `bytes_max` bytes of states."""
        self._spans: dict[bytes, tuple[int, int]] = {}
        self._used_bytes = 0
        self._bytes_max = bytes_max

    @functools.cached_property
    def _descriptor(self) -> int:
        """The file's descriptor; the file is made when there is something to keep."""
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, file.close)
        return file.fileno()

    def get(self, key: bytes) -> bytes | None:
        """The body that was put under `key`; None if there is none."""
        first, size = self._spans.get(key, (0, 0))
        return os.pread(self._descriptor, size, first) if size else None

    def put(self, key: bytes, body: bytes) -> None:
        """Keep `body` under `key` if there is room; after an error of the disk, keep no more."""
        if key in self._spans or self._used_bytes + len(body) > self._bytes_max:
            return
        try:
            written = os.pwrite(self._descriptor, body, self._used_bytes)
        except OSError as error:
            log.warning("States of rows are not kept any more: %s.", error.strerror)
            self._bytes_max = 0
            return
        if written == len(body):
            self._spans[key] = (self._used_bytes, len(body))
            self._used_bytes += len(body)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a pass leaves out, and which results of that are kept for each row."""

    results: tuple[FrozenResult, ...]
    """The modules that a pass leaves out, in order, with results whose form matters."""
    kept: frozenset[nn.Module]
    """Those among them whose results are kept; nothing reads the results of the others."""
    is_short: bool
    """Whether a row's last positions alone, those that its loss reads, are kept and computed."""
    device: torch.device
    """Device of the batches."""

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose results are kept, in order."""
        return [module for module, _ in self.results if module in self.kept]

    @property
    def forms(self) -> list[torch.Tensor]:
        """The tensors of the kept results, whose form matters: each [rows, tokens, ...]."""
        return _tensors([result for module, result in self.results if module in self.kept])

    def batch(self, batch: Batch) -> Batch:
        """What a pass over `batch` computes."""
        return batch.read() if self.is_short else batch

    def positions(self, example: EncodedExample) -> int:
        """How many positions of a row are kept, the last ones."""
        return len(example.response) + 1 if self.is_short else example.token_count


class _EnoughError(Exception):
    """Ends a pass that need not go on."""


class _FormError(Exception):
    """A result cannot be cut into rows of tokens."""


class RowStates:
    """Gives the results of a model's frozen part for a batch, from its rows' states.

    A row's states come from a pass over that row alone. So they are the same bits whichever batch
    the row comes in, and whether or not they were kept. In a batch the row would be rounded
    differently: losses differ from those of whole passes in their last digits.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, task: Task, rows: RowStore) -> None:
        """`rows` keeps the states, and must hold no others. Raises as `owners_of` does."""
        self._model = model
        self._task = task
        self._rows = rows
        self._frozen = FrozenPart(model, owners_of(model, manifest))
        self._names = {module: name for name, module in model.named_modules()}
        self._has_searched = False
        self._cut: _Cut | None = None

    @property
    def cut(self) -> str:
        """The name of the last module that a pass can do without, with its result.

        It is empty before the first batch, or if there is no such module.
        """
        return "" if self._cut is None else self._names[self._cut.modules[-1]]

    def begun(
        self, batch: Batch, before_row: Callable[[], None] = lambda: None
    ) -> tuple[Batch, Sequence[FrozenResult]]:
        """What a pass over `batch` still has to compute, as a batch, and what it begins with.

        The latter are results of the frozen part, for `FrozenPart.holding`. Rows without states go
        through the model first, each after a call of `before_row`, which may raise to end it; the
        states of earlier rows are kept. There are no results, and the batch is `batch`, if less
        than `FROZEN_SHARE_MIN` of the model runs before the trained part, or if no module can be
        the cut.
        """
        if not self._has_searched:
            self._cut, self._has_searched = self._search(batch.input_ids.device), True
        if self._cut is None:
            return batch, ()
        return self._assembled(self._cut, batch, functools.partial(self._kept, before_row))

    @contextmanager
    def known(self, batch: Batch, before_row: Callable[[], None] = lambda: None) -> Iterator[Batch]:
        """While open, a pass over the batch that this yields gives the losses of `batch`.

        It begins with what is known (see `begun`), and computes only the rest.
        """
        rest, results = self.begun(batch, before_row)
        with self._beginning(results, rest):
            yield rest

    # ------------------------------------------------------------------ finding the cut

    def _search(self, device: torch.device) -> _Cut | None:
        """Find the cut with a long and a short row, of which the short one is padded.

        The rows are the same for every worker and batch: in 16 bits the choice may depend on them,
        and with it the bits of a measurement.
        """
        response = () if self._task.config.kind == "classification" else _TRIED_TOKENS[:3]
        tried = [EncodedExample(_TRIED_TOKENS[first:], response, 0) for first in (0, 9)]
        pair = self._task.collate(tried, "the trial", device)
        with (
            self._frozen.holding(keeps=True) as results,
            self._frozen.left_out(Copies(1, *pair.input_ids.shape)),
        ):
            self._task.loss(self._model, pair)
        wanted = self._task.loss(self._model, pair)
        whole = computing_elements([self._model])
        for count in range(len(results), 0, -1):
            modules = [module for module, _ in results[:count]]
            if computing_elements(modules) < FROZEN_SHARE_MIN * whole:
                break
            cut = _Cut(tuple(results[:count]), frozenset(modules[-1:]), False, device)
            if self._serves(cut, pair, wanted):
                cut = self._shortened(cut, results[count:], pair, wanted)
                log.info(
                    "Passes begin after %s, with the kept states of each row%s.",
                    self._names[cut.modules[-1]],
                    " at the positions that the loss reads" if cut.is_short else "",
                )
                forms = tuple((module, _emptied(result)) for module, result in cut.results)
                return replace(cut, results=forms)
        return None

    def _shortened(
        self, cut: _Cut, later: Sequence[FrozenResult], pair: Batch, wanted: float
    ) -> _Cut:
        """The cut for passes over the positions that the loss reads; `cut` if there is none.

        Frozen modules after `cut`, `later`, may still mix positions, as a layer's attention does.
        So their results are kept too, as few of them as will do.
        """
        for count in range(len(later) + 1):
            after = [module for module, _ in later[:count]]
            results = (*cut.results, *later[:count])
            short = _Cut(results, cut.kept.union(after), True, cut.device)
            if self._serves(short, pair, wanted):
                for module in short.modules:
                    fewer = replace(short, kept=short.kept - {module})
                    if fewer.kept and self._serves(fewer, pair, wanted):
                        short = fewer
                return short
        return cut

    def _serves(self, cut: _Cut, pair: Batch, wanted: float) -> bool:
        """Whether passes that begin with `cut` give the loss `wanted`.

        With states of rows that ran alone, it may differ by rounding.
        """
        tolerance = loss_tolerance(self._model) * abs(wanted)
        shape = pair.input_ids.shape
        modules = [module for module, _ in cut.results]
        if len(set(modules)) < len(modules):
            return False
        try:
            if any(tensor.shape[:2] != shape for tensor in _tensors([r for _, r in cut.results])):
                return False
            # With the whole results first: they show whether their rows are the batch's rows, and
            # NaN shows whether anything reads what is not kept.
            wholes = [form.clone() for form in cut.forms]
            for whole in wholes:
                whole[:, : -cut.batch(pair).input_ids.shape[1]] = math.nan
            with self._beginning(self._given(cut, wholes, pair), pair):
                if self._task.loss(self._model, pair) != wanted:
                    return False
            rest, results = self._assembled(cut, pair, self._alone)
            with self._beginning(results, rest):
                return math.isclose(
                    self._task.loss(self._model, rest), wanted, rel_tol=0, abs_tol=tolerance
                )
        except (_FormError, RuntimeError, ValueError, IndexError):
            # NaN can also make a model fail. Then this is not the cut.
            return False

    # ------------------------------------------------------------------ states of rows

    def _assembled(
        self,
        cut: _Cut,
        batch: Batch,
        states_of: Callable[[_Cut, EncodedExample], list[torch.Tensor]],
    ) -> tuple[Batch, list[FrozenResult]]:
        """What a pass over `batch` computes, and what it begins with, from the states of its rows.

        Padding, which attention masks, is zero.
        """
        rest = cut.batch(batch)
        rows, tokens = rest.input_ids.shape
        wholes = [form.new_zeros((rows, tokens, *form.shape[2:])) for form in cut.forms]
        for row, example in enumerate(batch.examples):
            for whole, own in zip(wholes, states_of(cut, example), strict=True):
                whole[row, tokens - len(own) :] = own
        return rest, self._given(cut, wholes, rest)

    def _kept(
        self, before_row: Callable[[], None], cut: _Cut, example: EncodedExample
    ) -> list[torch.Tensor]:
        """The states that `_alone` gives, from the store if it has them."""
        ids = [*example.prompt, *example.response]
        count = cut.positions(example)
        names = "\n".join([f"{count}", *(self._names[module] for module in cut.modules)])
        key = hashlib.sha256(names.encode() + b"\0" + np.array(ids, dtype="<i8").tobytes())
        forms = [(torch.Size((count, *form.shape[2:])), form.dtype) for form in cut.forms]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in forms]
        body = self._rows.get(key.digest())
        if body is None or len(body) != sum(sizes):
            before_row()
            own = self._alone(cut, example)
            flat = [state.cpu().contiguous().flatten().view(torch.uint8) for state in own]
            self._rows.put(key.digest(), torch.cat(flat).numpy().tobytes())
            return own
        ends = np.cumsum(sizes).tolist()
        return [
            torch.frombuffer(bytearray(body[end - size : end]), dtype=dtype).view(shape)
            for end, size, (shape, dtype) in zip(ends, sizes, forms, strict=True)
        ]

    def _alone(self, cut: _Cut, example: EncodedExample) -> list[torch.Tensor]:
        """The states of one row: [positions, ...] for each tensor in the kept results.

        The row goes through the model by itself, up to the last module whose result is kept.
        """
        modules = cut.modules
        found: dict[nn.Module, Any] = {}

        def collect(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> Any:
                found[module] = original(*args, **kwargs)
                if module is modules[-1]:
                    raise _EnoughError
                return found[module]

            return forward

        with emptied_after_errors(self._model), ExitStack() as stack, suppress(_EnoughError):
            for module in modules:
                stack.enter_context(computing(module, collect))
            self._task.loss(self._model, self._task.collate([example], "one row", cut.device))
        results = _tensors([found[module] for module in modules])
        return [whole[0, len(whole[0]) - cut.positions(example) :] for whole in results]

    def _given(self, cut: _Cut, wholes: Sequence[torch.Tensor], batch: Batch) -> list[FrozenResult]:
        """The kept results `wholes`, and NaN, which takes no memory, for the others' results."""
        rows, tokens = batch.input_ids.shape
        left = iter(wholes)

        def nan(form: torch.Tensor) -> torch.Tensor:
            return form.new_full((), math.nan).expand(rows, tokens, *form.shape[2:])

        return [
            (
                module,
                pytree.tree_map_only(
                    torch.Tensor, (lambda _: next(left)) if module in cut.kept else nan, form
                ),
            )
            for module, form in cut.results
        ]

    @contextmanager
    def _beginning(self, results: Sequence[FrozenResult], batch: Batch) -> Iterator[None]:
        """While open, a pass over `batch` outside `Forward` begins with `results`."""
        copies = Copies(1, *batch.input_ids.shape)
        with self._frozen.holding(results, keeps=False), self._frozen.left_out(copies):
            yield


def _tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a module's result, each [rows, tokens, ...].

    Raises `_FormError` for a result of anything but lists and tuples of such tensors and None.
    """
    leaves = pytree.tree_leaves(result, is_leaf=lambda node: type(node) not in (tuple, list))
    tensors = [leaf for leaf in leaves if leaf is not None]
    for leaf in tensors:
        if not (isinstance(leaf, torch.Tensor) and leaf.dim() > 2 and leaf.is_floating_point()):
            raise _FormError
    return tensors


def _emptied(result: Any) -> Any:
    """The form of a module's result, without its memory."""
    return pytree.tree_map_only(
        torch.Tensor, lambda whole: whole.new_empty((0, 0, *whole.shape[2:])), result
    )
