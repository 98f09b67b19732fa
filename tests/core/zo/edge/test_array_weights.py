"""The adapter as arrays: the bits, the digests and the refusals of the torch party."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import DivergedError, FedMezoError, MismatchError, NumericError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.edge.array_weights import ArrayWeights
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.noise import Operands, Rounding
from fedmezo_core.zo.noise.spec import Distribution
from fedmezo_core.zo.party import open_party
from fedmezo_core.zo.plain.arrays import materialize_array
from fedmezo_core.zo.weights import Weights
from tests.core.zo.edge.conftest import Run, contract

SHARED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
commits = st.builds(
    lambda pairs, rounding, decay, from_base: Commit(
        np.array([seed for seed, _ in pairs], dtype=np.uint64),
        np.array([coefficient for _, coefficient in pairs], dtype=np.float32),
        rounding,
        decay=decay,
        from_base=from_base,
    ),
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(-1, 1, width=32)), max_size=5),
    st.integers(0, 2**64 - 1),
    st.sampled_from([1.0, 0.5, float(np.float32(0.999))]),
    st.booleans(),
)


def _weights(run: Run) -> ArrayWeights:
    form = read_form(run.form, run.genesis)
    return ArrayWeights(form.start, form.manifest, run.genesis.config, threads=1)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "low_rank_2"])
@pytest.mark.parametrize("freeze_a", [True, False])
def test_commits_give_the_bits_of_the_torch_party(
    run_of: Callable[[RunConfig], Run], distribution: str, freeze_a: bool
) -> None:
    config = contract(freeze_a=freeze_a, distribution=distribution, seed_policy="pool")
    run = run_of(config)

    @SHARED
    @given(journal=st.lists(commits, min_size=1, max_size=5), cut=st.integers(0, 5))
    def check(journal: Sequence[Commit], cut: int) -> None:
        arrays = _weights(run)
        torch_side = open_party(run.genesis.config, str(run.party.loaded.folder), threads=1).weights
        assert arrays.digest() == torch_side.digest()
        torch_side.apply(1, journal)
        for part, first in ((journal[:cut], 1), (journal[cut:], 1 + len(journal[:cut]))):
            if part:
                arrays.apply(first, part)
        assert arrays.digest() == torch_side.digest()
        assert arrays.round == torch_side.round

    check()


def test_it_refuses_what_the_torch_party_refuses(run_of: Callable[[RunConfig], Run]) -> None:
    run = run_of(contract())
    late = Commit(np.array([1], np.uint64), np.array([0.1], np.float32), 0)
    from_base = Commit(late.seeds, late.coefficients, 0, from_base=True)
    much = Commit(late.seeds, np.array([3e38], np.float32), 0)
    cases: list[tuple[int, list[Commit], type[FedMezoError]]] = [
        (2, [late], DivergedError),
        (1, [from_base], MismatchError),
        (1, [much, much], NumericError),
    ]
    for first, journal, kind in cases:
        sentences = []
        for weights in (_weights(run), _party_weights(run)):
            with pytest.raises(kind) as caught:
                weights.apply(first, journal)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def _party_weights(run: Run) -> Weights:
    return open_party(run.genesis.config, str(run.party.loaded.folder), threads=1).weights


def test_an_interrupted_commit_leaves_no_weights(run_of: Callable[[RunConfig], Run]) -> None:
    weights = _weights(run_of(contract()))
    much = Commit(np.array([1], np.uint64), np.array([3e38], np.float32), 0)
    with pytest.raises(NumericError):
        weights.apply(1, [much, much])
    with pytest.raises(DivergedError, match="start again from the base"):
        weights.digest()


def test_a_moved_adapter_is_a_commit_that_was_not_applied(
    run_of: Callable[[RunConfig], Run],
) -> None:
    run = run_of(contract())
    weights, other = _weights(run), _weights(run)
    before = weights.digest()
    commit = Commit(np.array([5], np.uint64), np.array([0.01], np.float32), 0)
    moved = weights.moved(commit)
    other.apply(1, [commit])
    assert weights.digest() == before
    assert moved.keys() == other.adapter.keys()
    assert all(np.array_equal(moved[name], other.adapter[name]) for name in moved)


def test_arrays_that_do_not_fit_are_refused() -> None:
    operands = Operands(0, Distribution.RADEMACHER, Rounding.NEAREST)
    for out in (np.zeros((2, 3), np.float32), np.zeros(4, np.float64)):
        with pytest.raises(MismatchError, match="give contiguous float32 arrays of one shape"):
            materialize_array(out, np.zeros(4, np.float32), [], operands)  # type: ignore[arg-type]
    empty = np.zeros((0, 3), np.float32)
    materialize_array(empty, empty, [], operands)
