"""Full jitter: somewhere between at once and the bound, and the bound doubles up to a cap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.wire.backoff import BASE_S, CAP_S, HINT_MAX_S, delay_s


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_within_its_bounds(attempt: int, uniform: float) -> None:
    assert 0 <= delay_s(attempt, uniform) <= min(CAP_S, BASE_S * 2.0 ** min(attempt, 30))


@given(st.integers(0, 100))
def test_the_whole_interval_is_used(attempt: int) -> None:
    assert delay_s(attempt, 0.0) == 0.0
    assert delay_s(attempt, 0.5) * 2 == min(CAP_S, BASE_S * 2.0**attempt)


def test_base_and_cap_can_be_given() -> None:
    assert delay_s(0, 0.5, base_s=2.0, cap_s=60.0) == 1.0
    assert delay_s(9, 0.5, base_s=2.0, cap_s=60.0) == 30.0


@given(
    st.integers(0, 100),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1e9, allow_nan=False),
)
def test_a_hint_of_the_coordinator_takes_the_place_of_the_attempts(
    attempt: int, uniform: float, hint_s: float
) -> None:
    assert delay_s(attempt, uniform, None) == delay_s(attempt, uniform)
    assert delay_s(attempt, uniform, hint_s) == uniform * min(hint_s, HINT_MAX_S)
