"""The string that lets a process join a fleet: where, what vouches for the server, and a secret.

It is `fedmezo1:` and base64url of

    4 bytes   first bytes of the SHA-256 of the rest, which tell a string that was cut off
    32 bytes  SHA-256 of the CA's certificate, or zeros: the system's CAs vouch for the server
    8 bytes   id of the token
    16 bytes  secret of the token
    2 bytes   port of the enrolment service, big-endian
    the rest  host:port of the coordinator, in ASCII
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field

from fedmezo_core.errors import TokenError
from fedmezo_core.trust.members import SECRET_BYTES, TOKEN_ID_BYTES

PREFIX = "fedmezo1:"
ADDRESS_BYTES_MAX = 260
"""Longest host:port: a DNS name has at most 253 characters."""

_CHECK_BYTES = 4
_FIXED_BYTES = _CHECK_BYTES + 32 + TOKEN_ID_BYTES + SECRET_BYTES + 2


@dataclass(frozen=True, slots=True)
class JoinString:
    """What a join string says."""

    address: str
    """host:port of the coordinator's main port."""
    enrol_port: int
    ca_fingerprint: bytes
    """SHA-256 of the CA's certificate in DER, 32 bytes; empty: the system's CAs decide."""
    token_id: bytes
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        body = b"".join(
            (
                self.ca_fingerprint or bytes(32),
                self.token_id,
                self.secret,
                self.enrol_port.to_bytes(2, "big"),
                self.address.encode("ascii"),
            )
        )
        check = hashlib.sha256(body).digest()[:_CHECK_BYTES]
        return PREFIX + base64.urlsafe_b64encode(check + body).decode().rstrip("=")

    @property
    def enrol_address(self) -> str:
        """host:port of the enrolment service."""
        return f"{self.address.rpartition(':')[0]}:{self.enrol_port}"


def parse_join_string(text: str) -> JoinString:
    """Read a join string; raises `TokenError` for one that is cut off, changed or of no kind."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise TokenError(
            f"A join string begins with {PREFIX}, which this one does not; copy the whole line "
            "that `fedmezo token create` printed."
        )
    encoded = text.removeprefix(PREFIX)
    try:
        whole = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        whole = b""
    check, body = whole[:_CHECK_BYTES], whole[_CHECK_BYTES:]
    is_whole = _FIXED_BYTES < len(whole) <= _FIXED_BYTES + ADDRESS_BYTES_MAX
    if not is_whole or hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        raise TokenError(
            "The join string is cut off or changed; copy the whole line that `fedmezo token "
            "create` printed."
        )
    secret_at = 32 + TOKEN_ID_BYTES
    port_at = secret_at + SECRET_BYTES
    fingerprint = body[:32]
    try:
        address = body[port_at + 2 :].decode("ascii")
    except UnicodeDecodeError:
        raise TokenError("The join string names no address; ask for a new one.") from None
    return JoinString(
        address=address,
        enrol_port=int.from_bytes(body[port_at : port_at + 2], "big"),
        ca_fingerprint=b"" if fingerprint == bytes(32) else fingerprint,
        token_id=body[32:secret_at],
        secret=body[secret_at:port_at],
    )
