"""The state folder of a coordinator that knows its members.

ca.pem, ca.key          the CA that issues certificates
server.pem, server.key  the certificate that the coordinator shows, issued by that CA
members.jsonl           the members and tokens
operator/               the identity of the operator who made the folder
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import shutil
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509

from fedmezo_coordinator.admission.members_file import write_members
from fedmezo_core.errors import ConfigError, IdentityError
from fedmezo_core.folders import make_private, sync, write_private
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import (
    RENEW_AT,
    Authority,
    issue_member,
    issue_server,
    key_fingerprint,
    key_of_request,
    lifetime_s,
    load_certificate,
    new_authority,
    new_key,
    new_request,
)
from fedmezo_core.trust.identity import (
    FIRST_OPERATOR,
    Identity,
    keys_for,
    load_identity,
    save_identity,
)
from fedmezo_core.trust.members import Member

log = logging.getLogger("fedmezo.coordinator")

OPERATOR_LIFE_S = 10 * 365 * 86_400
"""Life of the certificate of the operator on the coordinator's own machine: that of its CA, whose
key lies beside it."""
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class StateFolder:
    """A state folder that exists and that nobody else can read."""

    path: Path
    authority: Authority

    @property
    def members_path(self) -> Path:
        """The file of members and tokens."""
        return self.path / "members.jsonl"

    @property
    def operator_path(self) -> Path:
        """The folder of the operator's identity."""
        return self.path / "operator"

    @property
    def server_files(self) -> tuple[Path, Path]:
        """Certificate and key that the coordinator shows."""
        return self.path / "server.pem", self.path / "server.key"

    @property
    def hosts(self) -> list[str]:
        """The names and addresses in the server's certificate, those given to `init` first."""
        return hosts_of((self.path / "server.pem").read_bytes())

    def tell_operator(self, address: str, server_ca: bytes) -> None:
        """Note in the operator's identity where the coordinator is, and what vouches for it.

        An identity that was moved elsewhere, or cannot be written, is left alone.
        """
        with contextlib.suppress(IdentityError):
            identity = load_identity(self.operator_path)
            if identity is not None:
                told = replace(identity, address=address, server_ca=server_ca)
                if told != identity:
                    save_identity(told)

    def renew_server(self) -> None:
        """Issue the server's certificate anew if it is near its end, for the same names."""
        certificate_path, key_path = self.server_files
        certificate = certificate_path.read_bytes()
        begins, ends = lifetime_s(certificate)
        now_s = int(time.time())
        if now_s < begins + (ends - begins) * RENEW_AT:
            return
        issued = issue_server(self.authority, key_path.read_bytes(), hosts_of(certificate), now_s)
        write_private(certificate_path, issued)
        log.info("the server's certificate was renewed")


def hosts_of(certificate: bytes) -> list[str]:
    """Names and addresses that a server's certificate (PEM) is for."""
    try:
        names = load_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names.value]


def make_state(path: Path, hosts: Sequence[str], own_ca: tuple[Path, Path] | None) -> bool:
    """Make a state folder; returns False, with nothing changed, if it is one already.

    One that lacks the server's certificate gets a new one, for `hosts`; members stay. `own_ca` are
    the certificate and key of a CA to issue with; None: a new one. Raises `ConfigError` for hosts
    or files that cannot be used, or a folder that others can read.
    """
    for host in hosts:
        _check_host(host)
    now_s = int(time.time())
    if (path / "ca.key").exists():
        state = open_state(path)
        if state.server_files[0].exists():
            return False
        _make_server(path, state.authority, hosts, now_s)
        return True
    make_private(path, ConfigError)
    if any(path.iterdir()):
        raise ConfigError(f"{path} is not empty and no state folder; name another folder.")
    authority = new_authority(now_s) if own_ca is None else _own_authority(*own_ca)
    try:
        _make_server(path, authority, hosts, now_s)
        _make_operator(path, authority, now_s)
        write_private(path / "ca.pem", authority.certificate)
        # Last: with it, the folder is whole.
        write_private(path / "ca.key", authority.key)
        sync(path.parent)
    except BaseException:
        for made in path.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        raise
    return True


def open_state(path: Path) -> StateFolder:
    """Open a state folder; raises `ConfigError` if it is none, or if others can read it."""
    if not (path / "ca.key").exists():
        raise ConfigError(
            f"{path} is no state folder; make one with: fedmezo-coordinator init --state {path}"
        )
    make_private(path, ConfigError)
    try:
        authority = Authority((path / "ca.pem").read_bytes(), (path / "ca.key").read_bytes())
        _, ends = lifetime_s(authority.certificate)
    except (OSError, IdentityError) as error:
        raise ConfigError(
            f"The state folder {path} is damaged ({error}); restore it from a copy."
        ) from None
    if ends < time.time():
        raise ConfigError(
            f"The CA in {path} has expired, so that no certificate is valid; make a new state "
            "folder and let every member join again. If that is not so, set this machine's clock."
        )
    return StateFolder(path, authority)


def _make_server(path: Path, authority: Authority, hosts: Sequence[str], now_s: int) -> None:
    key = new_key()
    write_private(path / "server.key", key)
    issued = issue_server(authority, key, [*hosts, *LOOPBACK_HOSTS], now_s)
    write_private(path / "server.pem", issued)


def _make_operator(path: Path, authority: Authority, now_s: int) -> None:
    folder = path / "operator"
    keys = keys_for(folder, FIRST_OPERATOR)
    public = key_of_request(new_request(keys.key))
    certificate = issue_member(authority, public, "operator", now_s, OPERATOR_LIFE_S)
    save_identity(
        Identity(
            folder=folder,
            name="operator",
            role=Role.OPERATOR,
            address="127.0.0.1:7465",
            token_id=FIRST_OPERATOR,
            keys=keys,
            certificate=certificate,
            server_ca=authority.certificate,
        ),
    )
    first = Member(
        name="operator",
        role=Role.OPERATOR,
        fingerprint=key_fingerprint(public),
        signing_key=keys.signing_public_key,
        enrolled_s=now_s,
        expires_s=now_s + OPERATOR_LIFE_S,
    )
    write_members(path / "members.jsonl", [first])


def _own_authority(certificate: Path, key: Path) -> Authority:
    try:
        authority = Authority(certificate.read_bytes(), key.read_bytes())
        # The empty password avoids a prompt.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        found = load_certificate(authority.certificate)
        is_ca = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are not a PEM certificate and its unencrypted key "
            f"({error.reason or error}); check ca_cert and ca_key."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read ({error.strerror}); check ca_cert and ca_key."
        ) from None
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca or found.issuer != found.subject:
        raise ConfigError(
            f"{certificate} is not the certificate of a root CA, which members' certificates can "
            "lead to; check ca_cert."
        )
    return authority


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        labels = host.split(".")
        fits = all(part and len(part) < 64 and part.replace("-", "").isalnum() for part in labels)
        if not (fits and host.isascii() and len(host) <= 253):
            raise ConfigError(
                f"name = {host[:80]!r} is no host name or IP address that workers could connect "
                "to; give it without a port."
            ) from None
