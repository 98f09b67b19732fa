"""Certificates: what is issued is valid for what it is for, and requests are checked."""

from __future__ import annotations

import time

import pytest

from fedmezo_core.errors import IdentityError, ProtocolError
from fedmezo_core.trust import certificates

NOW_S = int(time.time())


def test_a_member_keeps_its_fingerprint_when_its_certificate_is_renewed() -> None:
    authority = certificates.new_authority(NOW_S)
    public = certificates.key_of_request(certificates.new_request(certificates.new_key()))
    first = certificates.issue_member(authority, public, "w1", NOW_S, 60)
    second = certificates.issue_member(authority, public, "w1", NOW_S + 40, 60)
    assert first != second
    assert certificates.public_key_of(first) == certificates.public_key_of(second) == public
    assert certificates.lifetime_s(first) == (NOW_S - certificates.BACKDATED_S, NOW_S + 60)


@pytest.mark.parametrize("changed", [b"", b"\0" * 100, b"x" * 5000])
def test_bytes_that_are_no_request_are_refused(changed: bytes) -> None:
    with pytest.raises(ProtocolError, match="no PKCS #10 request"):
        certificates.key_of_request(changed)


def test_a_request_that_another_key_signed_is_refused() -> None:
    request = bytearray(certificates.new_request(certificates.new_key()))
    request[-1] ^= 1
    with pytest.raises(ProtocolError):
        certificates.key_of_request(bytes(request))


def test_bytes_that_are_no_certificate_are_refused() -> None:
    with pytest.raises(IdentityError):
        certificates.public_key_of(b"none")
