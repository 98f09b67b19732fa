"""The controller against what NVFlare may do with its tasks; NVFlare itself does not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmezo import encode_genesis
from fedmezo_core.errors import MeasurementError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Committed
from fedmezo_nvflare import FedMezoController, round_controller
from fedmezo_nvflare.round_controller import GENESIS_FILE, JOURNAL_FILE, RESULT_FILE, TASK
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.integration.support.harness import config_of, genesis_of, records_of, write_genesis
from tests.integration.support.nvflare_sites import GENESIS, ROUNDS, SITES, new_site
from tests.library.light_engine import LightEngine

Deliver = Callable[["Driven", str, Task], None]


class Server:
    """What the controller sees of NVFlare's server: engine, context and workspace in one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_engine(self) -> Server:
        return self

    def get_workspace(self) -> Server:
        return self

    def get_job_id(self) -> str:
        return "job"

    def get_run_dir(self, _job: str) -> str:
        return str(self.folder)

    def get_app_custom_dir(self, _job: str) -> str:
        return str(self.folder)

    def get_clients(self) -> list[Client]:
        return [Client(site, "token") for site in SITES]


class Driven(FedMezoController):
    """A controller whose tasks a test delivers as it likes."""

    def __init__(
        self, folder: Path, deliver: Deliver, journal: str = "", resume: float = 0.0
    ) -> None:
        super().__init__(journal, resume)
        self.server, self.deliver = Server(folder), deliver
        self.panics: list[str] = []
        self.sites = {site: new_site(site) for site in SITES}
        self.abort = Signal()
        self.count = 0
        (folder / GENESIS_FILE).write_bytes(encode_genesis(GENESIS))

    def run(self) -> Driven:
        """As NVFlare would run it."""
        self.start_controller(self.server)
        self.control_flow(self.abort, self.server)
        self.stop_controller(self.server)
        return self

    def broadcast(self, task: Task, fl_ctx: Server, targets: list[str], **_: Any) -> None:
        """Hand the task to the test."""
        assert task.name == TASK
        self.count += 1
        self.deliver(self, targets[0], task)

    def system_panic(self, reason: str, fl_ctx: Server) -> None:
        """Note what ends the job."""
        self.panics.append(reason)

    def result_of(self, site: str, task: Task) -> Shareable:
        """What the site's script makes of the task."""
        reply = self.sites[site].reply(from_shareable(task.data).data)
        return DXO(DataKind.WEIGHTS, data=reply).to_shareable()

    def reply(self, site: str, task: Task, result: Shareable) -> None:
        """The task's result arrives."""
        client_task = ClientTask(Client(site, "token"), task)
        client_task.result = result
        task.result_received_cb(client_task=client_task, fl_ctx=self.server)

    def end(self, task: Task) -> None:
        """NVFlare is done with the task, with or without a result."""
        task.task_done_cb(task=task, fl_ctx=self.server)

    @property
    def result(self) -> dict[str, Any]:
        """The result file."""
        content: dict[str, Any] = json.loads((self.server.folder / RESULT_FILE).read_text())
        return content


def soundly(controller: Driven, site: str, task: Task) -> None:
    controller.reply(site, task, controller.result_of(site, task))
    controller.end(task)


def dropping_every_third(controller: Driven, site: str, task: Task) -> None:
    if controller.count % 3:
        soundly(controller, site, task)
    else:
        controller.end(task)  # Its client is gone, and comes back.


def too_late(controller: Driven, site: str, task: Task) -> None:
    controller.end(task)
    controller.process_result_of_unknown_task(
        Client(site, "token"), TASK, "id", controller.result_of(site, task), controller.server
    )


def twice(controller: Driven, site: str, task: Task) -> None:
    result = controller.result_of(site, task)
    for _ in range(2):
        controller.reply(site, task, result)
        controller.end(task)


def with_failures(controller: Driven, site: str, task: Task) -> None:
    if controller.count == 4:
        controller.reply(site, task, make_reply(ReturnCode.EXECUTION_EXCEPTION))
    elif controller.count == 5:
        controller.reply(site, task, Shareable())  # It holds nothing.
    else:
        soundly(controller, site, task)


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that failed is asked again at once."""
    monkeypatch.setattr(round_controller, "ASK_AGAIN_S", 0.02)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The head of the undisturbed run."""
    result = Driven(tmp_path_factory.mktemp("sound"), soundly).run().result
    assert result["round"] == ROUNDS
    assert set(result["digests"]) == {"site-1", "site-2"}
    assert len(set(result["digests"].values())) == 1
    found: str = result["head"]
    return found


