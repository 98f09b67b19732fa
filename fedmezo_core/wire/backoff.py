"""How long to wait before the next attempt: exponential backoff with full jitter. Pure."""

from __future__ import annotations

BASE_S = 0.25
CAP_S = 10.0
HINT_MAX_S = 60.0
"""Longest hint that is followed: no coordinator can send a worker away for hours."""


def delay_s(
    attempt: int,
    uniform: float,
    retry_after_s: float | None = None,
    *,
    base_s: float = BASE_S,
    cap_s: float = CAP_S,
) -> float:
    """Seconds to wait before the next attempt, after `attempt` failed ones since the last success.

    `uniform` is a random number in [0, 1). Full jitter (Brooker, "Exponential Backoff and Jitter",
    2015) spreads a thousand workers that lost the same coordinator over the whole interval. The
    interval doubles from `base_s` up to `cap_s`. `retry_after_s` is the peer's hint, in seconds; it
    replaces that interval, because the peer knows how many callers it refused.
    """
    if retry_after_s is not None:
        return uniform * min(retry_after_s, HINT_MAX_S)
    return uniform * min(cap_s, base_s * 2.0 ** min(attempt, 30))
