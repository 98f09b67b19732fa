"""What a model computes before its trained part, once for each row of the data (decision 0024).

Nothing that runs before the first trained module depends on anything that training changes. So a row
goes through it once, by itself, and what comes out is kept; whatever batch the row comes in later
begins there. Which module is the last one whose result is enough, the *cut*, is found by trial: a pass
that begins at it, with NaN for what the modules before it give, has to end in the very same loss.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, Protocol

import numpy as np
import torch
from torch import nn

from fedmezo_core.zo.data.task import Batch, EncodedExample, Task
from fedmezo_core.zo.model.manifest import Manifest
from fedmezo_core.zo.model.modules import (
    computing,
    computing_elements,
    emptied_after_errors,
    frozen_modules,
    loss_tolerance,
    owners_of,
)

log = logging.getLogger("fedmezo.row_states")

PREFIX_SHARE_MIN: Final = 0.5
"""From this part of the model on, what runs before the trained part is worth special treatment."""


_TRIED_TOKENS: Final = tuple(range(16))
"""What every vocabulary has."""


class RowStore(Protocol):
    """Where the rows' states are kept; it may forget."""

    def get(self, key: bytes) -> bytes | None:
        """What was put there."""

    def put(self, key: bytes, body: bytes) -> None:
        """Keep it, if there is room."""


class SpooledRows:
    """A `RowStore` in a temporary file, which takes no memory and goes with the process."""

    def __init__(self, bytes_max: int) -> None:
        """Keeps at most `bytes_max`."""
        self._places: dict[bytes, tuple[int, int]] = {}
        self._used_bytes = 0
        self._bytes_max = bytes_max

    @functools.cached_property
    def _descriptor(self) -> int:
        """Of the file, which is made when there is something to keep."""
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, file.close)
        return file.fileno()

    def get(self, key: bytes) -> bytes | None:
        """What was put there."""
        first, size = self._places.get(key, (0, 0))
        return os.pread(self._descriptor, size, first) if size else None

    def put(self, key: bytes, body: bytes) -> None:
        """Keep it, if there is room; a disk that is full keeps no more."""
        if key in self._places or self._used_bytes + len(body) > self._bytes_max:
            return
        try:
            written = os.pwrite(self._descriptor, body, self._used_bytes)
        except OSError as error:
            log.warning("States of rows are not kept any more: %s.", error.strerror)
            self._bytes_max = 0
            return
        if written == len(body):
            self._places[key] = (self._used_bytes, len(body))
            self._used_bytes += len(body)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Modules that a pass skips, and the last of them, whose result is known."""

    name: str
    skipped: tuple[tuple[nn.Module, Any], ...]
    """Each with a result of it, of which only the form matters."""
    module: nn.Module
    form: Any
    """A result of `module`."""
    device: torch.device
    """Where batches go."""


class _EnoughError(Exception):
    """Carries the cut's result out of a pass of which nothing else is wanted."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


class _FormError(Exception):
    """A result that can't be cut into rows of tokens."""


