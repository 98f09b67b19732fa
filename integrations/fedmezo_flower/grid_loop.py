"""Carries a coordinator's bytes to Flower's nodes and back, over a Grid.

A node cannot begin a message, so the server does: each message and its reply are one exchange.
Flower may lose, repeat and reorder them; then a message is sent again, which changes nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmezo import Coordinator
from fedmezo_core.errors import (
    FedMezoError,
    NotReadyError,
    UnavailableError,
)
from fedmezo_flower.flower_client import RECORD, bytes_in, record_in

log = logging.getLogger("flwr")

POLL_S: Final = 0.2
"""Time between two looks for replies."""
NODES_EVERY_S: Final = 1.0
"""Time between two looks for nodes."""
RETRY_S: Final = 5.0
"""Time until a node that failed gets its next message."""
LEASE_MS: Final = 30 * 24 * 3600 * 1000
"""The coordinator's lease on a worker: no limit, because Flower knows which nodes are there."""
TTL_MIN_S: Final = 600.0
"""Least time that a node has for its reply; after that the message is sent again."""
NAME_CHARS_MAX: Final = 64
"""Longest name of a worker, as its settings allow."""


@dataclass
class _Node:
    """A SuperNode, and what is on the way to it."""

    worker: str = ""
    """The name that its worker has in the run; empty before its first reply."""
    message_id: str = ""
    """The message that has no reply yet; empty: none."""
    sent_at_s: float = 0.0
    again_at_s: float = 0.0
    refusal: bytes = b""
    """What its worker is told next, because what it sent was refused."""
    said: str = ""
    """The newest complaint, which the log has."""


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
        """`coordinator` has the lease `LEASE_MS`. Tests give another clock."""
        self._coordinator = coordinator
        self._grid = grid
        self._clock_s = clock_s
        self._sleep_s = sleep_s
        self._nodes: dict[int, _Node] = {}
        self._online: set[int] = set()
        self._look_at_s = -NODES_EVERY_S
        self._ttl_s = max(TTL_MIN_S, 2 * coordinator.config.deadline_ms / 1000)
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
            for node_id in self._nodes.keys() - self._online:
                self._lose(self._nodes.pop(node_id))
        self._tell()
        due = [
            (node_id, down)
            for node_id in sorted(self._online)
            if (down := self._due(self._nodes.setdefault(node_id, _Node()), now_s)) is not None
        ]
        if due:
            self._send(due, now_s)

    # ------------------------------------------------------------ down

    def _due(self, node: _Node, now_s: float) -> bytes | None:
        """What a node is to be sent now; None for nothing."""
        if node.message_id and now_s < node.sent_at_s + self._ttl_s:
            return None
        if now_s < node.again_at_s:
            return None
        if node.worker not in self._coordinator.workers:
            refusal, node.refusal = node.refusal, b""
            return refusal  # If it is empty, the worker says hello.
        if node.message_id or self._coordinator.has_news(node.worker):
            return self._coordinator.down_for(node.worker)
        return None

    def _send(self, due: list[tuple[int, bytes]], now_s: float) -> None:
        messages = [
            Message(
                RecordDict(
                    {
                        RECORD: ConfigRecord(
                            {"genesis": self._coordinator.genesis_bytes, "down": down}
                        )
                    }
                ),
                dst_node_id=node_id,
                message_type="train.fedmezo",
                ttl=self._ttl_s,
                group_id=str(self._coordinator.round + 1),
            )
            for node_id, down in due
        ]
        for (node_id, _), message_id in zip(due, pushed(self._grid, messages), strict=True):
            node = self._nodes[node_id]
            node.message_id, node.sent_at_s = message_id, now_s
            node.again_at_s = 0.0 if message_id else now_s + RETRY_S

    # ------------------------------------------------------------ up

    def _take_replies(self) -> None:
        sent = {node.message_id: node_id for node_id, node in self._nodes.items()}
        sent.pop("", None)
        if not sent:
            return
        for reply in self._grid.pull_messages(list(sent)):
            # Of a message that Flower lost, the reply comes from the SuperLink.
            node_id = sent.pop(reply.metadata.reply_to_message_id, None)
            if node_id is not None:
                self._nodes[node_id].message_id = ""
                self._take(node_id, reply)

    def _take(self, node_id: int, reply: Message) -> None:
        node, up = self._nodes[node_id], b""
        try:
            if reply.has_error():
                raise UnavailableError(sentence_of(reply.error))
            record = record_in(reply)
            worker, up = str(record.get("worker"))[:NAME_CHARS_MAX], bytes_in(record, "up")
            self._check_name(node_id, worker)
            node.worker = self._coordinator.take(up, worker=worker)
            node.said = ""
        except FedMezoError as error:
            self._lose(node)
            node.again_at_s = self._clock_s() + RETRY_S
            if up:
                node.refusal = self._coordinator.refusal(up, error)
            if str(error) != node.said:
                node.said = str(error)
                log.warning("Node %d: %s", node_id, error)

    def _lose(self, node: _Node) -> None:
        """Note that a node has no worker for now."""
        self._coordinator.disconnect(node.worker)
        node.worker = ""

    def _check_name(self, node_id: int, worker: str) -> None:
        """Refuse a worker whose name another node's worker has."""
        for other_id, other in self._nodes.items():
            if other_id != node_id and other.worker == worker:
                raise NotReadyError(
                    f"its worker is named {worker}, as that of node {other_id} is; give each "
                    "worker another --name"
                )

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
