"""What the cryptography package raises for bytes that hold no key, certificate or request."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.x509 import InvalidVersion

UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    InvalidVersion,
    # OpenSSL's own refusals for which the package has no name, such as a key of a wrong length.
    InternalError,
)
"""Exceptions of the package's `load_...` functions and of what they return."""
