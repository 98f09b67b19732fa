"""Shamir's secret sharing (1979) of 32-byte secrets over a prime field.

A secret is the value at 0 of a random polynomial of degree threshold - 1, and a share is the value
at another point. As many shares as the threshold give the secret, and fewer say nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PRIME = 2**256 + 297
"""The smallest prime above all secrets."""
SECRET_BYTES = 32
SHARE_BYTES = 33
"""Size of a share: a number below `PRIME`, little-endian."""
COEFFICIENT_BYTES = 48
"""Random bytes for each coefficient. They are taken modulo `PRIME`, and 128 bits more than it has
leave no bias that anyone could see."""


def random_bytes_needed(threshold: int) -> int:
    """Count of the random bytes that `split` takes."""
    return COEFFICIENT_BYTES * (threshold - 1)


def split(secret: bytes, threshold: int, points: Sequence[int], random: bytes) -> list[bytes]:
    """The share of a 32-byte `secret` at each of `points`, which are distinct and above 0.

    `random` has `random_bytes_needed(threshold)` bytes and must serve nothing else.
    """
    assert len(secret) == SECRET_BYTES
    assert len(random) == random_bytes_needed(threshold)
    coefficients = [int.from_bytes(secret, "little")] + [
        int.from_bytes(random[at : at + COEFFICIENT_BYTES], "little") % PRIME
        for at in range(0, len(random), COEFFICIENT_BYTES)
    ]
    coefficients.reverse()
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """What the shares at `points` are multiplied by to give the secret (Lagrange's weights)."""
    product, weights = math.prod(points) % PRIME, []
    for point in points:
        below = math.prod(other - point for other in points if other != point)
        weights.append(product * pow(point * below, -1, PRIME) % PRIME)
    return weights


def combined_secret(shares: Sequence[bytes], weights: Sequence[int]) -> bytes | None:
    """The secret of these shares, whose points have these weights; None if they give none.

    Shares that do not belong together give another secret, or none.
    """
    value = sum(
        int.from_bytes(share, "little") * weight
        for share, weight in zip(shares, weights, strict=True)
    )
    value %= PRIME
    return value.to_bytes(SECRET_BYTES, "little") if value < 2**256 else None
