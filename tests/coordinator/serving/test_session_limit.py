"""Limits on sessions and joins, and the time after which a refused worker retries."""

from __future__ import annotations

import contextlib

import pytest

from fedmezo_coordinator.serving.session_limit import RETRY_AFTER_MAX_S, RETRY_UNIT_S, SessionLimit
from fedmezo_core.errors import NotReadyError


def fill(
    session_limit: SessionLimit, places: contextlib.ExitStack, count: int, *, joined: bool
) -> None:
    for _ in range(count):
        permit = places.enter_context(session_limit.session())
        if joined:
            session_limit.joined(permit)


@pytest.mark.parametrize(("inside", "welcome"), [(1, True), (2, True), (3, False)])
def test_no_more_sessions_are_open_than_the_limit_allows(inside: int, welcome: bool) -> None:
    session_limit = SessionLimit(sessions_max=3)
    with contextlib.ExitStack() as places:
        fill(session_limit, places, inside, joined=True)
        if welcome:
            fill(session_limit, places, 1, joined=True)
            assert session_limit.sessions == inside + 1
        else:
            with pytest.raises(NotReadyError, match=r"3 sessions are open, .*\(sessions_max\)"):
                fill(session_limit, places, 1, joined=True)
            assert session_limit.sessions == 3
            assert session_limit.refused == 1
    assert session_limit.sessions == 0


@pytest.mark.parametrize("joins", [1, 2, 3])
def test_no_more_workers_join_at_a_time_than_the_limit_allows(joins: int) -> None:
    session_limit = SessionLimit(joins_at_a_time=2)
    with contextlib.ExitStack() as places:
        fill(session_limit, places, min(joins, 2), joined=False)
        if joins == 3:
            with pytest.raises(
                NotReadyError, match=r"2 workers are joining, .*\(joins_at_a_time\)"
            ):
                fill(session_limit, places, 1, joined=False)
        assert session_limit.joining == min(joins, 2)
    assert session_limit.joining == 0


def test_a_worker_that_has_joined_makes_room_for_the_next() -> None:
    session_limit = SessionLimit(joins_at_a_time=1)
    with session_limit.session() as first:
        session_limit.joined(first)
        session_limit.joined(first)  # once is enough
        with session_limit.session():
            assert (session_limit.sessions, session_limit.joining) == (2, 1)
    assert (session_limit.sessions, session_limit.joining) == (0, 0)


def test_the_more_are_refused_within_a_second_the_later_they_retry() -> None:
    now_s = 10.0
    session_limit = SessionLimit(joins_at_a_time=2, clock=lambda: now_s)

    def refusal() -> float:
        with pytest.raises(NotReadyError) as caught, session_limit.session():
            pass
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    with session_limit.session(), session_limit.session():
        hints = [refusal() for _ in range(4)]
        assert hints == [RETRY_UNIT_S * (1 + n / 2) for n in (1, 2, 3, 4)]
        for _ in range(1000):
            longest = refusal()
        assert longest == RETRY_AFTER_MAX_S
        now_s = 11.0
        assert refusal() == hints[0]


def test_a_full_coordinator_asks_for_more_patience_than_a_busy_one() -> None:
    session_limit = SessionLimit(sessions_max=1)
    with session_limit.session() as permit:
        session_limit.joined(permit)
        with pytest.raises(NotReadyError) as caught, session_limit.session():
            pass
    assert caught.value.retry_after_s == RETRY_AFTER_MAX_S
