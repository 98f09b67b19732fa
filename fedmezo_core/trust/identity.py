"""A member's identity on its own disk: keys that never leave it, and the newest certificate.

    identity.json            name, role, address, and which folder is the newest
    <token's id>/key.pem           the key of its certificate
    <token's id>/signing.pem       the key that signs its answers
    <token's id>/certificate.pem   its certificate, with what leads to the CA
    <token's id>/server-ca.pem     what vouches for the coordinator; empty: the system's CAs

A new join string makes a folder of its own, and `identity.json` names it once the certificate is
there. So a join that is cut off leaves the identity from before, and goes on with the same keys.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedmezo_core.errors import IdentityError
from fedmezo_core.folders import make_private, write_private
from fedmezo_core.journal.key_bytes import UNREADABLE
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import RENEW_AT, lifetime_s, new_key

FIRST_OPERATOR = "init"
"""Folder of an identity that no token made: that of the state folder's operator."""

_INDEX = "identity.json"


@dataclass(frozen=True, slots=True)
class Keys:
    """A member's two private keys, in PEM."""

    key: bytes = field(repr=False)
    signing: bytes = field(repr=False)

    @property
    def signing_key(self) -> Ed25519PrivateKey:
        """The key that signs the member's answers."""
        try:
            loaded = load_pem_private_key(self.signing, password=None)
        except UNREADABLE:
            loaded = None
        if not isinstance(loaded, Ed25519PrivateKey):
            raise IdentityError(
                "The state folder's signing.pem holds no unencrypted Ed25519 key; restore it, or "
                "join again."
            )
        return loaded

    @property
    def signing_public_key(self) -> bytes:
        """The public key of `signing_key`, 32 bytes."""
        return self.signing_key.public_key().public_bytes_raw()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a member is, and what it shows and checks in TLS."""

    folder: Path
    """Where it is kept."""
    name: str
    role: Role
    address: str
    """host:port of the coordinator."""
    token_id: str
    """The id of the token that it joined with, in hex; `FIRST_OPERATOR` for none."""
    keys: Keys
    certificate: bytes
    """PEM, with the certificates that lead to the CA."""
    server_ca: bytes
    """PEM of what vouches for the coordinator; empty: the system's CAs."""

    @property
    def renew_at_s(self) -> float:
        """When to renew the certificate, in seconds since 1970."""
        begins, ends = lifetime_s(self.certificate)
        return begins + (ends - begins) * RENEW_AT

    def check_time(self, now_s: float | None = None) -> None:
        """Raise `IdentityError` if the certificate is not valid at `now_s`, by default now."""
        now_s = time.time() if now_s is None else now_s
        begins, ends = lifetime_s(self.certificate)
        if begins <= now_s <= ends:
            return
        who, clock = f"The certificate of {self.role} {self.name}", _date(now_s)
        if now_s < begins:
            raise IdentityError(
                f"{who} is not valid before {_date(begins)}, and this machine's clock says {clock} "
                "UTC; set the clock."
            )
        raise IdentityError(
            f"{who} expired on {_date(ends)}, and this machine's clock says {clock} UTC; if the "
            "clock is wrong, set it; else ask the operator for a join string from `fedmezo rotate "
            f"{self.name}`."
        )


def new_keys() -> Keys:
    """Two new private keys."""
    signing = Ed25519PrivateKey.generate()
    return Keys(new_key(), signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def keys_for(folder: Path, token_id: str) -> Keys:
    """The keys with which to join by a token: those of an earlier attempt, or new ones.

    Raises `IdentityError` for a folder that others can read or that cannot be written to.
    """
    make_private(folder, IdentityError)
    own = folder / token_id
    try:
        if not (own / "signing.pem").exists():
            own.mkdir(mode=0o700, exist_ok=True)
            keys = new_keys()
            write_private(own / "key.pem", keys.key)
            write_private(own / "signing.pem", keys.signing)
            return keys
        return Keys((own / "key.pem").read_bytes(), (own / "signing.pem").read_bytes())
    except OSError as error:
        raise _unusable(folder, error) from None


def forget_keys(folder: Path, token_id: str) -> None:
    """Remove the keys of a token that let nobody join, and the folder if nothing else is in it.

    Keys that have a certificate stay.
    """
    if not (folder / token_id / "certificate.pem").exists():
        shutil.rmtree(folder / token_id, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()


def save_identity(identity: Identity) -> None:
    """Keep an identity in its folder, where its keys are already; others there are removed."""
    folder = identity.folder
    own = folder / identity.token_id
    index = {
        "name": identity.name,
        "role": str(identity.role),
        "address": identity.address,
        "token": identity.token_id,
    }
    try:
        write_private(own / "certificate.pem", identity.certificate)
        write_private(own / "server-ca.pem", identity.server_ca)
        write_private(folder / _INDEX, json.dumps(index).encode() + b"\n")
        for path in folder.iterdir():
            if path.is_dir() and path != own and (path / "signing.pem").exists():
                shutil.rmtree(path)
    except OSError as error:
        raise _unusable(folder, error) from None


def load_identity(folder: Path) -> Identity | None:
    """The identity in a folder; None if there is none yet.

    Raises `IdentityError` for a folder that others can read, or whose files cannot be used.
    """
    if not (folder / _INDEX).exists():
        return None
    make_private(folder, IdentityError)
    try:
        index = json.loads((folder / _INDEX).read_bytes())
        own = folder / index["token"]
        identity = Identity(
            folder=folder,
            name=index["name"],
            role=Role(index["role"]),
            address=index["address"],
            token_id=index["token"],
            keys=Keys((own / "key.pem").read_bytes(), (own / "signing.pem").read_bytes()),
            certificate=(own / "certificate.pem").read_bytes(),
            server_ca=(own / "server-ca.pem").read_bytes(),
        )
    except OSError as error:
        raise _unusable(folder, error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IdentityError(
            f"{folder / _INDEX} is damaged; restore it, or move the folder away and join again "
            "with a new join string."
        ) from None
    lifetime_s(identity.certificate)  # Raises if it is none.
    return identity


def _unusable(folder: Path, error: OSError) -> IdentityError:
    return IdentityError(
        f"The identity in {folder} cannot be read or written ({error.strerror}: {error.filename}); "
        "check the folder, or name another."
    )


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
