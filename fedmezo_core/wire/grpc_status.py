"""The one table between our errors and what travels over gRPC: a status code's name and a reason."""

from __future__ import annotations

from fedmezo_core import errors
from fedmezo_core.errors import FedMezoError, NotReadyError, ProtocolError, UnavailableError

REASON_KEY = "fedmezo-reason"
"""Trailing metadata key that names the error class."""
RETRY_AFTER_KEY = "fedmezo-retry-after-ms"
"""Trailing metadata key with the milliseconds of `retry_after_s`."""


def _tree(root: type[FedMezoError]) -> dict[str, type[FedMezoError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_REASON = _tree(FedMezoError)
"""Class name -> class, for every error there is."""

BY_STATUS: dict[str, type[FedMezoError]] = {
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "RESOURCE_EXHAUSTED": NotReadyError,
    "UNIMPLEMENTED": errors.VersionError,
    "INVALID_ARGUMENT": ProtocolError,
}
"""For statuses that gRPC itself made, which carry no reason."""


def error_from(status: str, reason: str, message: str, retry_after_ms: str = "") -> FedMezoError:
    """The error that a peer meant; the most specific class that is known here."""
    kind = BY_REASON.get(reason) or BY_STATUS.get(status, FedMezoError)
    error = kind(message)
    if retry_after_ms.isdecimal():
        error.retry_after_s = int(retry_after_ms) / 1000
    return error
