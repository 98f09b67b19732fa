"""Who makes a call: the member whose key its certificate has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Protocol

from fedmezo_core.errors import ForbiddenError, IdentityError
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.certificates import key_fingerprint, lifetime_s, public_key_of
from fedmezo_core.trust.members import Members

PRIVATE_SCHEME = "unix:"
"""Beginning of a peer's address on the private socket."""

LOOPBACK = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")
"""Beginnings of a peer's address on the coordinator's own machine."""


class PeerContext(Protocol):
    """What a call says of its other side, as gRPC's contexts do."""

    def peer(self) -> str:
        """Its address."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What TLS has found out about it."""


def caller_of(context: PeerContext, members: Members | None) -> Caller:
    """Who makes the call of `context`; without members everybody is `Caller.ANYONE`.

    TLS has checked that the certificate is of the fleet's CA and was valid when the connection
    began. Raises `IdentityError` if its key is no member's, or if it has expired since.
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
    fingerprint, ends_s = _read(certificate)
    caller = members.caller(fingerprint)
    if time.time() > ends_s:
        raise IdentityError(
            f"The certificate of {caller} expired while its connection was open; connect again "
            "with the renewed one."
        )
    return caller


@lru_cache(maxsize=4096)
def _read(certificate: bytes) -> tuple[bytes, int]:
    """Fingerprint of the certificate's key, and when the certificate ends."""
    return key_fingerprint(public_key_of(certificate)), lifetime_s(certificate)[1]


def check_worker_name(caller: Caller, name: str) -> None:
    """Refuse a hello under another name than the caller's; raises `ForbiddenError`."""
    if caller.name and name != caller.name:
        raise ForbiddenError(
            f"{caller} may not join a run as {name[:64]!r}, a name that belongs to another key; "
            "join under its own name."
        )


def check_operator(caller: Caller, peer: str) -> None:
    """Refuse an order from another machine to a coordinator that knows nobody.

    `peer` is the address of the call. Raises `ForbiddenError`.
    """
    if caller.role is Role.ANYONE and not peer.startswith(LOOPBACK):
        raise ForbiddenError(
            "This coordinator knows nobody by a certificate, so it takes orders from its own "
            "machine alone; run the command there."
        )
