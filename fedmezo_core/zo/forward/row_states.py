"""The results of the frozen part for each row of the data, kept for a run (decision 0024).

A row goes through the frozen part once, by itself, and the result is kept. Whatever batch the row
comes in later, the pass begins there. The last module that a pass can do without, the *cut*, is
found by trial: a pass that begins after it, with NaN for the results of the modules before it, must
end in the very same loss.
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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fedmezo_core.zo.data.task import Batch, EncodedExample, Task
from fedmezo_core.zo.forward.copies import Copies
from fedmezo_core.zo.forward.frozen import FROZEN_SHARE_MIN, FrozenPart, FrozenResult
from fedmezo_core.zo.model.manifest import Manifest
from fedmezo_core.zo.model.modules import (
    computing,
    computing_elements,
    emptied_after_errors,
    loss_tolerance,
    owners_of,
)

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
    """The last module that a pass can do without, and a result of it, whose form matters."""

    name: str
    module: nn.Module
    form: Any
    before: tuple[FrozenResult, ...]
    """The modules that run before it, in order, with results whose form matters."""
    device: torch.device
    """Device of the batches."""


class _EnoughError(Exception):
    """Carries the cut's result out of a pass that need not go on."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


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
        """The name of the last module that a pass can do without.

        It is empty before the first batch, or if there is no such module.
        """
        return "" if self._cut is None else self._cut.name

    def results(
        self, batch: Batch, before_row: Callable[[], None] = lambda: None
    ) -> Sequence[FrozenResult]:
        """The results of the frozen part for `batch`, for `FrozenPart.holding`.

        Rows without states go through the model first, each after a call of `before_row`, which may
        raise to end it; the states of earlier rows are kept. There are no results if less than
        `FROZEN_SHARE_MIN` of the model runs before the trained part, or if no module can be the
        cut.
        """
        if not self._has_searched:
            self._cut, self._has_searched = self._search(batch.input_ids.device), True
        if self._cut is None:
            return ()
        kept = functools.partial(self._kept, before_row)
        return self._given(self._cut, self._assembled(self._cut, batch, kept), batch)

    @contextmanager
    def known(self, batch: Batch, before_row: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While open, a pass over `batch` begins with its `results`, and computes only the rest."""
        with self._beginning(self.results(batch, before_row), batch):
            yield

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
            *before, (module, form) = results[:count]
            cut = _Cut(self._names[module], module, form, tuple(before), device)
            if len(set(modules)) == len(modules) and self._serves(cut, pair, wanted):
                log.info("Passes begin after %s, with the kept states of each row.", cut.name)
                forms = tuple((earlier, _emptied(result)) for earlier, result in before)
                return replace(cut, form=_emptied(form), before=forms)
        return None

    def _serves(self, cut: _Cut, pair: Batch, wanted: float) -> bool:
        """Whether passes that begin after `cut` give the loss `wanted`.

        With states of rows that ran alone, it may differ by rounding.
        """
        tolerance = loss_tolerance(self._model) * abs(wanted)
        shape = pair.input_ids.shape
        try:
            for result in (*(result for _, result in cut.before), cut.form):
                if any(tensor.shape[:2] != shape for tensor in _tensors(result)):
                    return False
            # With the whole result first: it shows whether a result's rows are the batch's rows.
            with self._beginning(self._given(cut, cut.form, pair), pair):
                if self._task.loss(self._model, pair) != wanted:
                    return False
            states = self._assembled(cut, pair, self._alone)
            with self._beginning(self._given(cut, states, pair), pair):
                return math.isclose(
                    self._task.loss(self._model, pair), wanted, rel_tol=0, abs_tol=tolerance
                )
        except (_FormError, RuntimeError, ValueError, IndexError):
            # NaN can also make a model fail. Then this module is not the cut.
            return False

    # ------------------------------------------------------------------ states of rows

    def _assembled(
        self,
        cut: _Cut,
        batch: Batch,
        states_of: Callable[[_Cut, EncodedExample], list[torch.Tensor]],
    ) -> Any:
        """The cut's result for a batch, from the states of its rows.

        Padding, which attention masks, is zero.
        """
        rows, tokens = batch.input_ids.shape
        wholes = [whole.new_zeros((rows, tokens, *whole.shape[2:])) for whole in _tensors(cut.form)]
        for row, example in enumerate(batch.examples):
            for whole, own in zip(wholes, states_of(cut, example), strict=True):
                whole[row, tokens - len(own) :] = own
        left = iter(wholes)
        return pytree.tree_map_only(torch.Tensor, lambda _: next(left), cut.form)

    def _kept(
        self, before_row: Callable[[], None], cut: _Cut, example: EncodedExample
    ) -> list[torch.Tensor]:
        """The states that `_alone` gives, from the store if it has them."""
        ids = [*example.prompt, *example.response]
        key = hashlib.sha256(cut.name.encode() + b"\0" + np.array(ids, dtype="<i8").tobytes())
        forms = [
            (torch.Size((len(ids), *whole.shape[2:])), whole.dtype) for whole in _tensors(cut.form)
        ]
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
        """The states of one row: [tokens, ...] for each tensor in the cut's result.

        The row goes through the model by itself, up to the cut.
        """

        def last(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> NoReturn:
                raise _EnoughError(original(*args, **kwargs))

            return forward

        try:
            with emptied_after_errors(self._model), computing(cut.module, last):
                self._task.loss(self._model, self._task.collate([example], "one row", cut.device))
        except _EnoughError as enough:
            return [whole[0] for whole in _tensors(enough.result)]
        raise AssertionError(f"{cut.name} did not run")

    def _given(self, cut: _Cut, states: Any, batch: Batch) -> list[FrozenResult]:
        """The cut's result `states`, and NaN, which takes no memory, for the modules before it."""
        rows, tokens = batch.input_ids.shape

        def nan(form: torch.Tensor) -> torch.Tensor:
            return form.new_full((), math.nan).expand(rows, tokens, *form.shape[2:])

        before = [(m, pytree.tree_map_only(torch.Tensor, nan, form)) for m, form in cut.before]
        return [*before, (cut.module, states)]

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
