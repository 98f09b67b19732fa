"""What leaves a worker's machine about an error there."""

from __future__ import annotations

from typing import Final

from fedmezo_core.errors import (
    ExcludedError,
    MismatchError,
    PolicyError,
    ProtocolError,
    UnavailableError,
)

_TELLS_NOTHING: Final = (
    UnavailableError,
    ProtocolError,
    MismatchError,
    PolicyError,
    ExcludedError,
)
"""Errors whose sentences say nothing of rows or of paths."""
REASON_BYTES_MAX: Final = 512
"""Longest reason that a coordinator takes from a worker that declines a run."""


def told_to_others(error: Exception, worker: str) -> str:
    """The sentence about an error for whoever asked this worker to take part in a run."""
    if isinstance(error, _TELLS_NOTHING):
        return str(error)
    return f"Worker {worker} cannot serve this run ({type(error).__name__}); its log says why."


def reason_to_decline(error: Exception, worker: str) -> str:
    """The same sentence, as long as a coordinator takes it."""
    return told_to_others(error, worker).encode()[:REASON_BYTES_MAX].decode(errors="ignore")
