"""One run among those that a process hosts: what serves it, what it offers, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.status_report import HIDDEN_REASON
from fedmezo_core.errors import FedMezoError, StartingError, UnavailableError
from fedmezo_core.machines.roster import Phase
from fedmezo_core.program import LongStep
from fedmezo_core.service.log_lines import log_with
from fedmezo_core.trust.authorisation import Caller, sees_everyone
from fedmezo_proto.v1 import runs_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

CHECK_JOURNAL_EVERY_S = 5.0
"""Period in which an idle coordinator checks that no other has taken over its journal."""
STARTING_RETRY_S = 5.0
"""Callers of a run that is being created or loaded are asked to come back within this time."""
FAILED_RETRY_S = 30.0
"""Callers of a run that has failed are asked to come back within this time."""
DECLINES_MAX = 1000
"""Most workers whose word that they do not take part is kept for one run."""

_PHASES = {
    Phase.WAITING: wire.RUN_PHASE_RUNNING,
    Phase.OPEN: wire.RUN_PHASE_RUNNING,
    Phase.PAUSED: wire.RUN_PHASE_PAUSED,
    Phase.FINISHED: wire.RUN_PHASE_FINISHED,
}


@dataclass(frozen=True, slots=True)
class OfferedFile:
    """A file that workers of a run may read."""

    path: Path
    sha256: bytes
    """Digest of its bytes, 32 bytes."""
    file_bytes: int


@dataclass(eq=False, slots=True)
class HostedRun:
    """A run: being created, served, or failed."""

    run_id: str
    created_ms: int = 0
    """When it was created, in milliseconds since 1970 UTC; 0 if that is not known."""
    loop: ServingLoop[Any] | None = None
    """What serves it; None while it is being created or loaded, and after it has failed."""
    files: Mapping[str, OfferedFile] = field(default_factory=dict)
    """What its workers may read, by name."""
    waits_for: str | LongStep = "it is being loaded"
    """What its creation or start waits for, in words or as a step."""
    is_new: bool = False
    """Whether nothing is in its journal yet."""
    failure: str = ""
    """Why it cannot go on, in a sentence; empty if it can."""
    declined: dict[str, str] = field(default_factory=dict)
    """Worker -> why it does not take part, in its own words, the newest last."""
    _replica: asyncio.Task[None] | None = None

    @property
    def phase(self) -> wire.RunPhase.ValueType:
        """What the run is doing."""
        if self.failure:
            return wire.RUN_PHASE_FAILED
        return wire.RUN_PHASE_CREATING if self.loop is None else _PHASES[self.loop.phase]

    @property
    def is_over(self) -> bool:
        """Whether no round will ever open again, unless an operator mends what has failed."""
        return self.phase in (wire.RUN_PHASE_FINISHED, wire.RUN_PHASE_FAILED)

    @property
    def is_offered(self) -> bool:
        """Whether workers may take part."""
        return self.phase in (wire.RUN_PHASE_RUNNING, wire.RUN_PHASE_PAUSED)

    @property
    def reason(self) -> str:
        """Why it is not running, or what is done meanwhile; empty if it is running."""
        return self.failure or (self._waits_for if self.loop is None else self.loop.reason)

    @property
    def _waits_for(self) -> str:
        return self.waits_for if isinstance(self.waits_for, str) else self.waits_for.what

    def shows_workers_to(self, caller: Caller) -> bool:
        """Whether `caller` may read what is told of single workers, their losses included."""
        return self.loop is None or sees_everyone(caller, self.loop.genesis.config)

    def reason_for(self, caller: Caller) -> str:
        """The reason as far as `caller` may read it, as in the status."""
        return self.reason if not self.reason or self.shows_workers_to(caller) else HIDDEN_REASON

    def serving(self) -> ServingLoop[Any]:
        """The loop that serves it; raises the error for callers if there is none."""
        if self.loop is not None:
            return self.loop
        error: FedMezoError
        if self.failure:
            error = self._failed_error()
        else:
            error = StartingError(f"Run {self.run_id} is not served yet: {self._waits_for}.")
            error.retry_after_s = STARTING_RETRY_S
        raise error

    def _failed_error(self) -> UnavailableError:
        error = UnavailableError(
            f"Run {self.run_id} stands still at its coordinator ({self.failure}); it goes on when "
            "its operator has mended that and resumes it."
        )
        error.retry_after_s = FAILED_RETRY_S
        return error

    def decline(self, worker: str, reason: str) -> None:
        """Keep a worker's word that it does not take part."""
        self.declined.pop(worker, None)
        while len(self.declined) >= DECLINES_MAX:
            del self.declined[next(iter(self.declined))]
        self.declined[worker] = reason

    def wait_for(self, step: LongStep) -> None:
        """Say from now on that this step is what the run waits for."""
        self.waits_for = step

    def joined(self, worker: str) -> None:
        """Forget why a worker did not take part, because it does now."""
        self.declined.pop(worker, None)

    @property
    def declines(self) -> dict[str, str]:
        """Worker -> why it does not take part, without those that are connected by now."""
        loop = self.loop
        return {
            worker: reason
            for worker, reason in self.declined.items()
            if loop is None or not loop.is_connected(worker)
        }

    async def serve(self, alongside: Coroutine[Any, Any, None] | None = None) -> None:
        """Serve until cancelled; raises the error with which the journal fails.

        `alongside` keeps the run's replica for the same time.
        """
        assert self.loop is not None, "a run is loaded before it is served"
        log_with(run=self.run_id)
        if alongside is not None:
            self._replica = asyncio.create_task(alongside)
        try:
            await _serve(self.loop)
        finally:
            await self.end_replica()

    def begin_stop(self) -> None:
        """Tell all workers that the coordinator is going away, and let the replica end."""
        self._cancel_replica()
        if self.loop is not None:
            self.loop.end_sessions()

    async def end_replica(self) -> None:
        """End the replica's process, if there is one."""
        if self._replica is not None:
            self._cancel_replica()
            await asyncio.gather(self._replica, return_exceptions=True)

    def _cancel_replica(self) -> None:
        # Once only: a second time would break off the wait for its process, which is then killed.
        if self._replica is not None and not self._replica.cancelling():
            self._replica.cancel()

    async def fail(self, sentence: str) -> None:
        """Note that the run cannot go on; its sessions end with an error that a retry may help."""
        log.error("the run has failed, others go on: %s", sentence)
        self.failure = sentence.rstrip(".")
        loop, self.loop = self.loop, None
        if loop is not None:
            await loop.fail(self._failed_error())
            with contextlib.suppress(FedMezoError):  # Its journal has failed already.
                await loop.close()


async def _serve(loop: ServingLoop[Any]) -> None:
    """Serve until the journal fails, even if it fails while there is nothing to write."""
    serving = asyncio.create_task(loop.serve())
    checking = asyncio.create_task(_check_journal(loop))
    try:
        done, _ = await asyncio.wait({serving, checking}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (serving, checking):
            task.cancel()
        await asyncio.gather(serving, checking, return_exceptions=True)


async def _check_journal(loop: ServingLoop[Any]) -> None:
    while True:
        await asyncio.sleep(CHECK_JOURNAL_EVERY_S)
        await loop.check_journal()
