"""Joining a fleet with a join string, and keeping the identity that comes of it.

Nothing secret is sent before the server is known: the first connection only looks for the CA whose
fingerprint the join string has, in what the server sends, and the second one trusts that CA alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import re
import socket
import ssl
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from fedmezo_core.errors import FedMezoError, IdentityError, NotReadyError, UnavailableError
from fedmezo_core.folders import state_home
from fedmezo_core.service.proxies import connect
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import (
    key_of_request,
    lifetime_s,
    new_request,
    public_key_of,
)
from fedmezo_core.trust.identity import (
    Identity,
    Keys,
    forget_keys,
    keys_for,
    load_identity,
    save_identity,
)
from fedmezo_core.trust.join_string import JoinString, parse_join_string
from fedmezo_core.wire.client import (
    CALL_TIMEOUT_S,
    CoordinatorClient,
    channel_options,
    errors_mapped,
    system_roots,
)
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import admin_pb2 as wire
from fedmezo_proto.v1 import admin_pb2_grpc as rpc

log = logging.getLogger("fedmezo.identity")

ROLES = {
    wire.MEMBER_ROLE_WORKER: Role.WORKER,
    wire.MEMBER_ROLE_OBSERVER: Role.OBSERVER,
    wire.MEMBER_ROLE_OPERATOR: Role.OPERATOR,
}
"""A role on the wire -> ours."""
RENEW_AGAIN_S = 600.0
"""Longest time between two attempts to renew."""
LOOK_AGAIN_S = 3600.0
"""Longest sleep: a machine that was suspended finds its certificate old within this time."""


async def become_member(
    join: str,
    folder: Path | None,
    name: str,
    roles: frozenset[Role],
    *,
    give_up_after_s: float = math.inf,
) -> Identity:
    """The identity that a program shows: the one in `folder`, or a new one by the join string.

    `join` is the join string, or empty to use what `folder` has. `folder` None means a folder of
    its own for each string and name, in the user's state folder. Waits for a coordinator that does
    not answer or is busy, as long as for any. Raises `IdentityError` if there is no identity of one
    of `roles` to be had.
    """
    if join:
        parsed = parse_join_string(join)
        folder = folder or members_folder(join, name)
        reconnecting = Reconnecting(log, give_up_after_s=give_up_after_s)
        while True:
            try:
                identity = await join_fleet(parsed, folder, name)
                break
            except (UnavailableError, NotReadyError) as error:
                await reconnecting.wait_after(error)
    else:
        assert folder is not None, "one of the two is given"
        identity = identity_in(folder)
    if identity.role not in roles:
        raise IdentityError(
            f"{identity.name} is {identity.role} of its fleet, and this takes "
            f"{' or '.join(sorted(roles))}; ask the operator for a join string with that role."
        )
    identity.check_time()
    return identity


def members_folder(join: str, name: str) -> Path:
    """Where the identity that comes of a join string and a name is kept by default."""
    own = hashlib.sha256(f"{join.strip()} {name}".encode()).hexdigest()[:16]
    return state_home() / "members" / own


def identity_in(folder: Path) -> Identity:
    """The identity in a member's folder, or the operator's in a coordinator's state folder.

    Raises `IdentityError` if there is none.
    """
    identity = load_identity(folder / "operator") or load_identity(folder)
    if identity is None:
        raise IdentityError(
            f"{folder} holds no identity; join first with the operator's join string (a worker: "
            "--join STRING, join in its file, or FEDMEZO_WORKER_JOIN, and a relay likewise; a "
            "person: fedmezo join STRING), or name the folder that holds it with --state."
        )
    return identity


def machine_name() -> str:
    """This machine's name in the letters that a member's name may have; perhaps empty."""
    name = re.sub("[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower())
    return name.lstrip("-")[:64]


async def join_fleet(join: JoinString, folder: Path, name: str) -> Identity:
    """The identity in `folder`, which is made with the join string unless it was made before.

    `name` is the name to insist on, or empty. Raises `TokenError` or another
    `IdentityError` if there is none to be had, and `UnavailableError` if nobody answers.
    """
    token_id = join.token_id.hex()
    kept = await asyncio.to_thread(load_identity, folder)
    if kept is not None and kept.token_id == token_id:
        return kept
    ca = await asyncio.to_thread(find_ca, join) if join.ca_fingerprint else b""
    keys = await asyncio.to_thread(keys_for, folder, token_id)
    try:
        answer = await _enroll(join, ca, keys, name)
    except (UnavailableError, NotReadyError):
        raise  # The next attempt needs these keys: this one may have gone well.
    except FedMezoError:
        await asyncio.to_thread(forget_keys, folder, token_id)
        raise
    role = ROLES.get(answer.role)
    ours = public_key_of(answer.certificate_chain) == key_of_request(new_request(keys.key))
    if role is None or not ours:
        raise IdentityError(
            f"The coordinator at {join.address} issued a certificate for another key or role; "
            "report this to its operator."
        )
    identity = Identity(
        folder=folder,
        name=answer.name,
        role=role,
        address=join.address,
        token_id=token_id,
        keys=keys,
        certificate=answer.certificate_chain,
        server_ca=answer.server_ca,
    )
    identity.check_time()
    await asyncio.to_thread(save_identity, identity)
    log.info("joined the fleet of %s as %s %s", identity.address, identity.role, identity.name)
    return identity


async def _enroll(join: JoinString, ca: bytes, keys: Keys, name: str) -> wire.EnrollResponse:
    address = join.enrol_address
    async with AsyncExitStack() as stack:
        channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca or system_roots()),
            options=channel_options(address),
        )
        stack.push_async_callback(channel.close)
        with errors_mapped(
            address,
            "that its certificate names that host, and that both clocks are right (a clock that is "
            "a day off is a usual cause)",
        ):
            return await rpc.EnrollmentServiceStub(channel).Enroll(
                wire.EnrollRequest(
                    token_id=join.token_id,
                    secret=join.secret,
                    certificate_request=new_request(keys.key),
                    signing_key=keys.signing_public_key,
                    name=name,
                    default_name=machine_name(),
                ),
                timeout=CALL_TIMEOUT_S,
            )


def find_ca(join: JoinString) -> bytes:
    """The certificate, in PEM, that has the join string's fingerprint, as the server sends it.

    Raises `IdentityError` if the server sends no such certificate or one that is not valid now, and
    `UnavailableError` if nobody answers.
    """
    address = join.enrol_address
    try:
        chain = served_certificates(address)
    except OSError as error:
        raise UnavailableError(
            f"No coordinator lets members join at {address} ({error}); check that it is running, "
            "and that its enrolment port can be reached."
        ) from None
    for certificate in chain:
        if hashlib.sha256(certificate).digest() == join.ca_fingerprint:
            found = ssl.DER_cert_to_PEM_cert(certificate).encode()
            for each in (found, ssl.DER_cert_to_PEM_cert(chain[0]).encode()):
                check_served_time(address, each)
            return found
    raise IdentityError(
        f"What answers at {address} is not the coordinator of this join string: its CA has another "
        "fingerprint. Nothing was sent to it. Check the address; if it is right, the coordinator "
        "has a new state folder, or somebody is in between: ask the operator."
    )


def served_certificates(address: str) -> list[bytes]:
    """The certificates, in DER, that what answers at `address` sends in TLS, its own first.

    Nothing is sent to it, and none of them is trusted. Raises `OSError` if nobody answers, or not
    with TLS.
    """
    host = address.rpartition(":")[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The caller knows what to trust, and nothing is sent.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        connect(address, CALL_TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=host.strip("[]")) as tls,
    ):
        return _chain_of(tls)


def _chain_of(tls: ssl.SSLSocket) -> list[bytes]:
    """The certificates that the server sent, in DER, its own first."""
    public: Any = getattr(tls, "get_unverified_chain", None)
    if public is not None:  # Python 3.13
        return [bytes(certificate) for certificate in public()]
    inner: Any = tls._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_unverified_chain()]


def check_served_time(address: str, certificate: bytes) -> None:
    """Raise `IdentityError` if a certificate (PEM) of `address` is not valid now."""
    begins, ends = lifetime_s(certificate)
    if begins <= time.time() <= ends:
        return
    dates = [
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) for at in (begins, ends, time.time())
    ]
    raise IdentityError(
        f"A certificate of {address} is valid from {dates[0]} to {dates[1]}, and this machine's "
        f"clock says {dates[2]} UTC; set the clock if it is wrong, else tell the operator."
    )


async def renewed(client: CoordinatorClient, identity: Identity) -> Identity:
    """The identity that `client` shows, with a newer certificate, which its folder has too."""
    answer = await client.renew()
    newer = replace(identity, certificate=answer.certificate_chain, server_ca=answer.server_ca)
    if public_key_of(newer.certificate) != public_key_of(identity.certificate):
        raise IdentityError(
            f"The coordinator at {client.address} renewed the certificate for another key; report "
            "this to its operator."
        )
    await asyncio.to_thread(save_identity, newer)
    log.info("the certificate of %s was renewed", newer.name)
    return newer


async def keep_renewed(client: CoordinatorClient, identity: Identity) -> None:
    """Renew the identity that `client` shows in time, and keep it in its folder, for ever."""
    shown = identity
    while True:
        left_s = identity.renew_at_s - time.time()
        if left_s > 0 and shown is identity:
            await asyncio.sleep(min(left_s, LOOK_AGAIN_S))
            continue
        try:
            if left_s <= 0:
                identity = await renewed(client, identity)
            await client.show(identity)
            shown = identity
        # OSError: the folder of the identity, or the system's file of CAs.
        except (FedMezoError, OSError) as error:
            _, ends = lifetime_s(shown.certificate)
            wait_s = min(max((ends - time.time()) / 10, 1.0), RENEW_AGAIN_S)
            log.warning("the certificate of %s cannot be renewed yet: %s", identity.name, error)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
