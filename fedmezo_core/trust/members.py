"""The members of a fleet and the tokens that let others join: a pure table.

A member's name belongs to the key that enrolled it. Whatever changes the table comes as whole rows,
each of which replaces the row of the same name or id; the caller makes a row durable before it
applies it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import ConfigError, ForbiddenError, RevokedError, TokenError
from fedmezo_core.trust.authorisation import MEMBER_ROLES, Caller, Role

MEMBERS_MAX = 20_000
"""Most members of a fleet, those revoked included."""
TOKENS_MAX = 20_000
"""Most tokens that can still be used."""
TOKEN_USES_MAX = 10_000
"""Most members that one token lets join."""
TOKEN_LIFE_S_MAX = 365 * 86_400
"""Longest time that a token can be used."""

SECRET_BYTES = 16
"""Size of a token's secret: 128 random bits."""
TOKEN_ID_BYTES = 8
"""Size of the random id that finds a token's row."""


@dataclass(frozen=True, slots=True)
class Member:
    """A name, and the key that it belongs to."""

    name: str
    role: Role
    fingerprint: bytes
    """SHA-256 of its certificate's public key; empty while the name waits for a new key."""
    signing_key: bytes = b""
    """Its Ed25519 public key, 32 bytes; empty if it signs nothing."""
    token_id: bytes = b""
    """The token that it joined with; empty for the first operator."""
    enrolled_s: int = 0
    """When its key was enrolled, in seconds since 1970."""
    expires_s: int = 0
    """When its newest certificate expires, in seconds since 1970."""
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """Lets somebody join who knows the secret."""

    id: bytes
    secret_sha256: bytes
    role: Role
    name: str = ""
    """The name that it gives; empty: the one that is asked for."""
    uses_left: int = 1
    expires_s: int = 0
    """The end of its life, in seconds since 1970; 0: it was taken back."""
    replaces: bool = False
    """Whether its name may have a member, whose key the new one replaces."""


Row = Member | Token


