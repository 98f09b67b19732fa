"""Flower's Grid without its programs: nodes that run the ClientApp, on a line that disturbs."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmezo import Session
from fedmezo_flower.flower_client import app
from fedmezo_worker.resident import ResidentWorker


@dataclass
class Mischief:
    """How often, out of one, a message meets what."""

    random: random.Random
    lost: float = 0.0
    reply_lost: float = 0.0
    repeated: float = 0.0
    late: float = 0.0
    """An old message comes again before the new one."""


@dataclass
class Node:
    """A SuperNode and what it is configured with."""

    config: dict[str, str]
    old: list[Message] = field(default_factory=list)


@contextmanager
def resident(name: str, path: Path, open_session: Callable[[bytes], Session]) -> Iterator[None]:
    """A resident worker on a thread of its own."""
    loop, stop, listening = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with ResidentWorker(name, open_session).listening_on(path):
            listening.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert listening.wait(60)
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


class FakeGrid(Grid):
    """Runs the ClientApp in this process, when replies are looked for."""

    def __init__(
        self, sockets: Iterable[Path], mischief: Mischief | None = None, run_id: int = 1
    ) -> None:
        # Flower's own programs set these for the process of an app.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.sockets = list(sockets)
        self.nodes = {
            number: Node({"fedmezo-socket": str(path)})
            for number, path in enumerate(self.sockets, 1)
        }
        self._run_id = run_id
        self.online = set(self.nodes)
        self.messages = 0
        self.now_s = 0.0
        self._mischief = mischief or Mischief(random.Random(0))
        self._replies: dict[str, Message] = {}

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds

    def clock(self) -> float:
        return self.now_s

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.messages += 1
            message_id = f"m{self.messages}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            reply = self._carry(message)
            if reply is not None:
                self._replies[message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [self._replies.pop(key) for key in list(self._replies) if key in wanted]
        self._mischief.random.shuffle(found)
        return found

    def _happens(self, share: float) -> bool:
        return self._mischief.random.random() < share

    def _carry(self, message: Message) -> Message | None:
        node = self.nodes[message.metadata.dst_node_id]
        if self._happens(self._mischief.lost):
            return None
        if node.old and self._happens(self._mischief.late):
            self._run(node, self._mischief.random.choice(node.old))
        reply = self._run(node, message)
        if self._happens(self._mischief.repeated):
            reply = self._run(node, message)
        node.old.append(message)
        return None if self._happens(self._mischief.reply_lost) else reply

    def _run(self, node: Node, message: Message) -> Message:
        context = Context(
            run_id=self._run_id,
            node_id=message.metadata.dst_node_id,
            node_config=dict(node.config),
            state=RecordDict(),
            run_config={},
        )
        try:
            return app(message, context)
        except Exception as error:  # As Flower's own process does.
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    # What this Grid has no use for.

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError
