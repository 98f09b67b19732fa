"""The table between our errors and their form in gRPC: the name of a status code, and a reason."""

from __future__ import annotations

from fedmezo_core import errors
from fedmezo_core.errors import FedMezoError, NotReadyError, ProtocolError, UnavailableError

REASON_KEY = "fedmezo-reason"
"""Key in the trailing metadata for the name of the error's class."""
RETRY_AFTER_KEY = "fedmezo-retry-after-ms"
"""Key in the trailing metadata for `retry_after_s` in milliseconds."""


_HINT_DIGITS_MAX = 15
"""Longest hint that is read as a number; nobody waits for longer hints."""


def _tree(root: type[FedMezoError]) -> dict[str, type[FedMezoError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_REASON = _tree(FedMezoError)
"""Name of an error's class -> class, for every `FedMezoError`."""

BY_STATUS: dict[str, type[FedMezoError]] = {
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "RESOURCE_EXHAUSTED": NotReadyError,
    "UNIMPLEMENTED": errors.VersionError,
    "INVALID_ARGUMENT": ProtocolError,
}
"""Status -> class, for errors that gRPC itself raises, which have no reason."""


def error_from(status: str, reason: str, message: str, retry_after_ms: str = "") -> FedMezoError:
    """The error that a peer sent, of the most specific class that is known here."""
    kind = BY_REASON.get(reason) or BY_STATUS.get(status, FedMezoError)
    error = kind(message)
    if retry_after_ms.isdecimal() and len(retry_after_ms) <= _HINT_DIGITS_MAX:
        error.retry_after_s = int(retry_after_ms) / 1000
    return error