class RowStates:
    """Lets a model begin a pass behind what is known of the batch's rows.

    A row's states are those of a pass of that row alone, so they are the same bits whichever batch it
    comes in and whether or not they were kept. In another batch a row would be rounded differently:
    losses differ from those of a whole pass in their last digits.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, task: Task, rows: RowStore) -> None:
        """`rows` keeps states; nobody else's may be in it. Raises as `owners_of` does."""
        self._model = model
        self._task = task
        self._rows = rows
        self._owners = owners_of(model, manifest)
        self._frozen = frozen_modules(model, self._owners)
        self._names = {module: name for name, module in model.named_modules()}
        self._looked = False
        self._cut: _Cut | None = None

    @property
    def cut(self) -> str:
        """Name of the last module that a pass can do without; empty if there is none, or before the first pass."""
        return "" if self._cut is None else self._cut.name

    @contextmanager
    def known(self, batch: Batch, before_row: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While open, the model computes `batch`, and no other, from what is known of its rows.

        Rows that are not known go through the model first, each after a call of `before_row`, which may
        raise to end it; what was done by then is kept. If less than half of the model runs before
        the trained part, or it does not let itself be cut, passes are as they always are.
        """
        if not self._looked:
            self._cut, self._looked = self._look(batch.input_ids.device), True
        if self._cut is None:
            yield
            return
        kept = functools.partial(self._kept, before_row)
        states = self._assembled(self._cut, batch, kept)
        with self._beginning_at(self._cut, states, *batch.input_ids.shape):
            yield

    # ------------------------------------------------------------------ finding the cut

    def _look(self, device: torch.device) -> _Cut | None:
        """The last module that serves, tried on a long and a short row, one of which is padded.

        They are the same for every worker and batch: in 16 bits the choice may depend on them, and with it
        the bits of what is measured.
        """
        response = () if self._task.config.kind == "classification" else _TRIED_TOKENS[:3]
        tried = [EncodedExample(_TRIED_TOKENS[first:], response, 0) for first in (0, 9)]
        pair = self._task.collate(tried, "the trial", device)
        calls, wanted = self._observed(pair), self._task.loss(self._model, pair)
        whole = computing_elements([self._model])
        for place in reversed(range(len(calls))):
            modules = [module for module, _ in calls[: place + 1]]
            if computing_elements(modules) < PREFIX_SHARE_MIN * whole:
                break
            module, result = calls[place]
            cut = _Cut(self._names[module], tuple(calls[:place]), module, result, device)
            if len(set(modules)) == len(modules) and self._serves(cut, pair, wanted):
                log.info("Passes begin behind %s, with what is known of each row.", cut.name)
                skipped = tuple((module, _emptied(form)) for module, form in cut.skipped)
                return replace(cut, skipped=skipped, form=_emptied(result))
        return None

    def _observed(self, batch: Batch) -> list[tuple[nn.Module, Any]]:
        """Frozen modules and their results, as they run before anything trained."""
        calls: list[tuple[nn.Module, Any]] = []
        is_before = True

        def frozen(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if is_before:
                    calls.append((module, result))
                return result

            return forward

        def trained(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal is_before
                is_before = False
                return original(*args, **kwargs)

            return forward

        with ExitStack() as stack:
            for module in self._frozen:
                stack.enter_context(computing(module, frozen))
            for module in self._owners:
                stack.enter_context(computing(module, trained))
            self._task.loss(self._model, batch)
        return calls

    def _serves(self, cut: _Cut, pair: Batch, wanted: float) -> bool:
        """Whether passes that begin at `cut` give the loss `wanted`, and rows that ran alone nearly."""
        tolerance = loss_tolerance(self._model) * abs(wanted)
        shape = pair.input_ids.shape
        try:
            for _, result in (*cut.skipped, (cut.module, cut.form)):
                if any(leaf.shape[:2] != shape for leaf in _leaves(result)):
                    return False
            # The whole result first: what of it belongs to which row can only then be asked.
            with self._beginning_at(cut, cut.form, *shape):
                if self._task.loss(self._model, pair) != wanted:
                    return False
            with self._beginning_at(cut, self._assembled(cut, pair, self._alone), *shape):
                return math.isclose(
                    self._task.loss(self._model, pair), wanted, rel_tol=0, abs_tol=tolerance
                )
        except (_FormError, RuntimeError, ValueError, IndexError):
            # NaN may also lead a model to where it fails, and then this module does not serve either.
            return False

    # ------------------------------------------------------------------ states of rows

    def _assembled(
        self,
        cut: _Cut,
        batch: Batch,
        leaves_of: Callable[[_Cut, EncodedExample], list[torch.Tensor]],
    ) -> Any:
        """The cut's result for a batch, out of its rows'; padding is zero, which attention masks."""
        rows, tokens = batch.input_ids.shape
        leaves = [leaf.new_zeros((rows, tokens, *leaf.shape[2:])) for leaf in _leaves(cut.form)]
        for row, example in enumerate(batch.examples):
            for whole, own in zip(leaves, leaves_of(cut, example), strict=True):
                whole[row, tokens - len(own) :] = own
        return _like(cut.form, leaves)

    def _kept(
        self, before_row: Callable[[], None], cut: _Cut, example: EncodedExample
    ) -> list[torch.Tensor]:
        """What `_alone` gives, if possible from where it is kept."""
        ids = [*example.prompt, *example.response]
        key = hashlib.sha256(cut.name.encode() + b"\0" + np.array(ids, dtype="<i8").tobytes())
        forms = [
            (torch.Size((len(ids), *leaf.shape[2:])), leaf.dtype) for leaf in _leaves(cut.form)
        ]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in forms]
        body = self._rows.get(key.digest())
        if body is None or len(body) != sum(sizes):
            before_row()
            own = self._alone(cut, example)
            flat = [leaf.cpu().contiguous().flatten().view(torch.uint8) for leaf in own]
            self._rows.put(key.digest(), torch.cat(flat).numpy().tobytes())
            return own
        ends = np.cumsum(sizes).tolist()
        return [
            torch.frombuffer(bytearray(body[end - size : end]), dtype=dtype).view(shape)
            for end, size, (shape, dtype) in zip(ends, sizes, forms, strict=True)
        ]

    def _alone(self, cut: _Cut, example: EncodedExample) -> list[torch.Tensor]:
        """[tokens, ...] of each tensor in the cut's result on one row, which goes up to there by itself."""

        def last(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> NoReturn:
                raise _EnoughError(original(*args, **kwargs))

            return forward

        try:
            with emptied_after_errors(self._model), computing(cut.module, last):
                self._task.loss(self._model, self._task.collate([example], "one row", cut.device))
        except _EnoughError as enough:
            return [leaf[0] for leaf in _leaves(enough.result)]
        raise AssertionError(f"{cut.name} did not run")

    @contextmanager
    def _beginning_at(self, cut: _Cut, states: Any, rows: int, tokens: int) -> Iterator[None]:
        """While open, the cut gives `states`, and what runs before it NaN, which takes no memory."""
        with ExitStack() as stack:
            for module, form in cut.skipped:
                nothing = [
                    leaf.new_full((), math.nan).expand(rows, tokens, *leaf.shape[2:])
                    for leaf in _leaves(form)
                ]
                stack.enter_context(computing(module, _giving(_like(form, nothing))))
            stack.enter_context(computing(cut.module, _giving(states)))
            yield


def _giving(result: Any) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
    def make(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        # wraps: callers look at the signature of a model's forward.
        return functools.wraps(original)(lambda *_args, **_kwargs: result)

    return make


def _leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of a module's result, each [rows, tokens, ...]; raises `_FormError` for anything else."""
    if result is None:
        return []
    if type(result) in (tuple, list):
        return [leaf for item in result for leaf in _leaves(item)]
    if isinstance(result, torch.Tensor) and result.dim() > 2 and result.is_floating_point():
        return [result]
    raise _FormError


def _emptied(result: Any) -> Any:
    """A result's form, without its memory."""
    return _like(result, [leaf.new_empty((0, 0, *leaf.shape[2:])) for leaf in _leaves(result)])


def _like(form: Any, leaves: Sequence[torch.Tensor]) -> Any:
    """`leaves` in the form of another result."""
    left = iter(leaves)

    def made(form: Any) -> Any:
        if type(form) in (tuple, list):
            return type(form)(map(made, form))
        return None if form is None else next(left)

    return made(form)
