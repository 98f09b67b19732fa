"""The members of a running coordinator: joining, renewing, and the operator's commands.

Every method answers one request. A change is on the disk before it counts, and one change is made
after the other.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fedmezo_coordinator.admission.members_file import MembersFile
from fedmezo_coordinator.admission.state_folder import StateFolder
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    IdentityError,
    ProtocolError,
    RevokedError,
)
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.certificates import (
    MEMBER_LIFE_S,
    RENEW_AT,
    certificate_fingerprint,
    issue_member,
    key_fingerprint,
    key_of_request,
    lifetime_s,
)
from fedmezo_core.trust.join_string import JoinString
from fedmezo_core.trust.members import (
    SECRET_BYTES,
    TOKEN_ID_BYTES,
    TOKEN_LIFE_S_MAX,
    Member,
    Members,
    Row,
    Token,
)
from fedmezo_core.wire.enrolment import ROLES
from fedmezo_proto.v1 import admin_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

TOKEN_LIFE_S = 3600
"""Default time that a token can be used."""
TOKENS_AT_ONCE_MAX = 1000
"""Most tokens that one call makes."""
MEMBERS_IN_A_LIST_MAX = 1000
"""Most members in one answer."""

WIRE_ROLES = {role: number for number, role in ROLES.items()}
"""Our roles -> those on the wire."""

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])

LoseRights = Callable[[str, FedMezoError], None]
"""Ends whatever a member has open: its name, and the error that tells it why."""


def _to_its_end(method: Method) -> Method:
    """Let a method finish even if its caller goes away: the disk and the table must agree."""

    @functools.wraps(method)
    async def wrapper(self: Fleet, *arguments: Any) -> Any:
        async def work() -> Any:
            async with self._one_change:
                return await method(self, *arguments)

        task = asyncio.create_task(work())
        self._changing.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    return wrapper  # type: ignore[return-value]


class Fleet:
    """The members of one state folder, while its coordinator runs."""

    def __init__(
        self,
        state: StateFolder,
        *,
        server_ca: Path | None = None,
        has_own_certificate: bool = False,
        certificate_life_s: int = MEMBER_LIFE_S,
    ) -> None:
        """Take the state folder; raises `ConfigError` if another coordinator has it.

        With `has_own_certificate` the coordinator shows a certificate that the state folder's CA
        did not issue; `server_ca` is then the PEM file of what vouches for it, or None if workers'
        systems know that. `certificate_life_s` is that of members' certificates.
        """
        self.state = state
        self._life_s = certificate_life_s
        self.server_ca = state.authority.certificate
        if has_own_certificate:
            self.server_ca = b"" if server_ca is None else _certificate_in(server_ca)
        self._fingerprint = certificate_fingerprint(self.server_ca) if self.server_ca else b""
        self._file = MembersFile(state.members_path)
        self.members: Members = self._file.open(int(time.time()))
        self._one_change = asyncio.Lock()
        self._changing: set[asyncio.Task[Any]] = set()
        self.join_address = ""
        """host:port that join strings name, once the coordinator listens."""
        self.enrol_port = 0
        """Port of the enrolment service, once the coordinator listens."""
        self.on_loss: LoseRights | None = None
        self.is_connected: Callable[[str], bool] = lambda _: False

    def close(self) -> None:
        """Let another coordinator have the state folder."""
        self._file.close()

    def _changed(self, task: asyncio.Task[Any]) -> None:
        self._changing.discard(task)
        if not task.cancelled():
            task.exception()  # The caller, which got it too, may be gone.

    # ------------------------------------------------------------ members

    async def enroll(self, request: wire.EnrollRequest) -> wire.EnrollResponse:
        """Issue a certificate to a key that comes with a token."""
        if max(len(request.name), len(request.default_name)) > 64 or len(request.signing_key) != 32:
            raise ProtocolError(
                "An enrolment has a name of at most 64 characters and a signing key of 32 bytes; "
                "use the same FedMeZO version."
            )
        # The token first: whoever has none costs a hash, waits for nobody, and no signature is
        # checked.
        self.members.check_token(request.token_id, request.secret, int(time.time()))
        return await self._enroll(request, key_of_request(request.certificate_request))

    @_to_its_end
    async def _enroll(self, request: wire.EnrollRequest, public_key: bytes) -> wire.EnrollResponse:
        member, token = self.members.admit(
            request.token_id,
            request.secret,
            key_fingerprint(public_key),
            request.signing_key,
            request.name,
            int(time.time()),
            request.default_name,
        )
        certificate = self._issue(public_key, member.name)
        if await self._record_end(member, certificate, token):
            log.info("%s %s joined the fleet", member.role, member.name)
        return wire.EnrollResponse(
            certificate_chain=certificate + self.state.authority.certificate,
            server_ca=self.server_ca,
            name=member.name,
            role=WIRE_ROLES[member.role],
        )

    @_to_its_end
    async def renew(self, caller: Caller, public_key: bytes) -> wire.RenewResponse:
        """Issue a newer certificate to a member for the key that it has."""
        self._still_member(caller)
        certificate = self._issue(public_key, caller.name)
        if await self._record_end(self.members.named(caller.name), certificate):
            log.info("the certificate of %s was renewed", caller)
        return wire.RenewResponse(
            certificate_chain=certificate + self.state.authority.certificate,
            server_ca=self.server_ca,
        )

    async def _record_end(self, member: Member, certificate: bytes, *more: Row) -> bool:
        """Record when a member's newest certificate ends, with more rows; returns whether it did.

        If that is hardly later than what is recorded, nothing is written: a member that asks again
        and again fills no disk.
        """
        expires_s = lifetime_s(certificate)[1]
        if expires_s - member.expires_s < self._life_s * (1 - RENEW_AT):
            return False
        await self._change([*more, replace(member, expires_s=expires_s)])
        return True

    def _issue(self, public_key: bytes, name: str) -> bytes:
        return issue_member(self.state.authority, public_key, name, int(time.time()), self._life_s)

    # ------------------------------------------------------------ the operator's commands

    @_to_its_end
    async def create_tokens(
        self, request: wire.CreateTokensRequest, caller: Caller
    ) -> wire.CreateTokensResponse:
        """Make tokens, one for each name or one without a name."""
        self._still_member(caller)
        if len(request.names) > TOKENS_AT_ONCE_MAX:
            raise ConfigError(f"One call makes at most {TOKENS_AT_ONCE_MAX} tokens; make several.")
        if len(set(request.names)) < len(request.names):
            raise ConfigError("A name is there twice; each member needs its own.")
        role = ROLES.get(request.role)
        if role is None:
            raise ConfigError("role is worker, observer or operator.")
        made: list[tuple[Token, bytes]] = []
        self.members.forget_tokens_before(int(time.time()))
        for name in request.names or [""]:
            token, secret = self._token(role, name, request.uses or 1, request.life_s)
            made.append((self.members.new_token(token, beside=len(made)), secret))
        await self._change([token for token, _ in made])
        log.info("%s made tokens for %s: %d", caller, role, len(made))
        return wire.CreateTokensResponse(tokens=[self._shown(*one) for one in made])

    async def list_members(
        self, request: wire.ListMembersRequest, _caller: Caller
    ) -> wire.ListMembersResponse:
        """List the members after a name."""
        after = (member for member in self.members if member.name > request.after)
        shown = [
            wire.MemberStatus(
                name=member.name,
                role=WIRE_ROLES[member.role],
                fingerprint=member.fingerprint,
                enrolled_s=member.enrolled_s,
                expires_s=member.expires_s,
                revoked=member.revoked,
                connected=self.is_connected(member.name),
            )
            for _, member in zip(range(MEMBERS_IN_A_LIST_MAX), after, strict=False)
        ]
        return wire.ListMembersResponse(members=shown)

    @_to_its_end
    async def revoke_member(
        self, request: wire.RevokeMemberRequest, caller: Caller
    ) -> wire.RevokeMemberResponse:
        """Take a member's rights away, and end what it has open."""
        self._still_member(caller)
        self._not_oneself(request.name, caller)
        await self._change(self.members.revoked(request.name))
        log.warning("%s revoked %s", caller, request.name)
        self._lose(request.name, "was revoked")
        return wire.RevokeMemberResponse()

    @_to_its_end
    async def rotate_member(
        self, request: wire.RotateMemberRequest, caller: Caller
    ) -> wire.RotateMemberResponse:
        """Take a member's key away, end what it has open, and make a token for a new key."""
        self._still_member(caller)
        self._not_oneself(request.name, caller)
        self.members.forget_tokens_before(int(time.time()))
        rows, role = self.members.rotated(request.name), self.members.named(request.name).role
        token, secret = self._token(role, request.name, 1, request.life_s, replaces=True)
        # Last, because a row of an older token of this name would take its place.
        await self._change([*rows, self.members.new_token(token)])
        log.warning("%s took the key of %s away", caller, request.name)
        self._lose(request.name, "has to join with a new join string")
        return wire.RotateMemberResponse(token=self._shown(token, secret))

    def _still_member(self, caller: Caller) -> None:
        """Raise `RevokedError` if the caller lost its rights while it waited for its turn."""
        self.members.caller(caller.fingerprint)

    def _not_oneself(self, name: str, caller: Caller) -> None:
        if name == caller.name:
            raise ConfigError(
                f"{name} is who asks, and would lock itself out; let another operator do it."
            )

    def _token(
        self, role: Role, name: str, uses: int, life_s: int, *, replaces: bool = False
    ) -> tuple[Token, bytes]:
        if life_s > TOKEN_LIFE_S_MAX:
            raise ConfigError(f"A token lives at most {TOKEN_LIFE_S_MAX // 86_400} days.")
        secret = secrets.token_bytes(SECRET_BYTES)
        token = Token(
            id=secrets.token_bytes(TOKEN_ID_BYTES),
            secret_sha256=hashlib.sha256(secret).digest(),
            role=role,
            name=name,
            uses_left=uses,
            expires_s=int(time.time()) + (life_s or TOKEN_LIFE_S),
            replaces=replaces,
        )
        return token, secret

    def _shown(self, token: Token, secret: bytes) -> wire.JoinToken:
        join = JoinString(self.join_address, self.enrol_port, self._fingerprint, token.id, secret)
        return wire.JoinToken(name=token.name, join_string=str(join))

    async def _change(self, rows: Sequence[Row]) -> None:
        """Make rows durable, then let them count."""
        try:
            await asyncio.to_thread(self._file.append, rows)
        except OSError as error:
            raise ConfigError(
                f"The members file cannot be written ({error.strerror}), so nothing was changed; "
                "look at the coordinator's disk."
            ) from None
        for row in rows:
            self.members.apply(row)

    def _lose(self, name: str, what: str) -> None:
        if self.on_loss is not None:
            self.on_loss(
                name,
                RevokedError(f"Worker {name} {what}; ask the operator for a new join string."),
            )


def _certificate_in(path: Path) -> bytes:
    try:
        certificate = path.read_bytes()
        certificate_fingerprint(certificate)
    except (OSError, IdentityError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no certificate in it"
        raise ConfigError(
            f"tls_cert_ca {path} cannot be read ({reason}); give the CA's PEM file."
        ) from None
    return certificate
