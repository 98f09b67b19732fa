"""Joining a real coordinator with a join string, and what an operator's commands do to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import trustme

from fedmezo_coordinator.admission.members_file import read_members
from fedmezo_coordinator.admission.state_folder import make_state
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, RelaySettings
from fedmezo_coordinator.programs import relay_command
from fedmezo_coordinator.programs.connecting import Link, link_to
from fedmezo_coordinator.serving import hosting
from fedmezo_coordinator.serving.hosting import fronted
from fedmezo_coordinator.serving.service import (
    ENROLMENT_CALLER_CONNECTIONS_MAX,
    ENROLMENT_CONNECTIONS_MAX,
)
from fedmezo_coordinator.serving.worker_session import WorkerSession
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    ForbiddenError,
    IdentityError,
    RevokedError,
    TokenError,
    UnavailableError,
    UnknownWorkerError,
)
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.identity import Identity, load_identity, save_identity
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.wire import enrolment
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.enrolment import find_ca, keep_renewed
from fedmezo_proto.v1 import admin_pb2 as admin
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.coordinator.serving.test_limits import HTTP2
from tests.faults.light_worker import LightEngine
from tests.integration.support.fleets import ServedFleet, served_fleet
from tests.integration.support.harness import config_of, genesis_of, served, until

GENESIS = genesis_of(config_of(rounds=2, local_steps=1, workers_min=2, quorum=2))


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[ServedFleet]:
    async with served_fleet(tmp_path, GENESIS) as running:
        yield running


async def test_members_take_part_in_a_run(at: ServedFleet) -> None:
    first, second = await at.member("w1"), await at.member("w2")
    async with at.worker(first) as one, at.worker(second) as two:
        await one.open()
        await two.open()
        rounds = await asyncio.gather(one.work_to_the_end(), two.work_to_the_end())
        assert list(rounds) == [2, 2]


async def test_the_keys_and_the_certificate_stay_and_are_used_again(at: ServedFleet) -> None:
    join = await at.join_string("w1")
    identity = await at.joined(join, "w1")
    assert (identity.name, identity.role) == ("w1", Role.WORKER)
    assert await at.joined(join, "w1") == identity == load_identity(at.folder / "w1")
    stored = (at.state / "members.jsonl").read_bytes()
    for secret in (join, parse_join_string(join).secret.hex(), identity.keys.key.decode()):
        assert secret.encode() not in stored
    for path in (at.folder / "w1").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


async def test_a_lost_response_does_no_harm(at: ServedFleet) -> None:
    join = await at.join_string("w1")
    first = await at.joined(join, "w1")
    (at.folder / "w1" / "identity.json").unlink()
    again = await at.joined(join, "w1")
    assert again.keys == first.keys
    async with at.client(again) as client:
        await client.get_run()


async def test_a_refused_member_keeps_no_keys(at: ServedFleet) -> None:
    join = await at.join_string("w1")
    # A mistake of whoever started it, which ends the program with 2.
    with pytest.raises(TokenError, match="for the name w1, not 'w2'"):
        await at.joined(join, "new", "w2")
    assert not (at.folder / "new").exists()
    first = await at.member("w3")
    before = sorted(first.folder.rglob("*"))
    with pytest.raises(TokenError, match="for the name w1, not 'w2'"):
        await at.joined(join, "w3", "w2")
    assert sorted(first.folder.rglob("*")) == before
    assert load_identity(first.folder) == first
    # The join string still has its use.
    assert (await at.joined(join, "new", "w1")).name == "w1"


@pytest.mark.parametrize("life_s", [1])
async def test_a_token_that_was_used_or_expired_lets_nobody_join(
    at: ServedFleet, life_s: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "fedmezo")
    used = await at.join_string()
    await at.joined(used, "w1", "w1")
    with pytest.raises(TokenError, match="was used before"):
        await at.joined(used, "w2", "w2")
    expired = await at.join_string("w3", life_s=life_s)
    await asyncio.sleep(life_s + 1.1)
    with pytest.raises(TokenError, match=r"expired . s ago by the coordinator's clock"):
        await at.joined(expired, "w3")
    assert caplog.text.count("refused to enrol") == 2
    for join in (used, expired):
        secret = parse_join_string(join).secret
        assert not [word for word in (join, secret.hex(), repr(secret)) if word in caplog.text]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's sockets")
async def test_one_address_does_not_keep_others_from_joining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise gRPC ends connections without a call, which their owner could open again at once.
    monkeypatch.setattr(hosting, "ENROLMENT_OPTIONS", ())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    held: list[ssl.SSLSocket] = []

    def hold(port: int) -> None:
        with contextlib.suppress(OSError):  # The watch may close it at once.
            plain = socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.9", 0))
            held.append(stack.enter_context(context.wrap_socket(plain)))
            held[-1].sendall(HTTP2)

    def is_held(connection: ssl.SSLSocket) -> bool:
        connection.setblocking(False)
        try:
            while connection.recv(4096):
                pass
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    async with contextlib.AsyncExitStack() as stack:
        at = await stack.enter_async_context(served_fleet(tmp_path, GENESIS))
        join = await at.join_string("w1")
        for _ in range(ENROLMENT_CONNECTIONS_MAX):
            await asyncio.to_thread(hold, parse_join_string(join).enrol_port)

        async def has_joined() -> bool:
            with contextlib.suppress(UnavailableError):
                await at.joined(join, "w1")
                return True
            return False

        async def holds_its_share() -> bool:
            return sum(map(is_held, held)) == ENROLMENT_CALLER_CONNECTIONS_MAX

        await until(has_joined, "a place for another address", 20)
        await until(holds_its_share, "the connections beyond the limit to be closed", 20)


async def test_a_join_string_of_another_coordinator_sends_nothing(
    at: ServedFleet, tmp_path: Path
) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    async with served_fleet(other_folder, GENESIS) as other:
        join = parse_join_string(await other.join_string("w1"))
    mine = parse_join_string(await at.join_string("w1"))
    mixed = type(mine)(
        mine.address, mine.enrol_port, join.ca_fingerprint, join.token_id, join.secret
    )
    with pytest.raises(IdentityError, match="Nothing was sent to it"):
        await at.joined(str(mixed), "w1")
    foreign = type(mine)(
        mine.address, mine.enrol_port, mine.ca_fingerprint, join.token_id, join.secret
    )
    before = (at.state / "members.jsonl").read_bytes()
    with pytest.raises(TokenError, match="belongs to another coordinator"):
        await at.joined(str(foreign), "w1")
    assert (at.state / "members.jsonl").read_bytes() == before


async def test_the_ca_is_found_by_its_fingerprint(at: ServedFleet) -> None:
    found = await asyncio.to_thread(find_ca, parse_join_string(await at.join_string()))
    assert found.strip() == (at.state / "ca.pem").read_bytes().strip()


async def test_a_name_is_refused_to_another_key(at: ServedFleet) -> None:
    await at.member("w1")
    shared = await at.join_string(uses=2)
    with pytest.raises(ForbiddenError, match="w1 belongs to another key"):
        await at.joined(shared, "other", "w1")
    with pytest.raises(ForbiddenError, match="fedmezo rotate w1"):
        await at.join_string("w1")


async def test_a_hello_under_another_members_name_is_refused(at: ServedFleet) -> None:
    first, second = await at.member("w1"), await at.member("w2")
    async with at.worker(first) as right, at.worker(second, "w1") as wrong:
        await right.open()
        with pytest.raises(ForbiddenError, match="worker w2 may not join a run as 'w1'"):
            await wrong.open()
        poll = wire.SessionRequest(hello=wrong.hello())
        with pytest.raises(ForbiddenError, match="may not join a run as 'w1'"):
            await wrong.client.poll_session(b"", poll)
        assert at.daemon.is_connected("w1")


async def test_a_polled_session_is_its_members_alone(at: ServedFleet) -> None:
    first, second = await at.member("w1"), await at.member("w2")
    async with at.worker(first) as right, at.client(second) as other:
        hello = wire.SessionRequest(hello=right.hello())
        token = (await right.client.poll_session(b"", hello)).token
        with pytest.raises(UnknownWorkerError, match="No session has this token"):
            await other.poll_session(token, leave=True)
        await right.client.poll_session(token)


async def test_the_same_key_replaces_its_session(at: ServedFleet) -> None:
    identity = await at.member("w1")
    async with at.worker(identity) as old, at.worker(identity) as new:
        await old.open()
        await new.open()
        assert "joined as worker w1" in str(await old.ended())
        assert at.daemon.is_connected("w1")


async def test_revoking_ends_open_sessions_at_once(at: ServedFleet) -> None:
    identity, polling = await at.member("w1"), await at.member("w2")
    async with at.client(at.operator) as operator, at.worker(identity) as hand:
        await hand.open()
        async with at.worker(polling) as other:
            hello = wire.SessionRequest(hello=other.hello())
            token = (await other.client.poll_session(b"", hello)).token

            async def poll_for_ever() -> None:
                while True:
                    await other.client.poll_session(token, wait_ms=30_000)

            waiting = asyncio.create_task(poll_for_ever())
            await asyncio.sleep(0.1)
            await operator.revoke_member("w1")
            await operator.revoke_member("w2")
            error = await asyncio.wait_for(hand.ended(), 2)
            assert isinstance(error, RevokedError)
            assert "w1 was revoked" in str(error)
            with pytest.raises(RevokedError):
                await asyncio.wait_for(waiting, 2)
        for identity_ in (identity, polling):
            async with at.client(identity_) as client:
                with pytest.raises(RevokedError, match="was revoked; ask the operator"):
                    await client.get_run()

    async def both_left() -> bool:
        return not at.daemon.is_connected("w1") and not at.daemon.is_connected("w2")

    await until(both_left, "the revoked workers to leave")


async def test_a_worker_that_is_revoked_while_it_joins_holds_no_place(
    at: ServedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, joins = await at.member("w1"), at.daemon.join
    async with at.client(at.operator) as operator, at.worker(identity) as hand:

        async def revoked_meanwhile(hello: wire.Hello, **others: Any) -> WorkerSession:
            await operator.revoke_member("w1")
            return await joins(hello, **others)

        monkeypatch.setattr(at.daemon, "join", revoked_meanwhile)
        hello = wire.SessionRequest(hello=hand.hello())
        with pytest.raises(RevokedError):
            await hand.client.poll_session(b"", hello)

    async def has_left() -> bool:
        return not at.daemon.is_connected("w1")

    await until(has_left, "the revoked worker to leave", 20)  # A lease is 90 s.


async def test_revoking_cuts_a_read_that_waits(at: ServedFleet) -> None:
    identity = await at.member("o1", Role.OBSERVER)
    async with at.client(at.operator) as operator, at.client(identity) as client:
        reading = asyncio.create_task(client.read_journal(5, wait_ms=1500))
        await asyncio.sleep(0.1)
        await operator.revoke_member("o1")
        with pytest.raises(RevokedError):
            await reading


async def test_rotating_gives_the_name_a_new_key(at: ServedFleet) -> None:
    identity = await at.member("w1")
    async with at.client(at.operator) as operator, at.worker(identity) as hand:
        await hand.open()
        token = (await operator.rotate_member("w1", 60)).token
        assert isinstance(await asyncio.wait_for(hand.ended(), 2), RevokedError)
    renewed = await at.joined(token.join_string, "w1")
    assert renewed.name == "w1"
    assert renewed.keys != identity.keys
    async with at.worker(renewed) as hand:
        await hand.open()
    async with at.client(identity) as client:
        with pytest.raises(RevokedError, match="is no member's"):
            await client.get_run()


@pytest.mark.parametrize("how", ["revoked", "rotated"])
async def test_an_operator_that_is_revoked_leaves_no_way_back(at: ServedFleet, how: str) -> None:
    second = await at.member("op-2", Role.OPERATOR)
    request = admin.CreateTokensRequest(
        role=admin.MEMBER_ROLE_OPERATOR, uses=10, life_s=30 * 86_400
    )
    async with at.client(second) as stolen, at.client(at.operator) as operator:
        [made] = (await stolen.create_tokens(request)).tokens
        # This order waits for its turn behind the revocation.
        revoking = (
            operator.revoke_member("op-2")
            if how == "revoked"
            else operator.rotate_member("op-2", 60)
        )
        done = asyncio.create_task(revoking)
        late = [asyncio.create_task(stolen.create_tokens(request)) for _ in range(20)]
        await done
        answers = await asyncio.gather(*late, return_exceptions=True)
    strings = [
        token.join_string
        for answer in answers
        if isinstance(answer, admin.CreateTokensResponse)
        for token in answer.tokens
    ]
    for number, string in enumerate([made.join_string, *strings]):
        with pytest.raises(TokenError, match=r"was taken back when an operator was revoked"):
            await at.joined(string, f"back-{number}")
    rotated = done.result()
    if rotated is not None:
        again = await at.joined(rotated.token.join_string, "again")
        assert (again.name, again.role) == ("op-2", Role.OPERATOR)


async def test_an_operator_does_not_lock_itself_out(at: ServedFleet) -> None:
    async with at.client(at.operator) as client:
        with pytest.raises(ConfigError, match="would lock itself out"):
            await client.revoke_member("operator")
        with pytest.raises(ConfigError, match="No member is called 'nobody'"):
            await client.revoke_member("nobody")
        with pytest.raises(ConfigError, match="No member is called 'nobody'"):
            await client.exclude_worker("nobody", "noise")


async def test_what_was_decided_outlives_a_restart(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, GENESIS) as at:
        kept, gone = await at.member("w1"), await at.member("w2")
        async with at.client(at.operator) as operator:
            await operator.revoke_member("w2")
        stored = [
            (member.name, member.revoked) for member in read_members(at.state / "members.jsonl")
        ]
        assert stored == [("operator", False), ("w1", False), ("w2", True)]
    async with served_fleet(tmp_path, GENESIS) as at:
        async with at.client(kept) as client:
            await client.get_run()
        async with at.client(gone) as client:
            with pytest.raises(RevokedError):
                await client.get_run()


async def test_the_operator_is_told_where_the_coordinator_is(at: ServedFleet) -> None:
    link = link_to(None, None, False, at.state)
    assert link.address == at.address
    async with link.client() as client:
        assert [member.name async for member in client.members()] == ["operator"]


async def test_a_second_coordinator_cannot_use_the_folder(at: ServedFleet, tmp_path: Path) -> None:
    other = tmp_path / "second"
    other.mkdir()
    with pytest.raises(ConfigError, match="Another coordinator uses the state folder"):
        async with served_fleet(other, GENESIS, state=at.state):
            pass


@pytest.mark.parametrize("kind", ["plain", "server alone"])
async def test_without_a_certificate_nobody_is_served(at: ServedFleet, kind: str) -> None:
    ca = at.state / "ca.pem" if kind == "server alone" else None
    async with CoordinatorClient(at.address, ca) as client:
        with pytest.raises(UnavailableError, match="wants an identity"):
            await client.get_run()


@pytest.mark.parametrize("hours", [-25, 25])
async def test_a_clock_that_is_off_by_a_day_is_named(
    at: ServedFleet, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """A clock that is behind the first day of the certificates, or ahead of their last."""
    identity = await at.member("w2")
    join = parse_join_string(await at.join_string("w1"))
    now_s = time.time() + 3600 * hours + (0 if hours < 0 else 366 * 86_400)
    clock = SimpleNamespace(time=lambda: now_s, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(enrolment, "time", clock)
    with pytest.raises(IdentityError, match=r"is valid from .* clock says .* set the clock"):
        await asyncio.to_thread(find_ca, join)
    with pytest.raises(IdentityError, match=r"set the clock|is wrong, set it"):
        identity.check_time(now_s)


async def test_a_member_of_another_fleet_is_told_what_is_wrong(
    at: ServedFleet, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    async with served_fleet(folder, GENESIS) as other:
        stranger = await other.member("w1")
    unknown = replace(stranger, server_ca=at.operator.server_ca)
    for address, identity, said in (
        (at.address, stranger, "is another coordinator, or has a new state folder. Check"),
        (at.address, unknown, r"a clock that is a day off .* identity is"),
        (other.address, stranger, r"Connection refused\); check the address, and that it is run"),
    ):
        async with CoordinatorClient(address, identity=identity) as client:
            with pytest.raises(UnavailableError, match=said) as caught:
                await client.get_run()
        assert "OPENSSL" not in str(caught.value)


async def test_ones_own_identity_is_shown_to_its_own_coordinator_alone(
    at: ServedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option names it, as for `fedmezo members`; other coordinators are called as before."""
    home = tmp_path / "home" / "fedmezo"
    home.mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(home.parent))

    def link(address: str | None) -> Link:
        return link_to(address, None, False, None)

    async with (await asyncio.to_thread(link, at.address)).client() as client:
        with pytest.raises(
            UnavailableError, match="folder of your identity with --state"
        ) as caught:
            await client.get_status()
        said = str(caught.value)
        assert said.index("--join STRING") < said.index("--state") < said.index("tls or tls_ca")
    (home / "coordinator").symlink_to(at.state)
    for given in (None, at.address, at.address.replace("127.0.0.1", "localhost")):
        found = await asyncio.to_thread(link, given)
        assert found.address == (given or at.address)
        async with found.client() as client:
            await client.get_status()
    async with served(tmp_path / "plain.db", GENESIS) as plain:
        for told in (at.address, plain.address):  # The second: an old folder of that address.
            save_identity(replace(at.operator, address=told))
            found = await asyncio.to_thread(link, plain.address)
            async with found.client() as client:
                await client.get_status()