class Members:
    """The table, by name, by key and by token."""

    def __init__(self) -> None:
        self._by_name: dict[str, Member] = {}
        self._by_key: dict[bytes, Member] = {}
        self._tokens: dict[bytes, Token] = {}

    def __iter__(self) -> Iterator[Member]:
        """All members, sorted by name."""
        return iter(sorted(self._by_name.values(), key=lambda member: member.name))

    def __len__(self) -> int:
        return len(self._by_name)

    def rows(self) -> Iterator[Row]:
        """Rows from which an equal table can be made."""
        yield from self
        yield from self._tokens.values()

    def apply(self, row: Row) -> None:
        """Put a row in the place of the one with the same name or id.

        Of the tokens for one name, only the newest can be used.
        """
        if isinstance(row, Token):
            if row.name:
                self._tokens = {
                    id_: t for id_, t in self._tokens.items() if t.name != row.name or id_ == row.id
                }
            self._tokens[row.id] = row
            return
        before = self._by_name.get(row.name)
        if before is not None:
            self._by_key.pop(before.fingerprint, None)
        self._by_name[row.name] = row
        if row.fingerprint:
            self._by_key[row.fingerprint] = row

    def forget_tokens_before(self, now_s: int) -> None:
        """Drop the tokens that expired before `now_s`."""
        self._tokens = {id_: t for id_, t in self._tokens.items() if t.expires_s >= now_s}

    # ------------------------------------------------------------ who calls

    def caller(self, fingerprint: bytes) -> Caller:
        """The member whose key has this fingerprint.

        Raises `RevokedError` if it is none, or not one any more.
        """
        member = self._by_key.get(fingerprint)
        if member is None:
            raise RevokedError(
                f"The key {fingerprint.hex()[:16]} is no member's: it was replaced, or another "
                "coordinator's state folder had it; ask the operator for a new join string."
            )
        if member.revoked:
            raise RevokedError(
                f"The {member.role} {member.name} was revoked; ask the operator for a new join "
                "string."
            )
        return Caller(member.role, member.name, member.fingerprint, member.signing_key)

    def named(self, name: str) -> Member:
        """The member of this name; raises `ConfigError` if there is none."""
        member = self._by_name.get(name)
        if member is None:
            raise ConfigError(
                f"No member is called {name[:64]!r}; `fedmezo members` lists the names."
            )
        return member

    # ------------------------------------------------------------ joining

    def admit(
        self,
        token_id: bytes,
        secret: bytes,
        fingerprint: bytes,
        signing_key: bytes,
        asked_name: str,
        now_s: int,
        default_name: str = "",
    ) -> tuple[Member, Token]:
        """The rows of a member that joins with a token: itself, and the token with a use less.

        The name is `asked_name` or else the token's, which must agree, or else `default_name`.

        A repeated call with the same key and token gives the same member and costs no use, so that
        a lost response does no harm. Raises `TokenError` if the token lets nobody join, and
        `ForbiddenError` if the name is not to be had.
        """
        token = self.check_token(token_id, secret, now_s)
        holder = self._by_key.get(fingerprint)
        if holder is not None:
            return self._again(holder, token)
        if not token.uses_left:
            raise TokenError(
                "This join string was used before, as often as it may be; ask the operator for a "
                "new one."
            )
        name = self._free_name(token, asked_name, default_name)
        member = Member(name, token.role, fingerprint, signing_key, token.id, enrolled_s=now_s)
        return member, replace(token, uses_left=token.uses_left - 1)

    def check_token(self, token_id: bytes, secret: bytes, now_s: int) -> Token:
        """The token of this id and secret; raises `TokenError` if there is none to be used now."""
        token = self._tokens.get(token_id)
        expected = token.secret_sha256 if token is not None else bytes(32)
        if not hmac.compare_digest(hashlib.sha256(secret).digest(), expected) or token is None:
            raise TokenError(
                "This coordinator has no such token: it belongs to another coordinator, or it "
                "expired or was taken back long ago; ask the operator for a new join string."
            )
        if not token.expires_s:
            raise TokenError(
                "This join string was taken back when an operator was revoked or got a new key; "
                "ask the operator for a new one."
            )
        if now_s > token.expires_s:
            raise TokenError(
                f"This join string expired {now_s - token.expires_s} s ago by the coordinator's "
                "clock; ask the operator for a new one."
            )
        return token

    def _again(self, holder: Member, token: Token) -> tuple[Member, Token]:
        if holder.revoked or holder.token_id != token.id:
            raise ForbiddenError(
                f"This key belongs to {holder.role} {holder.name}, who joined with another join "
                "string; join from an empty state folder."
            )
        return holder, token

    def _free_name(self, token: Token, asked_name: str, default_name: str) -> str:
        if token.name and asked_name not in ("", token.name):
            raise TokenError(
                f"This join string is for the name {token.name}, not {asked_name[:64]!r}; leave "
                "the name out."
            )
        name = token.name or asked_name or default_name
        check_name(name)
        before = self._by_name.get(name)
        if before is not None and (before.revoked or not token.replaces):
            raise ForbiddenError(
                f"The name {name} belongs to another key; choose another name, or ask the operator "
                f"for a join string from `fedmezo rotate {name}`."
            )
        if before is None and len(self._by_name) >= MEMBERS_MAX:
            raise ForbiddenError(
                f"This coordinator has {MEMBERS_MAX} members, the most that it keeps; begin a new "
                "state folder."
            )
        return name

    # ------------------------------------------------------------ what an operator does

    def new_token(self, token: Token, beside: int = 0) -> Token:
        """Check a new token, which `beside` others will be added with; returns its row.

        Raises `ConfigError` for what no token may be, and `ForbiddenError` if its name is taken.
        """
        if token.role not in MEMBER_ROLES:
            raise ConfigError(f"A token cannot give the role {token.role}; use worker.")
        if token.name:
            check_name(token.name)
            if token.name in self._by_name and not token.replaces:
                raise ForbiddenError(
                    f"The name {token.name} belongs to a member; choose another name, or give the "
                    f"member a new key with `fedmezo rotate {token.name}`."
                )
            if token.uses_left != 1:
                raise ConfigError("A token with a name can be used once; leave uses out.")
        if not 1 <= token.uses_left <= TOKEN_USES_MAX:
            raise ConfigError(f"uses is 1 to {TOKEN_USES_MAX}.")
        if len(self._tokens) + beside >= TOKENS_MAX:
            raise ForbiddenError(
                f"{TOKENS_MAX} tokens can still be used, the most that are kept; wait until some "
                "expire."
            )
        return token

    def revoked(self, name: str) -> list[Row]:
        """The rows that take a member's rights away, and the use of the token it joined with.

        For an operator they take back all tokens, because it can know or have made any of them. The
        name stays with its key.
        """
        member = self.named(name)
        token = self._tokens.get(member.token_id)
        rows: list[Row] = [replace(member, revoked=True), *self._taken_back_with(member)]
        if token is not None and member.role is not Role.OPERATOR:
            rows.append(replace(token, uses_left=0))
        return rows

    def rotated(self, name: str) -> list[Row]:
        """The rows that take a member's key away; the name waits for a new key.

        For an operator they take back all tokens, as when it is revoked.
        """
        member = self.named(name)
        waiting = replace(member, fingerprint=b"", signing_key=b"", revoked=False)
        return [waiting, *self._taken_back_with(member)]

    def _taken_back_with(self, member: Member) -> list[Row]:
        """The tokens that are not used up, without a use, if the member is an operator.

        A token that is used up stays: whoever joined with it may have missed the response.
        """
        if member.role is not Role.OPERATOR:
            return []
        unused = [token for token in self._tokens.values() if token.uses_left]
        return [replace(token, uses_left=0, expires_s=0) for token in unused]


def check_name(name: str) -> None:
    """Raise `ConfigError` unless `name` can be a member's."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"A member cannot be called {name[:64]!r}: use 1 to 64 of a-z, 0-9 and -, beginning "
            "with a letter or digit."
        )
