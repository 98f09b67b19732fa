"""How long to wait before the next attempt: exponential, with full jitter."""

from __future__ import annotations

BASE_S = 0.25
CAP_S = 10.0
HINT_MAX_S = 60.0
"""Longest hint of a coordinator that is followed."""


def delay_s(attempt: int, uniform: float, *, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Seconds before attempt number `attempt` (from 0); `uniform` is a random number in [0, 1).

    Full jitter (Brooker, "Exponential Backoff and Jitter", 2015) spreads a thousand workers that lost
    the same coordinator over the whole interval.
    """
    return uniform * min(cap_s, base_s * 2.0 ** min(attempt, 30))


def delay_after_refusal_s(
    attempt: int, uniform: float, retry_after_s: float | None, *, longest_s: float = HINT_MAX_S
) -> float:
    """Seconds before the next attempt, at a random time within what the coordinator asked for.

    It knows how many were refused together, which their number of attempts does not tell. Without such a
    hint: `delay_s`. A hint of more than `longest_s` counts as that: no coordinator can send a worker away.
    """
    if retry_after_s is None:
        return delay_s(attempt, uniform)
    return uniform * min(retry_after_s, longest_s)
