"""The runs that are watched: their curves follow their journals, and a status is made once for all.

Nothing here is in the way of a run. The journal is read by the thread that reads it for others, in
small pieces, from its beginning on, so that a start does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from google.protobuf.message import DecodeError

from fedmezo_coordinator.runs.hosted_run import HostedRun
from fedmezo_coordinator.serving.loop_lag import AppendTimes, LoopLag
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.web.run_alarms import Alarm, alarms_of
from fedmezo_coordinator.web.run_series import RunSeries
from fedmezo_core.errors import FedMezoError
from fedmezo_core.journal.journal import ANSWERED, Row
from fedmezo_core.trust.authorisation import Caller
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import runs_pb2 as runs

log = logging.getLogger("fedmezo.coordinator")

LOOK_EVERY_S = 1.0
"""Time between two looks at a run: how old what a person sees can be."""
LIST_EVERY_S = 10.0
"""How old the status of a run can be that only stands in the list of runs."""
STATUS_SHARE = 0.01
"""Most of the time that is spent on one run's statuses: one that takes long is made less often."""
ROWS_AT_ONCE = 512
"""Records that are read and folded at once."""
CATCH_UP_PAUSE_S = 0.01
"""Pause after each of them, so that an old journal's records leave most of a core to the run."""
PACE_S = 120.0
"""Time over which rounds a minute are counted."""


class WatchedRun(Protocol):
    """A run as far as it can be watched."""

    @property
    def run_id(self) -> str:
        """Its name."""

    @property
    def run_phase(self) -> int:
        """What it is doing: a `RunPhase`."""

    @property
    def phase_reason(self) -> str:
        """Why it is paused or has failed; empty if it is neither."""

    @property
    def records_shown(self) -> int:
        """Count of durable records, which can be read."""

    @property
    def refused_answers(self) -> Counter[str]:
        """Answers refused since this start, by the class name of the error."""

    @property
    def append_times(self) -> AppendTimes:
        """How long appends took since this start."""

    @property
    def shows_workers(self) -> bool:
        """Whether who watches may read what is told of single workers, their losses included."""

    @property
    def declines(self) -> Mapping[str, str]:
        """Worker -> why it does not take part, as far as who watches may read that."""

    def status(self) -> wire.GetStatusResponse | None:
        """The status of the run; None while nothing serves it."""

    async def rows_from(self, seqno: int, rows_max: int) -> Sequence[Row]:
        """At most `rows_max` durable records from `seqno` on; dropped ones are passed over."""


class ServedRun:
    """A run of this process, to be watched by callers of a kind."""

    def __init__(self, hosted: HostedRun, caller: Caller, *, with_declines: bool) -> None:
        """What is shown is what `caller` may read; `with_declines`: also who takes no part."""
        self.hosted = hosted
        self._caller = caller
        self._with_declines = with_declines
        self.run_id = hosted.run_id

    @property
    def run_phase(self) -> int:
        """What it is doing."""
        return self.hosted.phase

    @property
    def phase_reason(self) -> str:
        """Why it stands still; empty if it does not."""
        return self.hosted.reason_for(self._caller)

    @property
    def shows_workers(self) -> bool:
        """Whether the callers may read what is told of single workers."""
        return self.hosted.shows_workers_to(self._caller)

    @property
    def records_shown(self) -> int:
        """Count of durable records."""
        return 0 if self.hosted.loop is None else self.hosted.loop.records_shown

    @property
    def refused_answers(self) -> Counter[str]:
        """Answers refused since it was loaded."""
        return Counter() if self.hosted.loop is None else self.hosted.loop.refused_answers

    @property
    def append_times(self) -> AppendTimes:
        """How long appends took since it was loaded."""
        return AppendTimes() if self.hosted.loop is None else self.hosted.loop.append_times

    @property
    def declines(self) -> Mapping[str, str]:
        """Worker -> why it does not take part."""
        return self.hosted.declines if self._with_declines else {}

    def status(self) -> wire.GetStatusResponse | None:
        """The status that the callers may read; None while nothing serves it."""
        loop = self.hosted.loop
        return None if loop is None else loop.status(self.run_id, self._caller)

    async def rows_from(self, seqno: int, rows_max: int) -> Sequence[Row]:
        """Durable records from `seqno` on."""
        return () if self.hosted.loop is None else await self.hosted.loop.rows_from(seqno, rows_max)


def served_runs(
    hosted: Callable[[], Sequence[HostedRun]], caller: Caller, *, with_declines: bool
) -> Callable[[], Sequence[ServedRun]]:
    """What gives the runs of this process as `RunsInView` wants them: the same ones again.

    `caller` and `with_declines` are as for `ServedRun`.
    """
    known: dict[int, ServedRun] = {}

    def found() -> Sequence[ServedRun]:
        nonlocal known
        runs = {
            id(run): known.get(id(run)) or ServedRun(run, caller, with_declines=with_declines)
            for run in hosted()
        }
        known = runs
        return list(runs.values())

    return found


