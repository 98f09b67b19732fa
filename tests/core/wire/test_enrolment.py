"""What a program shows as its identity, where no coordinator is needed to know."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from pathlib import Path
from typing import cast

import pytest

from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import IdentityError, NotReadyError, UnavailableError
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import (
    Authority,
    issue_member,
    key_of_request,
    new_authority,
    new_request,
)
from fedmezo_core.trust.identity import Identity, keys_for, load_identity, new_keys
from fedmezo_core.trust.join_string import JoinString
from fedmezo_core.wire import enrolment
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import become_member, identity_in, keep_renewed, machine_name
from fedmezo_proto.v1 import admin_pb2 as admin
from tests.integration.support.harness import until

WORKER = frozenset({Role.WORKER})
KEYS = new_keys()


def certificate_of(authority: Authority, at_s: float) -> bytes:
    """A certificate of `KEYS` that was made at `at_s`."""
    return issue_member(authority, key_of_request(new_request(KEYS.key)), "w1", int(at_s))


def member(folder: Path, authority: Authority, made_s: float) -> Identity:
    """A worker whose certificate was made at `made_s`."""
    certificate, ca = certificate_of(authority, made_s), authority.certificate
    address = "127.0.0.1:9"
    return Identity(folder, "w1", Role.WORKER, address, "ab" * 8, KEYS, certificate, ca)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("gpu-7.example.org", "gpu-7"),
        ("Rack_3 (left)", "rack-3-left-"),
        ("-x" * 60, "x" + "-x" * 31 + "-"),
        ("---", ""),
    ],
)
def test_a_machines_name_becomes_a_members(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert machine_name() == name
    assert not name or re.fullmatch(NAME_PATTERN, name)


def test_a_folder_without_an_identity_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="holds no identity; join first") as caught:
        identity_in(tmp_path)
    for way in ("--join STRING", "FEDMEZO_WORKER_JOIN", "fedmezo join STRING", "--state"):
        assert way in str(caught.value)


async def test_a_member_waits_for_a_coordinator_that_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def busy(*_: object) -> Identity:
        nonlocal asked
        asked += 1
        error = NotReadyError("10.0.0.7 calls more than 10 times a second; call less often.")
        error.retry_after_s = 0.01
        if asked < 3:
            raise error
        return member(tmp_path, new_authority(int(time.time())), time.time())

    monkeypatch.setattr(enrolment, "join_fleet", busy)
    join = JoinString("127.0.0.1:9", 9, b"f" * 32, b"12345678", b"s" * 16)
    assert (await become_member(str(join), tmp_path, "", WORKER)).name == "w1"
    assert asked == 3


class Client:
    """A coordinator's client that renews, and fails to show an identity at first."""

    address = "127.0.0.1:9"

    def __init__(self, authority: Authority, failures: list[Exception]) -> None:
        self.authority = authority
        self.failures = failures
        self.renewals = 0
        self.shown: list[Identity] = []

    async def renew(self) -> admin.RenewResponse:
        self.renewals += 1
        newer = certificate_of(self.authority, time.time())
        return admin.RenewResponse(certificate_chain=newer, server_ca=self.authority.certificate)

    async def show(self, identity: Identity) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.shown.append(identity)


@pytest.mark.parametrize(
    "failure", [IdentityError("not valid yet"), FileNotFoundError(2, "No such file", "ca.pem")]
)
async def test_an_identity_that_could_not_be_shown_is_shown_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(enrolment, "RENEW_AGAIN_S", 0.01)
    client = Client(new_authority(int(time.time())), [failure, failure])
    old = member(tmp_path, client.authority, time.time() - 70 * 86_400)
    keys_for(tmp_path, old.token_id)
    keeping = asyncio.create_task(keep_renewed(cast("CoordinatorClient", client), old))

    async def is_shown() -> bool:
        assert not keeping.done()
        return bool(client.shown)

    await until(is_shown, "the newer identity to be shown")
    await asyncio.sleep(0.05)
    keeping.cancel()
    assert client.renewals == 1
    kept = load_identity(tmp_path)
    assert kept is not None
    assert [identity.certificate for identity in client.shown] == [kept.certificate]


async def test_nobody_lets_a_member_join(tmp_path: Path) -> None:
    join = JoinString("127.0.0.1:9", 9, b"f" * 32, b"12345678", b"s" * 16)
    with pytest.raises(UnavailableError, match="check that it is running, and that its enrolment"):
        await become_member(str(join), tmp_path / "own", "", WORKER, give_up_after_s=0)
    # The next attempt goes on with the same keys.
    keys = [path.read_bytes() for path in (tmp_path / "own").rglob("key.pem")]
    with pytest.raises(UnavailableError):
        await become_member(str(join), tmp_path / "own", "", WORKER, give_up_after_s=0)
    assert keys == [path.read_bytes() for path in (tmp_path / "own").rglob("key.pem")]
