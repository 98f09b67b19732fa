"""How long to wait before a retry: exponential backoff with full jitter."""

from __future__ import annotations

BASE_S = 0.25
CAP_S = 10.0
HINT_MAX_S = 60.0
"""Longest wait that a coordinator can ask for."""


def delay_s(attempt: int, uniform: float, *, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Seconds to wait before retry number `attempt`, which counts from 0.

    `uniform` is a random number in [0, 1). Full jitter (Brooker, "Exponential Backoff and Jitter",
    2015) spreads a thousand workers that lost the same coordinator over the whole interval.
    """
    return uniform * min(cap_s, base_s * 2.0 ** min(attempt, 30))


def delay_after_refusal_s(
    attempt: int, uniform: float, retry_after_s: float | None, *, longest_s: float = HINT_MAX_S
) -> float:
    """Seconds to wait before a retry: a random part of `retry_after_s`, or `delay_s` if it is None.

    The coordinator knows how many workers it refused at once; a worker's count of attempts does not
    show that. More than `longest_s` counts as `longest_s`, so that a coordinator cannot send a
    worker away for good.
    """
    if retry_after_s is None:
        return delay_s(attempt, uniform)
    return uniform * min(retry_after_s, longest_s)