async def test_a_certificate_that_expires_on_an_open_connection_counts_no_more(
    tmp_path: Path,
) -> None:
    async with served_fleet(tmp_path, GENESIS, certificate_life_s=5) as at:
        identity = await at.member("w1")
        async with at.client(identity) as client:
            await client.get_run()
            await asyncio.sleep(5.5)
            with pytest.raises(IdentityError, match="expired while its connection was open"):
                await client.get_run()


async def test_a_command_renews_the_identity_that_it_shows(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, GENESIS, certificate_life_s=60) as at:
        identity = await at.member("o1", Role.OBSERVER)
        link = await asyncio.to_thread(link_to, at.address, None, False, identity.folder)
        newest = load_identity(identity.folder)
        assert newest is not None
        assert newest.certificate != identity.certificate
        async with link.client() as client:
            await client.get_status()


async def test_a_certificate_is_renewed_by_itself(tmp_path: Path) -> None:
    async with served_fleet(tmp_path, GENESIS, certificate_life_s=4) as at:
        identity = await at.member("w1")
        async with at.client(identity) as client:
            # Backdating is longer than this life, so two thirds of it have passed.
            renewing = asyncio.create_task(keep_renewed(client, identity))

            async def is_renewed() -> bool:
                kept = load_identity(at.folder / "w1")
                return kept is not None and kept.certificate != identity.certificate

            await until(is_renewed, "a newer certificate")
            await asyncio.sleep(5)
            renewing.cancel()
            assert not isinstance(await asyncio.gather(client.get_run()), FedMezoError)
        newest = load_identity(at.folder / "w1")
        assert newest is not None
        async with at.worker(newest) as hand:
            await hand.open()
        with pytest.raises(IdentityError, match=r"expired on .* this machine's clock says"):
            at.client(identity)


