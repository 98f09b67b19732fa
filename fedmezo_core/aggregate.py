"""What the coordinator makes of projected gradients: the coefficients of a commit.

Computed once, by the coordinator, and journaled; nobody recomputes them. The arithmetic is written
down to the last rounding all the same, so that an auditor with the answers gets the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from fedmezo_core.errors import NumericError


def to_binary32(value: float) -> float:
    """Round `value` once to IEEE 754 binary32, to nearest, ties to even; held as a Python float.

    Raises `NumericError` if the result is NaN or infinite.
    """
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise NumericError(
            f"{value!r} is not a finite binary32 value; lower the learning rate or the clip."
        )
    return rounded


def clip_of(projected_grad_abs_max: float) -> float:
    """Largest size of a binary32 projected gradient that the clip allows.

    A worker that clamps to the clip and then rounds to binary32 may land just above the clip's
    binary64 value; that is still the clip.
    """
    try:
        return max(projected_grad_abs_max, to_binary32(projected_grad_abs_max))
    except NumericError:
        return projected_grad_abs_max


def bits_of(values: Sequence[float]) -> bytes:
    """The binary32 bit patterns of `values`, little-endian, 4 bytes each: -0.0 and 0.0 differ."""
    return struct.pack(f"<{len(values)}f", *values)


def coefficients_of(
    projected_grads: Sequence[float], learning_rate: float, *, answers: int, probes: int
) -> tuple[float, ...]:
    """Coefficients of one answer among `answers` that count equally, each batch measured `probes` times.

    Each is binary32( -(learning_rate * projected_grad) / (answers * probes) ): two roundings to
    binary64, one to binary32 (the divisor is an exact integer). It is the mean over workers and
    directions of MeZO's step (Malladi et al. 2023, algorithms 1 and 2).
    Raises `NumericError` if one is not finite.
    """
    divisor = answers * probes
    return tuple(to_binary32(-(learning_rate * grad) / divisor) for grad in projected_grads)
