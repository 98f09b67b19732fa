"""Shamir's secret sharing: any threshold of shares gives the secret, fewer say nothing of it."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest

from fedmezo_core.trust.secure_aggregation.secret_sharing import (
    PRIME,
    combined_secret,
    random_bytes_needed,
    split,
    weights_at_zero,
)

SECRET = bytes(range(32))


def stream(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


def shares_of(secret: bytes, threshold: int, points: list[int], seed: int = 1) -> dict[int, bytes]:
    random_bytes = stream(seed, random_bytes_needed(threshold))
    return dict(zip(points, split(secret, threshold, points, random_bytes), strict=True))


def combine(shares: dict[int, bytes]) -> bytes | None:
    """The secret of shares by their points."""
    return combined_secret(list(shares.values()), weights_at_zero(list(shares)))


def test_prime_is_prime() -> None:
    assert PRIME > 2**256
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        power = pow(base, odd, PRIME)
        for _ in range(twos - 1):
            if power in (1, PRIME - 1):
                break
            power = power * power % PRIME
        assert power in (1, PRIME - 1)


@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
def test_every_choice_of_shares_gives_the_secret(threshold: int) -> None:
    shares = shares_of(SECRET, threshold, [1, 2, 4, 7, 4096])
    for count in range(threshold, 6):
        for chosen in itertools.combinations(shares, count):
            assert combine({point: shares[point] for point in chosen}) == SECRET


def test_extreme_secrets() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        shares = shares_of(secret, 3, [1, 2, 3, 4])
        assert combine({point: shares[point] for point in (2, 3, 4)}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """Given threshold - 1 shares, each secret has exactly one polynomial: they say nothing."""
    shares = shares_of(SECRET, 3, [1, 2, 3])
    known = {1: shares[1], 2: shares[2]}
    for guess in (bytes(32), b"\xff" * 32, hashlib.sha256(b"any").digest()):
        # The line of Lagrange through (0, guess) and the two known shares, evaluated at 3.
        value = int.from_bytes(guess, "little")
        one, two = (int.from_bytes(known[point], "little") for point in (1, 2))
        third = (value - 3 * one + 3 * two) % PRIME
        assert combine({**known, 3: third.to_bytes(33, "little")}) == guess


def test_shares_are_spread_evenly() -> None:
    """A single share of a threshold of 2 is uniform, whatever the secret."""
    low_bits = [shares_of(bytes(32), 2, [1], seed)[1][0] for seed in range(4096)]
    counts = [low_bits.count(byte) for byte in range(256)]
    chi2 = sum((count - 16) ** 2 / 16 for count in counts)
    assert 160 < chi2 < 360  # 255 degrees of freedom: 255 on average, a deviation of 23


def test_wrong_share_gives_another_secret() -> None:
    shares = shares_of(SECRET, 3, [1, 2, 3])
    shares[2] = shares_of(SECRET, 3, [1, 2, 3], seed=2)[2]
    assert combine(shares) != SECRET


def test_threshold_is_a_polynomial_of_known_coefficients() -> None:
    """Computed by hand: secret 5, coefficients 7 and 11, at 1, 2 and 3."""
    random_bytes = (7).to_bytes(48, "little") + (11).to_bytes(48, "little")
    found = split((5).to_bytes(32, "little"), 3, [1, 2, 3], random_bytes)
    assert [int.from_bytes(share, "little") for share in found] == [23, 63, 125]
