"""The table of members: who joins with which token, and whose name it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmezo_core.errors import ConfigError, ForbiddenError, RevokedError, TokenError
from fedmezo_core.trust import members as members_module
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.members import Member, Members, Token

NOW_S = 1_800_000_000
SECRET = b"s" * 16
KEY, OTHER_KEY, SIGNING_KEY = b"k" * 32, b"o" * 32, b"e" * 32
TOKEN = Token(
    b"12345678", hashlib.sha256(SECRET).digest(), Role.WORKER, "gpu-7", expires_s=NOW_S + 60
)


def table(*tokens: Token) -> Members:
    members = Members()
    for token in tokens or (TOKEN,):
        members.apply(members.new_token(token))
    return members


def join(
    members: Members, key: bytes = KEY, name: str = "", token: Token = TOKEN, now_s: int = NOW_S
) -> Member:
    member, used = members.admit(token.id, SECRET, key, SIGNING_KEY, name, now_s)
    members.apply(used)
    members.apply(member)
    return member


def rotate(members: Members, name: str) -> None:
    for row in members.rotated(name):
        members.apply(row)


def revoke(members: Members, name: str) -> None:
    for row in members.revoked(name):
        members.apply(row)


def test_a_token_lets_its_name_join_once() -> None:
    members = table()
    member = join(members)
    assert (member.name, member.role, member.enrolled_s) == ("gpu-7", Role.WORKER, NOW_S)
    caller = members.caller(KEY)
    assert (caller.name, caller.role, caller.signing_key) == ("gpu-7", Role.WORKER, SIGNING_KEY)
    with pytest.raises(TokenError, match="was used before"):
        join(members, OTHER_KEY)


def test_the_same_key_may_ask_again_because_a_response_can_be_lost() -> None:
    members = table()
    assert join(members) == join(members)
    assert len(members) == 1


@pytest.mark.parametrize(
    ("secret", "token_id"), [(b"x" * 16, TOKEN.id), (SECRET, b"another!"), (b"", b"")]
)
def test_a_token_that_is_not_here_lets_nobody_join(secret: bytes, token_id: bytes) -> None:
    members = table()
    with pytest.raises(TokenError, match="no such token"):
        members.admit(token_id, secret, KEY, SIGNING_KEY, "", NOW_S)
    assert not len(members)


def test_a_token_expires() -> None:
    with pytest.raises(TokenError, match="expired 5 s ago by the coordinator's clock"):
        join(table(), now_s=TOKEN.expires_s + 5)


def test_a_name_belongs_to_the_key_that_enrolled_it() -> None:
    shared = replace(TOKEN, name="", uses_left=5)
    members = table(shared)
    join(members, name="node-a", token=shared)
    with pytest.raises(ForbiddenError, match="node-a belongs to another key"):
        join(members, OTHER_KEY, "node-a", shared)
    assert join(members, OTHER_KEY, "node-b", shared).name == "node-b"


def test_a_name_that_the_token_does_not_give_is_refused() -> None:
    with pytest.raises(TokenError, match="for the name gpu-7, not 'gpu-8'"):
        join(table(), name="gpu-8")
    shared = replace(TOKEN, name="")
    with pytest.raises(ConfigError, match="cannot be called 'A B'"):
        join(table(shared), name="A B", token=shared)


def test_revoking_takes_the_rights_and_the_rest_of_the_token() -> None:
    shared = replace(TOKEN, name="", uses_left=5)
    members = table(shared)
    join(members, name="node-a", token=shared)
    for row in members.revoked("node-a"):
        members.apply(row)
    with pytest.raises(RevokedError, match="worker node-a was revoked"):
        members.caller(KEY)
    with pytest.raises(ForbiddenError, match="empty state folder"):
        join(members, name="node-a", token=shared)
    with pytest.raises(TokenError, match="was used before"):
        join(members, OTHER_KEY, "node-b", shared)


@pytest.mark.parametrize("take_away", [revoke, rotate])
def test_an_operator_does_not_come_back_with_a_token_that_it_made(
    take_away: Callable[[Members, str], None],
) -> None:
    own = replace(TOKEN, role=Role.OPERATOR, name="op-2")
    made = replace(own, id=b"made-by1", name="", uses_left=10)
    named = replace(TOKEN, id=b"made-by2", name="w1")
    members = table(own, made, named)
    join(members, token=own)
    join(members, b"a" * 32, "before", made)
    take_away(members, "op-2")
    for token in (made, named):
        with pytest.raises(TokenError, match="was taken back when an operator was revoked"):
            join(members, OTHER_KEY, token=token)
    assert members.caller(b"a" * 32).name == "before"
    # They take no place of tokens that can be used, and nobody can use them afterwards.
    members.forget_tokens_before(NOW_S)
    assert [row for row in members.rows() if isinstance(row, Token)] == [replace(own, uses_left=0)]


def test_a_worker_that_loses_its_key_leaves_others_their_tokens() -> None:
    other = replace(TOKEN, id=b"another1", name="w1")
    members = table(TOKEN, other)
    join(members)
    rotate(members, "gpu-7")
    revoke(members, "gpu-7")
    assert join(members, OTHER_KEY, token=other).name == "w1"


def test_rotating_takes_the_key_and_keeps_the_name_for_a_new_one() -> None:
    members = table()
    join(members)
    rotate(members, "gpu-7")
    with pytest.raises(RevokedError, match="is no member's"):
        members.caller(KEY)
    again = replace(TOKEN, id=b"87654321", replaces=True)
    members.apply(members.new_token(again))
    join(members, OTHER_KEY, token=again)
    assert members.caller(OTHER_KEY).name == "gpu-7"
    with pytest.raises(RevokedError):
        members.caller(KEY)


def test_only_the_newest_token_of_a_name_can_be_used() -> None:
    members = table(TOKEN, replace(TOKEN, id=b"87654321"))
    with pytest.raises(TokenError, match="no such token"):
        join(members)


def test_a_revoked_name_is_not_had_by_a_token_from_before() -> None:
    members = table()
    join(members)
    rotate(members, "gpu-7")
    again = replace(TOKEN, id=b"87654321", replaces=True)
    members.apply(members.new_token(again))
    for row in members.revoked("gpu-7"):
        members.apply(row)
    with pytest.raises(ForbiddenError):
        join(members, OTHER_KEY, token=again)


def test_rows_make_an_equal_table() -> None:
    members = table()
    join(members)
    copy = Members()
    for row in members.rows():
        copy.apply(row)
    assert list(copy.rows()) == list(members.rows())
    assert copy.caller(KEY) == members.caller(KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(TOKEN, role=Role.REPLICA),
        replace(TOKEN, name="A"),
        replace(TOKEN, uses_left=2),
        replace(TOKEN, name="", uses_left=0),
        replace(TOKEN, name="", uses_left=10_001),
    ],
)
def test_tokens_that_cannot_be_are_refused(wrong: Token) -> None:
    with pytest.raises(ConfigError):
        table(wrong)


@pytest.mark.parametrize("limit", [1, 2])
def test_members_and_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    shared = replace(TOKEN, name="", uses_left=5)
    monkeypatch.setattr(members_module, "MEMBERS_MAX", limit)
    members = table(shared)
    for k in range(limit):
        join(members, bytes([k]) * 32, f"w{k}", shared)
    with pytest.raises(ForbiddenError, match=f"has {limit} members, the most"):
        join(members, OTHER_KEY, "another", shared)
    monkeypatch.setattr(members_module, "TOKENS_MAX", limit)
    tokens = [replace(shared, id=bytes([k]) * 8) for k in range(limit)]
    members = table(*tokens)
    with pytest.raises(ForbiddenError, match=f"{limit} tokens can still be used"):
        members.new_token(shared)
    members.forget_tokens_before(TOKEN.expires_s + 1)
    members.new_token(shared)


def test_a_token_lets_at_most_so_many_join() -> None:
    table(replace(TOKEN, name="", uses_left=10_000))


def test_a_token_for_a_members_name_is_refused() -> None:
    members = table()
    join(members)
    with pytest.raises(ForbiddenError, match="fedmezo rotate gpu-7"):
        members.new_token(replace(TOKEN, id=b"87654321"))
