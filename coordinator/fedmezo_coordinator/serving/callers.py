"""Who makes a call: the member whose key its certificate has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Protocol

from fedmezo_core.errors import IdentityError
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.certificates import key_fingerprint, public_key_of
from fedmezo_core.trust.members import Members

PRIVATE_SCHEME = "unix:"
"""Beginning of a peer's address on the private socket."""


class PeerContext(Protocol):
    """What a call says of its other side, as gRPC's contexts do."""

    def peer(self) -> str:
        """Its address."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What TLS has found out about it."""


def caller_of(context: PeerContext, members: Members | None) -> Caller:
    """Who makes the call of `context`; without members everybody is `Caller.ANYONE`.

    TLS has checked that the certificate is of the fleet's CA and is valid now. Raises
    `IdentityError` if its key is no member's.
    """
    if context.peer().startswith(PRIVATE_SCHEME):
        return Caller(Role.REPLICA)
    if members is None:
        return Caller.ANYONE
    certificate = b"".join(context.auth_context().get("x509_pem_cert", ()))
    if not certificate:
        raise IdentityError(
            "This coordinator knows its callers by their certificates, and this call shows none; "
            "join with the operator's join string."
        )
    return members.caller(_key_fingerprint_in(certificate))


@lru_cache(maxsize=4096)
def _key_fingerprint_in(certificate: bytes) -> bytes:
    return key_fingerprint(public_key_of(certificate))
