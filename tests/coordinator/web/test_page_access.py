"""Links and sessions: once, for a while, and only for members who may look."""

from __future__ import annotations

import pytest

from fedmezo_coordinator.web.page_access import (
    LINK_LIFE_S,
    OF_A_MEMBER_MAX,
    SESSION_LIFE_S,
    SESSIONS_MAX,
    PageAccess,
)
from fedmezo_core.errors import ForbiddenError, RevokedError, TokenError
from fedmezo_core.trust.authorisation import Caller, Role


class Fleet:
    """Members by their keys, and a clock."""

    def __init__(self) -> None:
        self.members: dict[bytes, Caller] = {}
        self.now_s = 0.0
        self.access = PageAccess(self.member, lambda: self.now_s)

    def member(self, fingerprint: bytes) -> Caller:
        if fingerprint not in self.members:
            raise RevokedError("It was revoked.")
        return self.members[fingerprint]

    def add(self, name: str, role: Role = Role.OBSERVER) -> Caller:
        caller = Caller(role, name, name.encode())
        self.members[caller.fingerprint] = caller
        return caller


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_link_opens_one_session(fleet: Fleet) -> None:
    olga = fleet.add("olga")
    link = fleet.access.new_link(olga)
    session = fleet.access.enter(link)
    assert fleet.access.check(session) == olga
    with pytest.raises(TokenError, match="used before"):
        fleet.access.enter(link)


def test_no_secret_stands_for_another(fleet: Fleet) -> None:
    link = fleet.access.new_link(fleet.add("olga"))
    session = fleet.access.enter(fleet.access.new_link(fleet.add("otto")))
    for wrong in ("", "x", link[:-1], link, "\ud800"):
        with pytest.raises(ForbiddenError, match="fedmezo page"):
            fleet.access.check(wrong)
    with pytest.raises(TokenError):
        fleet.access.enter(session)


def test_links_and_sessions_end(fleet: Fleet) -> None:
    olga = fleet.add("olga")
    late = fleet.access.new_link(olga)
    session = fleet.access.enter(fleet.access.new_link(olga))
    fleet.now_s = LINK_LIFE_S
    with pytest.raises(TokenError):
        fleet.access.enter(late)
    fleet.access.check(session)
    fleet.now_s = SESSION_LIFE_S
    with pytest.raises(ForbiddenError):
        fleet.access.check(session)


def test_who_is_revoked_sees_nothing_any_more(fleet: Fleet) -> None:
    olga = fleet.add("olga")
    link = fleet.access.new_link(olga)
    session = fleet.access.enter(fleet.access.new_link(olga))
    del fleet.members[olga.fingerprint]
    with pytest.raises(ForbiddenError):
        fleet.access.check(session)
    with pytest.raises(TokenError):
        fleet.access.enter(link)


def test_a_worker_has_no_way_in(fleet: Fleet) -> None:
    olga = fleet.add("olga")
    session = fleet.access.enter(fleet.access.new_link(olga))
    fleet.add("olga", Role.WORKER)  # The same key, with another role now.
    with pytest.raises(ForbiddenError):
        fleet.access.check(session)


def test_one_member_takes_no_others_places(fleet: Fleet) -> None:
    olga, otto = fleet.add("olga"), fleet.add("otto")
    ottos = fleet.access.enter(fleet.access.new_link(otto))
    sessions = [fleet.access.enter(fleet.access.new_link(olga)) for _ in range(2 * OF_A_MEMBER_MAX)]
    fleet.access.check(ottos)
    fleet.access.check(sessions[-1])
    with pytest.raises(ForbiddenError):
        fleet.access.check(sessions[0])


def test_sessions_are_bounded(fleet: Fleet) -> None:
    first = fleet.access.enter(fleet.access.new_link(fleet.add("first")))
    for number in range(SESSIONS_MAX):
        fleet.access.enter(fleet.access.new_link(fleet.add(f"member-{number}")))
    with pytest.raises(ForbiddenError):
        fleet.access.check(first)
