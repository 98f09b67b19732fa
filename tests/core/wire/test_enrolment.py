"""What a program shows as its identity, where no coordinator is needed to know."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import IdentityError, UnavailableError
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.join_string import JoinString
from fedmezo_core.wire.enrolment import become_member, identity_in, machine_name

WORKER = frozenset({Role.WORKER})


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
    with pytest.raises(IdentityError, match="holds no identity; join first"):
        identity_in(tmp_path)


async def test_nobody_lets_a_member_join(tmp_path: Path) -> None:
    join = JoinString("127.0.0.1:9", 9, b"f" * 32, b"12345678", b"s" * 16)
    with pytest.raises(UnavailableError, match="check that it is running, and that its enrolment"):
        await become_member(str(join), tmp_path / "own", "", WORKER, give_up_after_s=0)
    # The next attempt goes on with the same keys.
    keys = [path.read_bytes() for path in (tmp_path / "own").rglob("key.pem")]
    with pytest.raises(UnavailableError):
        await become_member(str(join), tmp_path / "own", "", WORKER, give_up_after_s=0)
    assert keys == [path.read_bytes() for path in (tmp_path / "own").rglob("key.pem")]
