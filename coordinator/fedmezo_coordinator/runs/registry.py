"""The registry of the runs that this process hosts. This one holds a single run."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from fedmezo_coordinator.runs.hosted_run import HostedRun, OfferedFile
from fedmezo_coordinator.runs.run_service import RunService
from fedmezo_coordinator.serving.loop import ServingLoop
from fedmezo_coordinator.serving.loop_lag import LoopLag
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_core.errors import ConfigError, OneRunError, WrongRunError
from fedmezo_core.events import Ready
from fedmezo_core.machines.roster import Phase
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.wire.admission import NAME_CHARS_SHOWN_MAX, check_run_id
from fedmezo_proto.v1 import runs_pb2 as wire

NAMES_SHOWN_MAX = 8
"""Most names of runs in a sentence."""


class Runs(RunService):
    """The runs of a process, by name; as it is, exactly one."""

    more_may_come = False

    def __init__(self, session_limit: SessionLimit) -> None:
        """`session_limit` counts the sessions of all runs together."""
        super().__init__()
        self.session_limit = session_limit
        self.lag = LoopLag()
        """How late the event loop is, which serves all runs."""
        self._runs: dict[str, HostedRun] = {}
        # At random, so that a worker that was here before a restart sees a change.
        self.revision = 1 + secrets.randbits(62)
        self._offers = b""
        """The newest offers, serialised; empty if they have changed since."""
        self._changed = asyncio.Event()
        self._alongside: Coroutine[Any, Any, None] | None = None

    @classmethod
    def of(
        cls,
        loop: ServingLoop[Any],
        *,
        files: Mapping[str, OfferedFile] | None = None,
        alongside: Coroutine[Any, Any, None] | None = None,
    ) -> Runs:
        """A registry of one run, which `loop` serves; `alongside` keeps its replica."""
        runs = cls(loop.session_limit)
        run = HostedRun(loop.genesis.config.run_id, loop=loop, files=files or {})
        runs._alongside = alongside
        runs._runs[run.run_id] = run
        runs.lag = loop.lag
        loop.on_phase, loop.on_join = runs.changed, run.joined
        return runs

    # ------------------------------------------------------------ finding runs

    def hosted(self) -> Sequence[HostedRun]:
        """All runs, in the order in which they were created."""
        return list(self._runs.values())

    def find(self, run_id: str) -> HostedRun:
        """The run of that name.

        An empty one means the only run that is not over, or the only one there is. Raises
        `WrongRunError` if there is none.
        """
        run = self._runs.get(run_id)
        if run is not None:
            return run
        if not self.more_may_come:
            [run] = self._runs.values()
            check_run_id(run_id, run.run_id)
            return run
        going_on = [run for run in self._runs.values() if not run.is_over]
        if not run_id:
            for candidates in (going_on, self.hosted()):
                if len(candidates) == 1:
                    return candidates[0]
        raise WrongRunError(self._no_such_run(run_id, [run.run_id for run in going_on]))

    def _no_such_run(self, run_id: str, names: Sequence[str]) -> str:
        asked = f"There is no run {run_id[:NAME_CHARS_SHOWN_MAX]!r} here" if run_id else "Which run"
        if not names:
            going_on = "no run is going on here"
        else:
            more = len(names) - NAMES_SHOWN_MAX
            shown = ", ".join(names[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
            going_on = f"{shown} {'is' if len(names) == 1 else 'are'} going on"
        return f"{asked}: {going_on}; `fedmezo run list` shows the names, which --run-id takes."

    def loop(self, run_id: str) -> ServingLoop[Any]:
        """The loop that serves a run; raises the error for callers if there is none."""
        if not self.more_may_come:
            [run] = self._runs.values()
            return run.serving()  # It refuses the name of another run itself.
        return self.find(run_id).serving()

    def loops(self) -> Iterable[ServingLoop[Any]]:
        """The loops of all runs that are served now."""
        return [run.loop for run in self._runs.values() if run.loop is not None]

    @property
    def are_loaded(self) -> bool:
        """Whether the journal of every run has been read, or cannot be."""
        return all(run.loop is not None or run.failure for run in self._runs.values())

    def is_served(self, run_id: str) -> bool | None:
        """Whether the run of that name is served now; None: there is none."""
        run = self._runs.get(run_id)
        return None if run is None else run.loop is not None

    # ------------------------------------------------------------ offers

    def changed(self) -> None:
        """Note that the offers may have changed, and let those who wait for that know."""
        self.revision += 1
        self._offers = b""
        self._changed.set()
        self._changed = asyncio.Event()

    async def offers(self, known: int, wait_s: float) -> bytes:
        """A serialised `OfferRunsResponse`, as soon as its revision is not `known`.

        It has no offers if the revision is still `known` after `wait_s`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self.revision == known:
                    await self._changed.wait()
        if self.revision == known:
            unchanged = wire.OfferRunsResponse(revision=known, more_may_come=self.more_may_come)
            return unchanged.SerializeToString()
        if not self._offers:
            answer = wire.OfferRunsResponse(
                revision=self.revision,
                more_may_come=self.more_may_come,
                offers=[_offer(run) for run in self._runs.values() if run.is_offered],
            )
            self._offers = answer.SerializeToString()
        return self._offers

    # ------------------------------------------------------------ orders

    async def upload(self, request: wire.UploadFileRequest) -> int:
        """Refuse: no run is created here."""
        _refuse()

    async def create(self, settings: str, files: Sequence[wire.RunFile], by: str) -> str:
        """Refuse: no run is created here."""
        _refuse()

    async def delete(self, run: HostedRun, by: str) -> None:
        """Refuse: the only run is deleted by removing its files."""
        _refuse()

    async def pause(self, run: HostedRun, reason: str) -> None:
        """Hold a run, on the record; returns when that is durable."""
        await run.serving().order(lambda machine: machine.pause(reason))

    async def stop(self, run: HostedRun, reason: str) -> None:
        """End a run, on the record; returns when that is durable."""
        await run.serving().order(lambda machine: machine.stop(reason))

    async def resume(self, run: HostedRun, rate_factor: float) -> None:
        """Let a paused run go on, on the record; one that goes on stays as it is.

        Raises `ConfigError` if it is finished, or the factor not above 0.
        """

        def order(machine: RoundMachine) -> Ready:
            if machine.phase in (Phase.WAITING, Phase.OPEN):
                machine.check_rate_factor(rate_factor)
                return Ready()
            if machine.phase is Phase.FINISHED:
                raise ConfigError(f"Run {run.run_id} is finished, so there is nothing to resume.")
            return machine.resume(rate_factor)

        await run.serving().order(order)

    # ------------------------------------------------------------ life

    async def serve(self) -> None:
        """Serve until cancelled; raises the error with which the only run's journal fails."""
        [run] = self._runs.values()
        alongside, self._alongside = self._alongside, None
        await run.serve(alongside)

    def begin_stop(self) -> None:
        """Tell all workers that the coordinator is going away, and let the replicas end."""
        for run in self._runs.values():
            run.begin_stop()
        self.changed()  # Nobody should wait for other offers until the calls are cut off.

    async def close(self) -> None:
        """Close all journals; nothing is served afterwards."""
        await asyncio.gather(*(loop.close() for loop in self.loops()))


def _offer(run: HostedRun) -> wire.RunOffer:
    return wire.RunOffer(
        run_id=run.run_id,
        genesis=run.serving().genesis_body,
        files=[
            wire.RunFile(name=name, sha256=file.sha256, file_bytes=file.file_bytes)
            for name, file in run.files.items()
        ],
    )


def _refuse() -> NoReturn:
    raise OneRunError(
        "This coordinator serves one run and creates no others; start one with --runs FOLDER."
    )
