"""Rules that make one projected gradient of those that were measured along the same direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.journal.codec import config_from_pb, config_to_pb
from fedmezo_core.machines.aggregate import Share, combined, site_answer
from fedmezo_core.records import Committed, Scalars
from tests.core.machines.rounds_driver import RoundsDriver, config_of, parse

SHARED: dict[str, Any] = {"seed_policy": "shared", "rounds": 9}
RULES = ("trimmed_mean", "median", "sign_vote")
# Columns, one a direction, of five answers in an order that no rule may mind.
ANSWERS = [(5.0, -1.0), (1.0, -2.0), (-90.0, 0.0), (2.0, 3.0), (4.0, -0.0)]
GOLDEN = {
    # Of five, a fifth is one at either end: (1 + 2 + 4) / 3 and (-1 - 0 + 0) / 3.
    "trimmed_mean": (7 / 3, -1 / 3),
    "median": (2.0, 0.0),
    # 4 - 1 and 1 - 2 votes; the usual size is that of (4, -0).
    "sign_vote": (math.sqrt(8), -math.sqrt(8)),
}


def column_of(answers: Sequence[tuple[float, ...]], rule: str, **values: Any) -> tuple[float, ...]:
    config = config_of(aggregation=rule, local_steps=len(answers[0]), **SHARED | values)
    seeds = tuple(range(len(answers[0])))
    [share] = combined([Share(seeds, grads, 0.5, mean_loss=0.7) for grads in answers], config)
    assert (share.seeds, share.learning_rate, share.weight, share.mean_loss) == (seeds, 0.5, 1, 0.7)
    return share.projected_grads


@pytest.mark.parametrize("rule", RULES)
def test_golden_columns(rule: str) -> None:
    assert list(map(repr, column_of(ANSWERS, rule))) == list(map(repr, GOLDEN[rule]))
    assert list(map(repr, column_of(ANSWERS[::-1], rule))) == list(map(repr, GOLDEN[rule]))


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(1, 0.4, 1), (2, 0.49, 2), (4, 0.25, 2), (9, 0.2, 7), (3, 0.0, 3)]
)
def test_a_trimmed_mean_leaves_out_whole_answers_and_never_all(
    count: int, share: float, kept: int
) -> None:
    cut = (count - kept) // 2
    answers = [(float(k * k),) for k in range(count)]
    left = [answers[k][0] for k in range(cut, count - cut)]
    assert column_of(answers, "trimmed_mean", trimmed_share=share) == (sum(left) / kept,)


@given(
    st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 2), min_size=1, max_size=9),
    st.sampled_from(RULES),
    st.randoms(),
)
def test_the_order_of_the_answers_changes_no_bit_and_few_bad_ones_bound_no_result(
    answers: list[tuple[float, ...]], rule: str, shuffler: Any
) -> None:
    found = column_of(answers, rule)
    shuffled = list(answers)
    shuffler.shuffle(shuffled)
    assert list(map(repr, column_of(shuffled, rule))) == list(map(repr, found))
    if rule != "sign_vote":
        bad = [(1e30, -1e30)] * ((len(answers) - 1) // 4)
        for value, column in zip(
            column_of([*answers, *bad], rule), zip(*answers, strict=True), strict=True
        ):
            assert min(column) <= value <= max(column)


@pytest.mark.parametrize("rule", RULES)
def test_a_commit_and_its_replay_hold_what_the_rule_gives(rule: str) -> None:
    run = RoundsDriver(workers_min=5, quorum=5, aggregation=rule, **SHARED)
    run.ready(*"abcde")
    for worker, grads in zip("abcde", ANSWERS, strict=True):
        ready = run.answer(worker, grads=grads)
    [commit] = [record for record in ready.records if isinstance(record, Committed)]
    assert [len(r.coefficients) for r in commit.seed_ranges] == [2], "one for each direction"
    wanted = [-0.5 * value for value in GOLDEN[rule]]
    assert commit.seed_ranges[0].coefficients == pytest.approx(wanted)


@pytest.mark.parametrize("rule", RULES)
def test_a_relay_combines_the_answers_of_its_site_by_the_same_rule(rule: str) -> None:
    answers = [Scalars(grads, None, None) for grads in ANSWERS]
    config = config_of(aggregation=rule, **SHARED)
    assert site_answer(answers, config).projected_grads == pytest.approx(GOLDEN[rule])
    assert site_answer(answers, config).rows == 5


def test_a_new_run_of_shared_directions_trims_and_older_contracts_keep_their_bytes() -> None:
    assert parse().aggregation == config_of(**SHARED).aggregation == "mean"
    new = parse(seed_policy="shared")
    assert (new.aggregation, new.trimmed_share) == ("trimmed_mean", 0.2)
    assert parse(seed_policy="shared", weighting="rows").aggregation == "mean"
    assert parse(seed_policy="shared", personal_rate="random").aggregation == "mean"
    assert config_from_pb(config_to_pb(new)) == new
    for field in ("aggregation", "trimmed_share"):
        assert not config_to_pb(config_of(**SHARED)).HasField(field)
    assert new.recipe == parse(seed_policy="shared", aggregation="mean").recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "workers do not have with seed_policy 'per_worker'; choose shared"),
        ({"seed_policy": "pool"}, "workers do not have with seed_policy 'pool'"),
        ({"seed_policy": "shared", "weighting": "rows"}, "counts every answer alike"),
        ({"seed_policy": "shared", "personal_rate": "random"}, "counts every answer alike"),
        ({"seed_policy": "shared", "trimmed_share": 0.5}, "trimmed_share"),
    ],
)
def test_what_a_rule_cannot_be_combined_with_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(aggregation="median", **values)
