"""Carries a coordinator's bytes to Flower's nodes and back, over a Grid.

A node cannot begin a message, so the server does: each message and its reply are one exchange.
Flower may lose, repeat and reorder them; then a message is sent again, which changes nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Final

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmezo import Coordinator
from fedmezo.library_peers import Peers
from fedmezo_core.errors import FedMezoError, UnavailableError
from fedmezo_flower.flower_client import RECORD, bytes_in, record_in

log = logging.getLogger("flwr")

POLL_S: Final = 0.2
"""Time between two looks for replies."""
NODES_EVERY_S: Final = 1.0
"""Time between two looks for nodes."""
RETRY_S: Final = 5.0
"""Time until a node that failed gets its next message."""
TTL_MIN_S: Final = 600.0
"""Least time that a node has for its reply; after that the message is sent again."""
NAME_CHARS_MAX: Final = 64
"""Longest name of a worker, as its settings allow."""


class GridLoop:
    """Drives one run over Flower's nodes until each of them has reported its weights."""

    def __init__(
        self,
        coordinator: Coordinator,
        grid: Grid,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        sleep_s: Callable[[float], None] = time.sleep,
    ) -> None:
        """`coordinator` has the lease `PEER_LEASE_MS`. Tests give another clock."""
        self._coordinator = coordinator
        self._grid = grid
        self._clock_s = clock_s
        self._sleep_s = sleep_s
        self._online: set[int] = set()
        self._look_at_s = -NODES_EVERY_S
        self._ttl_s = max(TTL_MIN_S, 2 * coordinator.config.deadline_ms / 1000)
        self._peers: Peers[int] = Peers(
            coordinator,
            named=lambda node_id: f"Node {node_id}",
            log=log,
            again_after_s=RETRY_S,
            resend_after_s=self._ttl_s,
        )
        self._waiting_for = 0
        self._round = coordinator.round

    def run(self) -> None:
        """Return when the run is done, or paused."""
        while not self._coordinator.done and self._coordinator.phase != "paused":
            self.turn()
            self._sleep_s(POLL_S)

    def turn(self) -> None:
        """Take the replies that have come, and send each node what is due."""
        self._take_replies()
        now_s = self._clock_s()
        self._coordinator.tick(int(1000 * now_s))
        if now_s >= self._look_at_s + NODES_EVERY_S:
            self._look_at_s = now_s
            self._online = set(self._grid.get_node_ids())
            self._peers.see(self._online)
        self._tell()
        due = [
            (node_id, down)
            for node_id in sorted(self._online)
            if (down := self._peers.due(node_id, now_s)) is not None
        ]
        if due:
            self._send(due, now_s)

    # ------------------------------------------------------------ down

    def _send(self, due: list[tuple[int, bytes]], now_s: float) -> None:
        genesis = self._coordinator.genesis_bytes
        messages = [
            Message(
                RecordDict({RECORD: ConfigRecord({"genesis": genesis, "down": down})}),
                dst_node_id=node_id,
                message_type="train.fedmezo",
                ttl=self._ttl_s,
                group_id=str(self._coordinator.round + 1),
            )
            for node_id, down in due
        ]
        for (node_id, _), message_id in zip(due, pushed(self._grid, messages), strict=True):
            self._peers.sent(node_id, message_id or None, now_s)

    # ------------------------------------------------------------ up

    def _take_replies(self) -> None:
        sent = self._peers.on_the_way()
        for reply in self._grid.pull_messages(list(map(str, sent))) if sent else ():
            # Of a message that Flower lost, the reply comes from the SuperLink.
            message_id = reply.metadata.reply_to_message_id
            if message_id in sent:
                self._take(sent[message_id], message_id, reply)

    def _take(self, node_id: int, message_id: str, reply: Message) -> None:
        now_s = self._clock_s()
        try:
            if reply.has_error():
                raise UnavailableError(sentence_of(reply.error))
            record = record_in(reply)
            worker, up = str(record.get("worker"))[:NAME_CHARS_MAX], bytes_in(record, "up")
        except FedMezoError as error:
            self._peers.fail(node_id, message_id, str(error), now_s)
        else:
            self._peers.take(node_id, message_id, worker, up, now_s)

    # ------------------------------------------------------------ the log

    def _tell(self) -> None:
        coordinator = self._coordinator
        missing = coordinator.config.workers_min - len(coordinator.workers)
        if coordinator.phase != "waiting":
            missing = 0
        if missing != self._waiting_for and missing > 0:
            log.info("The run waits for %d more workers", missing)
        self._waiting_for = missing
        if coordinator.round != self._round:
            self._round = coordinator.round
            log.info("Round %d of %d is committed", self._round, coordinator.config.rounds)


def pushed(grid: Grid, messages: list[Message]) -> list[str]:
    """Send messages; the id of each one, empty for a message that Flower could not take."""
    # Some grids give no id or an empty one for such a message, and some leave it out of the list.
    ids = [message_id or "" for message_id in grid.push_messages(messages)]
    return ids if len(ids) == len(messages) else [""] * len(messages)


def sentence_of(error: Error) -> str:
    """The sentence of an error reply; Flower puts what a ClientApp raised in brackets."""
    reason = error.reason or f"Flower's error {error.code}"
    found = re.fullmatch(r"<class '[\w.]+'>:<'(.*)'>", reason, re.DOTALL)
    return found[1] if found else reason
