"""The server's side of a job: FedMeZO's round machine, with NVFlare's tasks as its transport."""

from __future__ import annotations

import json
import logging
import math
import queue
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmezo import Coordinator
from fedmezo.library_peers import PEER_LEASE_MS
from fedmezo.stack_settings import StackSettings
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_nvflare.site_exchanges import LEFT, SiteExchanges

log = logging.getLogger("fedmezo.nvflare")

TASK = "fedmezo"
"""Name of the tasks."""
GENESIS_FILE = "fedmezo_genesis.bin"
JOURNAL_FILE = "fedmezo_journal.db"
RESULT_FILE = "fedmezo_result.json"
LOOK_EVERY_S = 0.2
"""Longest time between two looks at clients and clock."""
ASK_AGAIN_S = 1.0
"""Time from a site's failure, or its loss, to its next task."""
FAILURES_MAX = 3
"""So many failures in a row, and the site is given up: NVFlare starts no script again."""


@dataclass(slots=True)
class _Reply:
    """What came back from a site for a task; no content: it failed, or never came."""

    site: str
    task: Task | None
    content: dict[str, Any] | None = None
    failure: str = ""


class FedMezoController(Controller):
    """Runs the rounds of one FedMeZO run with the clients of a job.

    The job brings the run's genesis as the file `fedmezo_genesis.bin` among its code. The journal
    lies in the job's workspace, unless `journal` names another file on the server: a job that is
    given the journal of an earlier one goes on where that one ended. When the run is finished,
    `fedmezo_result.json` in the workspace has its last round, head and digests.
    """

    def __init__(
        self, journal: str = "", resume: float = 0.0, task_check_period: float = 0.1
    ) -> None:
        """`resume` is the factor on the learning rates with which a paused run goes on; 0: not.

        Raises `ConfigError` for a value that is not allowed.
        """
        StackSettings.of({"journal": journal, "resume": resume}, "FedMezoController")
        super().__init__(task_check_period=task_check_period)
        self.journal = journal
        self.resume = resume
        self.task_check_period = task_check_period
        self._folder = self._code_folder = Path()
        self._left: set[str] = set()
        """Sites that take part no more."""
        self._replies: queue.SimpleQueue[_Reply] = queue.SimpleQueue()

    # ------------------------------------------------------------ what NVFlare calls

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the job's folders."""
        workspace, job = fl_ctx.get_engine().get_workspace(), fl_ctx.get_job_id()
        self._folder = Path(workspace.get_run_dir(job))
        self._code_folder = Path(workspace.get_app_custom_dir(job))

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to stop."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run until the run is finished or the job is aborted; an error ends the job."""
        try:
            coordinator = Coordinator(self._genesis(), self._store(), lease_ms=PEER_LEASE_MS)
            with closing(coordinator):
                if self.resume and coordinator.phase == "paused":
                    coordinator.resume(self.resume)
                self._run(coordinator, abort_signal, fl_ctx)
        except FedMezoError as error:
            log.error("%s", error)
            self.system_panic(str(error), fl_ctx)

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """A late reply is as good as another: it says by itself what it belongs to."""
        if task_name == TASK:
            self._replies.put(_reply(client.name, None, result))

    # ------------------------------------------------------------ the run

    def _genesis(self) -> bytes:
        path = self._code_folder / GENESIS_FILE
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"The job's {path} cannot be read ({error.strerror}); build it with FedMezoRecipe."
            ) from None

    def _store(self) -> Path:
        return Path(self.journal) if self.journal else self._folder / JOURNAL_FILE

    def _run(self, coordinator: Coordinator, abort_signal: Signal, fl_ctx: FLContext) -> None:
        exchanges = SiteExchanges(coordinator, ASK_AGAIN_S)
        sites: set[str] = set()
        round_, patient_until_s = coordinator.round, math.inf
        while not coordinator.done:
            if coordinator.round != round_:
                round_ = coordinator.round
                log.info("round %d committed", round_)
            if abort_signal.triggered:
                return
            if coordinator.phase == "paused":
                raise FedMezoError(
                    f"The run is paused after round {coordinator.round}: {coordinator.reason}; to "
                    "go on with it, submit the job again with the same journal and resume = 0.5 or "
                    "another factor on its learning rates."
                )
            now_s = time.monotonic()
            coordinator.tick(int(now_s * 1000))
            if coordinator.finished:
                latest_s = now_s + coordinator.config.deadline_ms / 1000
                patient_until_s = min(patient_until_s, latest_s)
                if now_s >= patient_until_s:
                    _let_go(coordinator)
            there = [client.name for client in fl_ctx.get_engine().get_clients()]
            exchanges.see(there)
            sites.update(there)
            for name in there:
                self._ask(name, exchanges, now_s, fl_ctx)
            if self._take_replies(exchanges):
                self._check_enough(sites, coordinator.config.quorum)
        digests = {worker: digest.hex() for worker, digest in sorted(coordinator.digests.items())}
        log.info("finished at round %d: %s", coordinator.round, digests)
        result = {"round": coordinator.round, "head": coordinator.head.hex(), "digests": digests}
        (self._folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")

    def _ask(self, name: str, exchanges: SiteExchanges, now_s: float, fl_ctx: FLContext) -> None:
        """Give a site its next task, if there is a reason for one."""
        content = None if name in self._left else exchanges.task(name, now_s)
        if content is None:
            return
        task = Task(
            name=TASK,
            data=DXO(DataKind.WEIGHTS, data=content).to_shareable(),
            result_received_cb=self._result_received,
            task_done_cb=partial(self._task_done, name),
        )
        exchanges.sent(name, task, now_s)
        self.broadcast(task=task, fl_ctx=fl_ctx, targets=[name], min_responses=1)

    def _take_replies(self, exchanges: SiteExchanges) -> bool:
        """Wait a little for replies, and take all that came; returns whether a site left."""
        timeout_s, count = LOOK_EVERY_S, len(self._left)
        while True:
            try:
                reply = self._replies.get(timeout=timeout_s)
            except queue.Empty:
                return len(self._left) > count
            timeout_s, now_s = 0.0, time.monotonic()
            site, task = reply.site, reply.task
            if reply.content is None and not reply.failure:
                exchanges.lose(site, task, now_s)
            elif reply.content is None:
                exchanges.fail(site, task, f"it failed with {reply.failure}; see its log", now_s)
            elif LEFT in reply.content:
                exchanges.fail(site, task, "it left the job; its log says why", now_s)
                self._left.add(site)
            else:
                exchanges.reply(site, task, reply.content, now_s)
            if exchanges.failures(site) >= FAILURES_MAX:
                self._left.add(site)

    def _check_enough(self, sites: set[str], needed: int) -> None:
        """End the job if the sites that are left can never make a round."""
        left = len(sites - self._left)
        if left < needed:
            raise FedMezoError(
                f"Only {left} of {len(sites)} sites can take part, but a round needs {needed}; "
                f"read the logs of {', '.join(sorted(self._left))}, then submit the job again."
            )

    # ------------------------------------------------------------ on NVFlare's threads

    def _result_received(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        result, client_task.result = client_task.result, None
        self._replies.put(_reply(client_task.client.name, client_task.task, result))

    def _task_done(self, site: str, task: Task, fl_ctx: FLContext) -> None:
        """Also called for a task that no reply ever ends, because its client is gone."""
        self._replies.put(_Reply(site, task))


def _let_go(coordinator: Coordinator) -> None:
    """At the end of the run, wait no longer for digests."""
    for worker in sorted(coordinator.workers - coordinator.digests.keys()):
        log.warning("worker %s did not report its weights in time", worker)
        coordinator.disconnect(worker)


def _reply(site: str, task: Task | None, result: Shareable) -> _Reply:
    code = result.get_return_code()
    if code != ReturnCode.OK:
        return _Reply(site, task, failure=str(code))
    try:
        content = from_shareable(result).data
    except ValueError as error:
        return _Reply(site, task, failure=str(error))
    return _Reply(site, task, content if isinstance(content, dict) else {})
