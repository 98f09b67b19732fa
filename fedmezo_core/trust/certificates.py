"""Certificates of a fleet: its CA, the server's and the members'. Keys are ECDSA P-256.

gRPC's TLS offers no Ed25519 for certificates. A member is known by its key, not by its certificate:
a renewed certificate of the same key is the same member.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmezo_core.errors import IdentityError, ProtocolError
from fedmezo_core.journal.key_bytes import UNREADABLE

CA_LIFE_S = 10 * 365 * 86_400
SERVER_LIFE_S = 365 * 86_400
MEMBER_LIFE_S = 90 * 86_400
"""Default life of a member's certificate."""
BACKDATED_S = 300
"""A certificate is valid from this long before it was made, because clocks differ."""
RENEW_AT = 2 / 3
"""Part of a certificate's life after which it is renewed."""
REQUEST_BYTES_MAX = 2048
"""Longest certificate request."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: its certificate and its key, both in PEM."""

    certificate: bytes
    key: bytes

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate in DER, 32 bytes."""
        return certificate_fingerprint(self.certificate)


def new_key() -> bytes:
    """A new P-256 key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_authority(now_s: int) -> Authority:
    """A new CA, which vouches for itself."""
    key = new_key()
    name = _named("FedMeZO CA")
    public = _private(key).public_key()
    builder = (
        _begun(name, name, public, now_s, CA_LIFE_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return Authority(_signed(builder, key), key)


def issue_server(authority: Authority, key: bytes, hosts: Sequence[str], now_s: int) -> bytes:
    """A server's certificate for host names and IP addresses, in PEM; `key` is its private key."""
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
        except ValueError:
            names.append(x509.DNSName(host))
    builder = _leaf(authority, _private(key).public_key(), "FedMeZO server", now_s, SERVER_LIFE_S)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    return _signed(builder, authority.key)


def issue_member(
    authority: Authority, public_key: bytes, name: str, now_s: int, life_s: int = MEMBER_LIFE_S
) -> bytes:
    """A member's certificate, in PEM. `public_key` is in DER (SubjectPublicKeyInfo)."""
    public = load_der_public_key(public_key)
    assert isinstance(public, ec.EllipticCurvePublicKey), "check_request comes first"
    builder = _leaf(authority, public, name, now_s, life_s)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    return _signed(builder, authority.key)


def new_request(key: bytes) -> bytes:
    """A certificate request (PKCS #10, DER) for a private key in PEM."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_named("member"))
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(Encoding.DER)


def key_of_request(request: bytes) -> bytes:
    """The public key (DER) of a certificate request that its private key has signed.

    Raises `ProtocolError` for any other bytes.
    """
    problem = ProtocolError(
        "The certificate request is no PKCS #10 request that an ECDSA P-256 key has signed; use "
        "the same FedMeZO version."
    )
    if len(request) > REQUEST_BYTES_MAX:
        raise problem
    try:
        parsed = x509.load_der_x509_csr(request)
        public = parsed.public_key()
        is_signed = parsed.is_signature_valid
    except UNREADABLE:
        raise problem from None
    is_p256 = isinstance(public, ec.EllipticCurvePublicKey) and isinstance(
        public.curve, ec.SECP256R1
    )
    if not is_p256 or not is_signed:
        raise problem
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_fingerprint(public_key: bytes) -> bytes:
    """SHA-256 of a public key in DER: what a member is known by."""
    return hashlib.sha256(public_key).digest()


def public_key_of(certificate: bytes) -> bytes:
    """The public key (DER) of a certificate in PEM; raises `IdentityError` if it is none."""
    loaded = load_certificate(certificate)
    try:
        public = loaded.public_key()
    except UNREADABLE:
        raise IdentityError(
            "A certificate holds no public key that can be read; restore the state folder, or join "
            "again."
        ) from None
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def certificate_fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a certificate in DER; the certificate is in PEM."""
    return load_certificate(certificate).fingerprint(hashes.SHA256())


def load_certificate(certificate: bytes) -> x509.Certificate:
    """The first certificate in PEM; raises `IdentityError` if there is none."""
    try:
        return x509.load_pem_x509_certificate(certificate)
    except UNREADABLE:
        raise IdentityError(
            "There is no certificate in PEM where one should be; restore the state folder, or join "
            "again."
        ) from None


def lifetime_s(certificate: bytes) -> tuple[int, int]:
    """When a certificate in PEM begins and ends to be valid, in seconds since 1970."""
    found = load_certificate(certificate)
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    return int(begins.timestamp()), int(ends.timestamp())


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = load_pem_private_key(key, password=None)
    except UNREADABLE:
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise IdentityError(
            "A key file holds no unencrypted ECDSA key in PEM; restore the state folder, or join "
            "again."
        )
    return loaded


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now_s: int,
    life_s: int,
) -> x509.CertificateBuilder:
    begins = datetime.datetime.fromtimestamp(now_s - BACKDATED_S, datetime.UTC)
    ends = datetime.datetime.fromtimestamp(now_s + life_s, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _leaf(
    authority: Authority, public: ec.EllipticCurvePublicKey, name: str, now_s: int, life_s: int
) -> x509.CertificateBuilder:
    issuer = load_certificate(authority.certificate)
    issuer_key = _private(authority.key).public_key()
    return (
        _begun(_named(name), issuer.subject, public, now_s, life_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _signed(builder: x509.CertificateBuilder, key: bytes) -> bytes:
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(Encoding.PEM)
