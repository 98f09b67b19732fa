"""How long to wait before the next attempt: exponential, with full jitter."""

from __future__ import annotations

BASE_S = 0.25
CAP_S = 10.0


def delay_s(attempt: int, uniform: float, *, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Seconds before attempt number `attempt` (from 0); `uniform` is a random number in [0, 1).

    Full jitter (Brooker, "Exponential Backoff and Jitter", 2015) spreads a thousand workers that lost
    the same coordinator over the whole interval.
    """
    return uniform * min(cap_s, base_s * 2.0 ** min(attempt, 30))
