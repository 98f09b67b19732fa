"""`fedmezo.v1.RunService`: translates its calls for the registry of runs, and checks them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from google.protobuf.message import Message

from fedmezo_coordinator.runs.hosted_run import HostedRun
from fedmezo_coordinator.serving.callers import LOOPBACK, check_operator
from fedmezo_coordinator.serving.callers import check_worker_name as check_is_caller
from fedmezo_coordinator.serving.run_directory import Call
from fedmezo_core.errors import ConfigError, NotReadyError, ProtocolError, WrongRunError
from fedmezo_core.trust.authorisation import Caller, Role
from fedmezo_core.wire.admission import check_worker_name
from fedmezo_proto.v1 import runs_pb2 as wire

WAIT_MS_MAX = 60_000
"""Longest time that a call may wait for other runs."""
REASON_CHARS_MAX = 400
"""Longest reason that an operator gives; the journal's record names the operator too."""
DECLINE_BYTES_MAX = 512
"""Longest reason that a worker gives, in bytes of UTF-8."""
FILES_MAX = 64
"""Most files of a new run."""
PIECE_BYTES = 64 * 1024
"""Size of the pieces in which a file is sent."""
READS_MAX = 64
"""Files that are sent at a time; one open file and one piece in memory each."""


class RunService(ABC):
    """Answers the calls; a subclass has the runs and carries the orders out."""

    def __init__(self) -> None:
        self._reads = 0

    # ------------------------------------------------------------ what a subclass does

    more_may_come: bool
    """Whether runs are created here while the process lives."""
    revision: int
    """Changes whenever the offers do."""

    @abstractmethod
    def find(self, run_id: str) -> HostedRun:
        """The run of that name; an empty one means the only run that is not over.

        Raises `WrongRunError` if there is none.
        """

    @abstractmethod
    def hosted(self) -> Sequence[HostedRun]:
        """All runs, in the order in which they were created."""

    @abstractmethod
    async def offers(self, known: int, wait_s: float) -> bytes:
        """A serialised `OfferRunsResponse`, as soon as its revision is not `known`.

        It has no offers if the revision is still `known` after `wait_s`.
        """

    @abstractmethod
    async def upload(self, request: wire.UploadFileRequest) -> int:
        """Take a piece of a file; returns where the next one begins."""

    @abstractmethod
    async def create(self, settings: str, files: Sequence[wire.RunFile], by: str) -> str:
        """Create a run for the operator `by`; returns its name."""

    @abstractmethod
    async def pause(self, run: HostedRun, reason: str) -> None:
        """Hold a run; returns when that is durable."""

    @abstractmethod
    async def resume(self, run: HostedRun, rate_factor: float) -> None:
        """Let a paused run go on, or a failed one try again."""

    @abstractmethod
    async def stop(self, run: HostedRun, reason: str) -> None:
        """End a run; returns when that is durable."""

    @abstractmethod
    async def delete(self, run: HostedRun, by: str) -> None:
        """Delete a run that is over, or has not begun, for the operator `by`."""

    # ------------------------------------------------------------ the calls

    async def answer(self, method: str, request: Any, call: Call) -> Message | bytes:
        """The response to a call of `method`; raises the `FedMezoError` that refuses it."""
        match method:
            case "ListRuns":
                return self._list(request, call)
            case "OfferRuns":
                _check_worker(request.worker, call.caller)
                if request.wait_ms > WAIT_MS_MAX:
                    raise ProtocolError(f"wait_ms is at most {WAIT_MS_MAX}; ask for less.")
                return await self.offers(request.revision, request.wait_ms / 1000)
            case "DeclineRun":
                return self._decline(request, call)
        check_operator(call.caller, call.peer)
        by = str(call.caller) if call.caller.name else "somebody at the coordinator's machine"
        match method:
            case "UploadFile":
                return wire.UploadFileResponse(next_offset=await self.upload(request))
            case "CreateRun":
                if len(request.files) > FILES_MAX:
                    raise ConfigError(
                        f"A run has at most {FILES_MAX} files, not {len(request.files)}."
                    )
                run_id = await self.create(request.settings_toml, request.files, by)
                return wire.CreateRunResponse(run_id=run_id)
            case "PauseRun":
                run = self.find(request.run_id)
                await self.pause(run, _recorded(by, request.reason, "paused it"))
                return wire.PauseRunResponse()
            case "ResumeRun":
                factor = request.rate_factor if request.HasField("rate_factor") else 1.0
                await self.resume(self.find(request.run_id), factor)
                return wire.ResumeRunResponse()
            case "StopRun":
                run = self.find(request.run_id)
                await self.stop(run, _recorded(by, request.reason, "ended it"))
                return wire.StopRunResponse()
            case "DeleteRun":
                if not request.run_id:
                    raise ConfigError("Name the run to delete.")
                await self.delete(self.find(request.run_id), by)
                return wire.DeleteRunResponse()
            case _:
                raise AssertionError(f"{method} has rights and no handler")

    def _list(self, request: wire.ListRunsRequest, call: Call) -> wire.ListRunsResponse:
        runs = [self.find(request.run_id)] if request.run_id else self.hosted()
        # Without identities, whoever is on another machine may be one of the workers.
        sees = call.caller.role is not Role.ANYONE or call.peer.startswith(LOOPBACK)
        found = [_summary(run, call.caller, with_declines=sees) for run in runs]
        return wire.ListRunsResponse(runs=reversed(found))

    def _decline(self, request: wire.DeclineRunRequest, call: Call) -> wire.DeclineRunResponse:
        run = self.find(request.run_id)
        _check_worker(request.worker, call.caller)
        reason = one_line(request.reason)
        if not reason or len(request.reason.encode()) > DECLINE_BYTES_MAX:
            raise ProtocolError(
                f"A worker says in 1 to {DECLINE_BYTES_MAX} bytes why it does not take part."
            )
        run.decline(request.worker, reason)
        return wire.DeclineRunResponse()

    async def read_file(
        self, request: wire.ReadRunFileRequest
    ) -> AsyncGenerator[wire.ReadRunFileResponse, None]:
        """A file that a run offers, from an offset on, in pieces."""
        run = self.find(request.run_id)
        offered = run.files.get(request.name)
        if offered is None:
            raise WrongRunError(f"Run {run.run_id} offers no file {request.name[:64]!r}.")
        if request.offset > offered.file_bytes:
            raise ProtocolError(
                f"{request.name} has {offered.file_bytes} bytes; begin before its end."
            )
        if self._reads >= READS_MAX:
            raise NotReadyError(f"{READS_MAX} files are being sent, the most; try later.")
        self._reads += 1
        try:
            with await asyncio.to_thread(offered.path.open, "rb") as file:
                file.seek(request.offset)
                while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                    yield wire.ReadRunFileResponse(data=piece)
        except OSError as error:
            raise NotReadyError(
                f"{request.name} of run {run.run_id} cannot be read here ({error.strerror})."
            ) from None
        finally:
            self._reads -= 1


