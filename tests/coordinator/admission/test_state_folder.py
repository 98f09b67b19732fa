"""The state folder: made once, for its owner only, and never half."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from fedmezo_coordinator.admission.fleet import Fleet
from fedmezo_coordinator.admission.members_file import MembersFile, read_members, write_members
from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_coordinator.programs.coordinator_command import main
from fedmezo_core.errors import ConfigError, IdentityError, RevokedError
from fedmezo_core.trust import certificates
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.trust.identity import keys_for, load_identity
from fedmezo_core.trust.members import Member, Row, Token
from fedmezo_proto.v1 import admin_pb2 as wire

MEMBER = Member("w1", Role.WORKER, b"k" * 32, b"s" * 32, b"t" * 8, 5, 6)
TOKEN = Token(b"t" * 8, b"h" * 32, Role.OBSERVER, "", 3, 2_000_000_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_init_says_as_json_whether_it_made_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "state")
    for made in (True, False):
        assert main(["init", "--state", state, "--name", "::1", "--format", "json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said == {"state": state, "made": made, "hosts": ["::1", "localhost", "127.0.0.1"]}


def test_a_second_init_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    assert (
        main(["init", "--state", str(state), "--name", "fleet.example.org", "--name", "::1"]) == 0
    )
    made = contents(state)
    assert main(["init", "--state", str(state)]) == 0
    said = capsys.readouterr().out
    assert "is a state folder already; nothing was changed" in said
    assert "For other host names remove server.pem from it and run init again" in said
    assert contents(state) == made
    assert open_state(state).hosts == ["fleet.example.org", "::1", "localhost", "127.0.0.1"]
    for path in [state, *state.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", "ca.key", "operator/init/key.pem"])
def test_a_folder_that_others_can_read_is_refused(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    make_state(state, [], None)
    (state / name).chmod(0o755 if not name else 0o644)
    with pytest.raises(ConfigError, match=f"run: chmod -R go= {state}$"):
        open_state(state)
    with pytest.raises(ConfigError, match="chmod"):
        make_state(state, [], None)


def test_a_members_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_state(tmp_path / "state", [], None)
    operator = tmp_path / "state" / "operator"
    operator.chmod(0o750)
    with pytest.raises(IdentityError, match="chmod"):
        load_identity(operator)
    with pytest.raises(IdentityError, match="chmod"):
        keys_for(operator, "00")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    make_state(state, [], None)
    os.chown(state / "ca.key", 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_state(state)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir(mode=0o700)
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "precious" / "file").chmod(0o600)
    with pytest.raises(ConfigError, match="is not empty and no state folder"):
        make_state(tmp_path / "precious", [], None)
    with pytest.raises(
        ConfigError, match="no state folder; make one with: fedmezo-coordinator init"
    ):
        open_state(tmp_path / "precious")
    assert contents(tmp_path / "precious") == {"file": b"x"}


@pytest.mark.parametrize("host", ["a b", "host:7465", "", "x" * 300, "-.x", "ä"])
def test_a_host_that_is_none_leaves_no_folder_behind(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="is no host name or IP address"):
        make_state(tmp_path / "state", [host], None)
    assert not contents(tmp_path / "state")


def test_an_own_ca_issues(tmp_path: Path) -> None:
    authority = certificates.new_authority(int(time.time()))
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    (tmp_path / "ca.key").write_bytes(authority.key)
    make_state(tmp_path / "state", [], (tmp_path / "ca.pem", tmp_path / "ca.key"))
    assert open_state(tmp_path / "state").authority == authority


def test_what_is_no_ca_is_refused(tmp_path: Path) -> None:
    pair = trustme.CA().issue_cert("localhost")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "ca.pem")
    pair.private_key_pem.write_to_path(tmp_path / "ca.key")
    own = (tmp_path / "ca.pem", tmp_path / "ca.key")
    with pytest.raises(ConfigError, match="is not the certificate of a root CA"):
        make_state(tmp_path / "state", [], own)
    (tmp_path / "ca.key").write_text("no key")
    with pytest.raises(ConfigError, match="check ca_cert and ca_key"):
        make_state(tmp_path / "state", [], own)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_state(tmp_path / "state", [], (tmp_path / "gone", tmp_path / "ca.key"))


def test_the_servers_certificate_is_renewed_for_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_state(tmp_path / "state", ["fleet.example.org"], None)
    state = open_state(tmp_path / "state")
    before, hosts = contents(state.path)["server.pem"], state.hosts
    state.renew_server()
    assert contents(state.path)["server.pem"] == before
    later = time.time() + certificates.SERVER_LIFE_S * 0.7
    monkeypatch.setattr(time, "time", lambda: later)
    state.renew_server()
    assert contents(state.path)["server.pem"] != before
    assert state.hosts == hosts


def test_other_host_names_take_a_new_certificate_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    make_state(state, [], None)
    before = contents(state)
    (state / "server.pem").unlink()
    assert make_state(state, ["fleet.example.org"], None)
    assert open_state(state).hosts[0] == "fleet.example.org"
    changed = {name for name, content in contents(state).items() if before[name] != content}
    assert changed == {"server.pem", "server.key"}
    assert not make_state(state, ["other.example.org"], None)


def test_members_outlive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "members.jsonl"
    write_members(path, [MEMBER, TOKEN])
    file = MembersFile(path)
    file.open(0)
    file.append([Member("w2", Role.OPERATOR, b"o" * 32, revoked=True)])
    file.close()
    with path.open("ab") as raw:
        raw.write(b'{"member": {"name": "w3", "ro')
    members = read_members(path)
    assert [member.name for member in members] == ["w1", "w2"]
    assert [row for row in members.rows() if row in (MEMBER, TOKEN)] == [MEMBER, TOKEN]


def test_a_crash_leaves_a_change_whole_or_not_made(tmp_path: Path) -> None:
    """A token that is used up without its member would refuse the member's next attempt."""
    path = tmp_path / "members.jsonl"
    token = replace(TOKEN, uses_left=1)
    write_members(path, [token])
    before = path.read_bytes()
    file = MembersFile(path)
    file.open(0)
    file.append([replace(token, uses_left=0), MEMBER])
    file.close()
    after = path.read_bytes()
    for size in range(len(before), len(after)):
        path.write_bytes(after[:size])
        assert list(read_members(path).rows()) == [token]
    path.write_bytes(after)
    assert list(read_members(path).rows()) == [MEMBER, replace(token, uses_left=0)]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "[[]]", '[{"x": {}}]', '{"member": {"name": 5}}', '{"x": {}}', "no JSON"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "members.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"Line 1 of .* is damaged"):
        read_members(path)


