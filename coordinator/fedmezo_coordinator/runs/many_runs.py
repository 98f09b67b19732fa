"""Any number of runs in one process: created, restored, ended and deleted while it serves.

Each run has a task of its own, from its base to its end. Whatever goes wrong in it ends that task
and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedmezo_coordinator.coordinator_settings import (
    RUNS_MAX,
    CoordinatorSettings,
    check_compaction,
)
from fedmezo_coordinator.daemon import Daemon
from fedmezo_coordinator.runs.hosted_run import HostedRun
from fedmezo_coordinator.runs.preparing import begun, keep_replica, loaded, offered_files
from fedmezo_coordinator.runs.registry import Runs
from fedmezo_coordinator.runs.run_folder import (
    DELETED,
    NEW,
    RunFolder,
    check_files,
    make_folder,
    run_settings,
)
from fedmezo_coordinator.runs.uploads import Uploads
from fedmezo_coordinator.serving.session_limit import SessionLimit
from fedmezo_coordinator.stores.opening import open_store
from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    NotReadyError,
    RunExistsError,
    WrongRunError,
)
from fedmezo_core.folders import make_private, sync
from fedmezo_core.journal.journal import Journal, JournalStore
from fedmezo_core.machines.roster import Phase
from fedmezo_core.service.log_lines import log_with, name_runs_in_text
from fedmezo_proto.v1 import runs_pb2 as wire

log = logging.getLogger("fedmezo.coordinator")

Result = TypeVar("Result")

SWEEP_EVERY_S = 3600.0
"""Period in which files that no run uses are looked for."""
OPERATIONS = "operations.jsonl"
"""File that says who created and deleted which run, and when; one JSON object on each line."""


@contextlib.contextmanager
def opened_runs(
    settings: CoordinatorSettings, folder: Path, session_limit: SessionLimit, private: str
) -> Iterator[ManyRuns]:
    """The runs in `folder`, which is made if it is not there; this process alone has them.

    Raises `ConfigError` for a folder that cannot be used.
    """
    if not folder.exists():
        make_private(folder, ConfigError)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((folder / ".lock").open("w"))
        except OSError as error:
            raise ConfigError(
                f"runs = {folder} is no folder that this can write to ({error.strerror}); make it "
                "writable, or name another."
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another coordinator serves the runs in {folder}; stop it, or name another folder."
            ) from None
        yield ManyRuns(settings, folder, session_limit, private)


class ManyRuns(Runs):
    """The runs in one folder."""

    more_may_come = True

    def __init__(
        self,
        process: CoordinatorSettings,
        folder: Path,
        session_limit: SessionLimit,
        private: str,
    ) -> None:
        """`private` is the address at which replicas reach this process."""
        super().__init__(session_limit)
        self._process = process
        self._folder = folder
        self._private = private
        self._uploads = Uploads(folder / ".uploads")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._replicas = asyncio.Semaphore(process.replicas_max or RUNS_MAX)
        self._orders: set[asyncio.Task[Any]] = set()
        """Orders that are being carried out, whoever still waits for them."""
        self._changing = asyncio.Lock()
        """Held by an order that changes which runs there are, or begins one again."""
        self._describing = asyncio.Lock()
        found: list[HostedRun] = []
        for path in self._folder.iterdir():
            if path.name.startswith((NEW, DELETED)):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and re.fullmatch(NAME_PATTERN, path.name):
                with contextlib.suppress(ConfigError):  # Its own start says what is wrong with it.
                    found.append(HostedRun(path.name, RunFolder(path).created_ms))
                    continue
                found.append(HostedRun(path.name))
        found.sort(key=lambda run: run.created_ms)
        self._runs.update({run.run_id: run for run in found})

    # ------------------------------------------------------------ life

    async def serve(self) -> None:
        """Load and serve all runs until cancelled; what goes wrong in one ends that one."""
        name_runs_in_text()
        for run in self._runs.values():
            self._begin(run)
        while True:
            await asyncio.to_thread(self._uploads.sweep)
            await asyncio.sleep(SWEEP_EVERY_S)

    async def close(self) -> None:
        """Finish all orders, end all runs' tasks and close their journals."""
        await asyncio.gather(*self._orders, return_exceptions=True)
        await asyncio.gather(*(self._end(run) for run in self._runs.values()))

    def _begin(self, run: HostedRun) -> None:
        run.failure, run.waits_for = "", "its journal is being read"
        self._tasks[run.run_id] = asyncio.create_task(self._host(run))

    async def _end(self, run: HostedRun, error: FedMezoError | None = None) -> None:
        """End a run's task and close its journal; its sessions end with `error`, if it is given."""
        task = self._tasks.pop(run.run_id, None)
        if task is not None:
            if not run.failure:  # Otherwise it ends by itself, once its journal is closed.
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        loop, run.loop = run.loop, None
        if loop is not None:
            if error is not None:
                await loop.fail(error)
            try:
                await loop.close()
            except FedMezoError as failed:
                log.warning("the journal of run %s did not close: %s", run.run_id, failed)

    async def _host(self, run: HostedRun) -> None:
        log_with(run=run.run_id)
        try:
            settings = await asyncio.to_thread(self._settings, run.run_id)
            daemon = await self._loaded(run, settings)
            run.loop, run.is_new = daemon, False
            daemon.on_phase, daemon.on_join, daemon.lag = self.changed, run.joined, self.lag
            self.changed()
            log.info("served from round %d on", daemon.round)
            await run.serve(self._replica_when_needed(settings, daemon))
        except (FedMezoError, OSError) as error:
            await run.fail(str(error))
        except Exception as error:  # A defect in one run must not end the others.
            log.exception("a defect")
            await run.fail(f"unexpected {type(error).__name__}: {error}")
        self.changed()

    def _settings(self, run_id: str) -> CoordinatorSettings:
        return RunFolder(self._folder / run_id).settings(self._process)

    async def _loaded(self, run: HostedRun, settings: CoordinatorSettings) -> Daemon:
        journal = Journal(await _opened(settings.journal))
        try:
            if journal.is_empty:
                run.is_new = True
                run.waits_for = "its model waits until another run's is loaded"
                async with self._describing:  # One model at a time, for its memory.
                    companions = await begun(settings, journal, run.wait_for)
                run.waits_for = "its journal is being read"
            else:
                companions = await begun(settings, journal)
            run.files = await asyncio.to_thread(offered_files, settings)
            return await loaded(settings, journal, companions, self.session_limit)
        except BaseException:
            journal.close()
            raise

    async def _replica_when_needed(self, settings: CoordinatorSettings, daemon: Daemon) -> None:
        """Keep a replica from the first worker on, or if the last round is to be evaluated."""
        is_due = daemon.evaluation_is_due and settings.heldout is not None
        if daemon.phase is not Phase.FINISHED:
            await daemon.joined.wait()
        elif not is_due:
            return
        async with self._replicas:
            await keep_replica(settings, daemon, self._private)

    # ------------------------------------------------------------ orders

    async def _to_its_end(self, order: Coroutine[Any, Any, Result]) -> Result:
        """Carry out an order, which goes on if its caller goes away."""
        task = asyncio.create_task(order)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)
        return await asyncio.shield(task)

    async def upload(self, request: wire.UploadFileRequest) -> int:
        """Take a piece of a file; returns where the next one begins."""
        return await asyncio.to_thread(self._uploads.take, request)

    async def create(self, settings: str, files: Sequence[wire.RunFile], by: str) -> str:
        """Create a run and begin it, for the operator `by`; returns its name.

        Raises `ConfigError` for settings that are not allowed, and `RunExistsError` if another run
        has the name.
        """
        check_files(settings, files)
        return await self._to_its_end(self._create(settings, files, by))

    async def _create(self, settings: str, files: Sequence[wire.RunFile], by: str) -> str:
        names = [file.name for file in files]
        async with self._changing:
            # The paths are those that it will have, though the name comes from the settings.
            given = run_settings(settings, names, self._process, self._folder)
            config = given.run_config("the [run] settings")
            run_id = config.run_id
            check_compaction(given, config)
            if run_id in self._runs:
                if RunFolder(self._folder / run_id).is_of(settings, files):
                    return run_id
                raise RunExistsError(
                    f"There is another run {run_id} here; give the new one another run_id, or "
                    "delete that one once it is over."
                )
            if not given.model:
                raise ConfigError(
                    "model is missing; set it to a Hugging Face name or a model folder of the "
                    'coordinator\'s machine, for example model = "HuggingFaceTB/SmolLM2-135M".'
                )
            if len(self._runs) >= RUNS_MAX:
                raise NotReadyError(f"{RUNS_MAX} runs are here, the most; delete one that is over.")
            try:
                folder = await asyncio.to_thread(self._make, run_id, settings, files, by)
            except OSError as error:
                raise NotReadyError(
                    f"The coordinator cannot make a folder for run {run_id} ({error.strerror}); "
                    "make room at its disk, then try again."
                ) from None
            run = self._runs[run_id] = HostedRun(run_id, folder.created_ms)
            self._begin(run)
        self.changed()
        log.warning("%s created run %s", by, run_id)
        return run_id

    def _make(
        self, run_id: str, settings: str, files: Sequence[wire.RunFile], by: str
    ) -> RunFolder:
        if (self._folder / run_id).exists():
            # An earlier call made it, and met an error before the run was begun.
            found = RunFolder(self._folder / run_id)
            if found.is_of(settings, files):
                sync(self._folder)
                return found
            raise RunExistsError(
                f"{found.path} holds another run; give the new one another run_id, or move that "
                "folder away."
            )
        self._note("create", run_id, by)
        return make_folder(self._folder, run_id, settings, files, self._uploads, by)

    async def resume(self, run: HostedRun, rate_factor: float) -> None:
        """Let a paused run go on, or load a failed one again."""
        if not run.failure:
            await super().resume(run, rate_factor)
            return
        if rate_factor != 1.0:
            raise ConfigError(
                f"Run {run.run_id} has failed and is loaded again first; resume it without a "
                "factor."
            )
        await self._to_its_end(self._load_again(run))

    async def _load_again(self, run: HostedRun) -> None:
        async with self._changing:
            if self.find(run.run_id) is not run or not run.failure:
                return  # Another call was faster.
            await self._end(run)
            self._begin(run)
        self.changed()

    async def delete(self, run: HostedRun, by: str) -> None:
        """Delete a run that is over, or has not begun, with all its files."""
        await self._to_its_end(self._delete(run, by))

    async def _delete(self, run: HostedRun, by: str) -> None:
        async with self._changing:
            if not (run.is_over or run.is_new):
                raise ConfigError(
                    f"Run {run.run_id} is not over; end it first with: fedmezo run stop "
                    f"{run.run_id}"
                )
            if self._runs.get(run.run_id) is not run:
                return  # Another call has deleted it meanwhile.
            path = self._folder / run.run_id
            gone = path.with_name(f"{DELETED}{path.name}-{time.time_ns()}")
            try:
                await asyncio.to_thread(self._note, "delete", run.run_id, by)
            except OSError as error:
                raise _not_deleted(path, error) from None
            await self._end(run, WrongRunError(f"Run {run.run_id} was deleted here; stop."))
            try:
                await asyncio.to_thread(path.rename, gone)
            except OSError as error:
                refused = _not_deleted(path, error)
                await run.fail(str(refused))
                self.changed()
                raise refused from None
            del self._runs[run.run_id]
        self.changed()
        log.warning("%s deleted run %s", by, run.run_id)
        with contextlib.suppress(OSError):  # After a crash, a folder without files may be there.
            await asyncio.to_thread(sync, self._folder)
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)

    def _note(self, what: str, run_id: str, by: str) -> None:
        """Write down, durably, who asks for what."""
        line = {"at_ms": int(1000 * time.time()), "by": by, "what": what, "run_id": run_id}
        path = self._folder / OPERATIONS
        with path.open("a", encoding="utf-8") as file:
            path.chmod(0o600)
            file.write(json.dumps(line) + "\n")
        sync(path)


async def _opened(journal: str) -> JournalStore:
    """The opened store of a journal; it is closed again if this is cancelled meanwhile."""
    opening = asyncio.create_task(asyncio.to_thread(open_store, journal))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with contextlib.suppress(FedMezoError):
            (await opening).close()
        raise


def _not_deleted(path: Path, error: OSError) -> NotReadyError:
    return NotReadyError(
        f"Run {path.name} cannot be deleted ({error.strerror}); look at {path}, then try again."
    )