@pytest.mark.parametrize("deliver", [dropping_every_third, too_late, twice, with_failures])
def test_what_happens_to_tasks_changes_nothing(deliver: Deliver, tmp_path: Path, head: str) -> None:
    controller = Driven(tmp_path, deliver).run()
    assert not controller.panics
    assert controller.result["head"] == head
    commits = [r for r in records_of(tmp_path / JOURNAL_FILE) if isinstance(r, Committed)]
    assert len(commits) == ROUNDS


def test_another_job_goes_on_with_the_journal(tmp_path: Path, head: str) -> None:
    journal = tmp_path / "kept.db"

    def until_aborted(controller: Driven, site: str, task: Task) -> None:
        if controller.count > 9:
            controller.abort.trigger(True)
        soundly(controller, site, task)

    aborted = Driven(tmp_path, until_aborted, str(journal)).run()
    assert not (tmp_path / RESULT_FILE).exists()
    assert not aborted.panics
    assert Driven(tmp_path, soundly, str(journal)).run().result["head"] == head


class Unable(LightEngine):
    """It cannot measure."""

    def measure(self, order: Measure) -> Measured:
        raise MeasurementError("a loss is not a number")


def test_a_paused_run_ends_the_job_until_it_is_resumed(tmp_path: Path) -> None:
    genesis = genesis_of(
        config_of(workers_min=2, quorum=2, rounds=3, pause_rounds=2, deadline_ms=300)
    )

    def job(resume: float = 0.0) -> Driven:
        controller = Driven(tmp_path, soundly, str(tmp_path / "kept.db"), resume)
        (tmp_path / GENESIS_FILE).write_bytes(encode_genesis(genesis))
        return controller

    first = job()
    first.sites = {site: new_site(site, Unable) for site in SITES}
    (panic,) = first.run().panics
    assert "The run is paused after round 0" in panic
    assert "resume = 0.5" in panic
    assert len(job().run().panics) == 1
    assert job(resume=0.5).run().result["round"] == 3


def test_a_site_that_hangs_at_the_end_does_not_keep_the_job(tmp_path: Path) -> None:
    genesis = genesis_of(config_of(workers_min=2, quorum=2, rounds=3, deadline_ms=500))

    def hang_at_the_end(controller: Driven, site: str, task: Task) -> None:
        result = controller.result_of(site, task)
        messages = wire.PollSessionRequest.FromString(from_shareable(result).data["up"]).messages
        is_last = messages[-1].WhichOneof("kind") == "weights_report"
        if site == "site-1" or not is_last:
            controller.reply(site, task, result)
            controller.end(task)

    controller = Driven(tmp_path, hang_at_the_end)
    (tmp_path / GENESIS_FILE).write_bytes(encode_genesis(genesis))
    assert set(controller.run().result["digests"]) == {"site-1"}


def test_sites_that_fail_again_and_again_end_the_job(tmp_path: Path) -> None:
    def fail(controller: Driven, site: str, task: Task) -> None:
        controller.reply(site, task, make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR))

    (panic,) = Driven(tmp_path, fail).run().panics
    assert panic.startswith("Only 0 of 2 sites can take part, but a round needs 2")


def test_a_job_without_a_genesis(tmp_path: Path) -> None:
    controller = Driven(tmp_path, soundly)
    (tmp_path / GENESIS_FILE).unlink()
    assert "build it with FedMezoRecipe" in controller.run().panics[0]


def test_the_journal_of_another_run(tmp_path: Path) -> None:
    write_genesis(tmp_path / "other.db", genesis_of(config_of(run_id="other")))
    (panic,) = Driven(tmp_path, soundly, str(tmp_path / "other.db")).run().panics
    assert "another genesis" in panic


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (panic,) = Driven(tmp_path, soundly, str(tmp_path / "nowhere/journal.db")).run().panics
    assert "nowhere" in panic