class RunInView:
    """A watched run, with what is made of its journal and its status."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run
        self.series = RunSeries()
        self.answers_live = 0
        """Answers accepted since this was made."""
        self.rounds_planned = 0
        """Rounds of the contract; 0 as long as no status was seen."""
        self.complained = False
        """Whether the log says that its curves stand still."""
        self._begin_live: int | None = None
        self._next_seqno = 0
        self._status: wire.GetStatusResponse | None = None
        self._status_at_s = -math.inf
        self._status_took_s = 0.0
        self._paces: deque[tuple[float, int]] = deque()

    @property
    def is_caught_up(self) -> bool:
        """Whether the curves hold the records from before this start."""
        return self._begin_live is not None and self._next_seqno >= self._begin_live

    def status(self, age_max_s: float = LOOK_EVERY_S) -> wire.GetStatusResponse | None:
        """The run's status, at most so old if it is not large; None if it has none."""
        now_s = time.monotonic()
        if now_s >= self._status_at_s + max(age_max_s, self._status_took_s / STATUS_SHARE):
            self._status, self._status_at_s = self.run.status(), now_s
            self._status_took_s = time.monotonic() - now_s
            if self._status is not None:
                self.rounds_planned = self._status.config.rounds
        return self._status

    def alarms(self, age_max_s: float = LOOK_EVERY_S) -> list[Alarm]:
        """What a person should look at, by a status at most so old."""
        run, status = self.run, self.status(age_max_s)
        return alarms_of(run.run_phase, run.phase_reason, status, self.series, run.declines)

    @property
    def rounds_per_minute(self) -> float | None:
        """Rounds committed in a minute, of late; None if there was none."""
        if len(self._paces) < 2:
            return None
        (first_s, first), (last_s, last) = self._paces[0], self._paces[-1]
        return 60 * (last - first) / (last_s - first_s) or None

    async def follow(self) -> None:
        """Fold the records that are new."""
        if not self.run.records_shown:
            return
        if self._begin_live is None:
            self._begin_live = self.run.records_shown
        self.series.shows_workers = self.run.shows_workers
        while self._next_seqno < self.run.records_shown:
            rows = await self.run.rows_from(self._next_seqno, ROWS_AT_ONCE)
            if not rows:  # All of them were dropped in the meantime.
                self._next_seqno = min(self._next_seqno + ROWS_AT_ONCE, self.run.records_shown)
                continue
            for row in rows:
                self.series.take(row.body)
                self.answers_live += row.kind == ANSWERED and row.seqno >= self._begin_live
            self._next_seqno = rows[-1].seqno + 1
            await asyncio.sleep(CATCH_UP_PAUSE_S)
        self._note_pace()

    def _note_pace(self) -> None:
        now_s = time.monotonic()
        self._paces.append((now_s, self.series.round))
        while now_s - self._paces[0][0] > PACE_S:
            self._paces.popleft()


class RunsInView:
    """All runs of a coordinator, in view."""

    def __init__(
        self,
        runs: Callable[[], Sequence[WatchedRun]],
        session_limit: SessionLimit | None = None,
        lag: LoopLag | None = None,
    ) -> None:
        """`runs` gives the runs that there are now, in the order in which they are shown.

        `session_limit` and `lag` are those of the process, which its runs share.
        """
        self._runs = runs
        self.session_limit = session_limit or SessionLimit()
        self.lag = lag or LoopLag()
        self._views: dict[str, RunInView] = {}
        self._looked = asyncio.Event()
        self.looks = 0
        """Count of looks: what is made of the runs stays true until it changes."""

    def all(self) -> list[RunInView]:
        """The runs that there are now."""
        found = {}
        for run in self._runs():
            view = self._views.get(run.run_id)
            found[run.run_id] = view if view and view.run is run else RunInView(run)
        self._views = found
        return list(found.values())

    def find(self, run_id: str) -> RunInView | None:
        """The run of this name; None if there is none."""
        return next((view for view in self.all() if view.run.run_id == run_id), None)

    def first_id(self) -> str:
        """The run to show to who names none: the first that is under way; empty without runs."""
        views = self.all()
        is_on = [view for view in views if view.run.run_phase == runs.RUN_PHASE_RUNNING]
        return next((view.run.run_id for view in [*is_on, *views]), "")

    async def next_look(self) -> None:
        """Return after the next look at the runs."""
        await self._looked.wait()

    async def watch(self) -> None:
        """Follow all runs until cancelled."""
        following: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for view in self.all():
                    run_id = view.run.run_id
                    task = following.get(run_id)
                    if task is None or task.done():
                        following[run_id] = asyncio.create_task(self._follow(view))
                # A run with a long journal does not hold up the others.
                if following:
                    await asyncio.wait(following.values(), timeout=LOOK_EVERY_S)
                for run_id in [name for name, task in following.items() if task.done()]:
                    del following[run_id]
                self.looks += 1
                looked, self._looked = self._looked, asyncio.Event()
                looked.set()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            for task in following.values():
                task.cancel()
            await asyncio.gather(*following.values(), return_exceptions=True)

    async def _follow(self, view: RunInView) -> None:
        """Follow one run; what is wrong with it is told once, and is no harm to the others."""
        # A journal that was closed meanwhile, as at the end, is a RuntimeError or a cancelled read.
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            try:
                await view.follow()
            except (FedMezoError, OSError, ValueError, DecodeError) as error:
                if not view.complained:
                    view.complained = True
                    log.warning("the curves of run %s stand still: %s", view.run.run_id, error)