def test_expired_tokens_are_forgotten_at_a_start(tmp_path: Path) -> None:
    path = tmp_path / "members.jsonl"
    write_members(path, [MEMBER, TOKEN])
    file = MembersFile(path)
    file.open(TOKEN.expires_s + 1)
    file.close()
    assert list(read_members(path).rows()) == [MEMBER]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    make_state(tmp_path / "state", [], None)
    opened = Fleet(open_state(tmp_path / "state"))
    yield opened
    opened.close()


def another_operator(fleet: Fleet, name: str = "another") -> Caller:
    """An operator who has joined."""
    member = Member(name, Role.OPERATOR, name.encode().ljust(32), b"s" * 32)
    fleet._file.append([member])
    fleet.members.apply(member)
    return fleet.members.caller(member.fingerprint)


async def test_an_order_counts_only_if_its_operator_is_one_when_its_turn_comes(
    fleet: Fleet,
) -> None:
    first, second = another_operator(fleet, "op-1"), another_operator(fleet, "op-2")
    worker = wire.CreateTokensRequest(role=wire.MEMBER_ROLE_WORKER)
    revoking, *late = await asyncio.gather(
        fleet.revoke_member(wire.RevokeMemberRequest(name="op-2"), first),
        fleet.revoke_member(wire.RevokeMemberRequest(name="op-1"), second),
        fleet.rotate_member(wire.RotateMemberRequest(name="operator"), second),
        fleet.create_tokens(worker, second),
        return_exceptions=True,
    )
    assert isinstance(revoking, wire.RevokeMemberResponse)
    assert [type(error) for error in late] == [RevokedError] * 3
    assert [member.name for member in fleet.members if member.revoked] == ["op-2"]


async def test_a_change_is_made_whole_though_its_caller_goes_away(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk and what counts would differ until the next start otherwise."""
    append = fleet._file.append

    def slowly(rows: Sequence[Row]) -> None:
        time.sleep(0.2)
        append(rows)

    monkeypatch.setattr(fleet._file, "append", slowly)
    operator = another_operator(fleet)
    revoking = asyncio.create_task(
        fleet.revoke_member(wire.RevokeMemberRequest(name="operator"), operator)
    )
    await asyncio.sleep(0.05)
    revoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await revoking
    request = wire.CreateTokensRequest(role=wire.MEMBER_ROLE_WORKER)
    await fleet.create_tokens(request, operator)
    assert fleet.members.named("operator").revoked
    kept = read_members(fleet.state.members_path)
    assert list(kept.rows()) == list(fleet.members.rows())


async def test_a_disk_that_refuses_changes_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = another_operator(fleet)

    def full(_rows: Sequence[Row]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fleet._file, "append", full)
    before = list(fleet.members.rows())
    with pytest.raises(ConfigError, match="No space left on device"):
        await fleet.create_tokens(wire.CreateTokensRequest(role=wire.MEMBER_ROLE_WORKER), operator)
    assert list(fleet.members.rows()) == before
