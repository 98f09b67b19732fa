"""Peers of a stack that loses, repeats, delays and fails messages, and that come and go."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import pytest

from fedmezo import Coordinator, Session
from fedmezo.library_peers import Peers
from fedmezo_core.errors import FedMezoError
from fedmezo_core.journal.journal import MemoryStore
from tests.library.test_both_sides import (
    NAMES,
    TURNS_MAX,
    check,
    open_session,
    run_in_order,
    small_run,
)

log = logging.getLogger("fedmezo.test")
AGAIN_AFTER_S = 2.0


def peers_of(coordinator: Coordinator, resend_after_s: float = 20.0) -> Peers[int]:
    return Peers(
        coordinator,
        named=lambda number: f"Node {number}",
        log=log,
        again_after_s=AGAIN_AFTER_S,
        resend_after_s=resend_after_s,
    )


@dataclass
class OnTheWay:
    """A message to a node, or its reply."""

    node: int
    message: int
    content: bytes
    is_reply: bool = False


@pytest.mark.parametrize("seed", range(15))
def test_whatever_a_stack_does_to_messages_changes_nothing(seed: int) -> None:
    """Restarts of either side and nodes that come back under other ids, too."""
    dice = random.Random(seed)
    genesis, store = small_run(deadline_ms=60_000), MemoryStore()
    coordinator = Coordinator(genesis, store, lease_ms=10**9)
    peers = peers_of(coordinator)
    sessions = {name: open_session(genesis, name) for name in NAMES}
    nodes = dict(enumerate(NAMES))
    way: list[OnTheWay] = []
    count = 0
    for now_s in range(TURNS_MAX):
        if coordinator.done and coordinator.digests.keys() == set(NAMES):
            break
        coordinator.tick(now_s * 1000)
        if dice.random() < 0.02:
            coordinator = Coordinator(genesis, store, lease_ms=10**9)
            peers = peers_of(coordinator)
        if dice.random() < 0.02:
            name = dice.choice(NAMES)
            sessions[name] = open_session(genesis, name)
        if dice.random() < 0.02:
            old = dice.choice(list(nodes))
            nodes[max(nodes) + 1] = nodes.pop(old)
        peers.see(nodes)
        for node in nodes:
            down = peers.due(node, now_s)
            if down is None:
                continue
            count += 1
            peers.sent(node, None if dice.random() < 0.1 else count, now_s)
            if dice.random() < 0.7:
                way.append(OnTheWay(node, count, down))
        dice.shuffle(way)
        for one in way[: dice.randrange(4)]:
            if dice.random() > 0.3:  # Otherwise it will come once more.
                way.remove(one)
            if one.is_reply:
                peers.take(one.node, one.message, nodes.get(one.node, "a"), one.content, now_s)
            elif one.node in nodes:
                name = nodes[one.node]
                chance = dice.random()
                if chance < 0.1:
                    peers.fail(one.node, one.message, "out of memory", now_s)
                elif chance < 0.2:
                    peers.lose(one.node, one.message, now_s)
                else:
                    up = exchanged(sessions, name, one.content)
                    way.append(OnTheWay(one.node, one.message, up, is_reply=True))
    else:
        raise AssertionError("the run did not end")
    check(store, coordinator.config)
    assert coordinator.head == run_in_order(genesis).head
    assert len(set(coordinator.digests.values())) == 1


def exchanged(sessions: dict[str, Session], name: str, down: bytes) -> bytes:
    """One exchange; as a resident worker does, begin from the base after an error."""
    try:
        return sessions[name].exchange(down)
    except FedMezoError:
        sessions[name] = open_session(sessions[name]._genesis, name)
        return sessions[name].exchange(b"")


def test_a_peer_that_fails_is_put_off_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    coordinator = Coordinator(small_run())
    peers = peers_of(coordinator)
    peers.see([1])
    for number in range(3):
        now_s = number * AGAIN_AFTER_S
        assert peers.due(1, now_s) == b""
        peers.sent(1, f"m{number}", now_s)
        assert peers.due(1, now_s) is None
        peers.fail(1, f"m{number}", "out of memory", now_s)
        assert peers.due(1, now_s + AGAIN_AFTER_S - 0.1) is None
    assert peers.failures(1) == 3
    assert caplog.messages == ["Node 1: out of memory"]
    session = open_session(small_run(), "a")
    peers.take(1, None, "a", session.exchange(peers.due(1, 9.0) or b""), 9.0)
    assert peers.failures(1) == 0
    assert coordinator.workers == {"a"}


def test_a_peer_that_is_gone_takes_its_worker_along() -> None:
    coordinator = Coordinator(small_run())
    peers = peers_of(coordinator)
    peers.see([1, 2])
    peers.take(1, None, "a", open_session(small_run(), "a").exchange(), 0.0)
    peers.sent(2, "m", 0.0)
    assert peers.on_the_way() == {"m": 2}
    peers.see([])
    assert coordinator.workers == set()
    assert peers.due(1, 100.0) is None
    assert not peers.on_the_way()


def test_two_peers_do_not_share_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    coordinator = Coordinator(small_run())
    peers = peers_of(coordinator)
    peers.see([1, 2])
    first, second = (open_session(small_run(), "a") for _ in range(2))
    peers.take(1, None, "a", first.exchange(), 0.0)
    peers.take(2, None, "a", second.exchange(), 0.0)
    assert "Node 2: its worker is named a, as that of Node 1 is; give each" in caplog.text
    assert coordinator.workers == {"a"}
    refusal = peers.due(2, AGAIN_AFTER_S)
    assert refusal
    with pytest.raises(FedMezoError, match="a name of its own"):
        second.exchange(refusal)
    peers.see([2])
    peers.take(2, None, "a", second.exchange(), 5.0)
    assert coordinator.workers == {"a"}


def test_a_message_without_a_reply_is_sent_again_with_what_is_new_by_then() -> None:
    coordinator = Coordinator(small_run(workers_min=2, quorum=2))
    peers = peers_of(coordinator, resend_after_s=10.0)
    peers.see([1, 2])
    first, second = (open_session(small_run(workers_min=2, quorum=2), name) for name in "ab")
    peers.take(1, None, "a", first.exchange(), 0.0)
    assert peers.due(1, 0.0) is None  # Nothing is there to do yet.
    peers.sent(1, "m1", 0.0)
    peers.take(2, None, "b", second.exchange(), 1.0)
    assert peers.due(1, 9.9) is None
    assert peers.due(1, 10.0) == coordinator.down_for("a")
    peers.lose(1, "m1", 11.0)
    peers.lose(1, "m1", 12.0)  # NVFlare says so twice.
    assert peers.due(1, 11.0 + AGAIN_AFTER_S) == b""
