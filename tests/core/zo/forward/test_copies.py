"""Copies of a batch in nested arguments and results, such as those of transformers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from fedmezo_core.zo.forward.copies import Copies, DistinctRows, InseparableError, tensors_in

COPIES = Copies(count=3, rows=2, tokens=5)


class _Pair(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


def _hidden(rows: int) -> torch.Tensor:
    return torch.arange(float(rows * 10)).view(rows, 5, 2)


def _nested(rows: int) -> dict[str, Any]:
    hidden = _hidden(rows)
    return {
        "output": BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(hidden, hidden + 1),
        ),
        "ordered": OrderedDict(a=[hidden], b=None),
        "pair": _Pair(hidden.flatten(0, 1), None),
    }


def _same(one: Any, other: Any) -> bool:
    ours, theirs = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return ours[1] == theirs[1] and all(
        a is b or torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True)
    )


def test_a_result_is_joined_in_its_own_form() -> None:
    whole = _nested(6)
    parts = [COPIES.part(index, whole) for index in range(3)]
    assert type(parts[0]["output"]) is BaseModelOutputWithPast
    assert torch.equal(parts[1]["output"].last_hidden_state, _hidden(6)[2:4])
    assert torch.equal(parts[1]["pair"].hidden, _hidden(6).flatten(0, 1)[10:20])
    assert _same(COPIES.joined(parts, constant=False), whole)


def test_of_rows_that_are_alike_one_of_each_kind_is_computed() -> None:
    kinds = DistinctRows.of(["a", "b", "a", "c", "b", "b"], COPIES, torch.device("cpu"))
    single = kinds.single(_nested(6))
    assert torch.equal(single["output"].last_hidden_state, _hidden(6)[[0, 1, 3]])
    assert torch.equal(single["pair"].hidden, _hidden(6)[[0, 1, 3]].flatten(0, 1))
    repeated = kinds.repeated(single)
    assert torch.equal(repeated["output"].last_hidden_state, _hidden(6)[[0, 1, 0, 3, 1, 1]])
    assert torch.equal(repeated["pair"].hidden, _hidden(6)[[0, 1, 0, 3, 1, 1]].flatten(0, 1))
    assert len(kinds.repeated(_hidden(1))) == 1, "meant for every row"
    nothing = torch.tensor(1.0).expand(3, 5, 2)
    assert kinds.repeated(nothing).shape == (6, 5, 2)
    assert not any(kinds.repeated(nothing).stride()), "a single number takes no memory"
    with pytest.raises(InseparableError):
        kinds.repeated(_hidden(4))


def test_a_result_is_repeated_in_its_own_form() -> None:
    repeated = COPIES.repeated(_nested(2))
    assert type(repeated["output"]) is BaseModelOutputWithPast
    assert all(_same(COPIES.part(index, repeated), _nested(2)) for index in range(3))
    assert len(COPIES.repeated(_hidden(1))) == 1, "meant for every row"


def test_what_is_not_of_the_batch_is_common_to_all_copies() -> None:
    table, rate = torch.ones(7, 2), 0.5
    assert COPIES.part(2, (table, rate, "name", None)) == (table, rate, "name", None)
    ones = [torch.ones(1, 4)] * 3
    assert COPIES.joined(ones, constant=True).shape == (6, 4)


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_cache_is_passed_on_whole(is_registered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after some library has taught pytree to take it apart, as exporting does."""
    cache = DynamicCache()
    cache.update(_hidden(6)[:, None], _hidden(6)[:, None], 0)
    if is_registered:
        # A copy of what is registered, so that nothing of it is left after the test.
        monkeypatch.setattr(pytree, "SUPPORTED_NODES", dict(pytree.SUPPORTED_NODES))
        pytree.SUPPORTED_NODES[DynamicCache] = pytree.NodeDef(
            DynamicCache,
            lambda kept: ([kept.layers[0].keys], None),
            lambda *_: DynamicCache(),
            None,
        )
        assert len(pytree.tree_leaves(cache)) == 1
        assert isinstance(pytree.tree_leaves(cache)[0], torch.Tensor)
    arguments = ((_hidden(6),), {"past_key_values": cache})
    assert COPIES.separable(((_hidden(6),), {"past_key_values": None}))
    assert not COPIES.separable(arguments)
    assert COPIES.part(1, arguments)[1]["past_key_values"] is cache
    assert len(tensors_in(arguments)) == 1
    with pytest.raises(InseparableError):
        COPIES.repeated(BaseModelOutputWithPast(_hidden(2), cache))


def test_what_does_not_divide_is_refused() -> None:
    assert not COPIES.separable((torch.ones(6, 5), torch.ones(4, 5, 2))), "a float of other rows"
    assert not COPIES.separable((torch.ones(1, 5),)), "nothing of the batch"
    for result in (torch.ones(7, 2), torch.tensor(1.0), "text"):
        with pytest.raises(InseparableError):
            COPIES.repeated([result])
        with pytest.raises(InseparableError):
            COPIES.joined([[result]] * 3, constant=False)
