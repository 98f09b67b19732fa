"""A worker's open session, as the serving loop sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmezo_coordinator.serving.outbox import Outbox, Outgoing
from fedmezo_core.errors import FedMezoError, NotReadyError

OUTBOX_MAX = 1024
"""Most messages that wait for one worker; a worker that reads too slowly is cut off."""
OUTBOX_BYTES_MAX = 8 * 1024 * 1024
"""Most bytes that wait for one worker; the largest commit has a little more than 1 MiB."""


class HalfClosedError(FedMezoError):
    """The worker has nothing more to send: its session ends without an error."""


@dataclass(slots=True)
class Traffic:
    """Counters of one worker since this start, over all its sessions."""

    bytes_up: int = 0
    bytes_down: int = 0
    assigned_at_s: float | None = None
    """When its newest assignment was sent, on the monotonic clock."""
    answered_after_ms: int = 0
    """Time from its newest answered assignment to the answer."""


@dataclass(eq=False, slots=True)
class WorkerSession:
    """A worker's open session: what waits for it, and how it ended."""

    worker: str
    outbox: Outbox = field(default_factory=Outbox)
    ended: FedMezoError | None = None
    traffic: Traffic = field(default_factory=Traffic)
    """The worker's counters, shared by all its sessions once it has joined."""

    def put(self, message: Outgoing) -> None:
        """Queue a message; a full queue ends the session, so that nobody waits for this worker."""
        if self.ended is not None:
            return
        full = self.outbox.qsize() >= OUTBOX_MAX - 1
        # An empty queue takes a message of any size.
        if full or self.outbox.bytes_waiting > OUTBOX_BYTES_MAX:
            self.end(
                NotReadyError(
                    f"Worker {self.worker} reads more slowly than the run writes; "
                    "reconnect to catch up."
                )
            )
            return
        self.outbox.put_nowait(message)

    def end(self, error: FedMezoError) -> None:
        """End the session with `error` after the messages that are queued."""
        if self.ended is None:
            self.ended = error
            self.outbox.put_nowait(error)