def one_line(text: str) -> str:
    """`text` in one line, without characters that do something to a terminal."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _check_worker(name: str, caller: Caller) -> None:
    check_worker_name(name)
    check_is_caller(caller, name)


def _recorded(by: str, reason: str, otherwise: str) -> str:
    """What the journal keeps of an order: who gave it, and why."""
    reason = one_line(reason)
    if len(reason) > REASON_CHARS_MAX:
        raise ConfigError(
            f"The reason has {len(reason)} characters; say it in at most {REASON_CHARS_MAX}."
        )
    return f"{by}: {reason}" if reason else f"{by} {otherwise}"


def _summary(run: HostedRun, caller: Caller, *, with_declines: bool) -> wire.RunSummary:
    summary = wire.RunSummary(
        run_id=run.run_id,
        phase=run.phase,
        reason=run.reason_for(caller),
        created_ms=run.created_ms,
    )
    loop = run.loop
    if loop is not None:
        config, newest = loop.genesis.config, loop.newest_evaluation
        summary.round, summary.rounds, summary.workers = loop.round, config.rounds, loop.workers
        summary.model, summary.data_set = config.model, config.data_set
        if newest is not None:
            summary.loss, summary.accuracy = newest.loss, newest.accuracy
    if with_declines:
        summary.declined.extend(
            wire.Declined(worker=worker, reason=reason) for worker, reason in run.declines.items()
        )
    return summary
