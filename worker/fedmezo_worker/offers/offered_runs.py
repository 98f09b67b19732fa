"""A worker that stays: it serves the runs that a coordinator offers, for as long as any may come.

One task follows the offers, and one serves each run. All share the device: their engines have one
thread, on which they take turns.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from dataclasses import dataclass
from typing import Any, Final

from fedmezo.genesis import decode_genesis
from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    IdentityError,
    NotReadyError,
    PrivacyBudgetError,
    UnavailableError,
    VersionError,
)
from fedmezo_core.records import Genesis
from fedmezo_core.service.log_lines import log_with, name_runs_in_text
from fedmezo_core.trust.identity import Identity
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.admission import check_run_id
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_core.wire.reconnecting import Reconnecting
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.agent import Agent
from fedmezo_worker.engine_thread import EngineThread
from fedmezo_worker.offers.free_memory import free_bytes
from fedmezo_worker.offers.told_to_others import reason_to_decline
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.worker")

ASK_WAIT_S: Final = 60.0
"""How long a coordinator may wait before it says that nothing has changed."""
ASK_EVERY_S: Final = 1.0
"""Shortest time from one question to the next, whatever the coordinator does."""
GONE_AFTER_S: Final = 600.0
"""A run that is not offered for so long is over; a coordinator that restarts may need a while
until it offers its runs again."""
TRY_AGAIN_AFTER_S: Final = 3600.0
"""A run that failed here for another reason than the settings is tried again after this time."""
MODELS_OF_FREE_MEMORY: Final = 2.0
"""A further model is loaded while the memory has room for this many of the largest one so far:
its weights, as far as they are not there yet, and what it computes with."""
IDLE_S: Final = 60.0
"""A run gives its room to one that waits if it has had no work for so long."""
IDLE_LOADS: Final = 10.0
"""And for this many times as long as loading its model took, so that loading stays a small part."""
TURN_S: Final = 1800.0
"""And if it has held its room for so long, busy or not."""
LOOK_EVERY_S: Final = 1.0
"""How often runs that wait look for room."""


@dataclass(slots=True)
class _Serving:
    """A run that is being served."""

    offer: wire.RunOffer
    """What it was begun for. A newer offer of the same name is another run."""
    task: asyncio.Task[None]
    engine: EngineThread
    ledger: str
    """The privacy ledger that only one run at a time can have open; empty without one."""
    base: tuple[str, str] | None
    """As `_base_of` says."""
    began_s: float
    gives_way: bool = False


@dataclass(frozen=True, slots=True)
class _Settled:
    """A run that is not begun now."""

    offer: bytes
    """The offer that this is about; another one is looked at anew."""
    again_at_s: float
    """When to try again, by `time.monotonic`; infinite: never."""
    reason: str = ""
    """What the coordinator is told; empty for a run that is over."""


class OfferedRuns:
    """Serves each run that the coordinator offers and the operator of this worker allows."""

    def __init__(
        self,
        settings: WorkerSettings,
        engine: EngineThread,
        client: CoordinatorClient,
        identity: Identity | None,
    ) -> None:
        """Each run has another engine like `engine`, on its thread. `identity` signs answers."""
        if "give_up_after_s" not in settings.model_fields_set:
            # Who stays on a device that nobody looks after must survive a long outage.
            settings = settings.model_copy(update={"give_up_after_s": math.inf})
        self._settings = settings
        self._engine = engine
        self._client = client
        self._identity = identity
        self._sum_memory = SumMemory()
        self._revision, self._more_may_come = 0, True
        self._offers: dict[str, wire.RunOffer] = {}
        self._gone_s: dict[str, float] = {}
        """Since when runs that are served are not offered, by `time.monotonic`."""
        self._waiting: list[str] = []
        """Allowed runs without room, those first that waited longest."""
        self._serving: dict[str, _Serving] = {}
        self._settled: dict[str, _Settled] = {}
        self._untold: dict[str, str] = {}

    async def run(self, first: wire.OfferRunsResponse) -> None:
        """Serve what is offered, from the `first` offers on, for as long as others may come.

        Raises an error that concerns the worker and not one run, such as `RevokedError`, and
        `UnavailableError` after `give_up_after_s`.
        """
        self._make_folders()
        name_runs_in_text()
        self._take(first)
        asking = asyncio.create_task(self._next_offers())
        telling: asyncio.Task[None] | None = None
        try:
            while True:
                self._begin()
                if self._untold and telling is None:
                    telling = asyncio.create_task(self._tell())
                tasks: set[asyncio.Task[Any]] = {asking, *self._tasks()}
                if telling is not None:
                    tasks.add(telling)
                look_s = LOOK_EVERY_S if self._waiting else ASK_WAIT_S
                await asyncio.wait(tasks, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
                if telling is not None and telling.done():
                    telling.result()
                    telling = None
                self._reap()
                if asking.done():
                    self._take(asking.result())
                    asking = asyncio.create_task(self._next_offers())
                if not self._more_may_come and self._has_nothing_left():
                    return
        finally:
            for serving in self._serving.values():
                serving.engine.cut_short()
            ending = [asking, *self._tasks(), *([telling] if telling is not None else [])]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    def _has_nothing_left(self) -> bool:
        self._look_for_new()
        return not (self._serving or self._waiting or self._untold)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [serving.task for serving in self._serving.values()]

    def _make_folders(self) -> None:
        """Make the folders for a file of each run; refuse a file, which can only hold one run."""
        settings = self._settings
        files = {"journal_copy": settings.journal_copy, "evaluations": settings.evaluations}
        for name, one in settings.data_sets.items():
            files[f"data.{name}.evaluations"] = one.evaluations
        for key, path in files.items():
            if path is None or path.is_dir():
                continue
            if path.exists():
                raise ConfigError(
                    f"{key} = {str(path)!r} is one file, but this coordinator has many runs; name "
                    "a folder, or one run with run_id."
                )
            try:
                path.mkdir(parents=True)
            except OSError as error:
                raise ConfigError(
                    f"{key} = {str(path)!r} cannot be made as a folder for a file of each run "
                    f"({error.strerror}); name another, or mend that."
                ) from None
            log.info("made %s, the folder %s names, for a file of each run", path, key)

    # ------------------------------------------------------------ offers

    async def _next_offers(self) -> wire.OfferRunsResponse:
        """The next answer of the coordinator; waits for one through outages."""
        reconnecting = Reconnecting(log, give_up_after_s=self._settings.give_up_after_s)
        was_away = False
        while True:
            asked_s = time.monotonic()
            try:
                response = await self._client.offered_runs(
                    self._settings.name, self._revision, ASK_WAIT_S
                )
            except (UnavailableError, NotReadyError, VersionError) as error:
                # VersionError: the coordinator had runs to offer before, so it may again.
                was_away = True
                await reconnecting.wait_after(error)
                continue
            if was_away:
                # What a coordinator was told may have ended with its process.
                self._untold |= {k: one.reason for k, one in self._settled.items() if one.reason}
            await asyncio.sleep(max(0.0, asked_s + ASK_EVERY_S - time.monotonic()))
            return response

    def _take(self, response: wire.OfferRunsResponse) -> None:
        """Look at all offers: each is begun, waits, or is declined."""
        if response.revision == self._revision:
            return  # Nothing has changed, so they were not sent again.
        self._revision, self._more_may_come = response.revision, response.more_may_come
        before, self._offers = (
            self._offers,
            {
                offer.run_id: offer
                for offer in response.offers
                if re.fullmatch(NAME_PATTERN, offer.run_id)
            },
        )
        now_s = time.monotonic()
        self._gone_s = {
            run_id: self._gone_s.get(run_id, now_s)
            for run_id in self._serving
            if run_id not in self._offers
        }
        self._settled = {
            run_id: settled
            for run_id, settled in self._settled.items()
            if (offer := self._offers.get(run_id)) and settled.offer == _identity_of(offer)
        }
        self._untold = {k: reason for k, reason in self._untold.items() if k in self._settled}
        self._waiting = [
            run_id for run_id in self._waiting if self._offers.get(run_id) == before[run_id]
        ]

    def _look_for_new(self) -> None:
        """Let each offered run wait that neither waits, nor is served, nor was settled."""
        now_s = time.monotonic()
        for run_id, offer in self._offers.items():
            settled = self._settled.get(run_id)
            if run_id in self._serving or run_id in self._waiting:
                continue
            if settled is not None and now_s < settled.again_at_s:
                continue
            try:
                genesis = decode_genesis(offer.genesis)
                check_run_id(run_id, genesis.config.run_id)
                self._settings.for_run(genesis)
            except FedMezoError as error:
                self._decline(offer, error)
                continue
            self._waiting.append(run_id)

    def _decline(self, offer: wire.RunOffer, error: Exception) -> None:
        """Note that a run is not served, and why; said once for each reason."""
        run_id, reason = offer.run_id, reason_to_decline(error, self._settings.name)
        before = self._settled.get(run_id)
        if self._offers.get(run_id) != offer:
            log.warning("run %s, which is no longer offered, ended with: %s", run_id, error)
            return
        # What the settings say stays so until the next start.
        is_final = isinstance(error, (ConfigError, PrivacyBudgetError))
        again_at_s = math.inf if is_final else time.monotonic() + TRY_AGAIN_AFTER_S
        self._settled[run_id] = _Settled(_identity_of(offer), again_at_s, reason)
        if before is None or before.reason != reason:
            again = "when it is started again" if is_final else "in an hour, or when started again"
            log.warning("does not take part in run %s: %s (looks again %s)", run_id, error, again)
            self._untold[run_id] = reason

    async def _tell(self) -> None:
        """Tell the coordinator what it was not told; what fails is told later."""
        for run_id, reason in list(self._untold.items()):
            try:
                await self._client.decline_run(self._settings.name, run_id, reason)
            except IdentityError:
                raise
            except FedMezoError as error:
                log.info("the coordinator was not told about run %s: %s", run_id, error)
                if isinstance(error, (UnavailableError, NotReadyError)):
                    await asyncio.sleep(LOOK_EVERY_S)
                    return
            if self._untold.get(run_id) == reason:
                del self._untold[run_id]

    # ------------------------------------------------------------ turns

    def _begin(self) -> None:
        """Begin the runs that wait and have room."""
        self._look_for_new()
        for run_id in list(self._waiting):
            genesis = decode_genesis(self._offers[run_id].genesis)
            ledger = self._settings.for_run(genesis).privacy_ledger
            shown = "" if ledger is None else str(ledger)
            if shown and any(serving.ledger == shown for serving in self._serving.values()):
                continue
            base = _base_of(genesis)
            if not self._has_room(base):
                self._make_room()
                return
            self._waiting.remove(run_id)
            engine = self._engine.another()
            offer = self._offers[run_id]
            task = asyncio.create_task(self._serve(offer, engine))
            self._serving[run_id] = _Serving(offer, task, engine, shown, base, time.monotonic())

    def _has_room(self, base: tuple[str, str] | None) -> bool:
        """Whether the model of one more run, with that `base`, can be loaded."""
        sizes = [serving.engine.model_bytes for serving in self._serving.values()]
        if not sizes:
            return True
        if self._settings.models_max is not None:
            return len(sizes) < self._settings.models_max
        # Those that are not loaded yet still take memory; only then the next one is looked at.
        if not all(sizes):
            return False
        alike = [one.engine for one in self._serving.values() if one.base == base]
        there_bytes = max((engine.shared_bytes for engine in alike), default=0)
        needed_bytes = MODELS_OF_FREE_MEMORY * max(sizes) - there_bytes
        return free_bytes(self._settings.device) > needed_bytes

    def _make_room(self) -> None:
        """Let one run give way to those that wait, if one is idle or has had its turn."""
        now_s = time.monotonic()
        if any(serving.gives_way for serving in self._serving.values()):
            return
        loading = {k: one for k, one in self._serving.items() if not one.engine.model_bytes}
        # Without models_max, only a run that is not loaded yet keeps the others from being begun.
        could = self._serving if self._settings.models_max is not None or not loading else loading
        for run_id, serving in sorted(could.items(), key=lambda one: -one[1].engine.idle_s):
            engine = serving.engine
            is_idle = engine.idle_s > max(IDLE_S, IDLE_LOADS * engine.load_s)
            turn_s = max(TURN_S, IDLE_LOADS * engine.load_s)
            # One that loads, or waits for its files, is never idle.
            if (is_idle and run_id not in loading) or now_s - serving.began_s > turn_s:
                log.info("run %s gives way to a run that waits", run_id)
                serving.gives_way = True
                engine.cut_short()
                serving.task.cancel()
                return

    async def _serve(self, offer: wire.RunOffer, engine: EngineThread) -> None:
        """Take part in one run until it is finished."""
        log_with(run=offer.run_id)
        try:
            await Agent(
                self._settings,
                engine,
                self._client,
                self._identity,
                run_id=offer.run_id,
                files=offer.files,
                may_go_on=lambda: self._may_go_on(offer),
                sum_memory=self._sum_memory,
            ).run()
        finally:
            await engine.close()

    def _may_go_on(self, offer: wire.RunOffer) -> bool:
        """Whether a run that cannot be reached now may be reached again."""
        newest = self._offers.get(offer.run_id)
        if newest is not None:
            return newest == offer
        gone_s = self._gone_s.get(offer.run_id, time.monotonic())
        return time.monotonic() - gone_s < GONE_AFTER_S

    def _reap(self) -> None:
        """Note how the runs ended whose tasks are done."""
        ended = {run_id: one for run_id, one in self._serving.items() if one.task.done()}
        for run_id, serving in ended.items():
            del self._serving[run_id]
            if serving.task.cancelled():
                continue  # It gave way, and is looked at again like a new one.
            error = serving.task.exception()
            if error is None:
                log.info("run %s is over for this worker", run_id)
                if self._offers.get(run_id) == serving.offer:
                    self._settled[run_id] = _Settled(_identity_of(serving.offer), math.inf)
                continue
            if not isinstance(error, FedMezoError):
                log.error("run %s met an unexpected error", run_id, exc_info=error)
            if not isinstance(error, Exception):
                raise error
            self._decline(serving.offer, error)


def _base_of(genesis: Genesis) -> tuple[str, str] | None:
    """What runs with adapters on one base have alike: model and dtype; None: no adapter."""
    config = genesis.config
    return (config.model, config.dtype) if config.lora is not None else None


def _identity_of(offer: wire.RunOffer) -> bytes:
    return offer.SerializeToString(deterministic=True)
