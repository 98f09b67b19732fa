"""Exact samples of the discrete Gaussian, from the operating system's random numbers.

Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (2020), algorithms 1
to 3. All arithmetic is on integers, so that no rounding leaves marks in the low bits of the noise
(Mironov 2012). Never seed this: whoever can replay the noise can subtract it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

Below = Callable[[int], int]
"""Gives a uniform integer from 0 to below its argument."""


def discrete_gaussian(sigma: int, below: Below = secrets.randbelow) -> int:
    """A sample of the discrete Gaussian with the probability of x in proportion to
    exp(-x^2 / (2 sigma^2)); `sigma` is at least 1.
    """
    variance, scale = sigma * sigma, sigma + 1
    while True:
        sample = _discrete_laplace(scale, below)
        # exp(-(|sample| - variance / scale)^2 / (2 variance)), as a fraction.
        distance = abs(sample) * scale - variance
        if _is_head(distance * distance, 2 * variance * scale * scale, below):
            return sample


def _discrete_laplace(scale: int, below: Below) -> int:
    """A sample whose probability is in proportion to exp(-|x| / scale)."""
    while True:
        part = below(scale)
        if not _is_head(part, scale, below):
            continue
        whole = 0
        while _is_head(1, 1, below):
            whole += 1
        size, is_negative = part + scale * whole, bool(below(2))
        if size or not is_negative:
            return -size if is_negative else size


def _is_head(numerator: int, denominator: int, below: Below) -> bool:
    """Whether a coin comes up heads whose chance is exp(-numerator / denominator)."""
    while numerator > denominator:
        if not _is_head(1, 1, below):
            return False
        numerator -= denominator
    count = 1
    while below(denominator * count) < numerator:
        count += 1
    return count % 2 == 1
