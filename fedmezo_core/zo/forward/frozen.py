"""The frozen part of a model: the modules that run before anything trained.

What they compute depends neither on what training changes nor on the point of weight space. So a
pass over several points computes it for one copy of the batch, and repeats it (decision 0014). If
several passes are over the same batch, the later ones take the results of the first. And if a store
has kept the results of each row for the whole run (`RowStates`, decision 0024), the first pass
begins with those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from torch import nn

from fedmezo_core.zo.forward.copies import Copies, DistinctRows, InseparableError
from fedmezo_core.zo.model.modules import computing, computing_elements, frozen_modules

FROZEN_SHARE_MIN: Final = 0.5
"""Share of a model that must be frozen and run first to be worth small passes or kept states."""

FrozenResult = tuple[nn.Module, Any]
"""A frozen module, and its result for one copy of a batch."""


class FrozenPart:
    """Finds the frozen part of one model, and leaves it out of passes as far as it is known.

    Which modules belong to it shows as they run: the first pass over several points tries all
    frozen modules, and later passes only those that ran before anything trained.
    """

    def __init__(self, model: nn.Module, owners: Mapping[nn.Module, object]) -> None:
        """`owners` are the modules with trained parameters; the mapping may change later."""
        self._model = model
        self._owners = owners
        self._modules = frozen_modules(model, owners)
        self._ran_first: dict[nn.Module, None] = {}
        self._share: float | None = None
        self._known: list[FrozenResult] = []
        self._keeps = False
        self._copies: Copies | DistinctRows = Copies(1, 0, 0)
        self._is_first = False
        """Whether nothing trained has run in this pass yet."""
        self._calls = 0

    @property
    def share(self) -> float:
        """The share of the model's parameters in the frozen part, from 0 to 1.

        Parameters that are looked up (embeddings) do not count. 0 before the first pass over
        several points.
        """
        return self._share or 0.0

    def compute_every_copy(self) -> bool:
        """Compute the frozen part for all copies from now on; False if that was so already."""
        did, self._modules, self._share = bool(self._modules), [], 0.0
        return did

    @contextmanager
    def holding(
        self, known: Sequence[FrozenResult] = (), *, keeps: bool
    ) -> Iterator[list[FrozenResult]]:
        """While open, all passes are over one batch, of which the results `known` are known.

        They are in the order in which their modules run. With `keeps`, further results of the
        frozen part are added to the list that this yields, so that the next pass does not repeat
        the work. A call within another holds other results for as long as it is open.
        """
        before = self._known, self._keeps
        self._known, self._keeps = list(known), keeps
        try:
            yield self._known
        finally:
            self._known, self._keeps = before

    @contextmanager
    def left_out(self, copies: Copies | DistinctRows) -> Iterator[None]:
        """While open, one pass over `copies` leaves out what is known, and computes one copy.

        Of copies that are not all alike, it computes one row of each kind.
        """
        several = copies.count > 1 or self._keeps
        searches = several and bool(self._modules or self._known)
        modules = dict.fromkeys(module for module, _ in self._known)
        with ExitStack() as stack:
            if searches:
                modules.update(dict.fromkeys(self._modules))
                for owner in self._owners:
                    stack.enter_context(computing(owner, self._trained))
            for module in modules:
                stack.enter_context(computing(module, self._frozen))
            self._copies = copies
            self.restart()
            yield
        if several and self._share is None:
            # The same modules run first in every pass.
            self._modules = list(self._ran_first)
            whole, frozen = computing_elements([self._model]), computing_elements(self._modules)
            self._share = frozen / max(1, whole)

    def restart(self) -> None:
        """Compute the pass once more from its beginning."""
        self._calls, self._is_first = 0, True

    def _trained(self, _: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._is_first = False
            return original(*args, **kwargs)

        return forward

    def _frozen(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        # wraps: callers look at the signature of a model's forward.
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            copies, known, call = self._copies, self._known, self._calls
            is_known = call < len(known) and known[call][0] is module
            if not self._is_first or not (is_known or copies.separable((args, kwargs))):
                return original(*args, **kwargs)
            if is_known:
                single = known[call][1]
            else:
                one_args, one_kwargs = copies.single((args, kwargs))
                single = original(*one_args, **one_kwargs)
            try:
                result = copies.repeated(single)
            except InseparableError:
                self._modules = [other for other in self._modules if other is not module]
                return original(*args, **kwargs)
            if self._keeps and not is_known:
                known[call:] = [(module, single)]
            self._calls += 1
            self._ran_first[module] = None
            return result

        return forward