async def test_renewals_leave_each_open_session_its_channel(at: ServedFleet) -> None:
    identity = await at.member("w1")
    async with at.client(identity) as client:
        streams = []
        for _ in range(2):
            streams.append(client.session())
            await client.show(identity)
        channels = [stream.channel for stream in streams]
        for _ in range(3):
            await client.show(identity)
        assert closed(channels) == [False, False]
        streams.pop(0).cancel()
        gc.collect()
        await client.show(identity)
        assert closed(channels) == [True, False]


def closed(channels: list[grpc.aio.Channel]) -> list[bool]:
    return [one.get_state() is grpc.ChannelConnectivity.SHUTDOWN for one in channels]


async def test_asking_again_and_again_writes_nothing(at: ServedFleet) -> None:
    identity = await at.member("w1")
    before = (at.state / "members.jsonl").read_bytes()
    async with at.client(identity) as client:
        for _ in range(3):
            answer = await client.renew()
    assert answer.certificate_chain != identity.certificate
    assert (at.state / "members.jsonl").read_bytes() == before


async def test_a_relay_is_a_member_of_the_fleet_above(
    at: ServedFleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    values = {
        "listen": "127.0.0.1:0",
        "name": "site-a",
        "journal_copy": tmp_path / "copy.db",
        "join": await at.join_string("site-a"),
        "join_state": tmp_path / "site-a",
    }
    running = asyncio.create_task(relay_command.run(RelaySettings.model_validate(values)))

    async def serves() -> bool:
        if running.done():
            running.result()
        return "site site-a: relay of" in caplog.text

    await until(serves, "the relay to serve")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    identity = load_identity(tmp_path / "site-a")
    assert identity is not None
    assert identity.name == "site-a"


@pytest.mark.parametrize("is_public", [True, False])
async def test_the_coordinator_may_show_a_certificate_of_another_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_public: bool
) -> None:
    """A public CA is one that the system trusts; the fleet's own still names the members."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair = ca.issue_cert("localhost", "127.0.0.1")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    if is_public:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    else:
        files["tls_cert_ca"] = tmp_path / "ca.pem"
    async with served_fleet(tmp_path, GENESIS, **files) as at:
        join = await at.join_string("w1")
        assert bool(parse_join_string(join).ca_fingerprint) is not is_public
        identity = await at.joined(join, "w1")
        async with at.worker(identity) as hand:
            await hand.open()


async def test_a_state_folder_without_its_servers_certificate_is_named(tmp_path: Path) -> None:
    make_state(tmp_path / "state", [], None)
    (tmp_path / "state" / "server.pem").unlink()
    settings = {"listen": "127.0.0.1:0", "state": tmp_path / "state"}
    with pytest.raises(ConfigError, match=r"make it anew with: fedmezo-coordinator init"):
        async with fronted(CoordinatorSettings.model_validate(settings), "coordinator"):
            pass


async def test_a_file_that_holds_no_ca_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    files = dict.fromkeys(("tls_cert", "tls_key", "tls_cert_ca"), tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"tls_cert_ca .* cannot be read \(no certificate"):
        async with served_fleet(tmp_path, GENESIS, **files):
            pass


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "127.0.0.1:0"])
async def test_join_strings_that_no_other_machine_can_use_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, listen: str
) -> None:
    async with served_fleet(tmp_path, GENESIS, listen=listen) as at:
        assert ("which no other machine reaches" in caplog.text) is (listen[0] == "0")
        await at.member("w1")


async def test_a_worker_that_waits_longer_than_its_certificate_lives_takes_part(
    tmp_path: Path,
) -> None:
    async with served_fleet(tmp_path, GENESIS, certificate_life_s=3) as at:
        identities = [await at.member(name) for name in ("w1", "w2")]

        async def take_part(identity: Identity) -> None:
            settings = WorkerSettings(
                coordinator=at.address, name=identity.name, state=identity.folder, data=tmp_path
            )
            await work(settings, cast("Engine", LightEngine()), identity)

        first = asyncio.create_task(take_part(identities[0]))
        await asyncio.sleep(7)
        newest = load_identity(identities[1].folder)
        assert newest is not None
        with pytest.raises(IdentityError):
            newest.check_time()
        async with at.client(at.operator) as operator:
            token = (await operator.rotate_member("w2", 60)).token
        second = asyncio.create_task(take_part(await at.joined(token.join_string, "w2")))
        await asyncio.wait_for(asyncio.gather(first, second), 20)
